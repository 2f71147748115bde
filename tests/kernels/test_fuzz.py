"""17,000 calls of the public functions with random shapes, ranks, types, strides and values, against float64, half of them in `make test` and all
in `make matrix`; 3,000 more are in test_fuzz_arguments.py.

Equal data is given in several forms (as it lies, strided, in a list of modules, into `out`), each a call of its own. HETLORA_TEST_SEED draws others.
"""

from __future__ import annotations

import pytest
import torch
from accuracy import Estimate, assert_exact, cat
from fuzz_draws import Draw, repeat, shares
from kernel_cases import BY_SIZE, LARGE, SMALL, WIDENED, estimated, going, guarded, leaf_tensors, make_layer, results, rounded, same_bits
from test_aggregate import estimated_sum
from test_norms import estimated_gram, estimated_root, result_type
from test_quantize import LIMIT, oracle, unpacked

import hetlora_kernels as hk

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("backend", ["auto"], indirect=True)]


def packed(draw: Draw, ranks: list[int], width: int, dtype: torch.dtype):
    return draw.normal(sum(ranks), width, dtype=dtype)


def forms(draw: Draw, rows):
    """The data as it lies in memory of its own, and twice in other forms."""
    return rows, draw.lying(rows), draw.lying(rows)


# ---------------------------------------------------------------- the server's functions


def sums_of_uploads(draw: Draw) -> int:
    ranks, width, dtype, owners = draw.ranks(), draw.width(), draw.dtype(), draw.random() < 0.5
    layout, stored = hk.RankLayout(ranks), packed(draw, ranks, width, dtype)
    most, mode = layout.max_rank + draw.choice([0, 0, 1, 5]), "owners" if owners else "none"
    weights = torch.rand(len(ranks), generator=draw.torch, dtype=torch.float64).float().double() * (
        1 if dtype == torch.float16 else draw.choice([1, 1, 1024])
    )  # 65504 is float16's largest
    weights[[k for k in range(len(ranks)) if draw.random() < 0.1]] = 0
    keep = draw.normal(most, width, dtype=dtype) if draw.random() < 0.4 else None
    expected = estimated_sum(stored.double(), ranks, weights, most, owners, dtype) if ranks and most else Estimate(torch.zeros(most, width))
    if keep is not None:
        expected[slice(layout.max_rank, None)] = Estimate(keep.double())[layout.max_rank :]
    forced = {"normalize": mode, "keep": keep}
    got = [hk.aggregate(rows, layout, weights, most, **forced) for rows in forms(draw, stored)]
    out, guards_hold = guarded((most, width), dtype, "cpu")
    got.append(hk.aggregate(stored, layout, weights.tolist(), most, out=out, **forced))
    guards_hold()
    got += hk.aggregate([stored, draw.lying(stored)], layout, weights[:, None].expand(-1, 2), most, normalize=mode, keep=None if keep is None else [keep] * 2)
    sums = hk.Accumulator([stored[:0]], most)
    for k, own in enumerate(stored.split(ranks)):
        sums.add([draw.lying(own) if draw.random() < 0.5 else own], float(weights[k]))
    got += sums.result(normalize=mode, keep=None if keep is None else [keep])
    for result in got:
        assert_exact({"out": result}, {"out": expected})
    assert all(same_bits(result, got[0]) for result in got[1:])
    return len(got) - 1 + len(ranks) + 1


def downloads(draw: Draw) -> int:
    ranks, width, source, target = draw.ranks(), draw.width(), draw.dtype(), draw.dtype()
    layout, dense = hk.RankLayout(ranks), draw.random() < 0.5
    bank = draw.normal(layout.max_rank + draw.choice([0, 1, 4]), width, dtype=source)
    if dense:
        expected = torch.zeros(len(ranks), *bank.shape, dtype=target)
        for k, rank in enumerate(ranks):
            expected[k, :rank] = bank[:rank].to(target)
    else:
        expected = torch.cat([bank[:rank] for rank in ranks] or [bank[:0]]).to(target)
    got = [hk.truncate(rows, layout, dtype=target, dense=dense) for rows in forms(draw, bank)]
    out, guards_hold = guarded(expected.shape, target, "cpu")
    got.append(hk.truncate(bank, layout, dtype=target, dense=dense, out=out))
    guards_hold()
    got += hk.truncate([bank, draw.lying(bank)], [layout, hk.RankLayout(ranks)], dtype=target, dense=dense)
    assert all(same_bits(result, expected) for result in got)
    return len(got) - 1


