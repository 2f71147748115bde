"""Run cases on a library built by emulated.py, in every schedule asked for; print {schedule: {case: failure or null}} as JSON.

`emulator_worker.py LIBRARY f32,bf16 small|large|edge fwd,rev,rand,warp [case ...]`, with AddressSanitizer preloaded. A memory error ends the process.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from cases import DTYPES, SHAPES, cases, failures

from hetlora_kernels._library import SCHEMAS


def main() -> None:
    torch.set_num_threads(1)
    library, dtypes, size, schedules, *names = sys.argv[1:]
    namespace = torch.library.Library("hetlora_emulated", "DEF")
    for name, schema in SCHEMAS.items():
        namespace.define(name + schema)
    torch.ops.load_library(library)
    ops = {name: getattr(torch.ops.hetlora_emulated, name).default for name in SCHEMAS}
    every, report = cases(SHAPES[size]), {}
    for schedule in schedules.split(","):
        os.environ["HETLORA_SCHEDULE"] = schedule
        report[schedule] = {}
        for dtype in dtypes.split(","):
            for name in names or every:
                try:
                    report[schedule][f"{name}-{dtype}"] = failures(every[name], ops, DTYPES[dtype])
                except RuntimeError as error:
                    report[schedule][f"{name}-{dtype}"] = str(error).splitlines()[0]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
