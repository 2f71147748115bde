"""Run cases on a library built by emulated.py, in every schedule asked for; print {schedule: {case: failure or null}} as JSON.

`emulator_worker.py LIBRARY f32,bf16 SHAPES fwd,rev,rand,warp [case ...]`, with AddressSanitizer preloaded; SHAPES is small, large or edge of cases.py,
lora-NAME of lora_cases.py, or `checks` for those of layer_checks.py. A memory error ends the process; memory that an op allocates is full of NaN.

Without arguments: the same for each call of forked.py.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
from cases import DTYPES, SHAPES, cases, failures
from layer_checks import CHECKS, Check
from lora_cases import LORA_SHAPES, lora_cases

sys.path.append(str(Path(__file__).parents[1]))
import forked

from hetlora_kernels._library import SCHEMAS


def checks_of(shapes: str) -> dict[str, Check]:
    if shapes == "checks":
        return CHECKS
    named = lora_cases(LORA_SHAPES[shapes.removeprefix("lora-")]) if shapes.startswith("lora-") else cases(SHAPES[shapes])
    return {name: partial(failures, case) for name, case in named.items()}


def run(library: str, dtypes: str, shapes: str, schedules: str, *names: str) -> None:
    namespace = torch.library.Library("hetlora_emulated", "DEF")
    for name, schema in SCHEMAS.items():
        namespace.define(name + schema)
    torch.ops.load_library(library)
    ops = {name: getattr(torch.ops.hetlora_emulated, name).default for name in SCHEMAS}
    every, report = checks_of(shapes), {}
    for schedule in schedules.split(","):
        os.environ["HETLORA_SCHEDULE"] = schedule
        report[schedule] = {}
        for dtype in dtypes.split(","):
            for name in names or every:
                try:
                    report[schedule][f"{name}-{dtype}"] = every[name](ops, DTYPES[dtype])
                except RuntimeError as error:
                    report[schedule][f"{name}-{dtype}"] = str(error).splitlines()[0]
    print(json.dumps(report))


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if sys.argv[1:]:
        run(*sys.argv[1:])
    else:
        forked.serve(run)


if __name__ == "__main__":
    main()
