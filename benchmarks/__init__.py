"""Programs that measure antdist against the usual way of doing the same: `python -m benchmarks`."""
