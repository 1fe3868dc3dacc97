"""A person's own files, and the readers that turn them into records."""
