"""How lora_linear and lora_add are called: dropout switches and seeds, checkpointing, kinds of scale, autocast and compilation."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import MIXED_RANKS, leaf_tensors, make_layer, mixed_ids, same_bits
from torch.utils.checkpoint import checkpoint

import hetlora_kernels as hk

N, M = 37, 29  # multiples of no tile


def call_simple(layer, leaves, **options):
    return hk.lora_linear(leaves["x"], leaves["weight"], leaves["bias"], leaves["a"], leaves["bt"], layer.layout(), layer.segments(), **options)


def test_training_false_and_zero_probability_drop_nothing(device):
    layer = make_layer([3], [0] * 6, N, M)
    leaves = leaf_tensors(layer, torch.float32, None, device)
    plain = call_simple(layer, leaves)
    seeds = torch.tensor([5])
    state = torch.get_rng_state()
    assert same_bits(plain, call_simple(layer, leaves, dropout=0.5, seeds=seeds, training=False))
    assert same_bits(plain, call_simple(layer, leaves, dropout=0.5, training=False))
    assert same_bits(plain, call_simple(layer, leaves, dropout=0.0, seeds=seeds))
    assert same_bits(plain, call_simple(layer, leaves, dropout=0.4 / 65536, seeds=seeds))
    assert torch.equal(state, torch.get_rng_state())
    assert not same_bits(plain, call_simple(layer, leaves, dropout=0.5, seeds=seeds))


def test_seeds_of_the_torch_generator(device):
    layer = make_layer([3, 3], [0] * 3 + [1] * 3, N, M)
    leaves = leaf_tensors(layer, torch.float32, None, device)

    def draw(seed):
        torch.manual_seed(seed)
        return [call_simple(layer, leaves, dropout=0.5) for _ in range(2)]

    (first, second), (again, _), (other, _) = draw(1), draw(1), draw(2)
    assert same_bits(first, again) and not same_bits(first, other) and not same_bits(first, second)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("seeds", [[3, 4], None])
def test_activation_checkpointing(use_reentrant, seeds, device):
    layer = make_layer([3, 2], [0, 1, 0, 1], N, M)
    seeds = None if seeds is None else torch.tensor(seeds)
    outcomes = []
    for wrap in (False, True):
        torch.manual_seed(11)
        leaves = leaf_tensors(layer, torch.float32, None, device)

        def run(x, leaves=leaves):
            return call_simple(layer, {**leaves, "x": x}, dropout=0.5, seeds=seeds)

        y = checkpoint(run, leaves["x"], use_reentrant=use_reentrant) if wrap else run(leaves["x"])
        torch.rand(3)  # draws between forward and backward must not matter
        y.backward(layer.grad.to(y))
        outcomes.append([y.detach(), *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)])
    assert all(same_bits(one, other) for one, other in zip(*outcomes, strict=True))


@pytest.mark.parametrize("scale", [0.7, [0.7, 0.7], torch.tensor(0.7, dtype=torch.float64), torch.tensor([0.7, 0.7])])
def test_kinds_of_scale(scale, device):
    layer = make_layer([3, 2], [0, 1, 0, 1], N, M)
    leaves = leaf_tensors(layer, torch.float32, None, device)
    assert same_bits(call_simple(layer, leaves, scale=scale), call_simple(layer, leaves, scale=torch.tensor([0.7, 0.7], device=device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("ranks", "m"), [([3, 2], 151), ([16, 20], 150), ([1, 37], 64), ([5, 4], 7)])
@pytest.mark.parametrize("ids", [[0, 1, 0, 1], [0], [0, 0, 0, 1, 1, 1, 1, 1], [1] * 7 + [-1] * 3, [0] * 9 + [1] * 2], ids=lambda ids: "".join(map(str, ids)))
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_factors_as_transposed_views(dtype, ranks, m, ids, p, backend, device):
    """PEFT's lora_B.weight [m, r] as bt: the bits of a contiguous bt, the gradient in the parameter's own layout."""
    if backend == "reference":
        pytest.skip("the reference's products are the framework's, which may round otherwise in another layout")
    layer = make_layer(ranks, ids, 70, m, p=p)
    plain, viewed = leaf_tensors(layer, dtype, None, device), leaf_tensors(layer, dtype, None, device)
    b = viewed["bt"].detach().t().contiguous().requires_grad_()
    options = {"dropout": p, "seeds": torch.tensor([5, 6], device=device), "scale": torch.tensor([0.5, 2.0], device=device)}
    y, z = call_simple(layer, plain, **options), call_simple(layer, {**viewed, "bt": b.t()}, **options)
    y.backward(layer.grad.to(y))
    z.backward(layer.grad.to(z))
    assert same_bits(y, z) and b.grad.is_contiguous()
    assert same_bits(plain["bt"].grad.t().contiguous(), b.grad)
    assert all(same_bits(plain[name].grad, viewed[name].grad) for name in ("x", "a"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("rows", [5, 11])
def test_b_as_peft_keeps_it(dtype, rank, rows, backend, device):
    """transposed=True takes B [m, r] itself: the bits of its transpose, and a gradient that lies as B does."""
    layer = make_layer([rank, 2], [0, 1, 0, -1, 1] + [0] * (rows - 5), 70, 53, p=0.3)
    outcomes = []
    for transposed in (False, True):
        leaves = leaf_tensors(layer, dtype, torch.float32, device)
        b = leaves["bt"].detach().t().contiguous().requires_grad_()
        leaves["bt"] = b if transposed else b.t()
        options = {"dropout": 0.3, "seeds": torch.tensor(layer.seeds, device=device), "transposed": transposed}
        y = call_simple(layer, leaves, **options)
        added = hk.lora_add(y.detach(), leaves["x"], leaves["a"], leaves["bt"], layer.layout(), layer.segments(), **options)
        (y + added).backward(layer.grad.to(y))
        assert b.grad.shape == b.shape and b.grad.is_contiguous()
        outcomes.append([y, added, b.grad, *(leaves[name].grad for name in ("x", "a", "bias"))])
    assert all(same_bits(one, other) for one, other in zip(*outcomes, strict=True))
    with pytest.raises(ValueError, match=rf"^bt: expected a floating-point tensor of shape \(53, {rank + 2}\)"):
        call_simple(layer, {**leaves, "bt": b[1:]}, transposed=True)


@pytest.mark.parametrize("rows", [3, 11])
@pytest.mark.parametrize("wanted", [("x",), ("a",), ("b",), ("x", "b"), ("a", "b")], ids="".join)
def test_gradients_of_some_of_peft_shaped_factors(rows, wanted, backend, device):
    """Frozen parts change no bit of the others' gradients."""
    layer = make_layer([5], [0] * rows, 70, 53)
    parts = {"x": layer.x, "a": layer.a, "b": layer.bt.t().contiguous()}

    def gradients(names):
        leaves = {name: part.float().to(device).requires_grad_(name in names) for name, part in parts.items()}
        weight = layer.weight.float().to(device)
        y = hk.lora_linear(leaves["x"], weight, None, leaves["a"], leaves["b"].t(), layer.layout(), layer.segments(), scale=0.7)
        y.backward(layer.grad.to(y))
        return {name: leaf.grad for name, leaf in leaves.items()}

    every, some = gradients(("x", "a", "b")), gradients(wanted)
    assert all(same_bits(some[name], every[name]) if name in wanted else some[name] is None for name in parts)


