"""Sees sums only."""
