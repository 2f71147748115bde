"""The lora suite: forward + backward of one multi-rank LoRA linear, against the frozen layer alone in the same round (ratio - 1 = overhead of LoRA).

Providers: this project on every rung of the device; stock PEFT, one client after another; hand-written addmm per client; zero-padded batched GEMMs.
Adapters are float32, the base and its input `dtype`, as PEFT has them; every provider is checked at p = 0 against the reference before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hetlora_kernels as hk
from benchmarks.server import WrongResultError
from benchmarks.timing import interleaved, peak_extra_bytes
from hetlora_kernels import _library

SHAPES = [(256, 256), (1024, 1024), (1536, 1536), (576, 576), (576, 192), (576, 1536), (1536, 576)]  # in -> out; the last four: SmolLM2-135M
TOKENS_AND_CLIENTS = [(256, 1), (1024, 1), (4096, 1), (1024, 4), (1024, 8)]
RANK = 16
YARDSTICK = "frozen layer"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass
class Problem:
    n: int
    m: int
    tokens: int
    clients: int
    dtype: torch.dtype
    device: torch.device
    p: float = 0.0

    def __post_init__(self) -> None:
        draw = torch.Generator(self.device).manual_seed(0)

        def normal(*size: int, std: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(*size, generator=draw, device=self.device) * std).to(dtype)

        rows = self.clients * RANK
        self.x = normal(self.tokens, self.n).requires_grad_()
        self.weight, self.d_y = normal(self.m, self.n, std=self.n**-0.5), normal(self.tokens, self.m)
        self.a = normal(rows, self.n, std=self.n**-0.5, dtype=torch.float32).requires_grad_()
        self.bt = normal(rows, self.m, std=0.1, dtype=torch.float32).requires_grad_()

    def each(self, tensor: Tensor) -> list[Tensor]:
        """One leaf per client."""
        return [part.detach().clone().requires_grad_() for part in tensor.chunk(self.clients)]


Results = Callable[[], tuple[Tensor, Tensor, Tensor]]
Provider = Callable[[Problem], tuple[Callable[[], object], Results]]


def frozen(p: Problem) -> Callable[[], object]:
    def run() -> None:
        p.x.grad = None
        F.linear(p.x, p.weight).backward(p.d_y)

    return run


def ours(p: Problem, rung: str) -> tuple[Callable[[], object], Results]:
    layout, seg = hk.RankLayout([RANK] * p.clients), hk.Segments.from_lengths([p.tokens // p.clients] * p.clients)
    seeds = torch.arange(p.clients, device=p.device)

    def run() -> None:
        p.x.grad = p.a.grad = p.bt.grad = None
        with hk.use_backend(rung):
            hk.lora_linear(p.x, p.weight, None, p.a, p.bt, layout, seg, scale=1.0, dropout=p.p, seeds=seeds).backward(p.d_y)

    return run, lambda: (p.x.grad, p.a.grad, p.bt.grad)


def _joined(xs: list[Tensor], a: list[Tensor], bt: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.cat([t.grad for t in own]) for own in (xs, a, bt))


def peft(p: Problem) -> tuple[Callable[[], object], Results]:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = torch.nn.Linear(p.n, p.m, bias=False, device=p.device, dtype=p.dtype)
    base.weight = torch.nn.Parameter(p.weight, requires_grad=False)
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=p.p)
    xs, d_ys, layers = p.each(p.x), p.d_y.chunk(p.clients), []
    for a, bt in zip(p.a.chunk(p.clients), p.bt.chunk(p.clients), strict=True):
        layer = Linear(base, "default", config=config, r=RANK, lora_alpha=RANK)
        layer.lora_A["default"].weight = torch.nn.Parameter(a.detach().clone())
        layer.lora_B["default"].weight = torch.nn.Parameter(bt.detach().t().contiguous())
        layers.append(layer)
    factors = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]

    def run() -> None:
        for layer, x, d_y, (a, b) in zip(layers, xs, d_ys, factors, strict=True):
            x.grad = a.grad = b.grad = None
            layer(x).backward(d_y)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat([x.grad for x in xs]), torch.cat([a.grad for a, _ in factors]), torch.cat([b.grad.t() for _, b in factors])

    return run, results


def addmm(p: Problem) -> tuple[Callable[[], object], Results]:
    xs, d_ys, factors, others = p.each(p.x), p.d_y.chunk(p.clients), p.each(p.a), p.each(p.bt)

    def run() -> None:
        for x, d_y, a, bt in zip(xs, d_ys, factors, others, strict=True):
            x.grad = a.grad = bt.grad = None
            s = F.dropout(x, p.p) @ a.to(x.dtype).t()
            torch.addmm(F.linear(x, p.weight), s, bt.to(x.dtype)).backward(d_y)

    return run, lambda: _joined(xs, factors, others)


def padded(p: Problem) -> tuple[Callable[[], object], Results]:
    a = p.a.detach().clone().requires_grad_()
    bt = p.bt.detach().clone().requires_grad_()
    x = p.x.detach().clone().requires_grad_()

    def run() -> None:
        x.grad = a.grad = bt.grad = None
        grouped = F.dropout(x, p.p).view(p.clients, -1, p.n)
        s = torch.bmm(grouped, a.to(x.dtype).view(p.clients, RANK, p.n).transpose(1, 2))
        delta = torch.bmm(s, bt.to(x.dtype).view(p.clients, RANK, p.m))
        (F.linear(x, p.weight) + delta.view(p.tokens, p.m)).backward(p.d_y)

    return run, lambda: (x.grad, a.grad, bt.grad)


def providers(device: torch.device) -> dict[str, Provider]:
    rungs = [rung for rung in _library.available() if rung != "reference" and (rung == "cpu") == (device.type == "cpu")]
    own: dict[str, Provider] = {f"hetlora {rung}": partial(ours, rung=rung) for rung in (*rungs, "reference")}
    return own | {"PEFT one by one": peft, "torch addmm one by one": addmm, "torch padded bmm": padded}


def cases(options: Any, device: torch.device) -> Iterator[tuple[Problem, str]]:
    shapes, loads = ([(40, 24)], [(16, 1), (16, 4)]) if options.quick else (SHAPES, TOKENS_AND_CLIENTS)
    for dtype in (torch.float32, torch.bfloat16):
        for n, m in shapes:
            for tokens, clients in loads:
                for p in (0.0, 0.1):
                    op = f"lora_linear p={p}"
                    if not options.only or op in options.only or f"T={tokens}" in options.only:
                        yield Problem(n, m, tokens, clients, dtype, device, p), op


def check(p: Problem) -> None:
    """`WrongResultError` where a provider's gradients, without dropout, are not the reference's."""
    plain = Problem(p.n, p.m, p.tokens, p.clients, p.dtype, p.device)
    truth: tuple[Tensor, ...] = ()
    for name, make in {"truth": partial(ours, rung="reference"), **providers(p.device)}.items():
        work, results = make(plain)
        work()
        own = tuple(t.double().clone() for t in results())
        truth = truth or own
        for label, one, true in zip(("d_x", "d_a", "d_bt"), own, truth, strict=True):
            error = float((one - true).norm() / true.norm())
            if not error <= TOLERANCE[p.dtype]:
                raise WrongResultError(f"{name}: {label} of {p.n}->{p.m}, {p.dtype} is off by {error:.2e}; nothing is timed")


def measure(case: tuple[Problem, str], options: Any, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """One record for each provider and the frozen layer; bytes: x, W, y, d_y and d_x once."""
    torch.set_num_threads(threads)
    p, op = case
    check(p)
    runs = {YARDSTICK: frozen(p)} | {name: make(p)[0] for name, make in providers(device).items()}
    timings = interleaved(runs, YARDSTICK, device, options.seconds / 4)
    size = (2 * p.tokens * (p.n + p.m) + p.n * p.m) * p.dtype.itemsize
    records = []
    for name, timing in timings.items():
        record = {"op": op, "shape": f"{p.n}->{p.m} T={p.tokens} r={RANK}", "clients": p.clients, "dtype": str(p.dtype).removeprefix("torch.")}
        record |= {"threads": threads, "provider": name, "yardstick": YARDSTICK, "bytes": size, "rounds": timing.rounds, "note": ""}
        record |= {"median_s": timing.median, "p20_s": timing.p20, "p80_s": timing.p80, "gb_per_s": size / timing.median / 1e9, "ratio": timing.ratio}
        record["peak_extra_bytes"] = peak_extra_bytes(runs[name], device)
        records.append(record)
    return records
