"""Secure aggregation as both sides must agree on it: terms, messages, keys, shares."""
