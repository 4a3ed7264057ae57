"""Runs: what `antdist pretrain` and `antdist relearn` do, in the driver and in the workers."""
