"""The layer over more than one tile, chunk and thread of every kernel: bits that must not move, memory that must not be touched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import numpy
import pytest
import torch
from accuracy import Estimate, assert_exact, in_parts
from kernel_cases import drawn, estimated, guarded, kept, leaf_tensors, make_layer, rounded, run_fused, same_bits

import hetlora_kernels as hk
from hetlora_kernels import _library, reference

N, M = 584, 530  # past one panel of columns, multiples of no vector
LENGTHS, RANKS = [150, 0, 65, 1, 24], [16, 4, 5, 8, 0]
LARGE_RANKS = [70, 4, 33, 32, 0]  # in bfloat16 on the matrix tiles of a processor that has them, or S of pairs


def large_layer(p: float, shuffled: bool = False, n: int = N, m: int = M, ranks: list[int] = RANKS):
    ids = [k for k, length in enumerate(LENGTHS) for _ in range(length)] + [-1] * 3
    if shuffled:
        ids = [ids[i] for i in torch.randperm(len(ids), generator=drawn(3)).tolist()]
    return make_layer(ranks, ids, n, m, p=p)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("ranks", [RANKS, LARGE_RANKS])
def test_no_bit_depends_on_the_number_of_threads(dtype, shuffled, ranks, backend, device):
    """Of the kernels alone: a framework's own base product may split its sums by threads."""
    if backend == "reference":
        pytest.skip("the reference's products are the framework's")
    layer = large_layer(0.1, shuffled, ranks=ranks)
    seg, flat = layer.segments(), sum(r * n for r, n in zip(layer.ranks, layer.segments().lengths, strict=True))
    x, a = (t.to(device, dtype) for t in (layer.x, layer.a))
    case = (torch.tensor(layer.seeds, device=device), seg.keys_on(device), seg.index_on(device), layer.ranks, seg.starts, seg.lengths, 0.1)
    scale = torch.tensor(layer.scale, device=device)
    outcomes = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        s = _library.call("shrink")(x, a, scale, *case)
        out = torch.ones(len(layer.ids), N, device=device, dtype=dtype)
        _library.call("expand_")(out, s, a, *case)
        outcomes.append((s, out, _library.call("grouped_gram")(s, x, *case, torch.float32)))
    assert outcomes[0][0].numel() == flat
    for other in outcomes[1:]:
        assert all(same_bits(one, two) for one, two in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("ranks", [RANKS, LARGE_RANKS])
def test_factor_gradients_alone_and_co_batched_over_many_tiles(dtype, shuffled, ranks, device):
    layer = large_layer(0.1, shuffled, ranks=ranks)
    together = run_fused(layer, dtype, device=device)
    for k, (end, rank) in enumerate(zip(accumulate(ranks), ranks, strict=True)):
        rows, own = layer.client_rows(k), slice(end - rank, end)
        alone = make_layer([rank], [0] * len(rows), N, M, p=0.1)
        alone.x, alone.grad, alone.a, alone.bt = layer.x[rows], layer.grad[rows], layer.a[own], layer.bt[own]
        alone.weight, alone.scale, alone.seeds = layer.weight, layer.scale[k : k + 1], layer.seeds[k : k + 1]
        result = run_fused(alone, dtype, device=device)
        assert same_bits(together["d_a"][own], result["d_a"]) and same_bits(together["d_bt"][own], result["d_bt"])


@pytest.mark.parametrize("length", [40, 1100])  # one part of a sum over rows, and two
@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_large_ranks_beside_bfloat16_rows_are_exact(length, factor_dtype, p, device):
    layer = rounded(make_layer([33, 64], [0, 1] * (length // 2), 1100, 75, p=p), torch.bfloat16, factor_dtype)
    assert_exact(run_fused(layer, torch.bfloat16, factor_dtype, device), estimated(layer, torch.bfloat16, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [[31, 32], [256], [512]])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_ranks_on_both_sides_of_the_threshold_and_far_above_are_exact(dtype, ranks, p, device):
    layer = rounded(make_layer(ranks, [k for k in range(len(ranks)) for _ in range(40)], 330, 75, p=p), dtype)
    assert_exact(run_fused(layer, dtype, device=device), estimated(layer, dtype, device))


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1024, 1056, 2100])  # in steps of 32 columns and parts of 1024
def test_s_of_bfloat16_pairs_over_steps_and_parts(n, device):
    """Also of numbers of one sign, whose sum is long, and with a rest of rows and ranks beside whole tiles."""
    draw = drawn(n)
    x, a = (torch.randn(rows, n, generator=draw).abs().to(device, torch.bfloat16) for rows in (27, 39))
    got = _library.call("shrink")(x, a, torch.full((1,), 0.5, device=device), None, None, None, [39], [0], [27], 0.0).view(27, 39)
    operand = reference.operand_dtype(x)
    s = Estimate(x.cpu()).matmul(Estimate(a.cpu()).t(), torch.float32, in_parts).times(0.5, torch.float32).rounded(operand)
    assert_exact({"s": got}, {"s": s})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_a_multiple_of_1024_bytes_apart_have_the_bits_of_any_others(dtype, backend, device):
    """They share sets of L1, and strips of them are copied first (csrc/cpu/lora_kernels.cpp)."""
    if backend == "reference":
        pytest.skip("the reference's products are the framework's")
    draw, length, rank = drawn(0), 40, 13
    s, x = torch.randn(length * rank, generator=draw).to(device, dtype), torch.randn(length, 1032, generator=draw).to(device, dtype)
    aliased, apart = (_library.call("grouped_gram")(s, x[:, :n].contiguous(), None, None, None, [rank], [0], [length], 0.0, dtype) for n in (1024, 1032))
    assert same_bits(aliased, apart[:, :1024].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [33, 300, 600, 1030, 2050])  # four strips are copied together, fewer, or none
def test_rows_of_a_factor_a_multiple_of_1024_bytes_apart_have_the_bits_of_any_others(rank, dtype, backend):
    if backend != "cpu":
        pytest.skip("strips are copied by the CPU rung")
    draw, length = drawn(rank), 100  # more than one block of rows, and a rest
    s, factor = torch.randn(length * rank, generator=draw, dtype=dtype), torch.randn(rank, 520, generator=draw, dtype=dtype)
    aliased, apart = torch.randn(length, 512, generator=draw, dtype=dtype), torch.randn(length, 520, generator=draw, dtype=dtype)
    apart[:, :512] = aliased
    for out in (aliased, apart):
        _library.call("expand_")(out, s, factor[:, : out.shape[1]].contiguous(), None, None, None, [rank], [0], [length], 0.0)
    assert same_bits(aliased, apart[:, :512].contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "columns"), [(31, 2048), (32, 2048), (127, 4096), (128, 2100), (300, 1543)])  # ranks held together: none, some, all at a time
def test_s_of_many_columns_has_the_bits_of_its_rows_alone(rank, columns, dtype, backend):
    """Of twelve rows together parts are copied, and sums wait in memory (csrc/cpu/lora_kernels.cpp); single rows are read where they lie."""
    if backend != "cpu":
        pytest.skip("parts are copied by the CPU rung")
    draw, length = drawn(rank), 29  # whole groups of rows, and a rest
    x, a = (torch.randn(rows, columns, generator=draw, dtype=dtype) for rows in (length, rank))
    scale = torch.full((1,), 0.3, dtype=dtype)
    whole = _library.call("shrink")(x, a, scale, None, None, None, [rank], [0], [length], 0.0)
    alone = torch.cat([_library.call("shrink")(row[None], a, scale, None, None, None, [rank], [0], [1], 0.0) for row in x])
    assert same_bits(whole, alone)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38, 2.0**-100])
