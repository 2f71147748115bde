"""Small calls on the CPU, which have ops of their own: what they agree on with the others, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_exact
from kernel_cases import FLOATS, estimated, guarded, leaf_tensors, make_layer, results, rounded, run_fused, same_bits, scattered

import hetlora_kernels as hk
from hetlora_kernels import _library
from hetlora_kernels.ops import lora

pytestmark = [
    pytest.mark.skipif("cpu" not in _library.available(), reason="no compiled kernel for CPU tensors"),
    pytest.mark.parametrize("backend", ["cpu"], indirect=True),
]

IDS = [[0], [0, 0, 0, 1, 1, 1, 1, 1], [1, 0, -1, 1, 0, 0, -1], [-1, 1, 1, -1], [-1, -1]]


@pytest.fixture
def taken(monkeypatch):
    """How many calls went to the ops for small calls."""
    count = {"forward": 0, "backward": 0}
    ops = _library.small_ops()

    def counting(name, op):
        def run(*arguments):
            count[name] += 1
            return op(*arguments)

        return run

    own = counting("forward", ops[0]), counting("backward", ops[1])
    monkeypatch.setattr(lora, "small_ops", lambda: own)
    return count


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("ids", IDS, ids=lambda ids: "".join(map(str, ids)))
def test_factor_gradients_have_the_bits_of_the_other_way(dtype, p, ids, taken, monkeypatch):
    """A client with few rows gets the same update alone, where its call is small, and in a large batch. Factors of another type, as they lie or transposed."""
    layer = rounded(make_layer([5, 20], ids, 150, 131, p=p), dtype, torch.float32)
    kinds = (dtype, torch.float32) if dtype != torch.float64 else (dtype,)
    for factor_dtype in kinds:
        small = run_fused(layer, dtype, factor_dtype)
        with monkeypatch.context() as off:
            off.setattr(lora, "_FEW_ROWS", 0)
            large = run_fused(layer, dtype, factor_dtype)
        for name in ("d_a", "d_bt", "d_bias"):
            assert same_bits(small[name], large[name]), name
        if factor_dtype == torch.float32:
            assert_exact(small, estimated(layer, dtype))
    assert taken == {"forward": len(kinds), "backward": len(kinds)}


# Past a task of 16 rows of the weight, a chunk of 8, the 64 columns of a span and the columns whose result stays in L1.
@pytest.mark.parametrize(("n", "m"), [(1, 1), (63, 17), (130, 8), (517, 300), (1100, 9), (4100, 33)])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_base_product_of_every_tile(n, m, rows, dtype, taken):
    """y and d_x. The factors' gradients are those of the other way, above."""
    for seed in range(3):
        exact = rounded(make_layer([2], [-1] + [0] * (rows - 1), n, m, seed=seed), dtype)
        expected = estimated(exact, dtype, ours=True)
        assert_exact(run_fused(exact, dtype), {name: expected[name] for name in ("y", "d_x")})
    assert taken == {"forward": 3, "backward": 3}


