"""Read exports and write prepared domains."""
