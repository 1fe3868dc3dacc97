"""A/B tests on simulated devices."""
