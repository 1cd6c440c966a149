"""One file per experiment; each returns a `mhil.config.Config`."""
