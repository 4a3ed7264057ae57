"""Checkpoints: written, found, copied to remote storage."""

CHECKPOINTS, BEST = "checkpoints", "best"  # folders in a run's folder: checkpoints, the best weights
