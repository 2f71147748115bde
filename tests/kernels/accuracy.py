"""How exact a result must be: the one rule of the numeric tests. No part of it depends on the processor.

The bound. An operation rounds: fl(v) = v (1 + d) with |d| <= u, half the type's eps. To first order the error of a result is a sum e = sum_r d_r v_r over its
roundings r. We take the d_r as independent, of mean zero and uniform, so of variance at most u^2 / 3 (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, show
that independence and mean zero describe real sums). An `Estimate` carries the exact value of every element and the variance of its error:

- rounding to a type adds (u 2^floor(log2 |value|))^2 / 3;
- a sum of n products p_j adds u^2 / 3 times the squares of its products and of all its partial sums. The addends of our test data lie in no order, so a
  partial sum of j of them has mean j value / n and variance at most (j / n) sum p^2. Chains of L additions, n / L of them, then have
  partial sums whose squares add up to (L / 2) sum p^2 + (L^2 / 3 n) value^2. `Chain` says both factors, level by level;
- products and sums of estimates follow the product rule, to first order.

An error is an element's own, or shared by its row (that of S in S B is in all columns). Let D be the variances of the elements' own errors, w those shared,
summed by row. The covariance has eigenvalues at most D and w, so by Laurent and Massart (Ann. Statist. 28, 2000, lemma 1; it holds for uniform
errors too) with probability 1 - e^-x

    |e|^2 <= sum D + sum w + 2 sqrt(x) (|D| + |w|) + 2 x (max D + max w).

Such a norm does not see a small factor on a part of a 16-bit result, beside the rounding of all of it. So every block of the result is also projected on the
value: |<e, value>| <= sqrt(2 x') sd with x' = x + ln(2 blocks), where the sd takes shared errors as one of each row. Rows that are multiples of one row round
alike, which the sd does not know. So e counts there from the exact value or from that value rounded once, whichever is nearer. And every element is held to its
own variance: |e_i| <= sqrt(2 x'') sd_i with x'' = x + ln(2 elements).

The risk: x = 20, so a false alarm has a probability below 6.2e-9 a result, and below 1e-6 a test of up to 160 results.

The comparison with PyTorch. Over enough samples an error is at most `factor` times PyTorch's own on the same data. Results in 16 bits: their own rounding
dominates, whatever the order of a sum, and the factor is 1. Wider results: PyTorch's order of sums is the processor's. No library has more than 64 running sums
(four vectors of sixteen lanes), our kernels have at least four, an error grows at most with the square root of a chain's length, and the factor is
sqrt(64 / 4) = 4. The samples' luck is added to it: both errors are sums of squares as above, over as many rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

RISK = 20.0  # x of the docstring
BLOCK = (24, 512)  # rows and columns that are projected on the value together: a tile of csrc/cpu/lora.cpp

# n addends -> what the squares of all partial sums are at most: multiples of sum p^2, and of value^2.
Chain = Callable[[int], tuple[float, float]]


def any_order(n: int) -> tuple[float, float]:
    """One chain: of a sum whose order is not ours."""
    return n / 2, n / 3


def in_parts(n: int, lanes: int = 4) -> tuple[float, float]:
    """Our sums along columns (`dots`): on each lane chains of at most 64, those parts one after another, then the lanes by halves."""
    chain, parts = min(64, n / lanes), n / lanes / 64
    return chain / 2 + parts / 2 + math.log2(lanes), chain**2 / (3 * max(n, 1)) + parts / (3 * lanes) + 2


def in_groups(n: int) -> tuple[float, float]:
    """Our sums over rows of a weight: eight in a chain, 32 of those one after another, and such parts likewise."""
    groups, parts = min(32, n / 8), n / 256
    return (8 + groups + parts) / 2, (64 + 8 * groups**2) / (3 * max(n, 1)) + parts / 3


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Variance of the error when values are rounded to `dtype`: its steps are equal between two powers of two, and below the smallest normal number."""
    value = value.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    power = torch.ldexp(torch.ones_like(value), torch.frexp(value).exponent - 1)
    return (unit(dtype) * power).square() / 3


class Estimate:
    """Exact values, float64, and the variance of the error that the arithmetic so far makes in each: its own, and what it shares with its row."""

    def __init__(self, value: Tensor, own: Tensor | None = None, shared: Tensor | None = None) -> None:
        self.value = value.double()
        self.own = torch.zeros_like(self.value) if own is None else own
        self.shared = torch.zeros_like(self.value) if shared is None else shared

    def map(self, change: Callable[[Tensor], Tensor]) -> Estimate:
        """The same of another shape."""
        return Estimate(change(self.value), change(self.own), change(self.shared))

    def __getitem__(self, where) -> Estimate:
        return self.map(lambda t: t[where])

    def __setitem__(self, where, part: Estimate) -> None:
        self.value[where], self.own[where], self.shared[where] = part.value, part.own, part.shared

    def t(self) -> Estimate:
        return self.map(Tensor.t)

    @property
    def var(self) -> Tensor:
        return self.own + self.shared

    def rounded(self, dtype: torch.dtype, times: float = 1) -> Estimate:
        """Each element rounded to `dtype` so often."""
        return Estimate(self.value, self.own + times * rounding(self.value, dtype), self.shared)

    def times(self, factor: Tensor | float, dtype: torch.dtype) -> Estimate:
        """The product with numbers that are rounded to `dtype` themselves: one may stand for many elements, so its error u counts whole and as shared."""
        value, squared = self.value * factor, torch.as_tensor(factor).double().square()
        return Estimate(value, self.own * squared, self.shared * squared + (unit(dtype) * value).square()).rounded(dtype)

    def plus(self, other: Estimate, dtype: torch.dtype) -> Estimate:
        return Estimate(self.value + other.value, self.own + other.own, self.shared + other.shared).rounded(dtype)

    def matmul(self, other: Estimate, dtype: torch.dtype, chain: Chain = any_order) -> Estimate:
        """Products and sums in `dtype`."""
        value, squares = self.value @ other.value, self.value.square() @ other.value.square()
        of_squares, of_value = chain(self.value.shape[-1])
        own = unit(dtype) ** 2 / 3 * ((1 + of_squares) * squares + of_value * value.square())
        return Estimate(value, own, self.var @ other.value.square() + self.value.square() @ other.var)


