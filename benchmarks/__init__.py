"""Benchmarks: `python -m benchmarks.run --suite server --json FILE`, then `benchmarks.tables` and `benchmarks.plots` to renew docs/."""
