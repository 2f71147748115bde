"""Who does each server and client operation: this project on the rung in use, and PyTorch in its strong and in its usual form.

A provider takes a `Problem` and returns a callable that does the work once into buffers it holds, and what to compare with the reference's result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora_kernels import _library
from hetlora_kernels.ops.quantize import CODES, code_bytes


@dataclass
class Problem:
    """K clients' factors over the modules of `shape`: for each module A rows [S, n], then for each module B rows [S, m]."""

    shape: list[tuple[int, int]]
    ranks: list[int]
    dtype: torch.dtype
    device: torch.device
    layout: hk.RankLayout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = hk.RankLayout(self.ranks)

    @property
    def widths(self) -> list[int]:
        return [n for _, n in self.shape] + [m for m, _ in self.shape]

    @property
    def max_rank(self) -> int:
        return self.layout.max_rank

    @property
    def flat_ranks(self) -> list[int]:
        return self.ranks * len(self.widths)

    def draw(self, rows: int, seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        return [torch.randn(rows, width, generator=generator, device=self.device).to(dtype or self.dtype) for width in self.widths]

    def like(self, rows: int, fill: float | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
        make = torch.empty if fill is None else lambda *size, **options: torch.full(size, fill, **options)
        return [make(rows, width, dtype=dtype or self.dtype, device=self.device) for width in self.widths]

    @cached_property
    def rows(self) -> list[Tensor]:
        """The packed rows [S, d] of every factor."""
        return self.draw(self.layout.total, 0)

    @cached_property
    def bank(self) -> list[Tensor]:
        """Rows [R, d] of the server's factors."""
        return self.draw(self.max_rank, 1)

    @cached_property
    def weights(self) -> Tensor:
        """[K], summing to one."""
        draw = torch.rand(len(self.ranks), generator=torch.Generator().manual_seed(2)) + 0.5
        return (draw / draw.sum()).to(self.device)

    def client(self, tensor: Tensor, k: int) -> Tensor:
        return tensor[self.layout.rows(k)]


Run = tuple[Callable[[], object], Callable[[], list[Tensor]]]  # (the work, what it has written)
Provider = Callable[[Problem], Run]


def _native(op: str, *arguments: object) -> object:
    return _library.call(op)(*arguments)


# ---------------------------------------------------------------- aggregate


def aggregate_out(p: Problem) -> Run:
    out = p.like(p.max_rank, 0.0)
    table = p.weights[:, None].expand(len(p.ranks), len(p.widths)).contiguous()
    return lambda: _native("aggregate_", out, p.rows, table, [], p.flat_ranks, False), lambda: out


def aggregate_fresh(p: Problem) -> Run:
    out: list[Tensor] = []

    def run() -> None:
        out[:] = hk.aggregate(p.rows, p.layout, p.weights, p.max_rank)

    return run, lambda: out


def aggregate_loop(p: Problem) -> Run:
    out, weights = p.like(p.max_rank, 0.0), p.weights.tolist()
    sums = out if p.dtype == torch.float32 else p.like(p.max_rank, 0.0, torch.float32)  # in half precision the sum of 1000 clients would be off by a tenth

    def run() -> None:
        for target, total, rows in zip(out, sums, p.rows, strict=True):
            total.zero_()
            for k, rank in enumerate(p.ranks):
                total[:rank].add_(p.client(rows, k), alpha=weights[k])
            if target is not total:
                target.copy_(total)

    return run, lambda: out


def aggregate_pad(p: Problem) -> Run:
    out: list[Tensor] = []
    weights = p.weights.to(p.dtype)

    def run() -> None:
        out.clear()
        for rows in p.rows:
            padded = [torch.nn.functional.pad(p.client(rows, k), (0, 0, 0, p.max_rank - rank)) * weights[k] for k, rank in enumerate(p.ranks)]
            out.append(torch.stack(padded).sum(0))

    return run, lambda: out


# ---------------------------------------------------------------- truncate


def truncate_out(p: Problem) -> Run:
    out = p.like(p.layout.total, 0.0)
    return lambda: _native("truncate_", out, p.bank, p.flat_ranks, False), lambda: out


def truncate_fresh(p: Problem) -> Run:
    out: list[Tensor] = []

    def run() -> None:
        out[:] = hk.truncate(p.bank, p.layout)

    return run, lambda: out


def truncate_loop(p: Problem) -> Run:
    out = p.like(p.layout.total, 0.0)

    def run() -> None:
        for target, bank in zip(out, p.bank, strict=True):
            for k, rank in enumerate(p.ranks):
                p.client(target, k).copy_(bank[:rank])

    return run, lambda: out


def truncate_clones(p: Problem) -> Run:
    out: list[list[Tensor]] = []

    def run() -> None:
        out[:] = [[bank[:rank].clone() for rank in p.ranks] for bank in p.bank]

    return run, lambda: [torch.cat(own) for own in out]


# ---------------------------------------------------------------- streaming


def _uploads(p: Problem) -> list[list[Tensor]]:
    """The first eight clients' uploads, that stand for all: a server that streams holds no more than the one at hand."""
    few = Problem(p.shape, p.ranks[:8], p.dtype, p.device)
    return [[few.client(rows, k) for rows in few.rows] for k in range(len(few.ranks))]


def accumulate_native(p: Problem) -> Run:
    held, out = _uploads(p), p.like(p.max_rank, 0.0, torch.float32)
    weight = torch.full((len(p.widths),), 1 / len(p.ranks), device=p.device)

    def run() -> None:
        for k in range(len(p.ranks)):
            _native("accumulate_", out, held[k % len(held)], weight)

    return run, lambda: out


def accumulate_loop(p: Problem) -> Run:
    held, out = _uploads(p), p.like(p.max_rank, 0.0, torch.float32)

    def run() -> None:
        for k in range(len(p.ranks)):
            for total, rows in zip(out, held[k % len(held)], strict=True):
                total[: rows.shape[0]].add_(rows, alpha=1 / len(p.ranks))

    return run, lambda: out


# ---------------------------------------------------------------- norms


def gram_native(p: Problem) -> Run:
    out: list[Tensor] = []

    def run() -> None:
        out[:] = _native("gram", p.rows, p.flat_ranks, False)

    return run, lambda: out


def gram_loop(p: Problem) -> Run:
    out: list[list[Tensor]] = []

    def run() -> None:
        out[:] = [[own @ own.t() for own in rows.split(p.ranks)] for rows in p.rows]

    return run, lambda: [torch.cat([block.reshape(-1) for block in own]).float() for own in out]


def delta_native(p: Problem) -> Run:
    half, out = len(p.shape), []
    ranks = p.ranks * half

    def run() -> None:
        out[:] = [_native("delta_norms", p.rows[:half], p.rows[half:], ranks, False)]

    return run, lambda: out


def delta_loop(p: Problem) -> Run:
    half, out = len(p.shape), []

    def run() -> None:
        pairs = zip(p.rows[:half], p.rows[half:], strict=True)
        columns = [torch.stack([((x @ x.t()) * (y @ y.t())).sum() for x, y in zip(a.split(p.ranks), bt.split(p.ranks), strict=True)]) for a, bt in pairs]
        out[:] = [torch.stack(columns, 1).clamp_min(0).sqrt().float()]

    return run, lambda: out


def tail_native(p: Problem) -> Run:
    out, keep = [], [rank // 2 for rank in p.flat_ranks]

    def run() -> None:
        out[:] = [_native("tail_norms", p.rows, p.flat_ranks, keep)]

    return run, lambda: out


def tail_loop(p: Problem) -> Run:
    out = []

    def run() -> None:
        columns = [torch.stack([own[own.shape[0] // 2 :].norm() for own in rows.split(p.ranks)]) for rows in p.rows]
        out[:] = [torch.stack(columns, 1).float()]

    return run, lambda: out


# ---------------------------------------------------------------- quantised rows


def _codes(p: Problem, bits: int) -> list[Tensor]:
    kind = CODES[bits]
    return [torch.empty(p.layout.total, code_bytes(width, bits), dtype=kind, device=p.device) for width in p.widths]


def _scales(p: Problem) -> list[Tensor]:
    return [torch.empty(p.layout.total, device=p.device) for _ in p.widths]


def quantize_native(p: Problem, bits: int) -> Run:
    codes, scales = _codes(p, bits), _scales(p)
    return lambda: _native("quantize_rows_", codes, scales, p.rows, bits), lambda: [*codes, *scales]


def quantize_torch(p: Problem, bits: int) -> Run:
    """abs, amax, div and round in a buffer that is kept; of 4 bits two codes are put into a byte. Other forms of the maximum (a norm, aminmax) take longer."""
    codes, scales = _codes(p, bits), _scales(p)
    magnitudes = {width: torch.empty(p.layout.total, width, dtype=p.dtype, device=p.device) for width in p.widths}
    buffers = {width: torch.empty(p.layout.total, width, device=p.device) for width in p.widths}

    def run() -> None:
        for code, scale, rows in zip(codes, scales, p.rows, strict=True):
            width = rows.shape[1]
            torch.div(torch.abs(rows, out=magnitudes[width]).amax(1).float(), 2 ** (bits - 1) - 1, out=scale)
            numbers = torch.div(rows, scale[:, None], out=buffers[width]).round_()
            if bits == 8:
                code.copy_(numbers)
                continue
            integers = numbers.to(torch.int8)
            code.copy_(integers[:, ::2] & 15)
            code[:, : width // 2] |= (integers[:, 1::2] << 4).view(torch.uint8)

    return run, lambda: [*codes, *scales]


def _quantized(p: Problem, bits: int) -> tuple[list[Tensor], list[Tensor]]:
    codes, scales = hk.quantize_rows(p.rows, bits)
    return codes, scales


def dequantize_native(p: Problem, bits: int) -> Run:
    (codes, scales), out = _quantized(p, bits), p.like(p.layout.total)
    return lambda: _native("dequantize_rows_", out, codes, scales, bits), lambda: out


def dequantize_mul(p: Problem, bits: int) -> Run:
    (codes, scales), out = _quantized(p, bits), p.like(p.layout.total)

    def run() -> None:
        for target, code, scale in zip(out, codes, scales, strict=True):
            if bits == 8:
                torch.mul(code, scale[:, None], out=target)
                continue
            signed = code.view(torch.int8)
            target[:, ::2] = (signed << 4) >> 4
            target[:, 1::2] = (signed >> 4)[:, : target.shape[1] // 2]
            target.mul_(scale[:, None])

    return run, lambda: out


def dequantize_copy(p: Problem) -> Run:
    """Of 8 bits: codes up to 127 are exact in every type, so that the product is rounded once here too."""
    (codes, scales), out = _quantized(p, 8), p.like(p.layout.total)

    def run() -> None:
        for target, code, scale in zip(out, codes, scales, strict=True):
            target.copy_(code).mul_(scale[:, None])

    return run, lambda: out


PROVIDERS: dict[str, dict[str, Provider]] = {
    "aggregate": {"hetlora out=": aggregate_out, "hetlora fresh": aggregate_fresh, "torch add_ loop": aggregate_loop, "torch pad+stack+sum": aggregate_pad},
    "truncate": {"hetlora out=": truncate_out, "hetlora fresh": truncate_fresh, "torch copy_ loop": truncate_loop, "torch slices cloned": truncate_clones},
    "accumulate": {"hetlora": accumulate_native, "torch add_ loop": accumulate_loop},
    "gram": {"hetlora": gram_native, "torch loop": gram_loop},
    "delta_norms": {"hetlora": delta_native, "torch loop": delta_loop},
    "tail_norms": {"hetlora": tail_native, "torch loop": tail_loop},
    "quantize_rows": {"hetlora": lambda p: quantize_native(p, 8), "torch abs+amax+div+round": lambda p: quantize_torch(p, 8)},
    "quantize_rows, 4 bits": {"hetlora": lambda p: quantize_native(p, 4), "torch abs+amax+div+round": lambda p: quantize_torch(p, 4)},
    "dequantize_rows": {"hetlora": lambda p: dequantize_native(p, 8), "torch mul out=": lambda p: dequantize_mul(p, 8), "torch copy_+mul_": dequantize_copy},
    "dequantize_rows, 4 bits": {"hetlora": lambda p: dequantize_native(p, 4), "torch shifts+mul_": lambda p: dequantize_mul(p, 4)},
}
