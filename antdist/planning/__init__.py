"""Plan a run on paper: memory, step time, storage, hours."""
