"""Sequence encoders: packed tokens in, states out."""
