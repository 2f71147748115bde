"""Oracles written from the equations, independent of the package's own reference, and the tolerance every kernel test uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

import hetlora_kernels as hk

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXED_RANKS = [4, 0, 1, 64, 3, 7, 8, 128, 16, 24]
MIXED_LENGTHS = [5, 3, 0, 17, 1, 33, 2, 9, 1, 65]  # empty, one token, 2^k + 1 tokens, rows of a client of rank 0
_WORD = 0xFFFFFFFF


# ---------------------------------------------------------------- dropout, in Python integers


def philox_words(counter: Sequence[int], key: Sequence[int], rounds: int) -> tuple[int, int, int, int]:
    """Philox4x32 of Salmon et al. (SC 2011), round by round."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for turn in range(rounds):
        if turn:
            k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
        left, right = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (right >> 32) ^ x1 ^ k0, right & _WORD, (left >> 32) ^ x3 ^ k1, left & _WORD
    return x0, x1, x2, x3


@lru_cache(maxsize=100_000)
def _eight_draws(seed: int, key: int, block: int) -> tuple[int, ...]:
    seed, key = seed % 2**64, key % 2**64
    words = philox_words((key & _WORD, key >> 32, block, 0), (seed & _WORD, seed >> 32), 7)
    return tuple(half for word in words for half in (word & 0xFFFF, word >> 16))


