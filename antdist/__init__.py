"""antdist: pre-training and re-learning of multi-modal sequential recommenders that transfer."""

__version__ = "0.1.0"
