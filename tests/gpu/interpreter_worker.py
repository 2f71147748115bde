"""Run cases on the Triton rung in the interpreter: `interpreter_worker.py f32 SHAPE [--break|--no-repair] [case ...]`, or without arguments for
each call of forked.py.

SHAPE: one of cases.py, or `moments` for its check of them; lora-SHAPE for the layer's ops on one of lora_cases.py; lora_first-, base_first- or fused-SHAPE
for the whole layer in that way; several with commas between them.

Prints {case: failure or null} as JSON, {shape case: ...} for several shapes."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from cases import DTYPES, SHAPES, Case, cases, failures, moments, refused_moments
from interpreter import repair_bfloat16
from lora_cases import LORA_SHAPES, layer_cases, lora_cases

sys.path.append(str(Path(__file__).parents[1]))
import forked

from hetlora_kernels.triton import OPS, _segments, aggregate, lora


def chosen(size: str) -> dict[str, Case]:
    way, _, shape = size.partition("-")
    if way not in lora.WAYS:
        return lora_cases(LORA_SHAPES[shape]) if way == "lora" else cases(SHAPES[size])
    lora._way = lambda *_: way
    return layer_cases(LORA_SHAPES[shape])


def run(dtype_name: str, size_names: str, *options: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy on NaN
    dtype, sizes, names = DTYPES[dtype_name], size_names.split(","), [name for name in options if not name.startswith("--")]
    if "--no-repair" not in options:
        repair_bfloat16()
    if "--break" in options:
        aggregate.row_owners = lambda ranks: [0] * sum(ranks)
        _segments.every_segment = lambda *layout, right=_segments.every_segment: [s._replace(row=0) for s in right(*layout)]
    report = {}
    for size in sizes:
        if size == "moments":
            report[size] = (moments if dtype in (torch.float32, torch.bfloat16) else refused_moments)(OPS, dtype)
            continue
        every = chosen(size)
        report |= {name if len(sizes) == 1 else f"{size} {name}": failures(every[name], OPS, dtype) for name in names or every}
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1:]:
        run(*sys.argv[1:])
    else:
        forked.serve(run)
