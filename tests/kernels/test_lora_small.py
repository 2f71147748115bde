"""The small way of a call on the CPU: what it agrees on with the large way, which calls take it, and what the layer's ops refuse on both."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_exact
from kernel_cases import (
    BY_SIZE,
    FLOATS,
    LARGE,
    SMALL,
    estimated,
    going,
    guarded,
    leaf_tensors,
    make_layer,
    results,
    rounded,
    run_fused,
    same_bits,
    scattered,
)

import hetlora_kernels as hk
from hetlora_kernels import _library, reference
from hetlora_kernels._torch import multiplies_fast

pytestmark = [
    pytest.mark.skipif("cpu" not in _library.available(), reason="no compiled kernel for CPU tensors"),
    pytest.mark.parametrize("backend", ["cpu"], indirect=True),
]

IDS = [[0], [0, 0, 0, 1, 1, 1, 1, 1], [1, 0, -1, 1, 0, 0, -1], [-1, 1, 1, -1], [-1, -1]]


@pytest.fixture(autouse=True)
def _small_way(backend):
    """Every call of these tests, but where they choose, goes the small way."""
    with going(SMALL):
        yield


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("ids", IDS, ids=lambda ids: "".join(map(str, ids)))
def test_factor_gradients_have_the_bits_of_the_other_way(dtype, p, ids):
    """A client with few rows gets the same update alone, where its call is small, and in a large batch. Factors of another type, as they lie or transposed."""
    layer = rounded(make_layer([5, 20], ids, 150, 131, p=p), dtype, torch.float32)
    kinds = (dtype, torch.float32) if dtype != torch.float64 else (dtype,)
    for factor_dtype in kinds:
        small = run_fused(layer, dtype, factor_dtype)
        with going(LARGE):
            large = run_fused(layer, dtype, factor_dtype)
        for name in ("d_a", "d_bt", "d_bias"):
            assert same_bits(small[name], large[name]), name
        if factor_dtype == torch.float32:
            assert_exact(small, estimated(layer, dtype))
            assert [small[name].dtype for name in ("y", "d_x", "d_bias", "d_a", "d_bt")] == [dtype] * 3 + [factor_dtype] * 2


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("ids", IDS[:3], ids=lambda ids: "".join(map(str, ids)))
@pytest.mark.parametrize("transposed", [False, True])
def test_large_ranks_in_bfloat16_have_the_bits_of_the_other_way(p, ids, transposed):
    """On both sides of the rank from which S is made of pairs of bfloat16 numbers."""
    layer = rounded(make_layer([31, 32], ids, 150, 131, p=p), torch.bfloat16)
    seg, outcomes = layer.segments(), []
    for way in (SMALL, LARGE):
        leaves = leaf_tensors(layer, torch.bfloat16, None, "cpu")
        bt = leaves["bt"].detach().t().contiguous().requires_grad_() if transposed else leaves["bt"]
        with going(way):
            y = hk.lora_linear(
                *(leaves["x"], leaves["weight"], leaves["bias"], leaves["a"], bt, layer.layout(), seg),
                scale=layer.scale,
                dropout=p,
                seeds=torch.tensor(layer.seeds),
                transposed=transposed,
            )
            y.backward(layer.grad.to(y.dtype))
        d_bt = bt.grad.t() if transposed else bt.grad
        outcomes.append(results(y, {**leaves, "bt": leaves["bt"].detach()}) | {"d_bt": d_bt})
    for name in ("d_a", "d_bt", "d_bias"):
        assert same_bits(outcomes[0][name], outcomes[1][name]), name
    for outcome in outcomes:
        assert_exact(outcome, estimated(layer, torch.bfloat16))


# Past a task of 16 rows of the weight, a chunk of 8, the 64 columns of a span and the columns whose result stays in L1.
@pytest.mark.parametrize(("n", "m"), [(1, 1), (63, 17), (130, 8), (517, 300), (1100, 9), (4100, 33)])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_base_product_of_every_tile(n, m, rows, dtype):
    """y and d_x. The factors' gradients are those of the other way, above."""
    for seed in range(3):
        exact = rounded(make_layer([2], [-1] + [0] * (rows - 1), n, m, seed=seed), dtype)
        expected = estimated(exact, dtype, ours=True)
        result = run_fused(exact, dtype)
        assert_exact(result, {name: expected[name] for name in ("y", "d_x")})
        assert result["y"].dtype == result["d_x"].dtype == dtype


