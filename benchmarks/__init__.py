"""Benchmarks: `python -m benchmarks.run --suite server --json FILE`, then `python -m benchmarks.tables` to renew the tables of docs/."""
