"""Tests mirror the rooms. The shared environment is set here, before torch is imported."""

import os

# tests share the cores: with more than one thread a process they would spin against each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
