"""A real device that belongs to a server: how it joins, its directory, its part in a run."""
