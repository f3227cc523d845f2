"""Benchmarks of the operator: `python -m bench.run`."""
