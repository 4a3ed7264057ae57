"""Engines: forward, backward and update of a model, by torch alone or by DeepSpeed."""
