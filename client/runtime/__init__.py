"""The device's processes: supervisor, SuperNode, worker, and when answers leave."""