def norms(draw: Draw) -> int:
    ranks, dtype = draw.ranks(), draw.dtype()
    layout, clients = hk.RankLayout(ranks), len(ranks)
    a, bt = packed(draw, ranks, draw.width(), dtype), packed(draw, ranks, draw.width(), dtype)
    keep = [draw.choice([0, 1, 2, rank, rank + 1, 10**6, max(0, rank - 1)]) for rank in ranks]
    kind, nothing = result_type(dtype), Estimate(torch.zeros(0))
    grams = [[estimated_gram(own, dtype) for own in side.double().split(ranks)] for side in (a, bt)]
    deltas, tails = [], []
    for k, (left, right) in enumerate(zip(*grams, strict=True)):
        product = Estimate(left.value * right.value, left.own * right.value.square() + left.value.square() * right.own).rounded(kind)
        deltas.append(estimated_root(product, dtype))
        tails.append(estimated_root(Estimate(a.double().split(ranks)[k][keep[k] :].square()).rounded(kind), dtype))
    packed_gram, delta, tail = (cat(parts) if parts else nothing for parts in ([g.map(torch.Tensor.flatten) for g in grams[0]], deltas, tails))
    calls = 0
    for own_a, own_bt in zip(forms(draw, a), forms(draw, bt), strict=True):
        found = {"gram": hk.gram(own_a, layout), "delta": hk.delta_norms(own_a, own_bt, layout), "tail": hk.tail_norms(own_a, layout, keep)}
        assert {t.dtype for t in found.values()} == {kind}
        assert_exact(found, {"gram": packed_gram, "delta": delta, "tail": tail})
        calls += 3
    assert [tuple(block.shape) for block in hk.unpack_gram(found["gram"], layout)] == [(rank, rank) for rank in ranks]
    exact = hk.delta_norms([a, a], [bt, bt], layout, exact=True)
    truth = (
        torch.stack([torch.linalg.norm(b.t() @ own) for own, b in zip(a.double().split(ranks), bt.double().split(ranks), strict=True)])
        if ranks
        else exact[:, 0]
    )
    assert exact.shape == (clients, 2) and exact.dtype == torch.float64
    # float64 of the same sums: relative to the norms of the factors, between whose rows nothing cancels at random.
    torch.testing.assert_close(exact, truth[:, None].expand(-1, 2), rtol=1e-10, atol=0)
    return calls + 2


def few_bits(draw: Draw) -> int:
    width, bits, dtype = draw.choice([0, *range(1, 9), 33]), draw.choice([8, 4]), draw.dtype()
    rows = draw.normal(draw.randrange(5), width, dtype=dtype)
    rows[[i for i in range(len(rows)) if draw.random() < 0.2]] *= draw.choice([0, 2.0**-130, 2.0**-120])
    got = [hk.quantize_rows(own, bits) for own in forms(draw, rows)]
    together = hk.quantize_rows([rows, rows], bits)
    got.append((together[0][1], together[1][1]))
    codes, scales = got[0]
    for other in got[1:]:
        assert torch.equal(other[0], codes) and same_bits(other[1], scales)
    if dtype != torch.float64:  # the oracle divides in float32
        for row, own, scale in zip(rows.float().tolist(), unpacked(codes, bits, width), scales.tolist(), strict=True):
            assert (own, scale) == oracle(row, bits)
    values = torch.tensor(unpacked(codes, bits, width), dtype=torch.float64).view(len(rows), width)
    assert values.abs().max().item() <= LIMIT[bits] if values.numel() else True
    target = draw.dtype()
    back = hk.dequantize_rows(codes, scales, width, dtype=target)
    product = values * scales.double()[:, None]
    assert same_bits(back, (product if target == torch.float64 else product.float()).to(target))  # codes have 8 bits: the product in float32 is rounded once
    assert bool(
        ((hk.dequantize_rows(codes, scales, width, dtype=torch.float64) - rows.double()).abs() <= (0.5 + 2**-16) * scales.double()[:, None] + 2.0**-119).all()
    )
    return len(got) + 2