def test_a_graph_of_the_backward_pass_inside_autocast(device):
    """The types of a float32 call stay its own, whether its backward pass is inside autocast and whether a graph of it is asked for."""
    layer = make_layer([3], [0] * 6, N, M)
    leaves = leaf_tensors(layer, torch.float32, None, device)

    def d_x(autocast, create_graph):
        y = call_simple(layer, leaves)
        with torch.autocast(y.device.type, enabled=autocast):
            return torch.autograd.grad(y, leaves["x"], layer.grad.to(y), create_graph=create_graph)[0]

    plain = d_x(False, False)
    assert all(same_bits(plain, d_x(autocast, graph)) for autocast in (False, True) for graph in (False, True))


def test_scales_that_are_kept(device):
    """One set of segments serves several scales, types and modes; what it keeps belongs to each."""
    layer = make_layer([3, 2], [0, 0, 1], N, M)
    leaves, seg = leaf_tensors(layer, torch.float32, None, device), layer.segments()

    def call(scale, dtype=torch.float32, seg=seg):
        own = {name: leaf.detach().to(dtype) for name, leaf in leaves.items()}
        return hk.lora_linear(own["x"], own["weight"], None, own["a"], own["bt"], layer.layout(), seg, scale=scale)

    for scale in (2.0, (2.0, 0.5), 2, (2.0, 1.0), (2, 0.5)):
        for dtype in (torch.float32, torch.float64):
            expected = call(torch.tensor([float(s) for s in scale] if isinstance(scale, tuple) else [scale] * 2, device=device), dtype, layer.segments())
            assert all(same_bits(call(scale, dtype), expected) for _ in range(2))
    first = layer.segments()
    with torch.inference_mode():
        call(3.0, seg=first)
    y = hk.lora_linear(leaves["x"], leaves["weight"], None, leaves["a"], leaves["bt"], layer.layout(), first, scale=3.0, dropout=0.5)
    y.sum().backward()
    assert not first.plan(layer.layout(), 3.0, leaves["x"].device, torch.float32).scale.is_inference() and leaves["a"].grad.isfinite().all()
    for k in range(600):
        seg.plan(layer.layout(), float(k), leaves["x"].device, torch.float32)
    assert same_bits(call(2.0), call(torch.tensor([2.0, 2.0], device=device)))


