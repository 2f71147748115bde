"""The loss suite, and what a loss takes in memory and time: `python -m benchmarks.losses`; what its op takes on a chunk of logits: `... --chunk`.

One batch of eight clients, the losses and the gradient of the hidden states. Both forms give the same losses and gradients to rounding, which is checked before
anything is measured. Memory: what a process of its own takes at most beyond its start. Time: of the thread's processor, paired rounds in turn, one thread.

With `--device cuda` both forms and Liger's fused linear cross-entropy, of the package liger-kernel, are timed on the GPU. Liger's kernels are Triton's: on a
CPU a line says that it is not measured. (Not tried on a GPU; Triton's interpreter tests that Liger gives the same gradient.)

The suite (`cases`, `measure`) times hetlora's two forms, PyTorch's cross_entropy of float32 logits, as transformers has it, and on a GPU Liger's, against the
floor: the head's two products with nothing between them.

The op: losses of a chunk of 2^24 logits and the slopes that replace them, against PyTorch's in-place operations (the reference), its `cross_entropy` with the
backward pass, and the floor, a product with one in place that reads and writes as many bytes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from hetlora_kernels import reference
from hetlora_kernels._torch import multiplies_fast
from hetlora_kernels.ops.cross_entropy import cross_entropy_
from hetlora_kernels.peft import Head, client_losses
from hetlora_kernels.peft.losses import CHUNK

from .figures import seconds
from .server import WrongResultError
from .shapes import chosen
from .timing import interleaved, peak_extra_bytes, peak_extra_mib

FORMS = ("logits", "states")
LIGER, STOCK = "Liger", "torch"
CLIENTS = 8
CPU = torch.device("cpu")
Step = Callable[[str], tuple[torch.Tensor, torch.Tensor]]

# The suite: words, columns, tokens of all clients
MODELS = {"SmolLM2-135M": (49152, 576), "Qwen2.5-1.5B": (151936, 1536), "Llama-3.1-8B": (128256, 4096)}
CPU_LOADS, GPU_LOADS = [("SmolLM2-135M", 2048), ("Qwen2.5-1.5B", 256)], [(name, 2048) for name in MODELS]
SHORT = {"cpu": [("SmolLM2-135M", 64)], "cuda": [("Llama-3.1-8B", 2048)]}
YARDSTICK = "frozen head"
NAMES = {"states": "hetlora from states", "logits": "hetlora from logits", STOCK: "torch cross_entropy", LIGER: LIGER}


def why_no_liger(device: torch.device) -> str:
    """Why Liger's form cannot run here; "" where it can."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels are Triton's and need a GPU"
    return "" if importlib.util.find_spec("liger_kernel") else "not installed: liger-kernel"


