"""The processes of a device: supervisor, SuperNode, worker, and when answers leave."""
