"""The lora suite: forward + backward of one multi-rank LoRA linear, against the frozen layer alone in the same round (ratio - 1 = overhead of LoRA).

Providers: this project on every rung of the device; stock PEFT, one client after another, and compiled at a few shapes; hand-written addmm per client;
LoRAFusion's scheme; batched and grouped GEMMs over factors filled up with zero rows to one rank; without zero rows, one grouped GEMM for each rank. The
smallest call, four rows of 64 columns, shows what a call costs before it computes anything.
Adapters are float32, the base and its input `dtype`, as PEFT has them; every provider is checked at p = 0 against the reference before it is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hetlora_kernels as hk
from hetlora_kernels import _library
from hetlora_kernels._torch import multiplies_fast

from . import model
from .server import WrongResultError
from .shapes import chosen, power_law_ranks
from .timing import interleaved, peak_extra_bytes

# in -> out features
SMOLLM2_135M = [(576, 576), (576, 192), (576, 1536), (1536, 576)]
QWEN25_15B = [(1536, 1536), (1536, 256), (1536, 8960), (8960, 1536)]
LLAMA_8B = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
CPU_SHAPES = [(256, 256), (1024, 1024), (1536, 1536), *SMOLLM2_135M]
GPU_SHAPES = [*SMOLLM2_135M, *QWEN25_15B, *LLAMA_8B, (2048, 2048), (8192, 8192)]
# rows of x, ranks of the clients, which own equal numbers of rows
CPU_LOADS = [(4, [4]), (256, [16]), (1024, [16]), (4096, [16]), (1024, [16] * 4), (1024, [16] * 8), (1024, [4, 8, 16, 32, 64, 4, 8, 16])]
GPU_LOADS = [(2048, [16]), (8192, [16]), (8192, [64]), (2048, power_law_ranks(8)), (8192, [4, 8, 16, 32]), (16384, power_law_ranks(32))]
SMALLEST = (64, 64), (4, [4])  # a shape and its load
SHORT = {  # one shape, by rank, by clients and by tokens of each; none that is compiled
    "cpu": (
        [(576, 1536)],
        [*((256, [rank]) for rank in (4, 16, 64)), *((rows, [16] * 4) for rows in (256, 64, 1024)), (256, [16] * 8), (256, [4, 8, 16, 32, 64, 4, 8, 16])],
    ),
    "cuda": (
        [(4096, 4096)],
        [*((2048, [rank]) for rank in (4, 16, 64)), *((rows, [16] * 4) for rows in (2048, 512, 8192)), (2048, [16] * 8), (2048, [4, 8, 16, 32])],
    ),
}
SHORT_SLOW = [(576, 192)], [(64, [16] * 4)]  # of a type without instructions, whose products take some fifty times as long
COMPILED = [(576, 576), (1536, 576), (4096, 4096)]  # one client, 1024 or 8192 rows; float32 on a CPU: compiling takes longer than all else
YARDSTICK, RIVAL, LORAFUSION = "frozen layer", "PEFT one by one", "LoRAFusion's scheme, torch"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass
class Problem:
    n: int
    m: int
    tokens: int
    ranks: list[int]
    dtype: torch.dtype
    device: torch.device
    p: float = 0.0

    def __post_init__(self) -> None:
        draw = torch.Generator(self.device).manual_seed(0)

        def normal(*size: int, std: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(*size, generator=draw, device=self.device) * std).to(dtype)

        rows = sum(self.ranks)
        self.x = normal(self.tokens, self.n).requires_grad_()
        self.weight, self.d_y = normal(self.m, self.n, std=self.n**-0.5), normal(self.tokens, self.m)
        self.a = normal(rows, self.n, std=self.n**-0.5, dtype=torch.float32).requires_grad_()
        self.bt = normal(rows, self.m, std=0.1, dtype=torch.float32).requires_grad_()

    @property
    def clients(self) -> int:
        return len(self.ranks)

    def x_of_each(self) -> list[Tensor]:
        """One leaf per client."""
        return [part.detach().clone().requires_grad_() for part in self.x.chunk(self.clients)]

    def of_each(self, factor: Tensor) -> list[Tensor]:
        return [part.detach().clone().requires_grad_() for part in factor.split(self.ranks)]


Results = Callable[[], tuple[Tensor, Tensor, Tensor]]
Provider = Callable[[Problem], tuple[Callable[[], object], Results]]


def frozen(p: Problem) -> Callable[[], object]:
    def run() -> None:
        p.x.grad = None
        F.linear(p.x, p.weight).backward(p.d_y)

    return run


def ours(p: Problem, rung: str) -> tuple[Callable[[], object], Results]:
    layout, seg = hk.RankLayout(p.ranks), hk.Segments.from_lengths([p.tokens // p.clients] * p.clients)
    seeds = torch.arange(p.clients, device=p.device)

    def run() -> None:
        p.x.grad = p.a.grad = p.bt.grad = None
        hk.lora_linear(p.x, p.weight, None, p.a, p.bt, layout, seg, scale=1.0, dropout=p.p, seeds=seeds).backward(p.d_y)

    def forced() -> None:
        with hk.use_backend(rung):
            run()

    chosen = hk.backends(p.device.type)["lora_forward"][0] == rung  # forcing it would be timed with it
    return run if chosen else forced, lambda: (p.x.grad, p.a.grad, p.bt.grad)


def _joined(xs: list[Tensor], a: list[Tensor], bt: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.cat([t.grad for t in own]) for own in (xs, a, bt))


def peft(p: Problem, compiled: bool = False) -> tuple[Callable[[], object], Results]:
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    base = torch.nn.Linear(p.n, p.m, bias=False, device=p.device, dtype=p.dtype)
    base.weight = torch.nn.Parameter(p.weight, requires_grad=False)
    xs, d_ys, layers = p.x_of_each(), p.d_y.chunk(p.clients), []
    for rank, a, bt in zip(p.ranks, p.a.split(p.ranks), p.bt.split(p.ranks), strict=True):
        layer = Linear(base, "default", config=LoraConfig(r=rank, lora_alpha=rank, lora_dropout=p.p), r=rank, lora_alpha=rank)
        layer.lora_A["default"].weight = torch.nn.Parameter(a.detach().clone())
        layer.lora_B["default"].weight = torch.nn.Parameter(bt.detach().t().contiguous())
        layers.append(layer)
    factors = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
    calls = [torch.compile(layer) if compiled else layer for layer in layers]

    def run() -> None:
        for call, x, d_y, (a, b) in zip(calls, xs, d_ys, factors, strict=True):
            x.grad = a.grad = b.grad = None
            call(x).backward(d_y)

    def results() -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat([x.grad for x in xs]), torch.cat([a.grad for a, _ in factors]), torch.cat([b.grad.t() for _, b in factors])

    return run, results


def addmm(p: Problem) -> tuple[Callable[[], object], Results]:
    xs, d_ys, factors, others = p.x_of_each(), p.d_y.chunk(p.clients), p.of_each(p.a), p.of_each(p.bt)

    def run() -> None:
        for x, d_y, a, bt in zip(xs, d_ys, factors, others, strict=True):
            x.grad = a.grad = bt.grad = None
            s = F.dropout(x, p.p) @ a.to(x.dtype).t()
            torch.addmm(F.linear(x, p.weight), s, bt.to(x.dtype)).backward(d_y)

    return run, lambda: tuple(torch.cat([t.grad for t in own]) for own in (xs, factors, others))


class SplitAtS(torch.autograd.Function):
    """LoRAFusion's scheme (Zhu et al., EuroSys 2026) in PyTorch's operations.

    One base product for all clients. dropout and S = X~ A^T; Y += S B^T in place of a sum of two Ys; dS and dB from one dY; dX += dropout(dS A) likewise.
    Its kernels, which are Triton's, take each of these in one pass of a tile; PyTorch cannot.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, p: float, rows: int, *factors: Tensor) -> Tensor:
        kept, mask = torch.native_dropout(x, p, True) if p else (x, None)
        y, half = F.linear(x, weight), len(factors) // 2
        casts = [factor.to(x.dtype) for factor in factors]
        shrunk = [part @ a.t() for part, a in zip(kept.split(rows), casts[:half], strict=True)]
        for part, s, bt in zip(y.split(rows), shrunk, casts[half:], strict=True):
            part.addmm_(s, bt)
        ctx.save_for_backward(kept, weight, mask, *casts, *shrunk)
        ctx.p, ctx.rows, ctx.half, ctx.dtypes = p, rows, half, [factor.dtype for factor in factors]
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, mask, *rest = ctx.saved_tensors
        a, bt, shrunk = (rest[at * ctx.half : (at + 1) * ctx.half] for at in range(3))
        d_ys = d_y.split(ctx.rows)
        d_s = [part @ own.t() for part, own in zip(d_ys, bt, strict=True)]
        d_bt = [s.t() @ part for s, part in zip(shrunk, d_ys, strict=True)]
        d_a = [own.t() @ part for own, part in zip(d_s, kept.split(ctx.rows), strict=True)]
        d_x = d_y @ weight
        for at, (part, own, factor) in enumerate(zip(d_x.split(ctx.rows), d_s, a, strict=True)):
            if mask is None:
                part.addmm_(own, factor)
            else:
                part.addcmul_(own @ factor, mask.split(ctx.rows)[at], value=1 / (1 - ctx.p))
        return d_x, None, None, None, *(grad.to(dtype) for grad, dtype in zip((*d_a, *d_bt), ctx.dtypes, strict=True))


