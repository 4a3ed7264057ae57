"""Ingest: exports in, prepared domains out."""