def kept(seed: int, keys: Sequence[int], columns: int, p: float) -> Tensor:
    """[rows, columns] booleans: an element is kept when its 16-bit draw is at least round(65536 p)."""
    threshold = round(65536 * p)
    rows = [[_eight_draws(seed, key, c // 8)[c % 8] >= threshold for c in range(columns)] for key in keys]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(keys), columns)


# ---------------------------------------------------------------- the layer


@dataclass
class Layer:
    """One call of the layer: factors in float64 on the CPU, who owns which row, and how the call is made."""

    ranks: list[int]
    ids: list[int]  # client of each row, -1 = base only
    n: int
    m: int
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    bt: Tensor
    scale: list[float]
    p: float = 0.0
    seeds: list[int] = field(default_factory=list)
    keys: list[int] | None = None
    grad: Tensor | None = None  # [T, m], the gradient that comes in

    def client_rows(self, k: int) -> list[int]:
        return [t for t, owner in enumerate(self.ids) if owner == k]

    def layout(self) -> hk.RankLayout:
        return hk.RankLayout(self.ranks)

    def segments(self) -> hk.Segments:
        keys = None if self.keys is None else torch.tensor(self.keys, dtype=torch.int64)
        return hk.Segments.from_ids(self.ids, row_keys=keys, num_clients=len(self.ranks))


def make_layer(ranks: Sequence[int], ids: Sequence[int], n: int, m: int, seed: int = 0, p: float = 0.0, bias: bool = True, keys: list[int] | None = None):
    """A `Layer` of Gaussian data with variances as in a real one, a scale and a dropout seed of its own for each client."""
    g = torch.Generator().manual_seed(1000 + seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std

    total = sum(ranks)
    return Layer(
        ranks=list(ranks),
        ids=list(ids),
        n=n,
        m=m,
        x=draw(len(ids), n),
        weight=draw(m, n, std=n**-0.5),
        bias=draw(m) if bias else None,
        a=draw(total, n, std=n**-0.5),
        bt=draw(total, m, std=0.5),
        scale=[0.5 + 0.25 * k for k in range(len(ranks))],
        p=p,
        seeds=[(-1) ** k * (0x1234567890ABCDEF + 7919 * k + seed) for k in range(len(ranks))],
        keys=keys,
        grad=draw(len(ids), m),
    )


def mixed_ids(shuffled: bool = True, base_rows: int = 4) -> list[int]:
    """Clients of MIXED_LENGTHS with some base-only rows, in order or shuffled."""
    ids = [k for k, length in enumerate(MIXED_LENGTHS) for _ in range(length)] + [-1] * base_rows
    if shuffled:
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(5)).tolist()
        ids = [ids[i] for i in order]
    return ids


def plain_layer(layer: Layer, x: Tensor, a: Tensor, bt: Tensor, base: Tensor) -> Tensor:
    """base + scale_k * drop(x) A_k^T B_k^T, client by client with autograd's gradients, in the type of x: the oracle in float64, PyTorch's own
    result in any other type."""
    ends = list(accumulate(layer.ranks))
    y = base
    for k, (end, rank) in enumerate(zip(ends, layer.ranks, strict=True)):
        rows = torch.tensor(layer.client_rows(k), dtype=torch.int64, device=x.device)
        if not rank or not len(rows):
            continue
        own = x[rows]
        if layer.p:
            keys = list(range(len(rows))) if layer.keys is None else [layer.keys[t] for t in layer.client_rows(k)]
            mask = kept(layer.seeds[k], keys, layer.n, layer.p).to(x.device)
            own = torch.where(mask, own / (1 - round(65536 * layer.p) / 65536), torch.zeros((), dtype=x.dtype, device=x.device))
        delta = F.linear(F.linear(own, a[end - rank : end].to(x.dtype)), bt[end - rank : end].t().to(x.dtype))
        y = y.index_add(0, rows, delta * layer.scale[k])
    return y


def run_plain(layer: Layer, dtype: torch.dtype, factor_dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """y, d_x, d_a, d_bt, d_bias of `plain_layer` in `dtype` on data already rounded to it."""
    leaves = leaf_tensors(layer, dtype, factor_dtype, device)
    base = F.linear(leaves["x"], leaves["weight"], leaves.get("bias"))
    y = plain_layer(layer, leaves["x"], leaves["a"], leaves["bt"], base)
    y.backward(layer.grad.to(device, y.dtype))
    return results(y, leaves)


def run_fused(layer: Layer, dtype: torch.dtype, factor_dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The same through `lora_linear`."""
    leaves = leaf_tensors(layer, dtype, factor_dtype, device)
    y = hk.lora_linear(
        *(leaves["x"], leaves["weight"], leaves.get("bias"), leaves["a"], leaves["bt"], layer.layout(), layer.segments()),
        scale=layer.scale,
        dropout=layer.p,
        seeds=torch.tensor(layer.seeds, device=device),
    )
    y.backward(layer.grad.to(device, y.dtype))
    return results(y, leaves)


def leaf_tensors(layer: Layer, dtype: torch.dtype, factor_dtype: torch.dtype | None, device: torch.device | str) -> dict[str, Tensor]:
    """The call's tensors rounded to `dtype` (the factors to `factor_dtype`); all but the weight require a gradient."""
    types = {"x": dtype, "weight": dtype, "bias": dtype, "a": factor_dtype or dtype, "bt": factor_dtype or dtype}
    present = {name: kind for name, kind in types.items() if getattr(layer, name) is not None}
    return {name: getattr(layer, name).to(device, kind, copy=True).requires_grad_(name != "weight") for name, kind in present.items()}


def results(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient that autograd left out, because no row reaches the leaf, is zero."""
    grads = {f"d_{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"y": y.detach(), **grads}


def rounded(layer: Layer, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> Layer:
    """The layer with every tensor rounded to `dtype` and held in float64, so that the float64 oracle sees the same data as the kernel."""
    cast = {name: getattr(layer, name) for name in ("x", "weight", "bias", "a", "bt", "grad")}
    cast = {name: t if t is None else t.to(factor_dtype if name in ("a", "bt") and factor_dtype else dtype).double() for name, t in cast.items()}
    return Layer(**{**layer.__dict__, **cast})


# ---------------------------------------------------------------- tolerance


Run = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def assert_as_exact_as_torch(runs: Sequence[Run], dtypes: dict[str, torch.dtype], factor: float = 1.1) -> None:
    """Over all `runs` of (result, PyTorch's own result, float64 truth), by name: error <= max(factor * PyTorch's own error, 2 eps ||truth||).

    8 eps where the result is float64: PyTorch's own is then the truth itself, bit for bit, and the truth no more exact than what it judges (a sum that
    begins with the LoRA term instead of the base is as good, and 2.2 eps away).
    """
    for name in runs[0][2]:
        error, own, size = (
            sum(float(f(run).detach().double().square().sum()) for run in runs) ** 0.5
            for f in (
                lambda run, name=name: run[0][name].cpu().double() - run[2][name],
                lambda run, name=name: run[1][name].cpu().double() - run[2][name],
                lambda run, name=name: run[2][name],
            )
        )
        steps = 8 if dtypes[name] == torch.float64 else 2
        bound = max(factor * own, steps * torch.finfo(dtypes[name]).eps * size)
        assert error <= bound, f"{name}: error {error:.3e} is above {bound:.3e} (PyTorch's own {own:.3e}, norm {size:.3e})"


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return bool((left.detach().contiguous().view(integers) == right.detach().contiguous().view(integers)).all())


# ---------------------------------------------------------------- memory


def guarded(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous tensor between 64 guard elements on each side, and the check that no guard was written."""
    size = 1
    for extent in shape:
        size *= extent
    buffer = torch.full((size + 128,), 12345.0, dtype=dtype, device=device)

    def check() -> None:
        guards = torch.cat((buffer[:64], buffer[-64:]))
        assert bool((guards == torch.tensor(12345.0, dtype=dtype, device=device)).all())

    return buffer[64 : 64 + size].view(*shape), check


def scattered(t: Tensor) -> Tensor:
    """The same values in a non-contiguous tensor: every second column of a wider one, rows transposed in memory."""
    wide = torch.full((2 * t.shape[1], t.shape[0]), float("nan"), dtype=t.dtype, device=t.device)
    view = wide.t()[:, ::2]
    view.copy_(t)
    return view
