"""cross_entropy_: losses of rows of logits and the slopes that replace them, within the roundings of their own sums, whatever the logits are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import Estimate, assert_exact, rounding, unit
from kernel_cases import FLOATS, drawn, guarded, same_bits

from hetlora_kernels.ops.cross_entropy import cross_entropy_
from hetlora_kernels.reference import compute_dtype

FORMS = [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"scale": 0.3, "z_loss": 0.1}, {"softcap": 5.0}, {"scale": 2.0, "softcap": 3.0, "label_smoothing": 0.2}]
WORDS = [1, 2, 17, 1024, 1039, 5003]
FUNCTION = 4  # an exponential, logarithm or hyperbolic tangent is within 1 ulp: the variance of four roundings


def case(words, dtype, rows=6, width=3.0):
    g = drawn(words)
    logits = (width * torch.randn(rows, words, generator=g, dtype=torch.float64)).to(dtype)
    labels, weights = torch.randint(0, words, (rows,), generator=g), torch.rand(rows, generator=g, dtype=torch.float64).to(compute_dtype(dtype)) + 0.1
    labels[2 % rows] = -100 if rows > 1 else labels[0]
    return logits, labels, weights


def function(value, of, slope, dtype):
    """A function of an estimate, from its value and its derivative there."""
    return Estimate(value, slope.square() * of.own + FUNCTION * rounding(value, dtype), slope.square() * of.shared)


def total(e, dtype):
    """[T, 1]: a row's sum, in chains of at most 128; what its addends share adds up as it is."""
    n, value = e.value.shape[1], e.value.sum(1, keepdim=True)
    chain = min(128, n)
    own = unit(dtype) ** 2 / 3 * ((1 + chain / 2) * e.value.square().sum(1, keepdim=True) + chain**2 / (3 * n) * value.square())
    return Estimate(value, own + e.own.sum(1, keepdim=True) + e.shared.sqrt().sum(1, keepdim=True).square()).rounded(dtype, 2)


def as_factor(of, by, dtype):
    """Estimates [T, V] times one [T, 1] of each row, whose error the row shares."""
    value, squared = of.value * by.value, by.value.square()
    return Estimate(value, of.own * squared, of.shared * squared + of.value.square() * by.var).rounded(dtype)


