"""Runs on one person's device; text and personal head never leave."""