def by_liger(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[1]: the sum of the clients' losses, whose means are over equal numbers of tokens."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    rows = states[:, :-1].reshape(-1, states.shape[-1])
    found = LigerFusedLinearCrossEntropyFunction.apply(rows, weight, labels[:, 1:].reshape(-1), None, None, -100, 0.0, 0.0, "sum")
    total = found[0] if isinstance(found, tuple) else found
    return (total / (states.shape[1] - 1)).reshape(1)


def by_torch(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[1], as `by_liger`."""
    logits = F.linear(states, weight)[:, :-1].float()
    return (F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / (states.shape[1] - 1)).reshape(1)


def steps(words: int, columns: int, tokens: int, dtype: torch.dtype, device: torch.device = CPU) -> Step:
    """form -> losses [8] (of Liger and torch [1], their sum) and the gradient of the states, from the same numbers at every call."""
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(words, columns, generator=draw) / columns**0.5).to(dtype)
    states = torch.randn(CLIENTS, tokens // CLIENTS, columns, generator=draw).to(dtype)
    labels = torch.randint(0, words, states.shape[:2], generator=draw)
    weight, states, labels = weight.to(device), states.to(device), labels.to(device)

    def step(form: str) -> tuple[torch.Tensor, torch.Tensor]:
        leaf, head = states.clone().requires_grad_(), Head(weight)
        own = {"labels": labels, "ids": range(CLIENTS), "num_clients": CLIENTS}
        # The logits have no name here: a program that keeps them keeps them through the backward pass too.
        if form in (LIGER, STOCK):
            losses = (by_liger if form == LIGER else by_torch)(leaf, weight, labels)
        else:
            losses = client_losses(leaf, head=head, **own) if form == "states" else client_losses(head.logits(leaf), **own)
        losses.sum().backward()
        assert leaf.grad is not None
        return losses.detach(), leaf.grad

    return step


def check(step: Step, words: int, dtype: torch.dtype, forms: tuple[str, ...] = FORMS) -> None:
    """A few roundings to the type, and those of float32 sums over the words, which add up like the root of their number."""
    bound = 4 * torch.finfo(dtype).eps + words**0.5 * torch.finfo(torch.float32).eps
    losses, slopes = (own.double() for own in step(forms[0]))
    for form in forms[1:]:
        own, other = (found.double() for found in step(form))
        for one, two in ((losses if own.shape == losses.shape else losses.sum(0, keepdim=True), own), (slopes, other)):
            off = float((one - two).norm() / one.norm())
            if not off <= bound:
                raise WrongResultError(f"{dtype}: the forms {forms[0]} and {form} differ by {off:.1e}; nothing is measured")


@dataclass(frozen=True)
class Case:
    model: str
    words: int
    columns: int
    tokens: int
    dtype: torch.dtype

    @property
    def shape(self) -> str:
        return f"{self.model}, {self.words} words, T={self.tokens}"

    @property
    def rows(self) -> int:
        """That have a label: the last token of each sequence predicts none."""
        return self.tokens - CLIENTS


def wanted(options: Any, device: torch.device) -> list[Case]:
    """Where float32 logits and what PyTorch makes of them do not fit in the limit, with fewer tokens."""
    loads = SHORT[device.type] if options.short else GPU_LOADS if device.type == "cuda" else CPU_LOADS
    sizes = [("tiny", 64, 8, 64)] if options.quick else [(name, *MODELS[name], tokens) for name, tokens in loads]
    found = []
    for name, words, columns, tokens in sizes:
        while 16 * tokens * words > options.memory_gb * 1e9 and tokens > 8 * CLIENTS:
            tokens //= 2
        for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,):
            if options.short and not options.quick and not multiplies_fast(dtype, device.type):
                continue  # one call of it would take longer than the suite may
            if chosen(options, "loss", name, f"T={tokens}", str(dtype).removeprefix("torch.")):
                found.append(Case(name, words, columns, tokens, dtype))
    return found


def cases(options: Any, device: torch.device) -> Iterator[Case]:
    return iter(wanted(options, device))


def products(case: Case, device: torch.device) -> Callable[[], object]:
    """The floor: logits of the states, and the states' gradient of slopes that are there."""
    draw = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(rows, case.columns, generator=draw).to(device, case.dtype) for rows in (case.rows, case.words))
    logits, slopes = torch.empty(case.rows, case.words, dtype=case.dtype, device=device), torch.empty_like(states)
    return lambda: (torch.mm(states, weight.t(), out=logits), torch.mm(logits, weight, out=slopes))


def measure(case: Case, options: Any, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """One record for each form and the floor; bytes: the head and the states that have a label, once forward and once backward."""
    torch.set_num_threads(threads)
    step = steps(case.words, case.columns, case.tokens, case.dtype, device)
    forms = {form: name for form, name in NAMES.items() if form != LIGER or not why_no_liger(device)}
    check(step, case.words, case.dtype, tuple(forms))
    runs: dict[str, Callable[[], object]] = {YARDSTICK: products(case, device)} | {name: partial(step, form) for form, name in forms.items()}
    size = 2 * case.columns * (case.words + case.rows) * case.dtype.itemsize
    records = []
    for name, timing in interleaved(runs, YARDSTICK, device, options.seconds, how=options.how).items():
        record = {"op": "loss", "shape": case.shape, "clients": CLIENTS, "dtype": str(case.dtype).removeprefix("torch."), "threads": threads}
        record |= {"provider": name, "yardstick": YARDSTICK, "bytes": size, "flops": 4 * case.rows * case.words * case.columns}
        records.append({**record, **timing.figures(size), "note": "", "peak_extra_bytes": peak_extra_bytes(runs[name], device)})
    return records


def on_device(device: torch.device, chosen: argparse.Namespace, names: list[str], budget: float = 10.0) -> None:
    """A row for each type and form, timed in turn."""
    lacking = why_no_liger(device)
    forms = FORMS if lacking else (*FORMS, LIGER)
    print("| type | form | time (20th to 80th percentile) | peak | time / states |\n|---|---|--:|--:|--:|")
    for name in names:
        dtype = getattr(torch, name)
        step = steps(chosen.words, chosen.columns, chosen.tokens, dtype, device)
        check(step, chosen.words, dtype, forms)
        runs = {form: partial(step, form) for form in forms}
        for form, timing in interleaved(runs, "states", device, budget, least_rounds=chosen.rounds).items():
            peak = peak_extra_bytes(runs[form], device)
            held = "not said" if peak is None else f"{peak / 2**20:.0f} MiB"
            span = f"{seconds(timing.median)} ({seconds(timing.p20)} to {seconds(timing.p80)})"
            print(f"| {name} | {form} | {span} | {held} | {timing.ratio:.2f} |", flush=True)
    if lacking:
        print(f"\n{LIGER}: not measured: {lacking}")


def peak(form: str, options: argparse.Namespace, dtype: str) -> float:
    """MiB beyond the start, of a process that does one step."""
    own = ["--of", form, "--dtype", dtype, "--words", options.words, "--columns", options.columns, "--tokens", options.tokens]
    done = subprocess.run([sys.executable, "-m", f"{__package__}.losses", *map(str, own)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def peak_here(form: str, step: Step) -> None:
    print(peak_extra_mib(lambda: step(form)))


Form = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (chunk [T, V], labels [T]) -> slopes [T, V]


def by_op(chunk: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    cross_entropy_(chunk, labels)
    return chunk


def by_operations(chunk: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    reference.cross_entropy_(chunk, labels, None, 1.0, 0.0, 0.0, 0.0, True)
    return chunk


def by_autograd(chunk: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    leaf = chunk.detach().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, labels, reduction="sum").backward()
    assert leaf.grad is not None
    return leaf.grad


ON_A_CHUNK: dict[str, dict[str, Form]] = {
    "cross_entropy": {"floor": lambda chunk, labels: chunk.mul_(1), "op": by_op, "in place": by_operations, "autograd": by_autograd}
}


def chunk_times(forms: dict[str, Form], words: int, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """{form: seconds of the thread's processor in each round} after a look at the slopes; every call has the logits afresh."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(max(1, CHUNK["cpu"] // words), words, generator=draw).to(dtype)
    labels = torch.randint(0, words, (len(logits),), generator=draw)
    truth, chunk = by_autograd(logits.float(), labels), torch.empty_like(logits)
    bound = 4 * torch.finfo(dtype).eps + words**0.5 * torch.finfo(torch.float32).eps
    for name, form in forms.items():
        off = float((form(chunk.copy_(logits), labels).float() - truth).norm() / truth.norm())
        if name != "floor" and not off <= bound:
            raise SystemExit(f"{dtype}, {name}: slopes are off by {off:.1e}; nothing is measured")
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds):
        for name in forms if turn % 2 else reversed(forms):
            chunk.copy_(logits)
            start = time.thread_time()
            forms[name](chunk, labels)
            times[name].append(time.thread_time() - start)
    return times


def print_chunks(names: list[str], vocabularies: list[int], rounds: int) -> None:
    forms = ON_A_CHUNK["cross_entropy"]
    print(f"one chunk of {CHUNK['cpu']} logits, one thread, torch {torch.__version__}\n")
    print("| type | words | floor | op | in place | autograd | op / floor | op / in place | op / autograd |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in names:
        for words in vocabularies:
            times = chunk_times(forms, words, getattr(torch, name), rounds)
            cells = [f"{1e3 * statistics.median(own):.1f} ms" for own in times.values()]
            ratios = [f"{statistics.median(a / b for a, b in zip(times['op'], times[other], strict=True)):.2f}" for other in forms if other != "op"]
            print(f"| {' | '.join([name, str(words), *cells, *ratios])} |", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description="Memory and time of a loss from hidden states and from logits.")
    options.add_argument("--words", type=int, help="vocabulary (default 49152)")
    options.add_argument("--columns", type=int, default=576, help="width of the hidden states (default 576)")
    options.add_argument("--tokens", type=int, default=2048, help="of all clients (default 2048)")
    options.add_argument("--rounds", type=int, default=10, help="paired rounds (default 10)")
    options.add_argument("--of", choices=FORMS, help=argparse.SUPPRESS)
    options.add_argument("--dtype", choices=["float32", "bfloat16"], help="this one alone (default both)")
    options.add_argument("--chunk", action="store_true", help="the op on a chunk of logits, of --words (default 49152 and 151936)")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: on the GPU, beside Liger (default cpu)")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    names = [chosen.dtype] if chosen.dtype else ["float32", "bfloat16"]
    if chosen.chunk:
        print_chunks(names, [chosen.words] if chosen.words else [49152, 151936], chosen.rounds)
        return
    chosen.words = chosen.words or 49152
    if chosen.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda: this torch sees no GPU; 'hetlora info' says why")
        on_device(torch.device("cuda"), chosen, names)
        return
    if chosen.of:
        peak_here(chosen.of, steps(chosen.words, chosen.columns, chosen.tokens, getattr(torch, chosen.dtype)))
        return
    print(f"{chosen.tokens} tokens, {chosen.words} words, {chosen.columns} columns, one thread, torch {torch.__version__}\n")
    print("| type | peak, logits | peak, states | time, logits | time, states | ratio of times (quartiles) |\n|---|--:|--:|--:|--:|--:|")
    # First: a process inherits the peak of the one that starts it, and this one is small still.
    peaks = {name: [f"{peak(form, chosen, name):.0f} MiB" for form in FORMS] for name in names}
    for name in names:
        dtype = getattr(torch, name)
        step = steps(chosen.words, chosen.columns, chosen.tokens, dtype)
        check(step, chosen.words, dtype)
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for turn in range(chosen.rounds):
            for form in FORMS if turn % 2 else reversed(FORMS):
                start = time.thread_time()
                step(form)
                times[form].append(time.thread_time() - start)
        ratios = statistics.quantiles([two / one for one, two in zip(*times.values(), strict=True)], n=4)
        cells = [name, *peaks[name], *(f"{1e3 * statistics.median(own):.0f} ms" for own in times.values())]
        print(f"| {' | '.join([*cells, f'{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})'])} |", flush=True)
    print(f"\n{LIGER}: not measured: {why_no_liger(CPU) or 'on a GPU only, with --device cuda'}")


if __name__ == "__main__":
    try:
        main()
    except WrongResultError as error:
        raise SystemExit(str(error)) from None