def test_numbers_at_the_ends_of_float32_in_a_factor_of_large_rank(value, device):
    """As S = x A^T has them, of which one element is this one times 1."""
    x, a = torch.zeros(3, 40, device=device, dtype=torch.bfloat16), torch.zeros(64, 40, device=device)
    x[1, 7], a[50, 7] = 1.0, value
    s = _library.call("shrink")(x, a, torch.ones(1, device=device), None, None, None, [64], [0], [3], 0.0).view(3, 64)
    torch.testing.assert_close(s[1, 50], a[50, 7], rtol=0, atol=0, equal_nan=True)
    assert not s[1, :50].any() and not s[1, 51:].any()


@pytest.mark.parametrize("columns", [63, 64, 65, 511, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_over_many_blocks(columns, dtype, device):
    """What dropout leaves of x and of dx is the written mask, on columns past a vector, a block of draws and a panel."""
    keys, seed, p = [0, 2**20 + 5, 2**33], 0x0123456789ABCDEF, 0.3
    mask = kept(seed, keys, columns, p).to(device)
    seg = hk.Segments.from_lengths([3], row_keys=torch.tensor(keys))
    a = torch.ones(1, columns, dtype=dtype, device=device, requires_grad=True)
    x = torch.ones(3, columns, dtype=dtype, device=device, requires_grad=True)
    y = hk.lora_add(
        torch.zeros(3, 1, dtype=dtype, device=device), x, a, a.new_ones(1, 1), hk.RankLayout([1]), seg, dropout=p, seeds=torch.tensor([seed], device=device)
    )
    y.sum().backward()
    value = 1 / (1 - round(65536 * p) / 65536)
    assert torch.equal(x.grad != 0, mask)
    torch.testing.assert_close(y.detach()[:, 0].double(), mask.sum(1).double() * value, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    torch.testing.assert_close(a.grad[0].double(), mask.sum(0).double() * value, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_nothing_beside_the_results_is_written(dtype, shuffled, p, device):
    """Every tensor of the call between guards, at an address that is a multiple of no vector; the values are the reference's."""
    layer = large_layer(p, shuffled, n=75, m=70)
    seg = layer.segments()
    case = (torch.tensor(layer.seeds, device=device) if p else None, seg.keys_on(device) if p else None, seg.index_on(device))
    rows = (layer.ranks, seg.starts, seg.lengths, p)
    scale, checks, firsts, placed = torch.tensor(layer.scale, device=device), [], [], {}
    for name in ("x", "a", "grad"):
        source = getattr(layer, name)
        buffer, check = guarded((source.numel() + 1,), dtype, device)
        firsts.append(buffer[:1].fill_(-77.0))
        placed[name] = buffer[1:].view(source.shape).copy_(source)
        checks.append(check)
    x, a, out = placed["x"], placed["a"], placed["grad"]
    bt = layer.bt.to(device, dtype)
    s = _library.call("shrink")(x, a, scale, *case, *rows)
    expected = reference.shrink(x, a, scale, *case, *rows)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(s, expected, **close)
    wanted = out.clone()
    reference.expand_(wanted, s, bt, None, None, case[2], *rows[:3], 0.0)
    _library.call("expand_")(out, s, bt, None, None, case[2], *rows[:3], 0.0)
    torch.testing.assert_close(out, wanted, **close)
    gram = _library.call("grouped_gram")(s, x, *case, *rows, torch.float32)
    torch.testing.assert_close(gram, reference.grouped_gram(s, x, *case, *rows, torch.float32), rtol=1e-3, atol=1e-3)
    for check in checks:
        check()
    assert all(float(first) == -77.0 for first in firsts)


def far_apart(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same bfloat16 rows 2^30 elements apart, in memory that nobody touches in between."""
    size = (t.shape[0] - 1 << 30) + t.shape[1]
    buffer = torch.from_numpy(numpy.empty(size, numpy.int16)).view(torch.bfloat16) if device.type == "cpu" else torch.empty(size, device=device, dtype=t.dtype)
    return buffer.as_strided(t.shape, (1 << 30, 1)).copy_(t)


@pytest.mark.parametrize("gathered", [False, True])
def test_rows_past_two_to_the_thirty_first_element(gathered, backend, device):
    """Where 32-bit arithmetic on addresses wraps around."""
    if backend not in ("triton", "cuda", "reference"):
        pytest.skip("this rung copies rows that are not adjacent")
    g = drawn(1)
    x, rows = (torch.randn(n, 24, generator=g).to(device, torch.bfloat16) for n in (4, 5))
    index = torch.tensor([3, 0, 2, 1], device=device) if gathered else None
    case = (torch.tensor([1, 2], device=device), torch.arange(4, device=device), index, [2, 3], [0, 2], [2, 2], 0.25)
    outcomes = []
    for place in (x, far_apart(x, device)):
        s = _library.call("shrink")(place, rows, torch.ones(2, device=device), *case)
        gram = _library.call("grouped_gram")(s, place, *case, torch.float32)
        _library.call("expand_")(place, s, rows, *case)
        outcomes.append((s, gram, place.contiguous()))
    assert all(same_bits(one, other) for one, other in zip(*outcomes, strict=True))


def test_the_output_may_be_changed_in_place(device):
    """As a residual connection does: also for inputs of more than two dimensions, and the gradient stays right."""
    layer = make_layer([3], [0] * 6, 9, 7)
    grads = []
    for in_place in (False, True):
        leaves = leaf_tensors(layer, torch.float32, None, device)
        y = hk.lora_linear(
            *(leaves["x"].reshape(2, 3, 9), leaves["weight"], leaves["bias"], leaves["a"], leaves["bt"], layer.layout(), layer.segments()),
        )
        y = y.mul_(2.0) if in_place else y * 2.0
        y.backward(layer.grad.reshape(2, 3, 7).to(y))
        grads.append([leaf.grad for leaf in leaves.values() if leaf.requires_grad])
    assert all(same_bits(one, other) for one, other in zip(*grads, strict=True))


def test_training_after_inference_mode_on_one_layout(device):
    """What the layout keeps from the first call must serve the second."""
    layer = make_layer([3], [0] * 6, 9, 7)
    layout, seg = layer.layout(), layer.segments()

    def run():
        leaves = leaf_tensors(layer, torch.float32, None, device)
        return hk.lora_linear(leaves["x"], leaves["weight"], None, leaves["a"], leaves["bt"], layout, seg, scale=0.5), leaves

    with torch.inference_mode():
        first, _ = run()
    y, leaves = run()
    y.sum().backward()
    assert same_bits(first, y) and bool(leaves["a"].grad.isfinite().all())


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"index": [0, 9]}, "index: expected rows of x below 4"),
        ({"index": [0, -1]}, "index: expected rows of x below 4"),
        ({"starts": [3]}, "starts: expected segments within 4 rows"),
        ({"starts": [-1]}, "starts: expected segments within 4 rows"),
        ({"ranks": [3]}, "ranks: expected a sum of 2"),
        ({"lengths": [2, 2], "starts": [0, 2]}, "starts, lengths: expected at most 1"),
        ({"seeds": []}, "seeds: expected at least 1"),
        ({"row_keys": [0]}, "row_keys: expected at least 2"),
    ],
)
def test_compiled_kernels_refuse_what_would_leave_their_memory(change, text, capfd):
    if "cpu" not in _library.available():
        pytest.skip("no compiled kernel for CPU tensors")
    arguments = {"seeds": [1], "row_keys": [0, 1], "index": None, "ranks": [2], "starts": [0], "lengths": [2], **change}
    for name in ("seeds", "row_keys", "index"):
        arguments[name] = None if arguments[name] is None else torch.tensor(arguments[name], dtype=torch.int64)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.hetlora.shrink(torch.ones(4, 3), torch.ones(2, 3), torch.ones(1), *arguments.values(), 0.5)
    assert text in str(caught.value) + capfd.readouterr().err  # below torch 2.13 the text of a compiled check is on stderr