def cat(parts: Sequence[Estimate]) -> Estimate:
    return Estimate(*(torch.cat([getattr(part, name) for part in parts]) for name in ("value", "own", "shared")))


def why_not_exact(got: Mapping[str, Tensor], expected: Mapping[str, Estimate]) -> str | None:
    """What is less exact than the bound of the docstring; None where nothing is."""
    for name, estimate in expected.items():
        result = got[name].detach().cpu()
        if result.shape != estimate.value.shape:
            return f"{name}: shape {tuple(result.shape)}, expected {tuple(estimate.value.shape)}"
        # The truth is float64 itself, and as far from exact as a float64 result that it judges.
        more = 2 if result.dtype == torch.float64 else 1
        rows = (lambda t: t.reshape(1, -1)) if estimate.value.dim() < 2 else (lambda t: t.flatten(1))
        tensors = result.double() - estimate.value, estimate.value, more * estimate.own + rounding(estimate.value, result.dtype), more * estimate.shared
        error, value, own, shared = (rows(t) for t in tensors)
        if not error.numel():
            continue
        by_row = shared.sum(1)
        tail = 2 * RISK**0.5 * (own.norm() + by_row.norm()) + 2 * RISK * (own.max() + by_row.max())
        size, bound = float(error.norm()), float(own.sum() + by_row.sum() + tail) ** 0.5
        if not size <= bound:
            return f"{name}: error {size:.3e} is above {bound:.3e} (norm {float(value.norm()):.3e})"
        widest = (error.abs() - (2 * (RISK + math.log(2 * error.numel())) * (own + shared)).sqrt()).argmax()
        worst, sd = float(error.flatten()[widest]), float((own + shared).flatten()[widest].sqrt())
        if not abs(worst) <= math.sqrt(2 * (RISK + math.log(2 * error.numel()))) * sd:
            return f"{name}: error {worst:.3e} of element {int(widest)} is above its bound (standard deviation {sd:.3e})"
        blocks = -(-value.shape[0] // BLOCK[0]) * -(-value.shape[1] // BLOCK[1])
        most = math.sqrt(2 * (RISK + math.log(2 * blocks)))
        for top in range(0, value.shape[0], BLOCK[0]):
            for left in range(0, value.shape[1], BLOCK[1]):
                e, v, d, w = (t[top : top + BLOCK[0], left : left + BLOCK[1]] for t in (error, value, own, shared))
                once = v.to(result.dtype).double() - v
                along, size = min(abs(float((e * v).sum())), abs(float(((e - once) * v).sum()))), float(v.square().sum())
                allowed = most * float((d * v.square()).sum() + (v.abs() * w.sqrt()).sum(1).square().sum()) ** 0.5
                if not along <= allowed:
                    return f"{name}: error {along / size:.3e} times the value in the block at {top}, {left} is above {allowed / size:.3e}"
    return None


def assert_exact(got: Mapping[str, Tensor], expected: Mapping[str, Estimate]) -> None:
    reason = why_not_exact(got, expected)
    assert reason is None, reason


def factor_of(dtype: torch.dtype) -> float:
    """Of PyTorch's own error, by the type of the result."""
    return 1.0 if torch.finfo(dtype).bits == 16 else 4.0


def luck(samples: float, x: float = RISK) -> float:
    """How far the roots of two sums of so many squares, of equal expectation, are apart at most: infinite where the samples are too few to tell."""
    low = 1 - 2 * math.sqrt(x / samples)
    return math.sqrt((1 + 2 * math.sqrt(x / samples) + 2 * x / samples) / low) if low > 0 else math.inf


def assert_as_exact_as(errors: Tensor, others: Tensor, factor: float, what: str = "") -> None:
    """Root mean square of the errors [samples, ...] <= factor * that of the others, and luck. The first dimension counts independent samples."""
    chance = luck(len(errors))
    assert chance < 2, f"{what}: {len(errors)} samples are too few to compare"
    ours, theirs = (float(own.double().square().mean().sqrt()) for own in (errors, others))
    assert ours <= factor * chance * theirs, f"{what}: error {ours:.3e} is above {factor:.2f} x {chance:.2f} x {theirs:.3e}"
