"""Run cases on the Triton rung in the interpreter: `interpreter_worker.py f32 SHAPE [--break|--no-repair] [case ...]`.

SHAPE: one of cases.py; lora-SHAPE for the layer's ops on one of lora_cases.py; lora_first-, base_first- or fused-SHAPE for the whole layer in that way;
several with commas between them.

Prints {case: failure or null} as JSON, {shape case: ...} for several shapes."""

from __future__ import annotations

import json
import sys
import warnings

import torch
from cases import DTYPES, SHAPES, Case, cases, failures
from interpreter import repair_bfloat16
from lora_cases import LORA_SHAPES, layer_cases, lora_cases

from hetlora_kernels.triton import OPS, _segments, aggregate, lora


def chosen(size: str) -> dict[str, Case]:
    way, _, shape = size.partition("-")
    if way not in lora.WAYS:
        return lora_cases(LORA_SHAPES[shape]) if way == "lora" else cases(SHAPES[size])
    lora._way = lambda *_: way
    return layer_cases(LORA_SHAPES[shape])


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy on NaN
    dtype, sizes, names = DTYPES[sys.argv[1]], sys.argv[2].split(","), [a for a in sys.argv[3:] if not a.startswith("--")]
    if "--no-repair" not in sys.argv:
        repair_bfloat16()
    if "--break" in sys.argv:
        aggregate.row_owners = lambda ranks: [0] * sum(ranks)
        _segments.every_segment = lambda *layout, right=_segments.every_segment: [s._replace(row=0) for s in right(*layout)]
    report = {}
    for size in sizes:
        every = chosen(size)
        report |= {name if len(sizes) == 1 else f"{size} {name}": failures(every[name], OPS, dtype) for name in names or every}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
