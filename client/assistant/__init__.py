"""The owner's chat, offline: retrieval, profile, templates, text generation."""
