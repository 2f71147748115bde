"""Losses of rows of logits, whose slopes take the logits' place. A program per row, which it reads twice: for its largest logit with the sum of
exponentials, block by block, and for its slopes (from L2 where the rows in flight fit).

Bytes: the logits in, the slopes out. The exponential is arithmetic, as on a CPU: Triton's own is off by as many roundings as the exponent has. Options are
constants of the compiled kernel. A row has the same bits in any chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hetlora_kernels.reference import compute_dtype
from hetlora_kernels.triton._common import TYPES, alignment, block_for, cast, divide, launch, params, require_contiguous


@triton.jit
def _split_exponential(x):
    """(2^n, p) with e^x = 2^n (1 + p), for x <= 0 or NaN in float32; zero below 2^-126. See csrc/cpu/cross_entropy.cpp."""
    x = tl.where(x < -88.0, -88.0, x)
    shifted = x * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = x - n * 0.693145751953125
    r = r - n * 1.42860682e-6
    q = r * 0.0013814598787575960 + 0.0083687165752053261
    q = q * r + 0.041668392717838287
    q = q * r + 0.16666521131992340
    q = q * r + 0.49999994039535522
    bits = shifted.to(tl.int32, bitcast=True) - 0x4B400000 + 127
    return (bits << 23).to(tl.float32, bitcast=True), r + r * r * q


@triton.jit
def _exponential(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        power, p = _split_exponential(x)
        return power + power * p


@triton.jit
def _logarithm(x):
    """Of x >= 1: Triton's, whose error is some 1e-7, and one step of Newton's."""
    first = tl.log(x)
    return first + (x * _exponential(-first) - 1.0)


@triton.jit
def _capped(x, SCALE: tl.constexpr, CAP: tl.constexpr):
    """(z, dz / dx) of a logit: c tanh(scale x / c) from t = exp(-2 |scale x / c|) - 1, which is made without a difference of near numbers."""
    if CAP == 0:
        return x * SCALE, tl.zeros_like(x) + SCALE
    else:
        inner = divide(x * SCALE, tl.zeros_like(x) + CAP)
        doubled = -2.0 * tl.abs(inner)
        if x.dtype == tl.float64:
            doubled = tl.where(doubled < -700.0, -700.0, doubled)
            e = tl.exp(doubled)
            t = tl.where(e == 1.0, doubled, (e - 1.0) * doubled / tl.where(e == 1.0, 1.0, tl.log(e)))
        else:
            power, p = _split_exponential(doubled)
            e = power + power * p
            t = power * p + (power - 1.0)
        size = divide(-t, 2.0 + t)
        return CAP * tl.where(inner < 0, -size, size), SCALE * divide(4.0 * e, (2.0 + t) * (2.0 + t))


@triton.jit
def _block(row, column, words, SCALE: tl.constexpr, CAP: tl.constexpr, ACC: tl.constexpr, BYTES: tl.constexpr, ALIGN: tl.constexpr):
    """(z, dz / dx, which columns there are) of some columns of a row; -inf past it."""
    inside = tl.max_constancy(column < words, ALIGN)
    z, steep = _capped(tl.load(tl.multiple_of(row + column, BYTES), mask=inside, other=0.0).to(ACC), SCALE, CAP)
    return tl.where(inside, z, float("-inf")), steep, inside


@triton.jit
def _cross_entropy_kernel(
    logits,  # [T, V]
    labels,  # [T]
    weights,  # [T], or anything without WEIGHED
    losses,  # [T]
    words,  # V; a constant where it is 1
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    WEIGHED: tl.constexpr,
    SLOPES: tl.constexpr,
    T: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BYTES: tl.constexpr = 16 if ALIGN > 1 else 1
    at = tl.program_id(0).to(tl.int64)
    row, label = logits + at * words, tl.load(labels + at)
    offsets = tl.arange(0, BLOCK)
    if label == -100:
        tl.store(losses + at, 0.0)
        if SLOPES:
            for start in range(0, words, BLOCK):
                column = start + offsets
                inside = tl.max_constancy(column < words, ALIGN)
                tl.store(tl.multiple_of(row + column, BYTES), cast(tl.zeros([BLOCK], dtype=ACC), T), mask=inside)
        return
    is_word = (label >= 0) & (label < words)
    nothing = tl.where(is_word, 0.0, float("nan")).to(ACC)  # of a label that is no word: so are the loss and all slopes
    z_label, steep_label = _capped(tl.load(row + label, mask=is_word, other=0.0).to(ACC), SCALE, CAP)
    z_label += nothing
    origin = tl.where(tl.abs(z_label) < float("inf"), z_label, 0.0)  # the mean is taken of differences, which keep their bits where all logits are large
    top = tl.zeros_like(z_label) + float("-inf")
    total, off = tl.zeros_like(z_label), tl.zeros_like(z_label)
    for start in range(0, words, BLOCK):
        z, steep, inside = _block(row, start + offsets, words, SCALE, CAP, ACC, BYTES, ALIGN)
        before, top = top, tl.maximum(top, tl.max(z, axis=0))
        base = tl.where(top == float("-inf"), 0.0, top)  # columns of -inf alone have a sum of zero, not NaN
        total = total * _exponential(before - base) + tl.sum(_exponential(z - base), axis=0)
        if SMOOTHING != 0:
            off += tl.sum(tl.where(inside, z - origin, 0.0), axis=0)
    exponent = _logarithm(total)
    whole = exponent + top
    loss = exponent - (1 - SMOOTHING) * (z_label - top) + Z_LOSS * whole * whole
    if SMOOTHING != 0:
        loss -= SMOOTHING * (divide(off, tl.zeros_like(off) + words) + (origin - top))
    tl.store(losses + at, loss)
    if SLOPES:
        weight = tl.zeros_like(top) + 1.0
        if WEIGHED:
            weight = tl.load(weights + at)
        share = divide(1 + 2 * Z_LOSS * whole, total) + nothing
        each = divide(tl.zeros_like(top) + SMOOTHING, tl.zeros_like(top) + words)
        of_label = (_exponential(z_label - top) * share - each - (1 - SMOOTHING)) * steep_label * weight
        tl.debug_barrier()  # every thread has read the label's logit
        for start in range(0, words, BLOCK):
            column = start + offsets
            z, steep, inside = _block(row, column, words, SCALE, CAP, ACC, BYTES, ALIGN)
            slope = (_exponential(z - top) * share - each) * steep * weight
            tl.store(tl.multiple_of(row + column, BYTES), cast(tl.where(column == label, of_label, slope), T), mask=inside)


def cross_entropy_(logits, labels, weights, scale, softcap, smoothing, z_loss, slopes):
    """See `reference.cross_entropy_`; a label that is no word makes its loss and slopes NaN."""
    require_contiguous(logits=[logits])
    rows, words = logits.shape
    dtype = compute_dtype(logits.dtype)
    losses = logits.new_empty(rows, dtype=dtype)
    setting = params("cross_entropy", logits.device)
    launch(
        _cross_entropy_kernel,
        (rows,),
        logits.device,
        logits,
        labels.contiguous(),
        losses if weights is None else weights.contiguous(),
        losses,
        words,
        SCALE=scale,
        CAP=softcap,
        SMOOTHING=smoothing,
        Z_LOSS=z_loss,
        WEIGHED=weights is not None,
        SLOPES=slopes,
        T=TYPES[logits.dtype],
        ACC=TYPES[dtype],
        BLOCK=block_for(setting.pop("BLOCK") // (2 if dtype == torch.float64 else 1), words),  # more spills on sm_90
        ALIGN=alignment([words], [logits]),
        **setting,
    )
    return losses
