"""Simulation, evaluation and reports, which may import everything and which nothing imports."""
