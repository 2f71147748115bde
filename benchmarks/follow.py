"""What it costs to follow rows at every call of a model: `python -m benchmarks.follow`.

One fused model, two copies of it in turn. One is as it is: its layers are known after the first call. The other is behind a module that reads a number of its
data, after which no order is taken for fixed, so that every call is followed (docs/peft.md, "Where the promise holds"). Both give the same gradients, which is
checked. A step is forward and backward of a mixed batch of two adapters. Times are those of the thread's processor (CPU), of one thread, in paired rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from hetlora_kernels.peft import client_segments, fuse

from .peft_suite import adapted, smollm, twin

SHAPES = {"narrow-2": (2, True), "narrow-30": (30, True), "SmolLM2-135M": (30, False)}  # layers, whether of width 24
BATCH, LENGTH = 8, 32


class Reading(nn.Module):
    """The model; with `reads` after a look at a number of its data."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.reads = model, False

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.reads:
            input_ids[0, 0].item()
        logits: Tensor = self.model(input_ids=input_ids).logits
        return logits


def measure(name: str, rounds: int) -> str:
    layers, narrow = SHAPES[name]
    torch.manual_seed(0)
    stock = adapted(smollm(layers, narrow), ["q_proj", "v_proj"], [8, 16], 0.0)
    models = [twin(stock), twin(stock)]  # what is known of a layer's rows lives with the layer
    for model in models:
        fuse(model)
    forms = [Reading(model) for model in models]
    forms[1].reads = True
    tokens = torch.randint(0, 61, (BATCH, LENGTH))
    ids = [0, 1] * (BATCH // 2)

    def trained(form: Reading) -> list[nn.Parameter]:
        return [parameter for parameter in form.parameters() if parameter.requires_grad]

    def step(form: Reading) -> tuple[float, float]:
        for parameter in trained(form):
            parameter.grad = None
        start = time.thread_time()
        with client_segments(form, ids):
            out = form(tokens)
            middle = time.thread_time()
            out.logsumexp(-1).mean().backward()
        return middle - start, time.thread_time() - start

    gradients = []
    for form in (*forms, *forms):  # the first call is followed in both
        step(form)
        gradients.append([parameter.grad for parameter in trained(form)])
    if not all(one is not None and two is not None and torch.equal(one, two) for one, two in zip(*gradients[2:], strict=True)):
        raise SystemExit(f"{name}: the two forms have different gradients")
    times: list[list[tuple[float, float]]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(step(forms[which]))
    row = [name]
    for part in (0, 1):
        known, followed = ([pair[part] for pair in own] for own in times)
        ratio = statistics.median(two / one for one, two in zip(known, followed, strict=True))
        row += [f"{1e3 * statistics.median(known):.1f} ms", f"{1e3 * statistics.median(followed):.1f} ms", f"{ratio:.2f}"]
    return f"| {' | '.join(row)} |"


def main() -> None:
    options = argparse.ArgumentParser(description="What it costs to follow rows at every call of a model.")
    options.add_argument("--rounds", type=int, default=20, help="paired rounds of each case (default 20)")
    options.add_argument("--cases", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="which of them (default all)")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    print("| model | forward, known | followed | ratio | forward and backward, known | followed | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in chosen.cases:
        print(measure(name, chosen.rounds), flush=True)


if __name__ == "__main__":
    main()
