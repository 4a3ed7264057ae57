"""The stream of training examples: order, windows, batches, and their shards."""
