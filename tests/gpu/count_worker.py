"""Count what a GPU would be given to do: `count_worker.py LIBRARY` runs two adapted layers and the optimisers of a bank on the emulated library, through
the package's own Python, and prints {what: launches} as JSON. No kernel runs: what is launched depends on no value.

A launch is a kernel or a product of the library, as the emulator counts them, or a PyTorch op that computes something: every leaf of a profile that is no
view and no allocation. Copies from the host are not seen here, where all is on the host: test_device_work.py counts them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable

import torch
from torch import nn

import hetlora_kernels as hk
from hetlora_kernels import _library
from hetlora_kernels.ops import lora as ops
from hetlora_kernels.peft import attach, client_segments

VIEWS = {"view", "as_strided", "select", "slice", "t", "transpose", "detach", "alias", "expand", "reshape", "_reshape_alias", "unbind", "squeeze", "unsqueeze"}
NAMESPACE = torch.library.Library("hetlora_emulated", "DEF")
NOTHING = {"contiguous", "resolve_conj"}  # by themselves: a copy that they make is a leaf of its own
MADE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "result_type", "_unsafe_view"}


def take(library: str) -> Callable[[int], int]:
    """Let the emulated kernels serve the package's ops; returns the emulator's counter."""
    for name, schema in _library.SCHEMAS.items():
        NAMESPACE.define(name + schema)
    torch.ops.load_library(library)
    for name in _library.SCHEMAS:
        _library._entries[name] = getattr(torch.ops.hetlora_emulated, name).default
    return ctypes.CDLL(library).emulator_launches


class Counter:
    def __init__(self, launches: Callable[[int], int]) -> None:
        self.launches, self.report = launches, {}

    def __call__(self, what: str, run: Callable[[], object]) -> object:
        before = self.launches(0)
        with torch.autograd.profiler.profile() as profile:
            out = run()
        own = self.launches(0) - before
        leaves = [e.name.removeprefix("aten::") for e in profile.function_events if e.name.startswith("aten::") and not e.cpu_children]
        self.report[what] = own + sum(leaf not in VIEWS | NOTHING | MADE for leaf in leaves)
        return out


def layers(count: Counter, name: str, width: int, lengths: list[int], ranks: list[int]) -> None:
    """Forward and backward pass of one layer whose neighbours have prepared the batch; bfloat16 base, float32 factors, dropout on."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=True, dtype=torch.bfloat16) for _ in range(2)))
    bank = hk.AdapterBank({str(i): (width, width) for i in range(2)}, ranks)
    hk.AdamW(bank, cast=torch.bfloat16)
    attach(model, bank, dropout=0.1)
    x = torch.randn(sum(lengths), width, dtype=torch.bfloat16)
    ids = [k for k, length in enumerate(lengths) for _ in range(length)]
    with torch.no_grad(), client_segments(model, ids, seeds=torch.arange(len(ranks))):
        model(x)  # finds out about the layers
    with client_segments(model, ids, seeds=torch.arange(len(ranks))):
        first = model[0](x).detach().requires_grad_()
        y = count(f"forward, {name}", lambda: model[1](first))
        gradient = torch.randn_like(y)
        count(f"backward, {name}", lambda: y.backward(gradient))


def optimisers(count: Counter) -> None:
    """A step of a bank of 32 layers after one that came before."""
    bank = hk.AdapterBank({str(i): (24, 16) for i in range(32)}, [3, 8])
    rules: dict[str, tuple[type, dict]] = {
        "AdamW": (hk.AdamW, {}),
        "AdamW, clip and tail": (hk.AdamW, {"clip_norm": 1.0, "tail_penalty": (0.1, [1, 4])}),
        "SGD": (hk.SGD, {}),
        "SGD, clip and tail": (hk.SGD, {"momentum": 0.9, "clip_norm": 1.0, "tail_penalty": (0.1, [1, 4])}),
    }
    for name, (rule, settings) in rules.items():
        optimizer = rule(bank, lr=0.1, cast=torch.bfloat16, **settings)
        for parameter in bank.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        count(f"step, {name}", optimizer.step)


def main() -> None:
    torch.set_num_threads(1)
    os.environ["HETLORA_SCHEDULE"] = "none"
    count = Counter(take(sys.argv[1]))
    ops.operand_dtype = lambda x: x.dtype  # as on a GPU
    layers(count, "small", 64, [3, 9], [8, 16])
    layers(count, "several splits", 1032, [1026, 9], [8, 16])
    layers(count, "several splits, odd rank", 1032, [1026, 9], [5, 16])
    layers(count, "a rank past what expand keeps", 1032, [3, 1026], [136, 8])
    optimisers(count)
    print(json.dumps(count.report))


if __name__ == "__main__":
    main()
