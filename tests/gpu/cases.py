"""Calls of every server and client op on data that a float64 run of the reference judges: shared by the Triton and the CUDA tests.

A case is a function of a type that returns the op's arguments. `failures` runs it on a rung and on the reference, both in that type, and on the reference in
float64 with the same data: error <= max(f x the reference's own, 2 eps |truth|), 8 eps where the result is float64 and so no more exact than the truth
it is compared with. f is the factor of tests/kernels/accuracy.py and a tenth for luck: the reference's sums have the order of the processor's library.
The reference rounds operands as it does for tensors on a GPU, wherever these lie. Copies and casts must be equal bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hetlora_kernels import reference
from hetlora_kernels.layout import joined
from hetlora_kernels.ops.quantize import CODES, code_bytes
from hetlora_kernels.reference import compute_dtype

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from accuracy import factor_of

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
WRITTEN = {"truncate_": (0,), "aggregate_": (0,), "accumulate_": (0,), "adamw_": (0, 2, 3, 4, 6), "sgd_": (0, 2, 3), "expand_": (0,)}
WRITTEN |= {"quantize_rows_": (0, 1), "dequantize_rows_": (0,), "cross_entropy_": (0,)}
EXACT = {"truncate_", "quantize_rows_", "dequantize_rows_"}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"ranks": [[4, 0, 1, 7], [3, 18, 40, 2]], "widths": [33, 64]},
    # More than 32 clients, tiles off the diagonal, more than one split, a width of one.
    "large": {"ranks": [[1, 0, 3, 8] * 9 + [33, 70], [2] * 37 + [5]], "widths": [1, 2056]},
    # Gram tiles of every size, on the diagonal and off it, in rows that are aligned, not aligned, and in several splits.
    "tiles": {"ranks": [[64, 70, 5, 130], [33, 96, 17, 0], [66, 20, 1, 49]], "widths": [136, 41, 2056]},
    # Modules that share their ranks, which then travel once.
    "shared": {"ranks": [[3, 0, 18, 2]] * 2 + [[1, 2, 0, 5]] + [[4, 4, 4, 4]] * 2, "widths": [33, 8, 5, 16, 40]},
    # A module without columns, one without rank rows.
    "edge": {"ranks": [[2, 1], [0, 0], [3, 2]], "widths": [0, 5, 16]},
}

Case = Callable[[torch.dtype], tuple[str, list[Any]]]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rows(shape: Mapping[str, Any], dtype: torch.dtype, seed: int, extra: int = 0) -> list[Tensor]:
    g = _generator(seed)
    return [torch.randn(sum(r), w + extra, generator=g, dtype=torch.float64).to(dtype) for r, w in zip(shape["ranks"], shape["widths"], strict=True)]


def _flat(lists: Sequence[Sequence[int]]) -> list[int]:
    return [value for own in lists for value in own]


def _most(shape: Mapping[str, Any]) -> int:
    return max(_flat(shape["ranks"])) + 1


def _empty(rows: int, shape: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    return [torch.full((rows, w), float("nan"), dtype=dtype) for w in shape["widths"]]


def _clients(shape: Mapping[str, Any]) -> int:
    return len(shape["ranks"][0])


def truncate(shape: Mapping[str, Any], dense: bool, target: torch.dtype | None, dtype: torch.dtype) -> tuple[str, list[Any]]:
    g, most = _generator(1), _most(shape)
    bank = [torch.randn(most, w, generator=g, dtype=torch.float64).to(dtype) for w in shape["widths"]]
    counts = [_clients(shape) * most if dense else sum(r) for r in shape["ranks"]]
    out = [torch.full((c, w), float("nan"), dtype=target or dtype) for c, w in zip(counts, shape["widths"], strict=True)]
    if dense:
        out = [o.view(_clients(shape), most, -1) for o in out]
    return "truncate_", [out, bank, joined(shape["ranks"]), dense]


def aggregate(shape: Mapping[str, Any], owners: bool, keep: bool, target: torch.dtype | None, dtype: torch.dtype) -> tuple[str, list[Any]]:
    g, most = _generator(2), _most(shape)
    weights = torch.rand(_clients(shape), len(shape["widths"]), generator=g, dtype=torch.float64)
    weights[0] = 0
    kept = [torch.randn(most, w, generator=g, dtype=torch.float64).to(dtype) for w in shape["widths"]] if keep else []
    out = _empty(most, shape, target or dtype)
    return "aggregate_", [out, _rows(shape, dtype, 3), weights.to(compute_dtype(dtype)), kept, joined(shape["ranks"]), owners]


def accumulate(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[str, list[Any]]:
    g, sums = _generator(4), compute_dtype(dtype)
    total = [torch.randn(sum(r) + 2, w, generator=g, dtype=torch.float64).to(sums) for r, w in zip(shape["ranks"], shape["widths"], strict=True)]
    return "accumulate_", [total, _rows(shape, dtype, 5), torch.rand(len(shape["widths"]), generator=g, dtype=torch.float64).to(sums)]


def _stored(shape: Mapping[str, Any], bits: int) -> list[tuple[int, int]]:
    return [(sum(r), code_bytes(w, bits)) for r, w in zip(shape["ranks"], shape["widths"], strict=True)]


def quantize(shape: Mapping[str, Any], bits: int, dtype: torch.dtype) -> tuple[str, list[Any]]:
    """Rows of many magnitudes, of zeros, of ties, and with what is not finite: the public function refuses those after the op."""
    rows = _rows(shape, dtype, 30)
    for t in (t for t in rows if t.numel()):
        t[0], t[-1] = 0, torch.randint(-7, 8, t[-1].shape, generator=_generator(31)).to(dtype)
        t[1:2] *= 1e-3
        t[2:3] *= 2.0**-126 if t.dtype != torch.float16 else 2.0**-14
        t[3:4, -1:] = float("inf")
    codes = [torch.full(size, 5, dtype=CODES[bits]) for size in _stored(shape, bits)]
    return "quantize_rows_", [codes, [torch.full(size[:1], float("nan")) for size in _stored(shape, bits)], rows, bits]


def dequantize(shape: Mapping[str, Any], bits: int, dtype: torch.dtype) -> tuple[str, list[Any]]:
    g, limits = _generator(32), torch.iinfo(CODES[bits])
    codes = [torch.randint(limits.min, limits.max + 1, size, generator=g, dtype=torch.int64).to(CODES[bits]) for size in _stored(shape, bits)]
    scales = [torch.randn(size[0], generator=g).abs() for size in _stored(shape, bits)]
    out = [torch.full((sum(r), w), float("nan"), dtype=dtype) for r, w in zip(shape["ranks"], shape["widths"], strict=True)]
    return "dequantize_rows_", [out, codes, scales, bits]


def gram(shape: Mapping[str, Any], exact: bool, dtype: torch.dtype) -> tuple[str, list[Any]]:
    return "gram", [_rows(shape, dtype, 6), joined(shape["ranks"]), exact]


def delta_norms(shape: Mapping[str, Any], exact: bool, dtype: torch.dtype) -> tuple[str, list[Any]]:
    return "delta_norms", [_rows(shape, dtype, 7), _rows(shape, dtype, 8, extra=8), joined(shape["ranks"]), exact]


def _cuts(shape: Mapping[str, Any]) -> list[int]:
    cuts = {id(own): [(rank + 1) // 2 if k % 3 else rank + k % 2 for k, rank in enumerate(own)] for own in shape["ranks"]}
    return joined([cuts[id(own)] for own in shape["ranks"]])


def tail_norms(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[str, list[Any]]:
    return "tail_norms", [_rows(shape, dtype, 9), joined(shape["ranks"]), _cuts(shape)]


def _step(shape: Mapping[str, Any], clip: bool, lam: bool, states: int, dtype: torch.dtype) -> tuple[list[list[Tensor]], list[Any]]:
    lists = [_rows(shape, dtype, 10 + i) + _rows(shape, dtype, 20 + i, extra=8) for i in range(2 + states)]
    lists[2:] = [[t.abs() for t in own] for own in lists[2:]]
    if lam:
        lists[0][0].zero_()  # a zero norm: the sub-gradient is zero
    per_client = torch.linspace(0, 1.5, _clients(shape), dtype=torch.float64)
    active = torch.arange(_clients(shape)) % 4 != 2
    return lists, [active, per_client if clip else None, per_client.flip(0) if lam else None, joined(shape["ranks"]), _cuts(shape) if lam else []]


def _casts(params: list[Tensor], cast: torch.dtype | None) -> list[Tensor]:
    return [] if cast is None else [p.to(cast, copy=True) for p in params]


def adamw(shape: Mapping[str, Any], clip: bool, lam: bool, cast: torch.dtype | None, dtype: torch.dtype) -> tuple[str, list[Any]]:
    lists, rest = _step(shape, clip, lam, 2, dtype)
    clients = _clients(shape)
    rate, counts = torch.linspace(0.01, 0.1, clients, dtype=torch.float64), torch.arange(clients) * 7
    return "adamw_", [*lists, _casts(lists[0], cast), rate, counts, *rest, 0.9, 0.999, 1e-8, 0.01]


def sgd(shape: Mapping[str, Any], clip: bool, lam: bool, momentum: bool, cast: torch.dtype | None, dtype: torch.dtype) -> tuple[str, list[Any]]:
    lists, rest = _step(shape, clip, lam, 1, dtype)
    rate = torch.linspace(0.01, 0.1, _clients(shape), dtype=torch.float64)
    return "sgd_", [*lists[:2], lists[2] if momentum else [], _casts(lists[0], cast), rate, *rest, 0.9, 0.01]


def cross_entropy(
    shape: Mapping[str, Any], of: int, scale: float, softcap: float, smoothing: float, z_loss: float, slopes: bool, dtype: torch.dtype
) -> tuple[str, list[Any]]:
    """Rows of one module's width: large ones, one with words that never come, one without a label, one that holds a NaN and has none either."""
    words = max(1, shape["widths"][of])
    logits = 3 * torch.randn(6, words, generator=_generator(40), dtype=torch.float64)
    logits[1], logits[3] = 10 * logits[1], float("nan")
    if softcap or not smoothing:  # else the loss is infinite
        logits[2, (words + 1) // 2 :] = float("-inf")
    labels = torch.randint(0, (words + 1) // 2, (6,), generator=_generator(41))
    labels[3:5] = -100
    weights = torch.rand(6, generator=_generator(42), dtype=torch.float64).to(compute_dtype(dtype)) if softcap or z_loss else None
    return "cross_entropy_", [logits.to(dtype), labels, weights, scale, softcap, smoothing, z_loss, slopes]


def odd_rows(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[str, list[Any]]:
    """Labelled rows with a NaN, with +inf, with nothing above -inf; a row as any other."""
    words = max(1, shape["widths"][-1])
    logits = 3 * torch.randn(4, words, generator=_generator(43), dtype=torch.float64)
    logits[0, words // 2], logits[1, -1], logits[2] = float("nan"), float("inf"), float("-inf")
    return "cross_entropy_", [logits.to(dtype), torch.zeros(4, dtype=torch.int64), None, 1.0, 0.0, 0.0, 0.0, True]


def no_word(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[str, list[Any]]:
    """Labels that are no word, and one that is."""
    words = max(1, shape["widths"][-1])
    logits = 3 * torch.randn(4, words, generator=_generator(46), dtype=torch.float64)
    return "cross_entropy_", [logits.to(dtype), torch.tensor([words, -1, 1 << 32, 0]), None, 1.0, 0.0, 0.0, 0.0, True]


def saturated(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[str, list[Any]]:
    """Logits at six times the cap and more, whose slopes are small; by weights these count more than the losses."""
    size = 6 + 1.5 * torch.rand(4, max(1, shape["widths"][-1]), generator=_generator(44), dtype=torch.float64)
    logits = size * torch.randint(0, 2, size.shape, generator=_generator(45)).mul(2).sub(1)
    return "cross_entropy_", [logits.to(dtype), torch.zeros(4, dtype=torch.int64), torch.full((4,), 1e6, dtype=compute_dtype(dtype)), 1.0, 1.0, 0.0, 0.0, True]


def _cross_entropy_of_any_label(logits: Tensor, labels: Tensor, *rest: Any) -> Tensor:
    """The reference's, which refuses a label that is no word: on a GPU its loss and slopes are NaN."""
    wrong = _wrong(labels, logits.shape[1])
    losses = reference.cross_entropy_(logits, labels.masked_fill(wrong, -100), *rest)
    if rest[-1]:
        logits[wrong] = float("nan")
    return losses.masked_fill(wrong, float("nan"))


def _wrong(labels: Tensor, words: int) -> Tensor:
    return (labels != -100) & ((labels < 0) | (labels >= words))


def cases(shape: Mapping[str, Any]) -> dict[str, Case]:
    """Every op with each of its options at least once."""
    return {
        "truncate": partial(truncate, shape, False, None),
        "truncate-cast": partial(truncate, shape, False, torch.bfloat16),
        "truncate-dense-cast": partial(truncate, shape, True, torch.float32),
        "aggregate": partial(aggregate, shape, False, False, None),
        "aggregate-owners-keep": partial(aggregate, shape, True, True, torch.float32),
        "accumulate": partial(accumulate, shape),
        "quantize-8": partial(quantize, shape, 8),
        "quantize-4": partial(quantize, shape, 4),
        "dequantize-8": partial(dequantize, shape, 8),
        "dequantize-4": partial(dequantize, shape, 4),
        "gram": partial(gram, shape, False),
        "delta_norms": partial(delta_norms, shape, False),
        "delta_norms-exact": partial(delta_norms, shape, True),
        "tail_norms": partial(tail_norms, shape),
        "adamw": partial(adamw, shape, False, False, None),
        "adamw-clip": partial(adamw, shape, True, False, None),
        "adamw-clip-tail": partial(adamw, shape, True, True, None),
        "adamw-cast": partial(adamw, shape, False, True, torch.bfloat16),
        "cross_entropy": partial(cross_entropy, shape, -1, 1.0, 0.0, 0.0, 0.0, True),
        "cross_entropy-smooth": partial(cross_entropy, shape, 0, 0.5, 0.0, 0.1, 0.01, True),
        "cross_entropy-capped": partial(cross_entropy, shape, -1, 0.7, 3.0, 0.1, 0.05, True),
        "cross_entropy-losses": partial(cross_entropy, shape, 0, 1.0, 0.0, 0.0, 0.1, False),
        "cross_entropy-odd-rows": partial(odd_rows, shape),
        "cross_entropy-no-word": partial(no_word, shape),
        "cross_entropy-saturated": partial(saturated, shape),
        "sgd": partial(sgd, shape, False, False, False, None),
        "sgd-momentum-tail": partial(sgd, shape, False, True, True, None),
        "sgd-cast": partial(sgd, shape, False, False, False, torch.float16),
    }


def _copy(value: Any, dtype: torch.dtype | None = None) -> Any:
    if isinstance(value, list):
        return [_copy(v, dtype) for v in value]
    if isinstance(value, Tensor):
        return value.to(dtype if dtype and value.is_floating_point() else value.dtype, copy=True)
    return dtype if dtype and isinstance(value, torch.dtype) else value


def _results(op: str, run: Callable, args: list[Any]) -> list[Tensor]:
    returned = run(*args)
    written = [t for i in WRITTEN.get(op, ()) for t in (args[i] if isinstance(args[i], list) else [args[i]])]
    return written + (list(returned) if isinstance(returned, (list, tuple)) else [] if returned is None else [returned])


def _tensors(args: list[Any]) -> list[Tensor]:
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


def _distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Root of the sum of squared differences; NaN in the same places is no difference, elsewhere it is infinite."""
    total = 0.0
    for a, b in zip(left, right, strict=True):
        difference = (a.double() - b.double()).masked_fill(a.isnan() & b.isnan(), 0)
        total += float(difference.square().sum())
    return total**0.5 if total == total else float("inf")


def failures(case: Case, ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """None, or what is wrong with `ops` on this case."""
    with mock.patch.object(reference, "operand_dtype", lambda x: x.dtype):
        return _failures(case, ops, dtype)


def _failures(case: Case, ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    op, args = case(dtype)
    right = _cross_entropy_of_any_label if op == "cross_entropy_" else getattr(reference, op)
    try:
        got = _results(op, ops[op], _copy(args))
    except RuntimeError as refusal:  # a rung that need not wait for a device's labels refuses those that are no word
        if op == "cross_entropy_" and _wrong(args[1], args[0].shape[1]).any() and "labels: expected -100 or a word" in str(refusal):
            return None
        raise
    own = _results(op, right, _copy(args))
    for i, (a, b) in enumerate(zip(got, own, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {i}: expected {b.dtype} {tuple(b.shape)}, got {a.dtype} {tuple(a.shape)}"
    if op in EXACT:
        return None if all(torch.equal(a, b) for a, b in zip(got, own, strict=True)) else f"differs from the reference by {_distance(got, own):.3e}"
    truth = _results(op, right, _copy(args, torch.float64))
    size = sum(float(t.nan_to_num().square().sum()) for t in truth) ** 0.5
    kind = own[0].dtype
    # Where float64 is judged by float64 both round each of a sum's terms at random: sqrt(2 n) roundings' worth, and 8 at least.
    terms = max(t.shape[-1] for t in _tensors(args) if t.dim())
    least = (max(8.0, (2 * terms) ** 0.5) if kind == torch.float64 else 2.0) * torch.finfo(kind).eps * size
    error, allowed = _distance(got, truth), max((factor_of(kind) + 0.1) * _distance(own, truth), least)
    return None if error <= allowed else f"error {error:.3e} is above {allowed:.3e} (norm {size:.3e})"


def moments(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """None, or what is wrong with moments in bfloat16 beside float32: a step has the bits of one with these moments in float32, which are then rounded once.

    Beside bfloat16 they are as ever; beside other types an error, which `refused_moments` looks at: in the emulator none can be thrown.
    """
    if dtype in (torch.float16, torch.float64):
        return None
    for name in ("adamw-clip-tail", "adamw-cast", "sgd-momentum-tail"):
        for shape in (SHAPES["small"], {"ranks": [[4, 0, 1, 7]], "widths": [64]}):  # unaligned rows, aligned ones
            op, wide = cases(shape)[name](dtype)
            wide[2] = [t.bfloat16().to(dtype) for t in wide[2]]
            half = _copy(wide)
            half[2] = [t.to(torch.bfloat16, copy=True) for t in wide[2]]
            ops[op](*wide)
            ops[op](*half)
            wide[2] = [t.bfloat16() for t in wide[2]]
            for at in WRITTEN[op]:
                left, right = ([own[at]] if isinstance(own[at], Tensor) else own[at] for own in (wide, half))
                if not all(torch.equal(a, b) for a, b in zip(left, right, strict=True)):
                    return f"{name}: argument {at} differs from that of a step with the moments in {dtype}"
    return None


def refused_moments(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """None where moments in bfloat16 beside `dtype` are an error."""
    for name in ("adamw", "sgd-momentum-tail"):
        op, arguments = cases(SHAPES["small"])[name](dtype)
        arguments[2] = [t.bfloat16() for t in arguments[2]]
        try:
            ops[op](*arguments)
        except (RuntimeError, TypeError):
            continue
        return f"{name}: moments in bfloat16 beside {dtype} are not refused"
    return None
