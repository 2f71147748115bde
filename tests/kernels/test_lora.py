"""lora_linear and lora_add: values and gradients against float64, whatever the ranks, the order of the batch and the memory layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import Estimate, assert_exact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    FLOATS,
    MIXED_LENGTHS,
    MIXED_RANKS,
    estimated,
    leaf_tensors,
    make_layer,
    mixed_ids,
    rounded,
    run_fused,
    same_bits,
    scattered,
)

import hetlora_kernels as hk

N, M = 37, 29  # multiples of no tile


def check(layers, dtype, device, factor_dtype=None):
    """Every result of the fused layer over all `layers`, against float64 on the same rounded data."""
    for layer in layers:
        exact = rounded(layer, dtype, factor_dtype)
        fused = run_fused(exact, dtype, factor_dtype, device)
        assert_exact(fused, estimated(exact, dtype, device))
        assert fused["y"].dtype == fused["d_x"].dtype == dtype
        assert fused["d_a"].dtype == fused["d_bt"].dtype == (factor_dtype or dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_mixed_ranks_in_any_order(dtype, p, device):
    check([make_layer(MIXED_RANKS, mixed_ids(), N, M, seed=s, p=p) for s in range(3)], dtype, device)


@pytest.mark.parametrize("dtype", FLOATS)
def test_mixed_ranks_one_client_after_another(dtype, device):
    check([make_layer(MIXED_RANKS, mixed_ids(shuffled=False), N, M, seed=s, p=0.1, bias=False) for s in range(3)], dtype, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_over_a_half_base(dtype, device):
    """PEFT's default: cast once, gradients come back in float32, as exact as the base's type allows."""
    check([make_layer(MIXED_RANKS, mixed_ids(), N, M, seed=s, p=0.1) for s in range(3)], dtype, device, torch.float32)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 9), (8, 1), (64, 64), (100, 33), (129, 257)])
def test_widths(n, m, device):
    check([make_layer([3, 0, 8], [0, 1, 2, -1, 2, 0, 2], n, m, seed=s, p=0.25) for s in range(3)], torch.float32, device)


@pytest.mark.parametrize("rank", [1, 3, 4, 7, 8, 16, 24, 64, 128])
def test_one_client_of_each_rank(rank, device):
    check([make_layer([rank], [0] * 9, N, M, seed=s) for s in range(2)], torch.float32, device)


def test_keys_of_far_apart_sequences(device):
    keys = [(t // 3) * 2**20 + t % 3 for t in range(12)]
    check([make_layer([4, 2], [0, 1] * 6, N, M, p=0.5, keys=keys)], torch.float32, device)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    clients=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=5),
    base_rows=st.integers(0, 3),
    widths=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    p=st.sampled_from([0.0, 0.2, 0.8]),
    bias=st.booleans(),
    shuffle=st.randoms(use_true_random=False),
)
def test_ragged_shapes(device, clients, base_rows, widths, p, bias, shuffle):
    ids = [k for k, (_, length) in enumerate(clients) for _ in range(length)] + [-1] * base_rows
    shuffle.shuffle(ids)
    check([make_layer([rank for rank, _ in clients], ids, *widths, p=p, bias=bias)], torch.float64, device)


def test_lengths_of_the_mixed_case_cover_what_they_should():
    assert {0, 1} < set(MIXED_LENGTHS) and {5, 9, 17, 33, 65} <= set(MIXED_LENGTHS) and set(MIXED_RANKS) == {0, 1, 3, 4, 7, 8, 16, 24, 64, 128}


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("ids", [[0] * 3 + [1] * 2 + [2], [2, -1, 0, 1, 0, 2, -1]])
def test_gradcheck(ids, p, device):
    """x, a, bt and bias, with a scale per client, a client of rank 0, shuffled rows and base-only rows."""
    layer = make_layer([2, 3, 0], ids, 5, 4, p=p)
    leaves = leaf_tensors(layer, torch.float64, None, device)
    weight, layout, seg, seeds = leaves["weight"], layer.layout(), layer.segments(), torch.tensor(layer.seeds, device=device)

    def linear(x, a, bt, bias):
        return hk.lora_linear(x, weight, bias, a, bt, layout, seg, scale=layer.scale, dropout=p, seeds=seeds)

    def add(x, a, bt, base):
        return hk.lora_add(base, x, a, bt, layout, seg, scale=layer.scale, dropout=p, seeds=seeds)

    inputs = [leaves[name] for name in ("x", "a", "bt")]
    assert torch.autograd.gradcheck(linear, (*inputs, leaves["bias"]))
    base = torch.randn(len(ids), 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(add, (*inputs, base))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_only_the_gradients_asked_for(p, device):
    """Every subset of (x, bias, a, bt): what is asked for does not depend on the rest, nothing else appears."""
    layer = make_layer([3, 2], [0, 1, 0, -1, 1], N, M, p=p)
    full = run_fused(layer, torch.float32, device=device)
    for subset in range(1, 16):
        leaves = leaf_tensors(layer, torch.float32, None, device)
        wanted = {name for i, name in enumerate(("x", "bias", "a", "bt")) if subset >> i & 1}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        y = hk.lora_linear(
            *(leaves["x"], leaves["weight"], leaves["bias"], leaves["a"], leaves["bt"], layer.layout(), layer.segments()),
            scale=layer.scale,
            dropout=p,
            seeds=torch.tensor(layer.seeds),
        )
        y.backward(layer.grad.to(y))
        for name in ("x", "bias", "a", "bt"):
            assert (leaves[name].grad is not None) == (name in wanted)
            assert name not in wanted or same_bits(leaves[name].grad, full[f"d_{name}"])


def test_second_derivatives_are_refused(device):
    layer = make_layer([2], [0, 0], 4, 3)
    leaves = leaf_tensors(layer, torch.float64, None, device)
    y = hk.lora_linear(leaves["x"], leaves["weight"], None, leaves["a"], leaves["bt"], layer.layout(), layer.segments())
    (grad,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------- routing


def test_a_misrouted_token_is_seen(device):
    """The tolerance above is worth something: one token of 136 sent to the neighbour's adapter is far outside it."""
    layer = make_layer(MIXED_RANKS, mixed_ids(), N, M, p=0.1)
    wrong = make_layer(MIXED_RANKS, mixed_ids(), N, M, p=0.1)
    row = layer.ids.index(5)
    wrong.ids[row] = 3
    layer, wrong = rounded(layer, torch.float32), rounded(wrong, torch.float32)
    good, bad = run_fused(layer, torch.float32, device=device), run_fused(wrong, torch.float32, device=device)
    expected = estimated(layer, torch.float32, device)
    assert_exact(good, expected)
    for name in ("y", "d_x", "d_a", "d_bt"):
        with pytest.raises(AssertionError, match=f"^{name}: error"):
            assert_exact(bad, {name: expected[name]})


