"""`python -m hetlora_kernels.benchmarks`: what `hetlora bench` does, with torch alone, which chooses the threads."""

from __future__ import annotations

import sys

from .kit import main

try:
    status = main(prog="python -m hetlora_kernels.benchmarks")
except KeyboardInterrupt:
    print("interrupted; what was measured is in the file of --json", file=sys.stderr)
    status = 130
sys.exit(status)
