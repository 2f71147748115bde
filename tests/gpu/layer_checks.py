"""What lora_cases.py does not ask of the CUDA kernels: the whole layer, tables too large for kernel arguments, the mask bit by bit, bits that batch mates
must not change. A check is a function of (ops, type) that returns None or what is wrong; it raises nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from cases import SHAPES, cases, failures, moments
from lora_cases import LORA_SHAPES, _draw, _rows_of_x, _segment_args, grouped_gram, layer_cases, shrink

from hetlora_kernels.reference import compute_dtype, keep_mask

Check = Callable[[Mapping[str, Callable], torch.dtype], str | None]

# More clients with work than a launch carries in its arguments.
MANY = {"ranks": [1 + k % 3 for k in range(70)], "lengths": [1 + k % 2 for k in range(70)], "base": 1, "width": 24}
# Every row has a LoRA term, so that the layer may start from it.
COVERED = {"ranks": [4, 9, 16], "lengths": [5, 66, 1], "base": 0, "width": 40}
# More columns than one split of shrink has, and a rank whose rows of S do not start at multiples of 16 bytes.
SPLIT = {"ranks": [5, 16], "lengths": [3, 66], "base": 0, "width": 1050}
# As many splits as there are, and more ranks than expand adds up by itself.
MOST_SPLITS = {"ranks": [5, 140], "lengths": [3, 2], "base": 0, "width": 8216}
# Planes of partial sums of both gradients.
CHUNKS = {"ranks": [3, 5], "lengths": [1100, 2], "base": 0, "width": 20}


def mask(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """The kept elements of each op are those of reference.keep_mask, seen through ones and an identity."""
    rows, width, p = 70, 37, 0.3
    seeds, keys = torch.tensor([-0x1234567890ABCDEF]), torch.arange(rows) * (2**33 + 7) - 3
    expected = keep_mask(seeds[0], keys, width, p)
    segments = [seeds, keys, None, [width], [0], [rows], p]
    ones, eye, wide = torch.ones(rows, width, dtype=dtype), torch.eye(width, dtype=dtype), compute_dtype(dtype)
    seen = {"shrink": ops["shrink"](ones, eye, torch.ones(1, dtype=wide), *segments).view(rows, width)}
    seen["expand_"] = torch.zeros(rows, width, dtype=dtype)
    ops["expand_"](seen["expand_"], ones.reshape(-1), eye, *segments)
    # The Gram matrix of S = identity rows: row t of the result is row t of drop(x).
    square = [seeds, keys, None, [rows], [0], [rows], p]
    seen["grouped_gram"] = ops["grouped_gram"](torch.eye(rows, dtype=dtype).reshape(-1), ones, *square, wide)
    for name, values in seen.items():
        if not torch.equal(values != 0, expected):
            return f"{name}: {int(((values != 0) != expected).sum())} elements of the mask differ"
    return None


def alone(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """S and the gradient of a client have the same bits alone and beside others."""
    ranks, lengths, width = [5, 16, 130], [3, 1100, 9], 72
    seeds, x = torch.tensor([11, -12, 13]), _draw(61, sum(lengths), width, dtype)
    keys, rows = torch.arange(len(x)), _draw(62, sum(ranks), width, dtype)
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=compute_dtype(dtype))
    starts = [sum(lengths[:k]) for k in range(3)]
    s = ops["shrink"](x, rows, scale, seeds, keys, None, ranks, starts, lengths, 0.25)
    gram = ops["grouped_gram"](s, x, seeds, keys, None, ranks, starts, lengths, 0.25, dtype)
    flat = row = 0
    for k, (rank, length, start) in enumerate(zip(ranks, lengths, starts, strict=True)):
        own, one = slice(start, start + length), slice(k, k + 1)
        segments = (seeds[one], keys[own].clone(), None, [rank], [0], [length], 0.25)
        s_alone = ops["shrink"](x[own].clone(), rows[row : row + rank].clone(), scale[one].clone(), *segments)
        gram_alone = ops["grouped_gram"](s_alone, x[own].clone(), *segments, dtype)
        if not (torch.equal(s_alone, s[flat : flat + rank * length]) and torch.equal(gram_alone, gram[row : row + rank])):
            return f"client {k} differs alone"
        flat, row = flat + rank * length, row + rank
    return None


def poisoned_neighbours(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """NaN in the rows, rank rows and S of the other clients reaches nothing of the one between them."""
    ranks, lengths, width = [5, 7, 3], [3, 70, 9], 72
    segments = (None, None, None, ranks, [0, 3, 73], lengths, 0.0)
    x, rows, s = _draw(71, sum(lengths), width, dtype), _draw(72, sum(ranks), width, dtype), _draw(73, 1, 5 * 3 + 7 * 70 + 3 * 9, dtype)[0]
    results = []
    for poison in (0.0, float("nan")):
        for whole, own in ((x, slice(3, 73)), (rows, slice(5, 12)), (s, slice(15, 505))):
            kept = whole[own].clone()
            whole.fill_(poison)[own] = kept
        out = torch.zeros(sum(lengths), width, dtype=dtype)
        ops["expand_"](out, s, rows, *segments)
        shrunk = ops["shrink"](x, rows, torch.ones(3, dtype=compute_dtype(dtype)), *segments)
        results.append((out[3:73], shrunk[15:505], ops["grouped_gram"](s, x, *segments, dtype)[5:12]))
    for name, left, right in zip(("expand_", "shrink", "grouped_gram"), *results, strict=True):
        if not torch.equal(left, right):
            return f"{name} lets a neighbour in"
    return None


def strided_out(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """expand_ on every second column of a wider matrix; the others stay."""
    shape = COVERED
    s, rows = _draw(63, 1, 4 * 5 + 9 * 66 + 16, dtype)[0], _draw(64, sum(shape["ranks"]), shape["width"], dtype)
    wide = _draw(65, _rows_of_x(shape), 2 * shape["width"], dtype)
    before, dense = wide.clone(), wide[:, ::2].contiguous()
    segments: list[Any] = _segment_args(shape, False, False)
    ops["expand_"](wide[:, ::2], s, rows, *segments)
    ops["expand_"](dense, s, rows, *segments)
    return None if torch.equal(wide[:, ::2], dense) and torch.equal(wide[:, 1::2], before[:, 1::2]) else "differs from the contiguous one"


def far_rows(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """The last rows of matrices with more than 2^31 elements, in a sparse file, give the same bits as those rows by themselves."""
    width, rank, count = 64, 5, 66
    rows = 2**31 // width + count
    start = rows - count
    near, factor, scale = _draw(66, count, width, dtype), _draw(67, rank, width, dtype), torch.ones(1, dtype=compute_dtype(dtype))
    with tempfile.TemporaryDirectory() as folder:
        far = torch.from_file(f"{folder}/x", shared=True, size=rows * width, dtype=dtype).view(rows, width)
        far[start:] = near
        results = []
        for x, at in ((near.clone(), 0), (far, start)):
            segments = (None, None, None, [rank], [at], [count], 0.0)
            s = ops["shrink"](x, factor, scale, *segments)
            gram = ops["grouped_gram"](s, x, *segments, dtype)
            ops["expand_"](x, s, factor, *segments)
            results.append((s, gram, x[at : at + count].clone()))
    for name, left, right in zip(("shrink", "grouped_gram", "expand_"), *results, strict=True):
        if not torch.equal(left, right):
            return f"{name} differs"
    return None


def casts(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """Optimisers write the stepped factors in another type too, rounded once; those of clients that stay out are left alone."""
    for name in ("adamw-cast", "sgd-cast"):
        op, arguments = cases(SHAPES["small"])[name](dtype)
        copies = arguments[4 if op == "adamw_" else 3]
        stepped = 0
        for copy in copies:
            copy.fill_(77)
        ops[op](*arguments)
        for param, copy in zip(arguments[0], copies, strict=True):
            left = (copy == 77).all(1)
            if not torch.equal(copy[~left], param[~left].to(copy.dtype)):
                return f"{op}: a copy differs from the factor"
            stepped += int((~left).sum())
        owned = sum(int(arguments[-9 if op == "adamw_" else -7].repeat_interleave(torch.tensor(ranks)).sum()) for ranks in SHAPES["small"]["ranks"])
        if stepped != 2 * owned:
            return f"{op}: {stepped} rows were copied, {2 * owned} belong to active clients"
    return None


CHECKS: dict[str, Check] = {"mask": mask, "alone": alone, "poisoned neighbours": poisoned_neighbours, "strided out": strided_out}
CHECKS |= {"far rows": far_rows, "casts": casts, "moments": moments}
for _name, _shape in (("covered, aligned x", COVERED), ("covered, aligned output", {**COVERED, "width": 43}), ("base-only rows", LORA_SHAPES["small"])):
    CHECKS |= {f"{_case}, {_name}": partial(failures, _make) for _case, _make in layer_cases(_shape).items()}
CHECKS |= {f"several splits-{_case}": partial(failures, layer_cases(SPLIT)[_case]) for _case in ("forward-no-bias", "backward-gathered")}
CHECKS |= {f"most splits-{_case}": partial(failures, layer_cases(MOST_SPLITS)[_case]) for _case in ("forward-no-bias", "backward-base")}
CHECKS["several chunks-backward"] = partial(failures, layer_cases(CHUNKS)["backward"])
CHECKS["many clients-shrink"] = partial(failures, partial(shrink, MANY, True, True, None, False))
CHECKS["many clients-grouped_gram"] = partial(failures, partial(grouped_gram, MANY, False, True, None))
