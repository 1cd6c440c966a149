"""Programs: train, compare, benchmark; the only place with all methods."""
