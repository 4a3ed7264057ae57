"""Frozen encoders of text, images and prices."""
