"""A person's own files, and the records that are read from them."""
