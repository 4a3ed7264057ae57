"""Readers of the formats in which users have their data; each returns a `base.SourceData`."""
