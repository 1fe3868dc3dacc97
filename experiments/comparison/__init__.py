"""Scenarios: models beside each other on the same people, as tables and a page."""