def test_clients_without_rows_get_exactly_zero(device):
    layer = make_layer([4, 2, 3], [0, 0, 2, -1], N, M)
    out = run_fused(layer, torch.float32, device=device)
    assert bool((out["d_a"][4:6] == 0).all()) and bool((out["d_bt"][4:6] == 0).all())
    assert bool((out["d_a"][6:] != 0).any())


@pytest.mark.parametrize("rows", [3, 11])
def test_base_only_rows_are_the_frozen_layer(rows, device, backend):
    """No bit of them knows of the clients; from nine rows on they are the framework's product, which Triton's rung adds to what its kernel wrote."""
    ids = [0 if t == 1 else -1 for t in range(rows)]
    layer, other = make_layer([4], ids, N, M, p=0.5), make_layer([4], ids, N, M, p=0.5)
    other.a, other.bt = -3 * layer.a, layer.bt + 1
    frozen = [t for t in range(rows) if t != 1]
    out, again = run_fused(layer, torch.float32, device=device), run_fused(other, torch.float32, device=device)
    assert all(same_bits(out[name][frozen], again[name][frozen]) and not same_bits(out[name], again[name]) for name in ("y", "d_x"))
    leaves = leaf_tensors(layer, torch.float32, None, device)
    own = F.linear(leaves["x"], leaves["weight"], leaves["bias"]).detach(), layer.grad.to(leaves["x"]) @ leaves["weight"]
    for name, torch_own in zip(("y", "d_x"), own, strict=True):
        assert rows == 3 or backend == "triton" or same_bits(out[name][frozen], torch_own[frozen])
    assert_exact(run_fused(exact := rounded(layer, torch.float32), torch.float32, device=device), estimated(exact, torch.float32, device))


