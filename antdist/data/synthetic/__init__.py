"""Generated worlds of domains, for tests, benchmarks and the demo."""
