"""Hand-written operations, each beside a plain twin that is its oracle."""
