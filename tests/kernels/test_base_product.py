"""The base product of a large call on the CPU kernels, of 16-bit types: the framework's own, or widened to float32 a part of the weight at a time."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_exact
from kernel_cases import LARGE, WIDENED, estimated, going, leaf_tensors, make_layer, results, rounded, run_fused, same_bits, scattered

import hetlora_kernels as hk
from hetlora_kernels import _library
from hetlora_kernels._torch import multiplies_fast

pytestmark = [
    pytest.mark.skipif("cpu" not in _library.available(), reason="no compiled kernel for CPU tensors"),
    pytest.mark.parametrize("backend", ["cpu"], indirect=True),
]

HALVES = [torch.bfloat16, torch.float16]
# A part of the weight has 2^18 elements: two parts, either way it lies.
SHAPES = [(70, 53, 9), (700, 400, 9), (400, 700, 12), (1, 1, 10)]
# Of x and y 2^22, and at least 64 rows: two parts, the last one short. A row of the weight that is more than a part.
WIDE = [(65_600, 3, 66), (3, 65_600, 66), (300_000, 2, 3)]
LIES = ["as it is", "transposed", "scattered"]


def check(n, m, rows, dtype, lies, bias):
    """y, d_x and every other result, for a weight [m, n] that lies as it is, as GPT-2's Conv1D keeps it, or anyhow."""
    exact = rounded(make_layer([2], [-1] + [0] * (rows - 1), n, m, bias=bias), dtype)
    leaves = leaf_tensors(exact, dtype, torch.float32, "cpu")
    weight = {"as it is": leaves["weight"], "transposed": leaves["weight"].t().contiguous().t(), "scattered": scattered(leaves["weight"])}[lies]
    with going(WIDENED):
        y = hk.lora_linear(leaves["x"], weight, leaves.get("bias"), leaves["a"], leaves["bt"], exact.layout(), exact.segments(), scale=exact.scale)
        y.backward(exact.grad.to(dtype))
    assert_exact(results(y, leaves), estimated(exact, dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "m", "rows"), SHAPES)
def test_widened_products_are_exact(n, m, rows, dtype, lies, bias):
    check(n, m, rows, dtype, lies, bias)


@pytest.mark.parametrize("lies", LIES[:2])
@pytest.mark.parametrize(("n", "m", "rows"), WIDE)
def test_widened_products_of_more_than_a_part(n, m, rows, lies):
    check(n, m, rows, torch.bfloat16, lies, True)


@pytest.mark.parametrize("dtype", HALVES)
def test_other_types_and_the_factors_gradients_know_nothing_of_it(dtype):
    layer = make_layer([5, 2], [0, 1, 1, -1, 0] * 3, 150, 131, p=0.3)
    with going(LARGE):
        before, wide = run_fused(layer, dtype), run_fused(layer, torch.float32)
    with going(WIDENED):
        after, again = run_fused(layer, dtype), run_fused(layer, torch.float32)
    assert all(same_bits(before[name], after[name]) for name in ("d_a", "d_bt", "d_bias"))
    assert all(same_bits(wide[name], again[name]) for name in wide)


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 5, 0), (12, 5, 0)])
def test_empty_ones(shape):
    rows, n, m = shape
    x, weight, bias = (torch.ones(*size, dtype=torch.bfloat16) for size in ((rows, n), (m, n), (m,)))
    x.requires_grad_()
    with going(WIDENED):
        y = hk.lora_linear(x, weight, bias, torch.ones(1, n), torch.ones(1, m), hk.RankLayout([1]), hk.Segments.from_ids([0] * rows))
        y.sum().backward()
    assert tuple(y.shape) == (rows, m) and tuple(x.grad.shape) == (rows, n) and not bool(x.grad.any())


def test_a_way_has_a_number():
    for way in (-1, 4):
        with pytest.raises(RuntimeError, match=f"way: expected 0 .* got {way}"):
            torch.ops.hetlora._lora_way(way)
    assert torch.ops.hetlora._lora_way(0) == 0


@pytest.mark.parametrize("dtype", HALVES)
def test_torch_itself_says_which_type_it_multiplies_fast(dtype):
    """Then the product has the bits of F.linear. Else a large call has those of the widened way, of its own accord."""
    layer = make_layer([0], [-1] * 40, 3000, 700)
    # Sums of zero: what is left is the rounding of each order.
    layer.x[:, 1500:], layer.weight[:, 1500:], layer.bias = -layer.x[:, :1500], layer.weight[:, :1500], None
    leaves = leaf_tensors(layer, dtype, None, "cpu")
    own = run_fused(layer, dtype)["y"]
    with going(WIDENED):
        widened = run_fused(layer, dtype)["y"]
    framework = torch.nn.functional.linear(leaves["x"], leaves["weight"]).detach()
    assert not same_bits(widened, framework), "this shape tells nothing"
    assert same_bits(own, framework if multiplies_fast(dtype, "cpu") else widened)