def expected(logits, labels, weights, scale=1.0, softcap=0.0, label_smoothing=0.0, z_loss=0.0):
    """Losses [T, 1] and slopes of rows that all have a label, by the equations, with the roundings of each step."""
    dtype, label = compute_dtype(logits.dtype), labels[:, None]
    z, steep = Estimate(logits), Estimate(torch.full_like(logits, scale, dtype=torch.float64))
    z = z if scale == 1 and not softcap else z.times(scale, dtype)
    if softcap:
        inner = z.times(1 / softcap, dtype)
        tangent = function(inner.value.tanh(), inner, 1 - inner.value.tanh().square(), dtype)
        falling = (-2 * inner.value.abs()).exp()
        e = function(falling, inner, 2 * falling, dtype)
        steep = function(4 * falling / (1 + falling).square(), e, 4 * (1 - falling) / (1 + falling) ** 3, dtype).times(scale, dtype)
        z = tangent.times(softcap, dtype)
    place = z.value.argmax(1, keepdim=True)
    top = z.map(lambda t: t.gather(1, place))
    off = Estimate(z.value - top.value, z.own, z.shared + top.var).rounded(dtype)
    e = function(off.value.exp(), off, off.value.exp(), dtype)
    e.own += torch.finfo(dtype).smallest_normal ** 2  # below it an exponential may be zero
    sums = total(e, dtype)
    exponent = function(sums.value.log(), sums, 1 / sums.value, dtype)
    whole = Estimate(exponent.value + top.value, exponent.own + top.var).rounded(dtype)
    at_label = off.map(lambda t: t.gather(1, label))
    losses = exponent.plus(at_label.times(label_smoothing - 1, dtype), dtype)
    if label_smoothing:
        mean = total(off, dtype)
        losses = losses.plus(mean.times(-label_smoothing / logits.shape[1], dtype), dtype)
    if z_loss:
        square = Estimate(whole.value.square(), 4 * whole.value.square() * whole.var).rounded(dtype)
        losses = losses.plus(square.times(z_loss, dtype), dtype)
    gain = (1 + 2 * z_loss * whole.value) / sums.value
    var = (2 * z_loss / sums.value).square() * whole.var + (gain / sums.value).square() * sums.var
    slopes = as_factor(e, Estimate(gain, var).rounded(dtype, FUNCTION), dtype)
    constant = Estimate(torch.full_like(slopes.value, -label_smoothing / logits.shape[1])).rounded(dtype)
    constant.value.scatter_add_(1, label, torch.full_like(sums.value, label_smoothing - 1))
    slopes = slopes.plus(constant.rounded(dtype), dtype)
    value = slopes.value * steep.value
    slopes = Estimate(value, *(getattr(slopes, k) * steep.value.square() + getattr(steep, k) * slopes.value.square() for k in ("own", "shared"))).rounded(dtype)
    return losses, slopes.times(weights.double()[:, None], dtype).rounded(logits.dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_losses_and_slopes_are_those_of_the_equations(dtype, form, device):
    for words in WORDS:
        logits, labels, weights = case(words, dtype)
        own = logits.to(device, copy=True)
        losses = cross_entropy_(own, labels.to(device), weights.to(device), **form).cpu()
        assert losses.dtype == compute_dtype(dtype)
        some = labels >= 0
        truth, slopes = expected(logits[some], labels[some], weights[some], **form)
        assert_exact({"losses": losses[some, None], "slopes": own.cpu()[some]}, {"losses": truth, "slopes": slopes})
        assert not bool(losses[~some].any()) and not bool(own.cpu()[~some].any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies_and_logits(dtype, device):
    """152k words, and logits of 1e4, where float32 has steps of 2^-10."""
    for words, width in ((151936, 3.0), (1039, 1e4)):
        logits, labels, weights = case(words, dtype, rows=1, width=width)
        own = logits.to(device, copy=True)
        losses = cross_entropy_(own, labels.to(device), weights.to(device)).cpu()
        truth, slopes = expected(logits, labels, weights)
        assert_exact({"losses": losses[:, None], "slopes": own.cpu()}, {"losses": truth, "slopes": slopes})


INF, NAN = math.inf, math.nan
ROWS = {
    "a word that never comes": ([0.5, -INF, 1.0, 2.0], 0),
    "the label never comes": ([0.5, -INF, 1.0, 2.0], 1),
    "one word alone comes": ([-INF, -INF, 7.0, -INF], 2),
    "no word comes": ([-INF, -INF, -INF, -INF], 0),
    "a NaN": ([0.5, NAN, 1.0, 2.0], 0),
    "a NaN before nothing": ([NAN, -INF, -INF, -INF], 1),
    "an infinity": ([0.5, INF, 1.0, 2.0], 0),
    "an infinity at the label": ([0.5, INF, 1.0, 2.0], 1),
    "far apart": ([-1e30, 1e30, 0.0, 3e38], 3),
    "far below": ([-1e30, -3e38, -1e30, -2e30], 2),
}


@pytest.mark.parametrize("long", [False, True], ids=["one block", "beside blocks of -inf"])
@pytest.mark.parametrize("name", ROWS)
def test_what_is_not_finite_is_as_torch_has_it(name, long, device):
    """In the first and in a later block of a row, and whatever the row is, its neighbours have their own bits."""
    values, label = ROWS[name]
    for place in (0, 2500) if long else (0,):
        row = torch.full((1, 3000 if long else 4), -INF)
        row[0, place : place + 4] = torch.tensor(values)
        given = torch.cat([torch.zeros(1, row.shape[1]), row, torch.ones(1, row.shape[1])])
        labels = torch.tensor([0, place + label, 1])
        leaf = given.clone().requires_grad_()
        truth = F.cross_entropy(leaf, labels, reduction="none")
        (slopes,) = torch.autograd.grad(truth.sum(), leaf)
        own = given.to(device, copy=True)
        losses = cross_entropy_(own, labels.to(device)).cpu()
        torch.testing.assert_close(losses, truth.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(own.cpu(), slopes, rtol=1e-6, atol=1e-7, equal_nan=True)
        neighbours = given[::2].to(device).contiguous()
        assert same_bits(cross_entropy_(neighbours, labels[::2].to(device)).cpu(), losses[::2]) and same_bits(neighbours.cpu(), own.cpu()[::2])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS[:2] + FORMS[3:4], ids=str)
def test_a_row_depends_on_itself_alone_and_nothing_else_is_written(dtype, form, device):
    for words in (5, 1039):
        logits, labels, weights = (t.to(device) for t in case(words, dtype))
        logits[labels < 0] = NAN  # an ignored row may hold anything
        own, guards_hold = guarded(tuple(logits.shape), dtype, device)
        own.copy_(logits)
        losses = cross_entropy_(own, labels, weights, **form)
        guards_hold()
        assert bool(losses.isfinite().all()) and bool(own.isfinite().all())
        kept = logits.clone()
        assert same_bits(cross_entropy_(kept, labels, slopes=False, **form), losses) and same_bits(kept, logits)
        for row in range(len(logits)):
            alone = logits[row : row + 1].clone()
            assert same_bits(cross_entropy_(alone, labels[row : row + 1], weights[row : row + 1], **form), losses[row : row + 1])
            assert same_bits(alone, own[row : row + 1])


def test_nothing_to_do(device):
    empty, none = torch.zeros(0, 7, device=device), torch.full((2,), -100, device=device)
    assert cross_entropy_(empty, none[:0]).shape == (0,)
    assert not bool(cross_entropy_(torch.zeros(2, 0, device=device), none).any())
    ignored = torch.full((2, 7), NAN, device=device)
    assert not bool(cross_entropy_(ignored, none).any()) and not bool(ignored.any())


X, LABELS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
BAD = [
    (lambda: cross_entropy_(X.t(), torch.zeros(5, dtype=torch.int64)), ValueError, r"^logits: expected contiguous.*strides \(1, 5\)"),
    (lambda: cross_entropy_(X[0], LABELS), ValueError, r"^logits: .*\(5,\)"),
    (lambda: cross_entropy_(X.long(), LABELS), ValueError, r"^logits: .*int64"),
    (lambda: cross_entropy_(X.clone().requires_grad_(), LABELS), ValueError, "^logits: expected none that require grad"),
    (lambda: cross_entropy_(X, LABELS[:1]), ValueError, r"^labels: expected torch.int64 \(2,\) .* \(1,\)"),
    (lambda: cross_entropy_(X, LABELS.int()), ValueError, r"^labels: .*int32"),
    (lambda: cross_entropy_(X, LABELS, torch.ones(2).double()), ValueError, r"^weights: expected torch.float32.*float64"),
    (lambda: cross_entropy_(X, LABELS, torch.ones(3)), ValueError, r"^weights: .*\(3,\)"),
    (lambda: cross_entropy_(X.clone(), LABELS + 5), RuntimeError, "index 5 is out of bounds"),
    (lambda: cross_entropy_(X.clone(), LABELS - 1), RuntimeError, "index -1 is out of bounds"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