@pytest.mark.parametrize(("case", "calls"), shares({sums_of_uploads: 4000, downloads: 2500, norms: 2500, few_bits: 3000}))
def test_server_functions(case, calls):
    repeat(case, calls)


# ---------------------------------------------------------------- the layer


def layers(draw: Draw) -> int:
    ranks, dtype = draw.ranks() or [draw.rank()], draw.dtype()
    rows = draw.choice([0, 1, 2, 3, 5, 8, 9, 17])
    ids = [draw.randrange(-1, len(ranks)) for _ in range(rows)]
    ids = sorted(ids, key=lambda k: k % (len(ranks) + 1)) if draw.random() < 0.3 else ids
    p = draw.choice([0.0, 0.0, 0.1, 0.9])
    factor_dtype = draw.choice([dtype, torch.float32]) if dtype != torch.float64 else dtype
    keys = [draw.randrange(2**40) for _ in ids] if draw.random() < 0.3 else None
    layer = rounded(
        make_layer(ranks, ids, draw.width(), draw.width(), seed=draw.randrange(2**20), p=p, bias=draw.random() < 0.5, keys=keys), dtype, factor_dtype
    )
    base = draw.normal(rows, layer.m, dtype=dtype)
    whole, added = estimated(layer, dtype), estimated(layer, dtype, base=Estimate(base.double().clone()))
    added.pop("d_bias", None)
    for transposed in (False, True):
        leaves = leaf_tensors(layer, dtype, factor_dtype, "cpu")
        with going(draw.choice([BY_SIZE, SMALL, LARGE, WIDENED])):
            assert_exact(called(draw, layer, leaves, transposed), whole)
        leaves = leaf_tensors(layer, dtype, factor_dtype, "cpu")
        assert_exact(called(draw, layer, leaves, transposed, base), added)
    return 4


def called(draw: Draw, layer, leaves, transposed, base=None):
    """Results of one call of `lora_linear`, or `lora_add` beside `base`, on views that lie in some other form."""
    shape = draw.choice([(), (1,), (1, 1)])
    x = leaves["x"]
    x = x.view(*shape, *x.shape) if draw.random() < 0.5 else x.t().clone(memory_format=torch.contiguous_format).t().view(*shape, *x.shape)
    a = leaves["a"] if draw.random() < 0.5 else torch.cat((leaves["a"], leaves["a"]), 1)[:, : layer.n]
    bt = leaves["bt"].t() if transposed else leaves["bt"]
    bt = bt.contiguous() if draw.random() < 0.5 else bt
    weight = draw.lying(leaves["weight"]).detach()
    given = {"scale": tuple(layer.scale), "dropout": layer.p, "seeds": torch.tensor(layer.seeds), "transposed": transposed}
    batch = a, bt, layer.layout(), layer.segments()
    y = hk.lora_linear(x, weight, leaves.get("bias"), *batch, **given) if base is None else hk.lora_add(base.view(*shape, *base.shape), x, *batch, **given)
    if y.requires_grad:
        y.backward(layer.grad.to(y.dtype).view(y.shape))
    found = results(y.view(-1, layer.m) if y.numel() else y.reshape(len(layer.ids), layer.m), leaves)
    if base is not None:
        found.pop("d_bias", None)
    return found