def lorafusion(p: Problem) -> tuple[Callable[[], object], Results]:
    x, factors, others = p.x.detach().clone().requires_grad_(), p.of_each(p.a), p.of_each(p.bt)

    def run() -> None:
        for leaf in (x, *factors, *others):
            leaf.grad = None
        SplitAtS.apply(x, p.weight, p.p, p.tokens // p.clients, *factors, *others).backward(p.d_y)

    return run, lambda: (x.grad, torch.cat([t.grad for t in factors]), torch.cat([t.grad for t in others]))


def padded(p: Problem) -> tuple[Callable[[], object], Results]:
    def stacked(factor: Tensor) -> Tensor:
        return torch.stack([F.pad(own, (0, 0, 0, max(p.ranks) - own.shape[0])) for own in factor.detach().split(p.ranks)]).requires_grad_()

    def unpadded(grad: Tensor) -> Tensor:
        return torch.cat([own[:rank] for own, rank in zip(grad, p.ranks, strict=True)])

    a, bt, x = stacked(p.a), stacked(p.bt), p.x.detach().clone().requires_grad_()

    def run() -> None:
        x.grad = a.grad = bt.grad = None
        s = torch.bmm(F.dropout(x, p.p).view(p.clients, -1, p.n), a.to(x.dtype).transpose(1, 2))
        (F.linear(x, p.weight) + torch.bmm(s, bt.to(x.dtype)).view(p.tokens, p.m)).backward(p.d_y)

    return run, lambda: (x.grad, unpadded(a.grad), unpadded(bt.grad))


@cache
def no_grouped_mm(device: torch.device, dtype: torch.dtype) -> str:
    """Why there is no `torch.nn.functional.grouped_mm` for such tensors; "" where there is."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    x, w = torch.ones(16, 16, device=device, dtype=dtype, requires_grad=True), torch.ones(2, 16, 16, device=device, dtype=dtype, requires_grad=True)
    try:
        F.grouped_mm(x, w, offs=torch.tensor([8, 16], device=device, dtype=torch.int32)).backward(torch.ones_like(x))
    except RuntimeError as error:
        return f"grouped_mm of {dtype} on {device}: {str(error).splitlines()[0]}"
    return ""


def grouped(p: Problem, by_rank: bool = False) -> tuple[Callable[[], object], Results]:
    """One grouped product of all clients, the factors filled up with zero rows to the largest rank.

    by_rank: one product for each rank, of the clients that have it, without zero rows but for those to whole 16 bytes, which grouped_mm asks for.
    """
    rows, unit = p.tokens // p.clients, 16 // p.dtype.itemsize
    x, of_client, parts = p.x.detach().clone().requires_grad_(), {}, []
    for rank in sorted(set(p.ranks)) if by_rank else [max(p.ranks)]:
        members = [k for k, own in enumerate(p.ranks) if own == rank or not by_rank]
        size = -(-rank // unit) * unit

        def stacked(factor: Tensor, members: list[int] = members, size: int = size) -> Tensor:
            each = factor.detach().split(p.ranks)
            return torch.stack([F.pad(each[k], (0, 0, 0, size - p.ranks[k])) for k in members]).requires_grad_()

        a, bt = stacked(p.a), stacked(p.bt)
        of_client |= {k: (a, bt, place) for place, k in enumerate(members)}
        at = torch.cat([torch.arange(k * rows, (k + 1) * rows, device=p.device) for k in members])
        ends = torch.arange(1, len(members) + 1, device=p.device, dtype=torch.int32) * rows
        parts.append((None if len(members) == p.clients else at, ends, a, bt))

    def run() -> None:
        x.grad = None
        y, dropped = F.linear(x, p.weight), F.dropout(x, p.p)
        for at, ends, a, bt in parts:
            a.grad = bt.grad = None
            s = F.grouped_mm(dropped if at is None else dropped.index_select(0, at), a.to(x.dtype).transpose(1, 2), offs=ends)
            own = F.grouped_mm(s, bt.to(x.dtype), offs=ends)
            y = y + own if at is None else y.index_add(0, at, own)
        y.backward(p.d_y)

    def of_each(which: int) -> Tensor:
        return torch.cat([of_client[k][which].grad[of_client[k][2], :rank] for k, rank in enumerate(p.ranks)])

    return run, lambda: (x.grad, of_each(0), of_each(1))


def providers(p: Problem, rungs: Sequence[str] | None = None) -> dict[str, Provider]:
    """rungs: those of this project that are measured; None: all that serve the device."""
    present = [rung for rung in _library.available() if rung != "reference" and (rung == "cpu") == (p.device.type == "cpu")]
    own: dict[str, Provider] = {f"hetlora {rung}": partial(ours, rung=rung) for rung in rungs or (*present, "reference")}
    stock = importlib.util.find_spec("peft") is not None
    own |= {RIVAL: peft} if stock else {}
    own |= {"torch addmm one by one": addmm, LORAFUSION: lorafusion, "torch padded bmm": padded}
    if p.clients > 1 and (p.n * p.dtype.itemsize) % 16 == (p.m * p.dtype.itemsize) % 16 == 0 and not no_grouped_mm(p.device, p.dtype):
        own["torch padded grouped_mm"] = grouped
        own |= {"torch grouped_mm by rank": partial(grouped, by_rank=True)} if len(set(p.ranks)) > 1 else {}
    if stock and (p.n, p.m) in COMPILED and p.tokens in (1024, 8192) and p.ranks == [16] and (p.dtype == torch.float32 or p.device.type == "cuda"):
        own["PEFT compiled"] = partial(peft, compiled=True)
    return own


def wanted(options: Any, device: torch.device) -> list[tuple[tuple[Any, ...], str]]:
    """(arguments of the problem, name) of each case."""
    on_cpu = device.type == "cpu"
    shapes, loads = (CPU_SHAPES, CPU_LOADS) if on_cpu else (GPU_SHAPES, GPU_LOADS)
    if options.quick:
        shapes, loads = [(40, 24)], [(16, [4]), (16, [4, 1, 7, 4])]
    elif options.short:
        shapes, loads = SHORT[device.type]
    named = [("smallest call", *SMALLEST), *(("lora_linear", shape, load) for shape in shapes for load in loads)]
    found: list[tuple[tuple[Any, ...], str]] = []
    for dtype in (torch.float32, torch.bfloat16) if on_cpu or options.quick else (torch.bfloat16,):
        if options.short and not options.quick and not multiplies_fast(dtype, device.type):
            shapes, loads = SHORT_SLOW
            named = [("lora_linear", shape, load) for shape in shapes for load in loads]
        for name, (n, m), (tokens, ranks) in named:
            for p in (0.1,) if options.short else (0.0, 0.1):
                op = f"{name} p={p}"
                if chosen(options, op, name, f"T={tokens}", f"{n}->{m}", str(dtype).removeprefix("torch.")):
                    found.append(((n, m, tokens, ranks, dtype, device, p), op))
    return found


def cases(options: Any, device: torch.device) -> Iterator[tuple[Problem, str]]:
    return ((Problem(*arguments), op) for arguments, op in wanted(options, device))


def check(p: Problem, rungs: Sequence[str] | None = None) -> None:
    """`WrongResultError` where a provider's gradients, without dropout, are not the reference's."""
    plain = Problem(p.n, p.m, p.tokens, p.ranks, p.dtype, p.device)
    truth: tuple[Tensor, ...] = ()
    for name, make in {"truth": partial(ours, rung="reference"), **providers(p, rungs)}.items():
        work, results = make(plain)
        work()
        own = tuple(t.double().clone() for t in results())
        truth = truth or own
        for label, one, true in zip(("d_x", "d_a", "d_bt"), own, truth, strict=True):
            error = float((one - true).norm() / true.norm())
            if not error <= TOLERANCE[p.dtype]:
                raise WrongResultError(f"{name}: {label} of {p.n}->{p.m}, {p.dtype} is off by {error:.2e}; nothing is timed")


def _text(ranks: list[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}..{max(ranks)}"


def flops(p: Problem) -> int:
    """Of y = x W^T and d_x = d_y W, and six products of a client's rows with its factors: two forward, four backward."""
    rows = p.tokens // p.clients
    return 4 * p.tokens * p.n * p.m + 6 * rows * sum(p.ranks) * (p.n + p.m)


def saved_bytes(run: Callable[[], object], p: Problem) -> int:
    """What the forward pass keeps for the backward pass beside inputs, weight and factors (of these: anything that is not one of the call's own tensors)."""
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not (tensor.requires_grad or tensor.data_ptr() == p.weight.data_ptr()):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    known = {t.untyped_storage().data_ptr() for t in (p.x, p.weight, p.d_y, p.a, p.bt)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for at, size in held.items() if at not in known)


def measure(case: tuple[Problem, str], options: Any, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """One record for each provider and the frozen layer; bytes: x, W, y, d_y and d_x once."""
    torch.set_num_threads(threads)
    p, op = case
    check(p, options.rungs)
    runs: dict[str, Callable[[], object]] = {YARDSTICK: frozen(p)} | {name: make(p)[0] for name, make in providers(p, options.rungs).items()}
    contest = {YARDSTICK, RIVAL, *(name for name in runs if name.startswith("hetlora") and name != "hetlora reference")}
    timings = interleaved(runs, YARDSTICK, device, options.seconds / 4, most_rounds=60, least_rounds=9, aside=runs.keys() - contest, how=options.how)
    size = (2 * p.tokens * (p.n + p.m) + p.n * p.m) * p.dtype.itemsize
    records = []
    for name, timing in timings.items():
        record = {"op": op, "shape": f"{p.n}->{p.m} T={p.tokens} r={_text(p.ranks)}", "clients": p.clients, "dtype": str(p.dtype).removeprefix("torch.")}
        record |= {"threads": threads, "provider": name, "yardstick": YARDSTICK, "bytes": size, "note": ""} | timing.figures(size)
        record["flops"] = flops(p)
        record["ratio_to_peft"] = timing.over(timings[RIVAL]) if RIVAL in timings else None
        own = device.type == "cuda" and p.dtype == torch.bfloat16 and name.startswith("hetlora")
        record["modelled_s"] = model.layer_seconds(model.gpu_of(device), p.tokens, p.n, p.m, p.ranks, p.p > 0) if own else None
        record |= {"peak_extra_bytes": peak_extra_bytes(runs[name], device), "saved_bytes": saved_bytes(runs[name], p)}
        records.append(record)
    return records
