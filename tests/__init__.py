"""Tests mirror the rooms. What all of them share of the environment is set here, before anything imports torch."""

import os

# tests share the cores: one thread a process, or they spin against each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
