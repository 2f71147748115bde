"""Benchmarks, installed as `hetlora_kernels.benchmarks`: `hetlora bench` for a machine of one's own.

In a checkout `python -m benchmarks.run --suite server --json FILE`, then `benchmarks.tables` and `benchmarks.plots` to renew docs/.
"""
