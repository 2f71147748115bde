"""bfloat16 clients whose S is rounded where it is multiplied (csrc/cpu/lora_rounded.h): both layouts of B, odd numbers, neighbours of every kind."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from accuracy import assert_exact
from kernel_cases import ROUNDED_RANK, drawn, estimated, leaf_tensors, make_layer, results, rounded, same_bits

import hetlora_kernels as hk
from hetlora_kernels.reference import operand_dtype

BF16 = torch.bfloat16
RANKS, LENGTHS = [33, 5, 130, 0, 32, 97], [151, 7, 33, 3, 1, 0]
N, M = 333, 131  # past a strip of columns, and odd


def layer_of(p, shuffled, ranks=RANKS):
    ids = [k for k, length in enumerate(LENGTHS[: len(ranks)]) for _ in range(length)] + [-1] * 3
    if shuffled:
        ids = [ids[i] for i in torch.randperm(len(ids), generator=drawn(3)).tolist()]
    return rounded(make_layer(ranks, ids, N, M, p=p), BF16)


def run(layer, transposed, device, base=None):
    """Results of `lora_linear`, or of `lora_add` beside a base's output."""
    leaves = leaf_tensors(layer, BF16, None, device)
    bt = leaves["bt"].detach().t().contiguous().requires_grad_() if transposed else leaves["bt"]
    settings = {"scale": layer.scale, "dropout": layer.p, "seeds": torch.tensor(layer.seeds, device=device), "transposed": transposed}
    adapter = leaves["a"], bt, layer.layout(), layer.segments()
    if base is None:
        y = hk.lora_linear(leaves["x"], leaves["weight"], leaves["bias"], *adapter, **settings)
    else:
        y = hk.lora_add(base.to(device), leaves["x"], *adapter, **settings)
    y.backward(layer.grad.to(device, y.dtype))
    return results(y, {**leaves, "bt": leaves["bt"].detach()}) | {"d_bt": bt.grad.t() if transposed else bt.grad}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [RANKS, [33, 128]])  # beside other clients, and without
def test_exact(p, shuffled, transposed, ranks, device):
    layer = layer_of(p, shuffled, ranks)
    assert_exact(run(layer, transposed, device), estimated(layer, BF16, device))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [RANKS, [33, 128], [64, 128]])
def test_no_bit_depends_on_how_b_lies(p, shuffled, ranks, backend, device):
    if backend == "reference":
        pytest.skip("the reference's products are the framework's")
    layer = layer_of(p, shuffled, ranks)
    rows, columns = (run(layer, transposed, device) for transposed in (False, True))
    assert all(same_bits(rows[name], columns[name]) for name in ("y", "d_x", "d_a", "d_bt"))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_bit_depends_on_threads_or_on_the_others_of_the_batch(p, transposed, backend, device):
    if backend == "reference":
        pytest.skip("the reference's products are the framework's")
    layer, base = layer_of(p, True), torch.randn(sum(LENGTHS) + 3, M, generator=drawn(4)).to(BF16)
    before, together = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together.append(run(layer, transposed, device, base))
    finally:
        torch.set_num_threads(before)
    for other in together[1:]:
        assert all(same_bits(together[0][name], other[name]) for name in other)
    for k, (end, rank) in enumerate(zip(accumulate(RANKS), RANKS, strict=True)):
        rows, own = layer.client_rows(k), slice(end - rank, end)
        if not rank or not rows:
            continue
        alone = make_layer([rank], [0] * len(rows), N, M, p=p)
        alone.x, alone.grad, alone.a, alone.bt = layer.x[rows], layer.grad[rows], layer.a[own], layer.bt[own]
        alone.scale, alone.seeds = layer.scale[k : k + 1], layer.seeds[k : k + 1]
        result = run(alone, transposed, device, base[rows])
        for name, part in (("y", rows), ("d_x", rows), ("d_a", own), ("d_bt", own)):
            assert same_bits(together[0][name][part], result[name]), (k, name)


@pytest.mark.parametrize(
    ("rank", "a_type", "bt_type", "may_round"),
    [
        (ROUNDED_RANK, BF16, BF16, True),
        (ROUNDED_RANK - 1, BF16, BF16, False),
        (ROUNDED_RANK, torch.float32, BF16, False),
        (ROUNDED_RANK, BF16, torch.float32, False),
        (ROUNDED_RANK, torch.float32, torch.float32, False),
    ],
)
def test_from_which_rank_and_in_which_types(rank, a_type, bt_type, may_round, device):
    """S = 1 + 2^-9, which bfloat16 rounds to 1: y beside a float32 base shows it, dB and dA do by sums with it."""
    x = torch.zeros(2, 40, device=device, dtype=BF16)
    if operand_dtype(x) == BF16:
        pytest.skip("on a GPU every S of 16-bit rows is rounded")
    x[1, 7], x[1, 30] = 1.0, 2.0**-9
    a, bt = torch.ones(rank, 40, device=device, dtype=a_type), torch.zeros(rank, 3, device=device, dtype=bt_type)
    bt[5] = 1.0
    y = hk.lora_add(torch.zeros(2, 3, device=device), x, a, bt, hk.RankLayout([rank]), hk.Segments.from_lengths([2]))
    assert not y[0].any()
    assert set(y[1].tolist()) in ([{1.0}, {1 + 2.0**-9}] if may_round else [{1 + 2.0**-9}])


@pytest.mark.parametrize("transposed", [False, True])
def test_no_outputs_give_no_gradient(transposed, device):
    x, a = (torch.randn(rows, 48, generator=drawn(rows)).to(device, BF16).requires_grad_() for rows in (20, 40))
    bt = torch.empty((0, 40) if transposed else (40, 0), device=device, dtype=BF16, requires_grad=True)
    weight = torch.empty(0, 48, device=device, dtype=BF16)
    y = hk.lora_linear(x, weight, None, a, bt, hk.RankLayout([40]), hk.Segments.from_lengths([20]), transposed=transposed)
    y.sum().backward()
    assert y.shape == (20, 0) and not x.grad.any() and not a.grad.any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value, transposed, device):
    """Rank, rows and columns are odd, so that a number without a partner stands beside each operand."""
    layer = layer_of(0.0, False, [33])
    layer.x[4, 9] = layer.grad[11, 5] = value
    got = run(layer, transposed, device, torch.zeros(len(layer.ids), M, dtype=BF16))
    for name, row in (("y", 4), ("d_x", 11)):
        others = torch.arange(len(layer.ids)) != row
        assert not got[name][row].isfinite().any() and got[name][others].isfinite().all(), name
    # dA = dS^T x has the column of x and every rank's dS; dB likewise.
    assert not got["d_a"].isfinite().any() and not got["d_bt"].isfinite().any()
