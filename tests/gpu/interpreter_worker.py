"""Run cases on the Triton rung in the interpreter: `interpreter_worker.py f32 small|edge [--break|--no-repair] [case ...]`.

Prints {case: failure or null} as JSON."""

from __future__ import annotations

import json
import sys
import warnings

import torch
from cases import DTYPES, SHAPES, cases, failures
from interpreter import repair_bfloat16

from hetlora_kernels.triton import OPS, aggregate


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy on NaN
    dtype, size, names = DTYPES[sys.argv[1]], sys.argv[2], [a for a in sys.argv[3:] if not a.startswith("--")]
    if "--no-repair" not in sys.argv:
        repair_bfloat16()
    if "--break" in sys.argv:
        aggregate.row_owners = lambda ranks: [0] * sum(ranks)
    every = cases(SHAPES[size])
    print(json.dumps({name: failures(every[name], OPS, dtype) for name in names or every}))


if __name__ == "__main__":
    main()
