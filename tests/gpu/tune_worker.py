"""The whole of `hetlora tune` on a tiny shape in Triton's interpreter, with a stub in place of the clock; prints what it would write, as JSON.

`tune_worker.py [--break]`: with --break every kernel's rank rows are wrong, so that no candidate may be chosen. The clock prefers few warps and base_first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from interpreter import repair_bfloat16

from hetlora_kernels.triton import _segments, tune
from hetlora_kernels.triton._common import device_params

CPU = torch.device("cpu")


def clock(run: Callable[[], Any]) -> float:
    run()
    if getattr(run, "func", None) is tune.lora.product:
        return 1.0 + (run.args[3] != "base_first")
    tables = device_params(CPU)
    return float(sum(tables[name]["num_warps"] for name in ("shrink", "expand", "grouped_gram", "fused")))


def main() -> None:
    torch.set_num_threads(1)
    repair_bfloat16()
    if "--break" in sys.argv:
        _segments.every_segment = lambda *layout, right=_segments.every_segment: [s._replace(row=0) for s in right(*layout)]
    every = tune.candidates
    tune.candidates = lambda kernel, dtype: list(every(kernel, dtype))[:12:4]
    said: list[str] = []
    try:
        content = tune.measure(CPU, clock, said.append, shapes=((16, 24),), rows=(16,), layers=((24, 40),))
    except RuntimeError as error:
        content = {"error": str(error)}
    print(json.dumps(content | {"said": said}))


if __name__ == "__main__":
    main()