@pytest.mark.parametrize(("n", "m", "rows"), [(1030, 700, 8), (4096, 200, 1), (300, 2000, 5)])
def test_no_bit_depends_on_the_number_of_threads(n, m, rows):
    layer, outcomes, before = make_layer([16, 4], [0, 1] * (rows // 2) + [0] * (rows % 2), n, m, p=0.1), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outcomes.append(run_fused(layer, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(outcomes[0][name], other[name]) for other in outcomes[1:] for name in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_arguments_of_any_layout(dtype, p):
    """x, the gradient that comes in and the factors not contiguous; the gradient of PEFT's lora_B [m, r] lies as the parameter does."""
    layer = make_layer([3, 2], [0, 1, 1, -1, 0], 70, 53, p=p)
    plain = run_fused(layer, dtype)
    leaves = leaf_tensors(layer, dtype, None, "cpu")
    own = {name: scattered(leaf.detach()).requires_grad_() for name, leaf in leaves.items() if name in ("x", "a")}
    b = leaves["bt"].detach().t().contiguous().requires_grad_()
    y = hk.lora_linear(
        *(own["x"], scattered(leaves["weight"]), leaves["bias"], own["a"], b.t(), layer.layout(), layer.segments()),
        scale=layer.scale,
        dropout=p,
        seeds=torch.tensor(layer.seeds),
    )
    y.backward(scattered(layer.grad.to(y)))
    again = {"y": y.detach(), "d_x": own["x"].grad, "d_a": own["a"].grad, "d_bt": b.grad.t().contiguous(), "d_bias": leaves["bias"].grad}
    assert [name for name in plain if not same_bits(plain[name], again[name])] in ([], ["d_bias"]) and b.grad.is_contiguous()
    torch.testing.assert_close(plain["d_bias"], again["d_bias"])  # the framework's sum, in an order of its own


def test_which_calls_are_small():
    """Up to eight rows; of 16-bit types that torch multiplies fast up to 2^18 elements of the weight; lora_add where the base is of x's type.

    The ways differ in the bits of y and d_x.
    """

    def goes(n, m, call):
        bits = {}
        for way in (BY_SIZE, SMALL, LARGE):
            with going(way):
                bits[way] = call()
        assert not same_bits(bits[SMALL], bits[LARGE]), "this shape tells nothing"
        return next(way for way in (SMALL, LARGE) if same_bits(bits[BY_SIZE], bits[way]))

    def linear(rows, n=700, m=300, dtype=torch.float32):
        layer = make_layer([2], [0] * rows, n, m)
        return goes(n, m, lambda: torch.cat([run_fused(layer, dtype)[name].flatten() for name in ("y", "d_x")]))

    assert [linear(rows) for rows in (1, 8, 9)] == [SMALL, SMALL, LARGE]
    assert linear(4, 512, 513) == SMALL
    if multiplies_fast(torch.bfloat16, "cpu"):  # elsewhere both ways sum in float32, and their bits tell nothing
        assert linear(4, 512, 512, torch.bfloat16) == SMALL and linear(4, 512, 513, torch.bfloat16) == LARGE


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", [BY_SIZE, SMALL, LARGE])
def test_a_base_of_any_type(kind, way):
    """Another type than x's goes the large way, whatever is asked for."""
    layer = make_layer([2], [0] * 4, 16, 12)
    leaves, base = leaf_tensors(layer, torch.float32, None, "cpu"), torch.ones(4, 12, dtype=kind, requires_grad=True)
    with going(way):
        y = hk.lora_add(base, leaves["x"], leaves["a"], leaves["bt"], layer.layout(), layer.segments())
        y.sum().backward()
    exact = 1 + layer.x.float().double() @ layer.a.float().double().t() @ layer.bt.float().double()
    assert y.dtype == kind and bool((base.grad == 1).all())
    torch.testing.assert_close(y.double(), exact, rtol=4 * torch.finfo(torch.bfloat16 if kind == torch.bfloat16 else torch.float32).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """The types of the call are those of a large one: all of it in the autocast type, gradients in the leaves' own."""
    layer = make_layer([3, 2], [0, 1, 1, -1, 0], 70, 53, p=0.3)
    leaves, casted = leaf_tensors(layer, torch.float32, None, "cpu"), leaf_tensors(layer, dtype, torch.float32, "cpu")

    def call(own):
        seeds = torch.tensor(layer.seeds)
        return hk.lora_linear(*(own[name] for name in ("x", "weight", "bias", "a", "bt")), layer.layout(), layer.segments(), dropout=0.3, seeds=seeds)

    with torch.autocast("cpu", dtype=dtype):
        y = call(leaves)
    expected = call(casted)
    y.backward(layer.grad.to(y))
    expected.backward(layer.grad.to(y))
    assert y.dtype == dtype and same_bits(y, expected)
    for name in ("x", "bias", "a", "bt"):
        assert leaves[name].grad.dtype == torch.float32 and torch.equal(leaves[name].grad, casted[name].grad.float())


def test_another_rung_may_be_forced_in_the_backward_pass():
    layer = make_layer([2, 3], [0, 1, 1, 0], 9, 7, p=0.3)
    expected = run_fused(layer, torch.float32)
    leaves = leaf_tensors(layer, torch.float32, None, "cpu")
    tensors = (leaves[name] for name in ("x", "weight", "bias", "a", "bt"))
    y = hk.lora_linear(*tensors, layer.layout(), layer.segments(), scale=layer.scale, dropout=0.3, seeds=torch.tensor(layer.seeds))
    with hk.use_backend("reference"):
        y.backward(layer.grad.to(y))
    for name, own in results(y, leaves).items():
        torch.testing.assert_close(own, expected[name])


def test_a_layer_without_outputs():
    for shape in ((4, 6), (2, 2, 6)):
        x, a = torch.randn(shape, requires_grad=True), torch.randn(2, 6, requires_grad=True)
        bias, bt = torch.zeros(0, requires_grad=True), torch.zeros(2, 0, requires_grad=True)
        y = hk.lora_linear(x, torch.zeros(0, 6), bias, a, bt, hk.RankLayout([2]), hk.Segments.from_lengths([4]))
        y.sum().backward()
        assert y.shape == (*shape[:-1], 0) and bias.grad.shape == (0,) and bt.grad.shape == (2, 0)
        assert bool((x.grad == 0).all()) and bool((a.grad == 0).all())


@pytest.mark.parametrize(("n", "m"), [(70, 20_000), (100_000, 20), (4100, 4100)])
@pytest.mark.parametrize("positive", [False, True])
def test_long_sums_are_made_in_parts(n, m, positive):
    """Sums of positive numbers show what is lost where an addend meets a large sum."""
    layer = make_layer([1], [0, -1, 0, -1, -1, -1, 0, -1], n, m, bias=False)
    if positive:
        layer.x, layer.weight, layer.grad = layer.x.abs(), layer.weight.abs(), layer.grad.abs()
    exact = rounded(layer, torch.float32)
    frozen = [t for t, owner in enumerate(layer.ids) if owner < 0]
    result, expected = run_fused(exact, torch.float32), estimated(exact, torch.float32, ours=True)
    assert_exact({name: result[name][frozen] for name in ("y", "d_x")}, {name: expected[name][frozen] for name in ("y", "d_x")})


def test_no_columns_are_no_rows():
    """x [3, 0] has no rows, here as in a large call."""
    for rows in (3, 30):
        layer = make_layer([2], [0] * rows, 1, 4)
        with pytest.raises(ValueError, match=f"^seg: expected segments over the 0 rows of x, got {rows}"):
            hk.lora_linear(torch.ones(rows, 0), torch.ones(4, 0), None, torch.ones(2, 0), torch.ones(2, 4), layer.layout(), layer.segments())


def test_what_the_op_cannot_do_is_not_hidden(monkeypatch):
    """An error of the op itself, where no argument is wrong, reaches the caller."""

    def fails(*_):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(reference, "lora_forward", fails)
    with hk.use_backend("reference"), pytest.raises(RuntimeError, match="no memory left"):
        run_fused(make_layer([2], [0] * 4, 16, 12), torch.float32)


def arguments(**changes):
    """Of the two ops, for 4 rows, 5 columns, 3 outputs and one client of rank 2 with two rows."""
    own = {"x": torch.ones(4, 5), "weight": torch.ones(3, 5), "a": torch.ones(2, 5), "bt": torch.ones(2, 3), "seeds": None, "row_keys": None, "index": None}
    own |= {"scale": torch.ones(1), "segments": [4, 2, 1, 2], "dropout": 0.0, "transposed": False, "bias": None, "base": None}
    return {**own, "d_y": torch.ones(4, 3), "s": torch.ones(4), **changes}


ASKED = True, True, True, torch.float32, torch.float32
REFUSED = [
    ({"weight": torch.ones(4, 5)}, "weight: expected"),
    ({"weight": torch.ones(3, 6)}, "weight: expected"),
    ({"weight": torch.ones(3, 5, dtype=torch.float64)}, "weight: expected"),
    ({"weight": torch.ones(1, 3, 5)}, "weight: expected"),
    ({"x": torch.ones(4, 6)}, "a: expected a width of 6"),
    ({"x": torch.ones(2, 5)}, "starts: expected segments within 2 rows"),
    ({"x": torch.ones(5, 5)}, "segments: expected the 5 rows of x, got 4"),
    ({"x": torch.ones(())}, "x: expected a last dimension"),
    ({"a": torch.ones(3, 5)}, "ranks: expected a sum of 3"),
    ({"a": torch.ones(1, 2, 5)}, "a: expected"),
    ({"bt": torch.ones(3, 2)}, "bt: expected 2 rank rows"),
    ({"bt": torch.ones(2, 3), "transposed": True}, "bt: expected 2 rank rows"),
    ({"bt": torch.ones(1, 2, 3)}, "bt: expected"),
    ({"segments": [4, 3, 1, 2]}, "ranks: expected a sum of 2"),
    ({"segments": [4, 2, -1, 2]}, "starts: expected segments within 4 rows"),
    ({"segments": [4, 2, 3, 2]}, "starts: expected segments within 4 rows"),
    ({"segments": [4, 2, 1, -2]}, "ranks, lengths: expected integers >= 0"),
    ({"segments": [4, 2, 1]}, "segments: expected the rows of x and three integers"),
    ({"segments": []}, "segments: expected the rows of x and three integers"),
    ({"scale": torch.ones(2)}, "scale: expected 1 numbers"),
    ({"index": torch.tensor([0, 1, 4])}, "index: expected rows of x below 4"),
    ({"seeds": torch.tensor([1]), "row_keys": torch.tensor([0, 1]), "dropout": 0.5}, "row_keys: expected at least 3"),
    ({"bias": torch.ones(4)}, "bias: expected"),
    ({"bias": torch.ones(3, dtype=torch.float64)}, "bias: expected"),
    ({"weight": None, "base": torch.ones(4, 4)}, "base: expected"),
    ({"weight": None, "base": torch.ones(3, 3)}, "base: expected"),
    ({"weight": None, "base": torch.ones(2, 2, 3)}, "base: expected"),
    ({"weight": None, "base": torch.ones(4, 3, dtype=torch.int64)}, "base: expected"),
    ({"weight": None}, "weight, base: expected one of them"),
    ({"d_y": torch.ones(3, 3)}, "d_y: expected"),
    ({"d_y": torch.ones(4, 4)}, "d_y: expected"),
    ({"s": torch.ones(3)}, "s: expected 4 elements"),
    ({"s": torch.ones(4, dtype=torch.float64)}, "s: expected 4 elements"),
]


@pytest.mark.parametrize("way", [SMALL, LARGE])
@pytest.mark.parametrize(("changes", "text"), REFUSED)
def test_the_ops_refuse_what_would_leave_their_memory(changes, text, way, capfd):
    own = arguments(**changes)
    batch = [own[name] for name in ("scale", "seeds", "row_keys", "index", "segments", "dropout", "transposed")]
    with going(way):
        if not {"bias", "base"} & changes.keys() and changes != {"weight": None}:
            with pytest.raises(RuntimeError) as caught:
                torch.ops.hetlora.lora_backward(own["d_y"], own["x"], own["weight"], own["a"], own["bt"], own["s"], *batch, *ASKED)
            assert text in str(caught.value) + capfd.readouterr().err  # below torch 2.13 the text of a compiled check is on stderr
        if not {"d_y", "s"} & changes.keys():
            with pytest.raises(RuntimeError) as caught:
                torch.ops.hetlora.lora_forward(own["x"], own["weight"], own["bias"], own["base"], own["a"], own["bt"], *batch)
            assert text in str(caught.value) + capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("gathered", [False, True])
def test_nothing_beside_the_results_is_written(dtype, p, gathered):
    """Every argument between guards, at an address that is a multiple of no vector, and unchanged."""
    layer = make_layer([3, 20], [0, 1, -1, 0, 1] if gathered else [0, 0, -1, 1, 1], 75, 71, p=p)
    plan = layer.segments().plan(layer.layout(), tuple(layer.scale), torch.device("cpu"), dtype)
    held, checks = {}, []
    for name in ("x", "weight", "bias", "a", "bt", "grad"):
        source = getattr(layer, name)
        buffer, check = guarded((source.numel() + 1,), dtype, "cpu")
        held[name] = buffer[1:].view(source.shape).copy_(source)
        checks.append(check)
    before = {name: t.clone() for name, t in held.items()}
    drawn = (torch.tensor(layer.seeds), layer.segments().keys_on(torch.device("cpu"))) if p else (None, None)
    factors, batch = (held["a"], held["bt"]), (plan.scale, *drawn, plan.gathered, plan.segments, p, False)
    y, s = torch.ops.hetlora.lora_forward(held["x"], held["weight"], held["bias"], None, *factors, *batch)
    d_x, d_a, d_bt = torch.ops.hetlora.lora_backward(held["grad"], held["x"], held["weight"], *factors, s, *batch, True, True, True, dtype, dtype)
    made = run_fused(layer, dtype)
    for check in checks:
        check()
    assert all(same_bits(before[name], held[name]) for name in held)
    for name, result in (("y", y), ("d_x", d_x), ("d_a", d_a), ("d_bt", d_bt)):
        assert same_bits(result, made[name])


def test_what_is_kept_for_the_backward_pass():
    """The call's own tensors and S."""
    layer = make_layer([3], [0] * 5, 40, 30)
    leaves, kept = leaf_tensors(layer, torch.float32, None, "cpu"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = hk.lora_linear(leaves["x"], leaves["weight"], None, leaves["a"], leaves["bt"], layer.layout(), layer.segments())
    own = {leaves[name].data_ptr() for name in ("x", "weight", "a", "bt")}
    assert len(kept) == 5 and [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(3 * 5,)]
    y.backward(layer.grad.to(y))
    assert results(y, leaves)["d_a"].abs().sum() > 0


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_compiles_to_one_graph(compiler, dtype, transposed):
    """The bits of the eager call."""
    layer = make_layer([3, 2], [0, 1, 1, -1, 0], 70, 53, p=0.3)
    layout, seg, seeds = layer.layout(), layer.segments(), torch.tensor(layer.seeds)

    def run(x, weight, bias, a, factor):
        bt = factor.t() if transposed else factor
        return hk.lora_linear(x.view(5, 1, 70), weight, bias, a, bt, layout, seg, scale=0.5, dropout=0.3, seeds=seeds)

    outcomes = []
    for call in (run, torch.compile(run, fullgraph=True, backend=compiler)):
        leaves = leaf_tensors(layer, dtype, torch.float32, "cpu")
        factor = (leaves["bt"].detach().t().contiguous() if transposed else leaves["bt"].detach()).requires_grad_()
        y = call(leaves["x"], leaves["weight"], leaves["bias"], leaves["a"], factor)
        y.backward(layer.grad.to(y).view(5, 1, 53))
        outcomes.append([y, factor.grad, *(leaves[name].grad for name in ("x", "a"))])
    assert all(same_bits(one, other) for one, other in zip(*outcomes, strict=True))
