"""Checkpoints: written, found, copied to remote storage."""
