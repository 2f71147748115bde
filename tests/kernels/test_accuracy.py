"""The layer beside PyTorch's own arithmetic, and the rule of accuracy.py: it holds for sound sums and notices what loses accuracy."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import Estimate, assert_as_exact_as, assert_exact, factor_of, in_parts, luck, why_not_exact
from kernel_cases import ROUNDED_RANK, drawn, estimated, make_layer, rounded, run_fused, run_plain

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("n", "m", "ids", "seeds"), [(1100, 300, [0, 1] * 4, 40), (517, 300, [0] * 100 + [1] * 150, 5)], ids=["small calls", "large calls"])
@pytest.mark.parametrize(
    ("dtype", "factors", "ranks"),
    [
        (torch.float32, torch.float32, [64, 32]),
        *((half, own, [64, 32]) for half in HALVES for own in (half, torch.float32)),
        *((torch.bfloat16, own, [ROUNDED_RANK, 150]) for own in (torch.bfloat16, torch.float32)),
    ],
)
def test_as_exact_as_pytorch(n, m, ids, seeds, dtype, factors, ranks, device):
    """Client by client in PyTorch, as PEFT computes it: over a float32 adapter its branch is float32, whatever the base."""
    ours, theirs = {}, {}
    for seed in range(seeds):
        layer = rounded(make_layer(ranks, ids, n, m, seed=seed), dtype, factors)
        truth = run_plain(layer, torch.float64)
        for errors, results in ((ours, run_fused(layer, dtype, factors, device)), (theirs, run_plain(layer, dtype, factors, device))):
            for name in ("y", "d_x", "d_a", "d_bt"):
                errors.setdefault(name, []).append(results[name].cpu().double() - truth[name])
    for name in ours:
        kind = factors if name in ("d_a", "d_bt") else dtype
        assert_as_exact_as(torch.cat(ours[name]), torch.cat(theirs[name]), factor_of(kind), name)


def by_lanes(x, w, lanes, part):
    """[rows, m] float32 products summed on so many lanes, in parts of so many columns, the parts in order and the lanes by halves."""
    products = (x[:, None] * w[None]).view(len(x), len(w), -1, lanes)
    total = torch.zeros(len(x), len(w), lanes)
    for start in range(0, products.shape[2], part // lanes):
        chain = torch.zeros_like(total)
        for step in range(start, min(start + part // lanes, products.shape[2])):
            chain += products[:, :, step]
        total += chain
    while total.shape[2] > 1:
        total = total[..., : total.shape[2] // 2] + total[..., total.shape[2] // 2 :]
    return total[..., 0]


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("positive", [False, True])
def test_one_chain_instead_of_parts_is_noticed(lanes, positive):
    """On each width of vectors, and parts of 64 steps are not."""
    g = drawn(lanes)
    x, w = torch.randn(8, 100_000, generator=g), torch.randn(6, 100_000, generator=g)
    if positive:
        x, w = x.abs(), w.abs()
    expected = {"y": Estimate(x).matmul(Estimate(w).t(), torch.float32, partial(in_parts, lanes=lanes))}
    assert_exact({"y": by_lanes(x, w, lanes, 64 * lanes)}, expected)
    assert why_not_exact({"y": by_lanes(x, w, lanes, 100_000)}, expected)


def case(dtype, factors=None, n=300, m=520, rank=ROUNDED_RANK - 1):
    layer = rounded(make_layer([rank], [0] * 500, n, m), dtype, factors)
    return layer, run_fused(layer, dtype, factors), estimated(layer, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", ["y", "d_x", "d_a", "d_bt"])
def test_a_factor_on_one_tile_is_noticed(dtype, name):
    """1 + 2^-10 on a tile of 24 rows: less than one step of bfloat16."""
    _, got, expected = case(dtype)
    assert_exact(got, expected)
    tile = got[name].double()
    tile[24:48, :512] = expected[name].value[24:48, :512] * (1 + 2**-10)
    assert why_not_exact({**got, name: tile.to(dtype)}, expected).startswith(f"{name}: error")


def of_kept(layer, dtype, s):
    """y and d_bt from an S in 16 bits."""
    y = F.linear(layer.x, layer.weight, layer.bias).to(dtype).double() + s.double() @ layer.bt
    return {"y": y.to(dtype), "d_bt": (s.double().t() @ layer.grad).to(layer.bt.dtype)}


@pytest.mark.parametrize(
    ("dtype", "factors", "rank"),
    [(half, own, ROUNDED_RANK - 1) for half in HALVES for own in (None, torch.float32)]
    + [(torch.bfloat16, torch.float32, ROUNDED_RANK), (torch.float16, None, ROUNDED_RANK)],
)
def test_a_product_kept_in_16_bits_is_noticed(dtype, factors, rank):
    """S rounded to the type of x, where the rule promises the type of the arithmetic."""
    layer, _, expected = case(dtype, factors, rank=rank)
    s = ((layer.x @ layer.a.t()) * layer.scale[0]).to(dtype)
    d_bt = of_kept(layer, dtype, s)["d_bt"].to(factors or dtype)
    assert why_not_exact({"d_bt": d_bt}, {"d_bt": expected["d_bt"]})


def test_where_s_may_be_rounded_it_may_not_be_truncated():
    """To bfloat16, where rank and types are those of the rule; nor rounded to a bit less."""
    layer, _, expected = case(torch.bfloat16, rank=96)  # ranks enough to tell the last bit of S
    s = (layer.x @ layer.a.t()) * layer.scale[0]
    bits = s.float().view(torch.int32)
    for kept, sound in ((bits, True), (bits & -65536, False), ((bits + 65536) & -131072, False)):
        for name, result in of_kept(layer, torch.bfloat16, kept.view(torch.float32).bfloat16()).items():
            reason = why_not_exact({name: result.bfloat16()}, {name: expected[name]})
            assert (reason is None) == sound, (name, reason)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_one_lost_element_is_noticed(dtype):
    """An element of the usual size set to zero, and a result of another shape."""
    _, got, expected = case(dtype)
    for name in ("y", "d_x", "d_a", "d_bt"):
        lost = got[name].clone()
        near = (lost.abs() - expected[name].value.square().mean().sqrt()).abs().argmin()
        lost.view(-1)[near] = 0
        assert why_not_exact({name: lost}, {name: expected[name]}).startswith(f"{name}: error"), name
        assert why_not_exact({name: got[name][:1]}, {name: expected[name]}).startswith(f"{name}: shape")


def test_risk_of_a_false_alarm():
    """Errors drawn as the rule takes them, at the largest variance: 2000 results, no alarm; one and a half times as large: alarms."""
    g, alarms, missed = drawn(1), 0, 0
    for _ in range(2000):
        value = torch.randn(40, 30, generator=g, dtype=torch.float64)
        var = torch.rand(40, 1, generator=g, dtype=torch.float64).expand(40, 30)
        error = (torch.rand(40, 30, generator=g, dtype=torch.float64) * 2 - 1) * (3 * var).sqrt()
        expected = {"y": Estimate(value, var)}
        alarms += why_not_exact({"y": value + error * 2**0.5}, expected) is not None  # in float64 the truth's own error is allowed as well
        missed += why_not_exact({"y": value + error * 4}, expected) is None
    assert alarms == 0 and missed == 0


def test_luck_of_samples():
    """Two sums of squares of the same distribution are never further apart."""
    g = drawn(2)
    ratios = torch.randn(5000, 2, 400, generator=g).square().sum(2).sqrt()
    assert float((ratios[:, 0] / ratios[:, 1]).max()) < luck(400) < 1.7 and luck(10) == float("inf")
