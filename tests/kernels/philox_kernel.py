"""A Triton kernel that only draws: the library's own Philox with seven rounds, as the layer's kernels call it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _philox_kernel(counter, seed, out):
    zero = tl.zeros((1,), tl.uint32)
    c0, c1 = tl.load(counter).to(tl.uint32) + zero, tl.load(counter + 1).to(tl.uint32) + zero
    c2, c3 = tl.load(counter + 2).to(tl.uint32) + zero, tl.load(counter + 3).to(tl.uint32) + zero
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, c3, n_rounds=7)
    at = tl.arange(0, 1)
    tl.store(out + at, w0.to(tl.int64))
    tl.store(out + 1 + at, w1.to(tl.int64))
    tl.store(out + 2 + at, w2.to(tl.int64))
    tl.store(out + 3 + at, w3.to(tl.int64))


def philox_in_triton(counter: tuple[int, ...], key: tuple[int, int], device: torch.device) -> Tensor:
    """Four 32-bit words, as int64."""
    seed = key[0] | key[1] << 32
    out = torch.zeros(4, dtype=torch.int64, device=device)
    _philox_kernel[(1,)](torch.tensor(counter, device=device), torch.tensor([seed - 2**64 if seed >> 63 else seed], device=device), out)
    return out