def others_alone(draw: Draw) -> int:
    """What one client's rows hold, NaN and infinities too, reaches no other client's output or gradient."""
    ranks, dtype = [draw.rank() for _ in range(3)], draw.dtype()
    ids = [draw.randrange(3) for _ in range(draw.randrange(2, 12))]
    layer = rounded(make_layer(ranks, ids, draw.width(), draw.width(), seed=draw.randrange(2**20)), dtype)
    bad, way = draw.randrange(3), draw.choice([BY_SIZE, SMALL, LARGE, WIDENED])
    found = []
    for value in (None, draw.choice([float("nan"), float("inf"), -float("inf")])):
        if value is not None:
            layer.x[layer.client_rows(bad)] = value
        leaves = leaf_tensors(layer, dtype, None, "cpu")
        with going(way):
            y = hk.lora_linear(*(leaves[name] for name in ("x", "weight", "bias", "a", "bt")), layer.layout(), layer.segments(), scale=layer.scale)
            y.backward(layer.grad.to(dtype))
        found.append(results(y, leaves))
    rest = [t for t, owner in enumerate(ids) if owner != bad]
    ends = hk.RankLayout(ranks)
    assert same_bits(found[0]["y"][rest], found[1]["y"][rest]) and same_bits(found[0]["d_x"], found[1]["d_x"])
    for name in ("d_a", "d_bt"):
        for k in {0, 1, 2} - {bad}:
            assert same_bits(found[0][name][ends.rows(k)], found[1][name][ends.rows(k)])
    return 2


@pytest.mark.parametrize(("case", "calls"), shares({layers: 3000, others_alone: 800}))
def test_layer(case, calls):
    repeat(case, calls)


# ---------------------------------------------------------------- banks


def banks(draw: Draw) -> int:
    """Every way from one bank to another moves rows bit for bit; B A of the results is checked densely."""
    dtype = draw.dtype()
    shapes = {f"m{i}": (draw.width(), draw.width()) for i in range(draw.randrange(1, 4))}
    clients = draw.randrange(1, 4)
    ranks = {name: [draw.rank() for _ in range(clients)] for name in shapes}
    bank = hk.AdapterBank(shapes, ranks, dtype=dtype)
    with torch.no_grad():
        for rows in bank.parameters():
            rows.copy_(draw.normal(*rows.shape))
    copy, chosen = bank.to(), [draw.randrange(clients) for _ in range(draw.randrange(4))]
    for k in range(clients):
        own = bank.adapter(k)
        copy.load_adapter(k, {key: draw.lying(value) for key, value in own.items()})
        for key, value in copy.adapter(k).items():
            assert same_bits(value, own[key])
    picked, cut = bank.select(chosen), {name: [draw.randrange(rank + 1) for rank in own] for name, own in ranks.items()}
    pruned, doubled, joined = bank.prune(cut), hk.AdapterBank.stack([bank, bank]), hk.AdapterBank.concat([bank, picked])
    server = bank.select([0])
    sent = server.truncate({name: [rank, rank // 2] for name, (rank, *_) in ranks.items()})

    def delta(some, name, k, rank=None):
        rows = some.layouts[name].rows(k)
        return some.bt[name].detach()[rows][:rank].double().t() @ some.a[name].detach()[rows][:rank].double()

    for name in shapes:
        for i, k in enumerate(chosen):
            assert torch.equal(delta(picked, name, i), delta(bank, name, k)) and torch.equal(delta(joined, name, clients + i), delta(bank, name, k))
        for k in range(clients):
            assert torch.equal(delta(pruned, name, k), delta(bank, name, k, cut[name][k]))
            torch.testing.assert_close(delta(doubled, name, k), 2 * delta(bank, name, k), rtol=1e-12, atol=1e-9)
        assert torch.equal(delta(sent, name, 1), delta(bank, name, 0, ranks[name][0] // 2))
    assert bank.num_bytes(0) == sum(value.numel() * value.element_size() for value in bank.adapter(0).values())
    return 2 * clients + 6


@pytest.mark.parametrize(("case", "calls"), shares({banks: 1200}))
def test_banks(case, calls):
    repeat(case, calls)
