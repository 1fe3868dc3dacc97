"""Settings: TOML in, frozen validated types out."""
