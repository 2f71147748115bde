"""AdapterBank: what it starts from, the banks made from it, and PEFT's format in and out."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import same_bits

import hetlora_kernels as hk

SHAPES = {"q": (6, 25), "mlp.up": (9, 4)}
MIXED = {"q": [4, 0, 3], "mlp.up": [2, 5, 1]}


def filled(shapes=SHAPES, ranks=MIXED, dtype=torch.float32, device="cpu", seed=0):
    bank = hk.AdapterBank(shapes, ranks, dtype=dtype, device=device)
    g = torch.Generator().manual_seed(seed)
    for factor in bank.parameters():
        factor.data.copy_(torch.randn(factor.shape, generator=g))
    return bank


def factors(bank, k):
    return [t.detach()[bank.layouts[name].rows(k)] for side in (bank.a, bank.bt) for name, t in side.items()]


def same_factors(left, right):
    return len(left) == len(right) and all(same_bits(one, other) for one, other in zip(left, right, strict=True))


# ---------------------------------------------------------------- what it starts from


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_clients_start_from_the_leading_rows_of_one_draw(dtype, device):
    bank = hk.AdapterBank({"q": (6, 25), "v": (3, 400)}, [4, 0, 64, 9], dtype=dtype, device=device)
    for name, (m, n) in bank.shapes.items():
        a, layout = bank.a[name].detach(), bank.layouts[name]
        largest = a[layout.rows(2)]
        for k, rank in enumerate(layout.ranks):
            assert same_bits(a[layout.rows(k)], largest[:rank])
        assert bool((bank.bt[name] == 0).all()) and bank.bt[name].shape == (77, m)
        bound = n**-0.5
        assert 0.9 * bound < float(largest.abs().max()) <= bound * 1.01 and abs(float(largest.float().mean())) < 0.1 * bound
        assert largest.unique().numel() > 0.5 * min(largest.numel(), 256)
        assert a.dtype == bank.bt[name].dtype == bank.dtype == dtype and a.device == bank.device == torch.empty(0, device=device).device


def test_the_draw_follows_the_generator():
    torch.manual_seed(3)
    first = hk.AdapterBank(SHAPES, [4])
    torch.manual_seed(3)
    assert same_factors(factors(first, 0), factors(hk.AdapterBank(SHAPES, [4]), 0))
    assert not same_factors(factors(first, 0), factors(hk.AdapterBank(SHAPES, [4]), 0))
    own = [hk.AdapterBank(SHAPES, [4], generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert same_factors(factors(own[0], 0), factors(own[1], 0))


def test_what_it_says_of_itself(device):
    bank = filled(device=device)
    assert bank.ranks == {"q": (4, 0, 3), "mlp.up": (2, 5, 1)} and hk.AdapterBank(SHAPES, [4, 2], device=device).ranks == (4, 2)
    assert bank.num_clients == 3 and bank.shapes == SHAPES and list(bank.a) == list(bank.bt) == list(SHAPES)
    parameters = list(bank.parameters())
    assert [p.shape for p in parameters] == [(7, 25), (8, 4), (7, 6), (8, 9)] and all(p.is_leaf and p.requires_grad for p in parameters)
    assert [bank.num_bytes(k) for k in range(3)] == [4 * sum(t.numel() for t in factors(bank, k)) for k in range(3)]
    assert all(bank.num_bytes(k, "a") == 4 * sum(t.numel() for t in factors(bank, k)[: len(SHAPES)]) for k in range(3))
    assert all(bank.num_bytes(k, "a") + bank.num_bytes(k, "b") == bank.num_bytes(k) for k in range(3))
    with pytest.raises(ValueError, match=r"^factors: expected 'a', 'b' or 'ab', got 'bt'"):
        bank.num_bytes(0, "bt")
    assert filled(dtype=torch.bfloat16, device=device).num_bytes(0) * 2 == bank.num_bytes(0)
    assert "clients: 3, modules: 2, ranks: 0 to 5, " in repr(bank)


# ---------------------------------------------------------------- new banks


def test_truncate_is_the_download(device):
    server = filled(ranks=[8], device=device)
    clients = server.truncate([3, 8, 0])
    assert clients.ranks == (3, 8, 0)
    for k, rank in enumerate((3, 8, 0)):
        assert same_factors(factors(clients, k), [t[:rank] for t in factors(server, 0)])
    mixed = server.truncate({"q": [1, 8], "mlp.up": [4, 0]})
    assert mixed.ranks == {"q": (1, 8), "mlp.up": (4, 0)} and same_bits(mixed.bt["mlp.up"], server.bt["mlp.up"][:4])
    clients.a["q"].data.zero_()
    assert bool((server.a["q"] != 0).any())


def test_prune_keeps_the_leading_rows_of_each_client(device):
    bank = filled(device=device)
    ranks = {"q": [2, 0, 3], "mlp.up": [0, 4, 1]}
    pruned = bank.prune(ranks)
    for k in range(3):
        assert same_factors(factors(pruned, k), [t[: ranks[name][k]] for t, name in zip(factors(bank, k), [*SHAPES] * 2, strict=True)])
    assert bank.ranks == {"q": (4, 0, 3), "mlp.up": (2, 5, 1)} and same_factors(factors(bank.prune(MIXED), 0), factors(bank, 0))
    assert hk.AdapterBank(SHAPES, [4, 2], device=device).prune([4, 0]).ranks == (4, 0)


def test_select_and_concat(device):
    bank = filled(device=device)
    picked = bank.select([2, 0, 2])
    assert picked.num_clients == 3
    for position, k in enumerate((2, 0, 2)):
        assert same_factors(factors(picked, position), factors(bank, k))
    joined = hk.AdapterBank.concat([bank.select([0, 1]), bank.select([2])])
    assert joined.ranks == bank.ranks and all(same_bits(one, other) for one, other in zip(joined.parameters(), bank.parameters(), strict=True))
    joined.a["q"].data.zero_()
    assert bool((bank.a["q"] != 0).any()) and bank.select([]).num_clients == 0
    assert all(p.requires_grad for p in picked.parameters())
    frozen = filled(device=device).freeze_a().select([1, 0])
    assert not any(p.requires_grad for p in frozen.a.values()) and all(p.requires_grad for p in frozen.bt.values())
    frozen = filled(device=device).freeze_b().select([1, 0])
    assert all(p.requires_grad for p in frozen.a.values()) and not any(p.requires_grad for p in frozen.bt.values())


def test_of_holds_the_rows_it_is_given(device):
    bank = filled(device=device)
    ranks = {name: layout.ranks for name, layout in bank.layouts.items()}
    made = hk.AdapterBank.of(SHAPES, ranks, bank.a, bank.bt)
    assert made.ranks == bank.ranks and all(one.data_ptr() == other.data_ptr() for one, other in zip(made.parameters(), bank.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"^bt: expected \(\d+, \d+\) for 'q', got none"):
        hk.AdapterBank.of(SHAPES, ranks, bank.a, {})
    with pytest.raises(ValueError, match=r"^a: expected \(\d+, \d+\) for 'q', got \(\d+, \d+\)"):
        hk.AdapterBank.of(SHAPES, ranks, {**bank.a, "q": bank.a["q"][1:]}, bank.bt)


def test_stack_is_the_sum_of_the_updates(device):
    one, other = filled(device=device), filled(device=device).select([2, 1, 0])
    stacked = hk.AdapterBank.stack([one, other, one])
    for name, layout in stacked.layouts.items():
        for k in range(3):
            assert layout.ranks[k] == 2 * one.layouts[name].ranks[k] + other.layouts[name].ranks[k]
            deltas = [bank.bt[name][bank.layouts[name].rows(k)].t() @ bank.a[name][bank.layouts[name].rows(k)] for bank in (stacked, one, other)]
            torch.testing.assert_close(deltas[0], 2 * deltas[1] + deltas[2])
    with pytest.raises(ValueError, match=r"^banks: expected the same modules, shapes and number of clients"):
        hk.AdapterBank.stack([one, one.select([0])])
    assert hk.AdapterBank.stack([one.select([]), one.select([])]).num_clients == 0


@pytest.mark.parametrize("normalize", ["none", "owners"])
def test_aggregate_merges_a_and_b_separately(normalize, device):
    bank, keep = filled(device=device), filled(ranks=[6], seed=1, device=device)
    table = torch.tensor([[0.2, 0.7], [0.5, 0.1], [0.3, 0.2]])
    merged = bank.aggregate(table, 6, normalize=normalize, keep=keep)
    assert merged.ranks == (6,) and merged.num_clients == 1
    for i, name in enumerate(SHAPES):
        for side in ("a", "bt"):
            rows, kept = getattr(bank, side)[name], getattr(keep, side)[name]
            expected = hk.aggregate(rows, bank.layouts[name], table[:, i], 6, normalize=normalize, keep=kept)
            assert same_bits(getattr(merged, side)[name], expected)
    assert bool((bank.aggregate([1.0] * 3, 6).a["q"][4:] == 0).all())


def test_the_aggregate_is_what_the_next_download_brings(device):
    """Trap 2: client == truncated bank, and another way of aggregating changes it."""
    clients = filled(ranks=[2, 4, 4], device=device)
    downloads = []
    for normalize in ("none", "owners"):
        server = clients.aggregate([0.5, 0.25, 0.25], 4, normalize=normalize)
        downloads.append(server.truncate([3]))
        assert same_bits(downloads[-1].a["q"], server.a["q"][:3]) and same_bits(downloads[-1].bt["mlp.up"], server.bt["mlp.up"][:3])
    assert not same_bits(downloads[0].a["q"], downloads[1].a["q"])


def test_to_copies(device):
    bank = filled(device=device)
    moved = bank.to(dtype=torch.bfloat16)
    assert moved.dtype == torch.bfloat16 and moved.ranks == bank.ranks and same_bits(moved.a["q"], bank.a["q"].bfloat16())
    same = bank.to()
    same.a["q"].data.zero_()
    assert bool((bank.a["q"] != 0).any()) and all(p.requires_grad and p.is_leaf for p in moved.parameters())


def test_norms(device):
    bank = filled(device=device)
    norms = bank.delta_norms()
    assert norms.shape == (3, 2) and bank.delta_norms(exact=True).dtype == torch.float64
    keep = {"q": [1, 0, 3], "mlp.up": [0, 2, 0]}
    tail_a, tail_b = bank.tail_norms(keep)
    for i, name in enumerate(SHAPES):
        layout = bank.layouts[name]
        for k in range(3):
            a, bt = bank.a[name].detach()[layout.rows(k)], bank.bt[name].detach()[layout.rows(k)]
            torch.testing.assert_close(norms[k, i], torch.linalg.norm(bt.t() @ a))
            torch.testing.assert_close(tail_a[k, i], torch.linalg.norm(a[keep[name][k] :]))
            torch.testing.assert_close(tail_b[k, i], torch.linalg.norm(bt[keep[name][k] :]))
    assert same_bits(bank.tail_norms([1, 1, 1])[0], bank.tail_norms({name: [1, 1, 1] for name in SHAPES})[0])


# ---------------------------------------------------------------- in and out


def test_adapter_is_pefts_format(device):
    bank = filled(device=device)
    adapter = bank.adapter(0)
    assert {key: tuple(t.shape) for key, t in adapter.items()} == {
        "base_model.model.q.lora_A.weight": (4, 25),
        "base_model.model.q.lora_B.weight": (6, 4),
        "base_model.model.mlp.up.lora_A.weight": (2, 4),
        "base_model.model.mlp.up.lora_B.weight": (9, 2),
    }
    assert same_bits(adapter["base_model.model.q.lora_B.weight"], bank.bt["q"].detach()[:4].t()) and all(t.is_contiguous() for t in adapter.values())
    assert not any(".q." in key for key in bank.adapter(1))  # rank 0 there
    adapter["base_model.model.q.lora_A.weight"].zero_()
    assert bool((bank.a["q"][:4] != 0).any())


def test_load_adapter_writes_one_client(device):
    bank, other = filled(device=device), filled(seed=1, device=device)
    before = [factors(bank, k) for k in range(3)]
    before = [[t.clone() for t in own] for own in before]
    bank.load_adapter(2, other.adapter(2))
    assert same_factors(factors(bank, 2), factors(other, 2))
    assert same_factors(factors(bank, 0), before[0]) and same_factors(factors(bank, 1), before[1])
    half = other.to(dtype=torch.bfloat16)
    bank.load_adapter(0, half.adapter(0))
    assert bank.dtype == torch.float32 and same_factors(factors(bank, 0), [t.float() for t in factors(half, 0)])


KEY = "base_model.model.q.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: s.pop(KEY), r"^state_dict: unknown keys \[\], missing keys \['base_model\.model\.q\.lora_A\.weight'\]"),
        (lambda s: s.update({"base_model.model.q.lora_A.r4.weight": s[KEY]}), r"^state_dict: unknown keys \['base_model\.model\.q\.lora_A\.r4"),
        (lambda s: s.update({KEY: s[KEY][:3]}), r"^state_dict: expected shape \(4, 25\) for base_model\.model\.q\.lora_A\.weight, got \(3, 25\)"),
        (lambda s: s.update({"base_model.model.mlp.up.lora_B.weight": torch.ones(2, 9)}), r"^state_dict: expected shape \(9, 2\)"),
    ],
)
def test_load_adapter_is_strict_and_writes_all_or_nothing(spoil, text, device):
    bank, state = filled(device=device), filled(seed=1, device=device).adapter(0)
    before = [p.detach().clone() for p in bank.parameters()]
    spoil(state)
    with pytest.raises(ValueError, match=text):
        bank.load_adapter(0, state)
    assert same_factors([p.detach() for p in bank.parameters()], before)


UP = "base_model.model.mlp.up.lora_B.weight"  # of the last module: what comes before it must not be written either
NOT_FACTORS = {
    "complex": lambda t: t + 1j,
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "quantised": lambda t: torch.quantize_per_tensor(t.cpu(), 0.1, 0, torch.qint8),
    "no tensor": lambda t: t.tolist(),
    "nan": lambda t: torch.where(t == t.reshape(-1)[0], float("nan"), t),
    "infinite": lambda t: torch.where(t == t.reshape(-1)[0], float("-inf"), t),
    "too large": lambda t: t.double() * 1e300,
}


@pytest.mark.parametrize("kind", NOT_FACTORS)
@pytest.mark.filterwarnings("ignore")
def test_load_adapter_takes_finite_real_numbers_only(kind, device):
    bank, state = filled(device=device), filled(seed=1, device=device).adapter(0)
    before = [p.detach().clone() for p in bank.parameters()]
    state[UP] = NOT_FACTORS[kind](state[UP] + 1)
    with pytest.raises((ValueError, TypeError), match=rf"^state_dict: expected .* for {UP}, got"):
        bank.load_adapter(0, state)
    assert same_factors([p.detach() for p in bank.parameters()], before)
    if kind in ("complex", "int64", "meta", "sparse"):
        packed = filled(seed=1, device=device).state_dict()
        packed["bt.mlp.up"] = NOT_FACTORS[kind](packed["bt.mlp.up"])
        with pytest.raises(TypeError, match=r"^state_dict: expected .* for bt\.mlp\.up, got"):
            bank.load_state_dict(packed)
        assert same_factors([p.detach() for p in bank.parameters()], before)


def test_an_adapter_is_a_copy(device):
    """Of every rank, 1 among them, whose B transposed is contiguous as it is."""
    bank = hk.AdapterBank({"q": (6, 25)}, [1, 2, 4], device=device)
    taken = [bank.adapter(k) for k in range(3)]
    before = [{key: value.clone() for key, value in own.items()} for own in taken]
    for parameter in bank.parameters():
        parameter.data.add_(1.0)
    for own, old in zip(taken, before, strict=True):
        assert all(torch.equal(own[key], old[key]) and own[key].is_contiguous() for key in old)


def test_state_dict_round_trip(device):
    bank, other = filled(device=device), filled(seed=1, device=device)
    assert list(bank.state_dict()) == ["a.q", "a.mlp.up", "bt.q", "bt.mlp.up"]
    assert bank.state_dict()["a.q"].data_ptr() == bank.a["q"].data_ptr()
    parameters = list(other.parameters())
    other.load_state_dict(bank.state_dict())
    assert same_factors([p.detach() for p in bank.parameters()], [p.detach() for p in other.parameters()])
    assert all(one is two for one, two in zip(parameters, other.parameters(), strict=True))  # an optimiser built before keeps its parameters


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda s: s.pop("bt.q"), r"^state_dict: .*\['bt\.q'\]"),
        (lambda s: s.update(extra=s["a.q"]), r"^state_dict: .*\['extra'\]"),
        (lambda s: s.update({"bt.mlp.up": s["bt.mlp.up"][:2]}), r"^state_dict: expected shape \(8, 9\) for bt\.mlp\.up, got \(2, 9\)"),
    ],
)
def test_load_state_dict_is_strict_and_writes_all_or_nothing(spoil, text, device):
    bank, state = filled(device=device), filled(seed=1, device=device).state_dict()
    before = [p.detach().clone() for p in bank.parameters()]
    spoil(state)
    with pytest.raises(ValueError, match=text):
        bank.load_state_dict(state)
    assert same_factors([p.detach() for p in bank.parameters()], before)


# ---------------------------------------------------------------- errors

BAD = [
    (lambda: hk.AdapterBank({}, [1]), ValueError, r"^shapes: expected at least one module"),
    (lambda: hk.AdapterBank(SHAPES, [1, -1]), ValueError, r"^ranks: .*-1"),
    (lambda: hk.AdapterBank(SHAPES, {"q": [1]}), ValueError, r"^ranks: .*mlp\.up"),
    (lambda: hk.AdapterBank(SHAPES, {"q": [1], "mlp.up": [1], "v": [1]}), ValueError, r"^ranks: .*'v'"),
    (lambda: hk.AdapterBank(SHAPES, {"q": [1], "mlp.up": [1, 2]}), ValueError, r"^ranks: expected the same number of clients"),
    (lambda: filled().truncate([1]), ValueError, r"^truncate: expected a bank of one client, got 3"),
    (lambda: filled(ranks=[4]).truncate([5]), ValueError, r"^layout: expected ranks <= 4 .*got 5"),
    (lambda: filled().prune([1, 1, 1]), ValueError, r"^ranks: expected at most 0 for client 1 in q \(ranks never grow\), got 1"),
    (lambda: filled().prune([0, 0]), ValueError, r"^ranks: expected 3 integers, one per client, got 2"),
    (lambda: filled().select([3]), IndexError, r"^client: expected 0 <= client < 3, got 3"),
    (lambda: filled().select([-1]), IndexError, r"^client: expected 0 <= client < 3, got -1"),
    (lambda: filled().adapter(-1), IndexError, r"^client: "),
    (lambda: filled().load_adapter(3, {}), IndexError, r"^client: "),
    (lambda: hk.AdapterBank.concat([filled(), hk.AdapterBank({"q": (6, 25)}, [1])]), ValueError, r"^banks: expected the same modules"),
    (lambda: filled().aggregate([1.0] * 3, 4), ValueError, r"^max_rank: .*5, got 4"),
    (lambda: filled().aggregate([1.0] * 3, 5, keep=filled()), ValueError, r"^keep: expected a bank of one client"),
    (lambda: filled().aggregate([1.0] * 3, 5, keep=filled(ranks=[4])), ValueError, r"^keep: expected shapes"),
    (lambda: filled().tail_norms({"q": [1] * 3}), ValueError, r"^keep: .*mlp\.up"),
    (lambda: filled().tail_norms([1] * 2), ValueError, r"^keep: expected 3 integers"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
