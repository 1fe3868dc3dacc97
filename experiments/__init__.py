"""Simulation, evaluation and reports; may import everything, nothing imports it."""
