"""The report of a run, for people who decide about privacy."""
