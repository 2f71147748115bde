"""Run cases on the Triton rung in the interpreter and print {case: failure or null} as JSON: `interpreter_worker.py f32 [--break|--no-repair] [case ...]`."""

from __future__ import annotations

import json
import sys
import warnings

import torch
from cases import DTYPES, SMALL, cases, failures
from interpreter import repair_bfloat16

from hetlora_kernels.triton import OPS, aggregate


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy on NaN
    dtype, names = DTYPES[sys.argv[1]], [a for a in sys.argv[2:] if not a.startswith("--")]
    if "--no-repair" not in sys.argv:
        repair_bfloat16()
    if "--break" in sys.argv:
        aggregate.row_owners = lambda ranks: [0] * sum(ranks)
    every = cases(SMALL)
    print(json.dumps({name: failures(every[name], OPS, dtype) for name in names or every}))


if __name__ == "__main__":
    main()
