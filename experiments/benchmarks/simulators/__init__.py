"""Simulated clients a second: privet, pfl-research and Flower's simulation, side by side."""