def test_the_default_device_is_not_that_of_the_tensors(device):
    layer = make_layer([3, 2], [0, 1, 0, 1], N, M)
    leaves, layout, ids = leaf_tensors(layer, torch.float32, None, device), layer.layout(), [0, 1, 0, 1]

    def call(seg):
        return hk.lora_linear(
            leaves["x"], leaves["weight"], leaves["bias"], leaves["a"], leaves["bt"], layout, seg, dropout=0.5, seeds=torch.tensor([3, 4], device=device)
        )

    with torch.device("meta"):
        seg = hk.Segments.from_ids(ids)
        inside = call(seg)
    assert same_bits(inside, call(seg)) and same_bits(inside, call(hk.Segments.from_ids(ids)))


# ---------------------------------------------------------------- autocast and compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    layer = make_layer(MIXED_RANKS, mixed_ids(), N, M, p=0.1)
    leaves, casted = leaf_tensors(layer, torch.float32, None, device), leaf_tensors(layer, dtype, torch.float32, device)
    options = {"scale": layer.scale, "dropout": 0.1, "seeds": torch.tensor(layer.seeds)}
    with torch.autocast(device.type, dtype=dtype):
        y = call_simple(layer, leaves, **options)
        added = hk.lora_add(torch.zeros_like(y), leaves["x"], leaves["a"], leaves["bt"], layer.layout(), layer.segments(), **options)
    expected = call_simple(layer, casted, **options)
    assert y.dtype == added.dtype == dtype and same_bits(y, expected)
    y.backward(layer.grad.to(y))
    expected.backward(layer.grad.to(y))
    for name in ("x", "bias", "a", "bt"):
        assert leaves[name].grad.dtype == torch.float32 and torch.equal(leaves[name].grad, casted[name].grad.float())


def test_autocast_leaves_float64_alone(device):
    layer = make_layer([3], [0] * 4, N, M)
    leaves = leaf_tensors(layer, torch.float64, None, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert same_bits(call_simple(layer, leaves), call_simple(layer, leaves)) and call_simple(layer, leaves).dtype == torch.float64


COMPILERS = [
    ("aot_eager", 0.0, False),
    ("aot_eager", 0.3, True),
    pytest.param("inductor", 0.3, True, marks=pytest.mark.slow),  # compiles C++
]


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
@pytest.mark.parametrize(("compiler", "p", "shuffled"), COMPILERS)
def test_compiles_to_one_graph(compiler, p, shuffled, device):
    """torch.compile(fullgraph=True), forward and backward, mixed ranks: the same values as eagerly."""
    layer = make_layer(MIXED_RANKS, mixed_ids(shuffled), N, M, p=p)
    layout, seg, seeds = layer.layout(), layer.segments(), torch.tensor(layer.seeds, device=device)

    def both(x, weight, bias, a, bt):
        y = hk.lora_linear(x, weight, bias, a, bt, layout, seg, scale=0.5, dropout=p, seeds=seeds)
        return y, hk.lora_add(y.sin(), x, a, bt, layout, seg, scale=2.0, dropout=p, seeds=seeds)

    outcomes = []
    for run in (both, torch.compile(both, fullgraph=True, backend=compiler)):
        leaves = leaf_tensors(layer, torch.float32, None, device)
        y, added = run(*(leaves[name] for name in ("x", "weight", "bias", "a", "bt")))
        (y + added).backward(layer.grad.to(y))
        outcomes.append([y, added, *(leaves[name].grad for name in ("x", "bias", "a", "bt"))])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # 136 rows summed in another order


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
def test_compiles_with_drawn_seeds(device):
    """seeds=None in the graph: every call draws a mask of its own, and drops."""
    layer = make_layer([4, 3], [0, 1, 1, 0], N, M)
    leaves, layout, seg = leaf_tensors(layer, torch.float32, None, device), layer.layout(), layer.segments()

    def run(x):
        return hk.lora_linear(x, leaves["weight"], None, leaves["a"], leaves["bt"], layout, seg, dropout=0.5)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert not same_bits(compiled(leaves["x"]), compiled(leaves["x"]))


@pytest.mark.parametrize("changed", ["scale", "seeds", "row_keys"])
def test_what_is_changed_between_forward_and_backward_changes_no_gradient(changed, device):
    """The backward pass has the forward's scale and dropout mask, whatever the caller does with his own tensors since."""
    layer = make_layer([3, 2], [0, 1, 1, 0], 9, 7, p=0.4, keys=[5, 6, 7, 8])
    grads = []
    for change in (False, True):
        leaves = leaf_tensors(layer, torch.float32, None, device)
        own = {
            "scale": torch.tensor(layer.scale, dtype=torch.float32, device=device),
            "seeds": torch.tensor(layer.seeds, device=device),
            "row_keys": torch.tensor(layer.keys),
        }
        seg = hk.Segments.from_ids(layer.ids, row_keys=own["row_keys"])
        tensors = (leaves[name] for name in ("x", "weight", "bias", "a", "bt"))
        y = hk.lora_linear(*tensors, layer.layout(), seg, scale=own["scale"], dropout=0.4, seeds=own["seeds"])
        if change:
            own[changed].add_(3)
        y.backward(layer.grad.to(y))
        grads.append([leaf.grad for leaf in leaves.values() if leaf.requires_grad])
    assert all(same_bits(one, other) for one, other in zip(*grads, strict=True))