@pytest.mark.parametrize(("n", "m", "rows"), [(1030, 700, 8), (4096, 200, 1), (300, 2000, 5)])
def test_no_bit_depends_on_the_number_of_threads(n, m, rows, taken):
    layer, outcomes, before = make_layer([16, 4], [0, 1] * (rows // 2) + [0] * (rows % 2), n, m, p=0.1), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outcomes.append(run_fused(layer, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(outcomes[0][name], other[name]) for other in outcomes[1:] for name in other)
    assert taken["forward"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_arguments_of_any_layout(dtype, p, taken):
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
    assert taken == {"forward": 2, "backward": 2}


def test_which_calls_are_small(taken):
    """Up to eight rows; of 16-bit types up to 2^18 elements of the weight; lora_add where the base is of x's type."""

    def call(rows, n=16, m=16, dtype=torch.float32):
        layer = make_layer([2], [0] * rows, n, m)
        before = taken["forward"]
        run_fused(layer, dtype)
        return taken["forward"] - before

    assert [call(rows) for rows in (0, 1, 8, 9)] == [0, 1, 1, 0]
    assert call(1, 512, 512, torch.bfloat16) == 1 and call(1, 512, 513, torch.bfloat16) == 0 and call(1, 512, 513) == 1
    layer = make_layer([2], [0] * 4, 16, 12)
    leaves = leaf_tensors(layer, torch.float32, None, "cpu")
    for kind, expected in ((torch.float32, 1), (torch.float64, 0), (torch.bfloat16, 0)):
        before, base = taken["forward"], torch.ones(4, 12, dtype=kind, requires_grad=True)
        y = hk.lora_add(base, leaves["x"], leaves["a"], leaves["bt"], layer.layout(), layer.segments())
        y.sum().backward()
        assert taken["forward"] - before == expected and y.dtype == kind and bool((base.grad == 1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, taken):
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
    assert y.dtype == dtype and same_bits(y, expected) and taken == {"forward": 2, "backward": 2}
    for name in ("x", "bias", "a", "bt"):
        assert leaves[name].grad.dtype == torch.float32 and torch.equal(leaves[name].grad, casted[name].grad.float())


@pytest.mark.parametrize("name", ["weight", "bias", "a", "bt"])
def test_an_argument_left_on_the_meta_device_is_refused(name):
    """Whatever device the dispatcher would choose, no result is made of memory that nobody wrote."""
    layer = make_layer([2], [0] * 4, 5, 3)
    leaves = leaf_tensors(layer, torch.float32, None, "cpu")
    leaves[name] = leaves[name].detach().to("meta")
    with pytest.raises(ValueError, match=rf"^{name}: expected .*device.*meta"):
        hk.lora_linear(*(leaves[key] for key in ("x", "weight", "bias", "a", "bt")), layer.layout(), layer.segments())


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
def test_long_sums_are_made_in_parts(n, m, positive, taken):
    """Sums of positive numbers show what is lost where an addend meets a large sum."""
    layer = make_layer([1], [0, -1, 0, -1, -1, -1, 0, -1], n, m, bias=False)
    if positive:
        layer.x, layer.weight, layer.grad = layer.x.abs(), layer.weight.abs(), layer.grad.abs()
    exact = rounded(layer, torch.float32)
    frozen = [t for t, owner in enumerate(layer.ids) if owner < 0]
    result, expected = run_fused(exact, torch.float32), estimated(exact, torch.float32, ours=True)
    assert_exact({name: result[name][frozen] for name in ("y", "d_x")}, {name: expected[name][frozen] for name in ("y", "d_x")})
    assert taken == {"forward": 1, "backward": 1}


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

    monkeypatch.setattr(lora, "small_ops", lambda: (fails, fails))
    with pytest.raises(RuntimeError, match="no memory left"):
        run_fused(make_layer([2], [0] * 4, 16, 12), torch.float32)


def arguments(**changes):
    """Of the two ops, for 4 rows, 5 columns, 3 outputs and one client of rank 2 with two rows."""
    plan = torch.tensor([[2], [1], [2], [0.5]], dtype=torch.float64)
    own = {"x": torch.ones(4, 5), "weight": torch.ones(3, 5), "a": torch.ones(2, 5), "b": torch.ones(2, 3), "seeds": None, "row_keys": None, "index": None}
    own |= {"plan": plan, "dropout": 0.0, "own_b": False, "bias": None, "base": None, "d_y": torch.ones(4, 3)}
    return {**own, **changes}


REFUSED = [
    ({"weight": torch.ones(4, 5)}, "weight: expected"),
    ({"weight": torch.ones(3, 6)}, "weight: expected"),
    ({"weight": torch.ones(3, 5, dtype=torch.float64)}, "weight: expected"),
    ({"weight": torch.ones(1, 3, 5)}, "weight: expected"),
    ({"x": torch.ones(4, 6)}, "a: expected a width of 6"),
    ({"x": torch.ones(2, 5)}, "starts: expected segments within 2 rows"),
    ({"x": torch.ones(())}, "x: expected a last dimension"),
    ({"a": torch.ones(3, 5)}, "ranks: expected a sum of 3"),
    ({"a": torch.ones(1, 2, 5)}, "a: expected"),
    ({"b": torch.ones(3, 2)}, "b: expected 2 rank rows"),
    ({"b": torch.ones(2, 3), "own_b": True}, "b: expected 2 rank rows"),
    ({"b": torch.ones(1, 2, 3)}, "b: expected"),
    ({"plan": torch.tensor([[3], [1], [2], [0.5]], dtype=torch.float64)}, "ranks: expected a sum of 2"),
    ({"plan": torch.tensor([[2], [-1], [2], [0.5]], dtype=torch.float64)}, "plan: expected integers >= 0"),
    ({"plan": torch.tensor([[2], [1], [float("nan")], [0.5]], dtype=torch.float64)}, "plan: expected integers >= 0"),
    ({"plan": torch.tensor([[2], [3], [2], [0.5]], dtype=torch.float64)}, "starts: expected segments within 4 rows"),
    ({"plan": torch.tensor([[2], [1], [2]], dtype=torch.float64)}, "plan: expected contiguous float64"),
    ({"index": torch.tensor([0, 1, 4])}, "index: expected rows of x below 4"),
    ({"seeds": torch.tensor([1]), "row_keys": torch.tensor([0, 1]), "dropout": 0.5}, "row_keys: expected at least 3"),
    ({"bias": torch.ones(4)}, "bias: expected"),
    ({"bias": torch.ones(3, dtype=torch.float64)}, "bias: expected"),
    ({"weight": None, "base": torch.ones(4, 4)}, "base: expected"),
    ({"weight": None, "base": torch.ones(3, 3)}, "base: expected"),
    ({"weight": None, "base": torch.ones(4, 3, dtype=torch.float64)}, "base: expected"),
    ({"weight": None}, "weight, base: expected one of them"),
    ({"d_y": torch.ones(3, 3)}, "d_y: expected"),
    ({"d_y": torch.ones(4, 4)}, "d_y: expected"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED)
def test_the_ops_refuse_what_would_leave_their_memory(changes, text, capfd):
    own = arguments(**changes)
    call = [own[name] for name in ("a", "b", "seeds", "row_keys", "index", "plan", "dropout", "own_b")]
    if not {"bias", "base"} & changes.keys() and changes != {"weight": None}:
        with pytest.raises(RuntimeError) as caught:
            torch.ops.hetlora.lora_small_backward(own["d_y"], own["x"], own["weight"], *call, True, True, True)
        assert text in str(caught.value) + capfd.readouterr().err  # below torch 2.13 the text of a compiled check is on stderr
    if "d_y" not in changes:
        with pytest.raises(RuntimeError) as caught:
            torch.ops.hetlora.lora_small_forward(own["x"], own["weight"], own["bias"], own["base"], *call)
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
    call = (held["a"], held["bt"], *drawn, plan.index, plan.table, p, False)
    y = torch.ops.hetlora.lora_small_forward(held["x"], held["weight"], held["bias"], None, *call)
    d_x, d_a, d_bt = torch.ops.hetlora.lora_small_backward(held["grad"], held["x"], held["weight"], *call, True, True, True)
    made = run_fused(layer, dtype)
    for check in checks:
        check()
    assert all(same_bits(before[name], held[name]) for name in held)
    for name, result in (("y", y), ("d_x", d_x), ("d_a", d_a), ("d_bt", d_bt)):
        assert same_bits(result, made[name])


def test_leaves_of_the_results(taken):
    """Nothing is kept for the backward pass beside the call's own tensors."""
    layer = make_layer([3], [0] * 5, 40, 30)
    leaves, kept = leaf_tensors(layer, torch.float32, None, "cpu"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = hk.lora_linear(leaves["x"], leaves["weight"], None, leaves["a"], leaves["bt"], layer.layout(), layer.segments())
    assert sorted(kept) == sorted(leaves[name].data_ptr() for name in ("x", "weight", "a", "bt"))
    y.backward(layer.grad.to(y))
    assert taken["backward"] == 1 and results(y, leaves)["d_a"].abs().sum() > 0


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