def test_more_clients_in_the_layout_than_in_the_batch(device):
    layer = make_layer([4, 2, 3], [0, 1, 1], N, M)
    leaves = leaf_tensors(layer, torch.float32, None, device)
    args = leaves["x"], leaves["weight"], None, leaves["a"], leaves["bt"], layer.layout()
    y = hk.lora_linear(*args, hk.Segments.from_ids([0, 1, 1]), scale=layer.scale)
    y.sum().backward()
    assert same_bits(y, hk.lora_linear(*args, layer.segments(), scale=layer.scale)) and bool((leaves["a"].grad[6:] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factor_gradients_are_bit_identical_alone_and_co_batched(dtype, device):
    layer = make_layer(MIXED_RANKS, mixed_ids(), N, M, p=0.1)
    together = run_fused(layer, dtype, device=device)
    offset = 0
    for k, rank in enumerate(MIXED_RANKS):
        rows, own = layer.client_rows(k), slice(offset, offset + rank)
        offset += rank
        alone = make_layer([rank], [0] * len(rows), N, M, p=0.1)
        alone.x, alone.grad, alone.a, alone.bt = layer.x[rows], layer.grad[rows], layer.a[own], layer.bt[own]
        alone.weight, alone.scale, alone.seeds = layer.weight, layer.scale[k : k + 1], layer.seeds[k : k + 1]
        result = run_fused(alone, dtype, device=device)
        assert same_bits(together["d_a"][own], result["d_a"]) and same_bits(together["d_bt"][own], result["d_bt"])


def test_bitwise_repeatable(device):
    layer = make_layer(MIXED_RANKS, mixed_ids(), N, M, p=0.1)
    first, second = (run_fused(layer, torch.float32, device=device) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- shapes and memory


@pytest.mark.parametrize("shape", [(N,), (1, N), (6, N), (2, 3, N), (1, 2, 3, 1, N), (0, N), (2, 0, N)])
def test_any_leading_shape(shape, device):
    rows = torch.Size(shape[:-1]).numel()
    layer = make_layer([3], [0] * rows, N, M, p=0.2)
    leaves = leaf_tensors(layer, torch.float32, None, device)
    seeds = torch.tensor(layer.seeds)

    def both(x):
        factors = leaves["a"], leaves["bt"], layer.layout(), layer.segments()
        y = hk.lora_linear(x, leaves["weight"], leaves["bias"], *factors, dropout=0.2, seeds=seeds)
        return y, hk.lora_add(F.linear(x, leaves["weight"], leaves["bias"]), x, *factors, dropout=0.2, seeds=seeds)

    flat, shaped = both(leaves["x"]), both(leaves["x"].detach().reshape(shape))
    for one, other in zip(flat, shaped, strict=True):
        assert other.shape == (*shape[:-1], M) and same_bits(one, other.reshape(-1, M))
    shaped[0].sum().backward()
    assert leaves["a"].grad.shape == leaves["a"].shape and bool(torch.isfinite(leaves["a"].grad).all())
    assert rows or bool((leaves["a"].grad == 0).all())


def test_non_contiguous_inputs(device):
    layer = make_layer([3, 5], [0, 1, 1, 0, -1], N, M, p=0.3)
    leaves = leaf_tensors(layer, torch.float32, None, device)
    expected = run_fused(layer, torch.float32, device=device)
    views = {name: scattered(leaf.detach()).requires_grad_(leaf.requires_grad) for name, leaf in leaves.items() if leaf.dim() == 2}
    y = hk.lora_linear(
        *(views["x"], views["weight"], leaves["bias"], views["a"], views["bt"], layer.layout(), layer.segments()),
        scale=layer.scale,
        dropout=0.3,
        seeds=torch.tensor(layer.seeds),
    )
    y.backward(scattered(layer.grad.to(y)))
    assert not any(view.is_contiguous() for view in views.values())
    close = {"rtol": 1e-5, "atol": 1e-5}  # torch's own GEMM may round otherwise on other strides
    torch.testing.assert_close(y, expected["y"], **close)
    for name in ("x", "a", "bt"):
        torch.testing.assert_close(views[name].grad, expected[f"d_{name}"], **close)
    base = torch.zeros(5, 2 * M, device=device)[:, ::2]
    with_base = hk.lora_add(base, views["x"], views["a"], views["bt"], layer.layout(), layer.segments())
    assert with_base.shape == (5, M) and bool((base == 0).all())


def test_peft_shaped_factor_is_used_as_it_is(device):
    """lora_B.weight [m, r] goes in as its transpose, and its gradient comes out there."""
    layer = make_layer([4], [0] * 5, N, M)
    b = layer.bt.t().contiguous().float().to(device).requires_grad_()
    leaves = leaf_tensors(layer, torch.float32, None, device)
    y = hk.lora_linear(leaves["x"], leaves["weight"], leaves["bias"], leaves["a"], b.t(), layer.layout(), layer.segments(), scale=layer.scale)
    y.backward(layer.grad.to(y))
    torch.testing.assert_close(b.grad.t(), run_fused(layer, torch.float32, device=device)["d_bt"])


def test_inputs_are_left_alone(device):
    layer = make_layer([3, 5], [0, 1, 1, 0, -1], N, M, p=0.3)
    leaves = leaf_tensors(layer, torch.float32, None, device)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    base = torch.randn(5, M, device=device)
    kept = base.clone()
    hk.lora_add(base, leaves["x"], leaves["a"], leaves["bt"], layer.layout(), layer.segments()).sum().backward()
    run = hk.lora_linear(leaves["x"], leaves["weight"], leaves["bias"], leaves["a"], leaves["bt"], layer.layout(), layer.segments())
    run.sum().backward()
    assert same_bits(base, kept) and all(same_bits(leaf, before[name]) for name, leaf in leaves.items())


def test_one_nan_row_stays_with_its_owner(device):
    layer = make_layer([3, 5], [0, 1, 1, 0, -1], N, M)
    layer.x[3, 2] = float("nan")
    out = run_fused(layer, torch.float32, device=device)
    assert out["y"].isnan().all(1).tolist() == [False, False, False, True, False]
    assert bool(out["d_a"][:3].isnan().any()) and bool(out["d_a"][3:].isfinite().all()) and bool(out["d_bt"][3:].isfinite().all())


# ---------------------------------------------------------------- lora_add


@pytest.mark.parametrize(("base_dtype", "dtype"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_lora_add(base_dtype, dtype, device):
    layer = rounded(make_layer(MIXED_RANKS, mixed_ids(), N, M, p=0.2), torch.bfloat16)
    base = (layer.x @ layer.weight.t()).to(base_dtype).double()
    leaves = leaf_tensors(layer, dtype, None, device)
    given = base.to(device, base_dtype).requires_grad_()
    y = hk.lora_add(
        *(given, leaves["x"], leaves["a"], leaves["bt"], layer.layout(), layer.segments()),
        scale=layer.scale,
        dropout=layer.p,
        seeds=torch.tensor(layer.seeds),
    )
    y.backward(layer.grad.to(device, base_dtype))
    assert y.dtype == base_dtype and same_bits(given.grad, layer.grad.to(device, base_dtype))
    fused = {"y": y, "d_x": leaves["x"].grad, "d_a": leaves["a"].grad, "d_bt": leaves["bt"].grad}
    expected = estimated(layer, dtype, device, base=Estimate(base))
    assert_exact(fused, {name: expected[name] for name in fused})
