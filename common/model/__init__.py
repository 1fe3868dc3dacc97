"""Base models, adapters and what a record's loss is."""
