"""Uploads as a broken client or an attacker sends them: taken exactly as they are, or refused by name, and what is refused changes nothing.

200 into a bank and 100 into a merge; 200 more come in messages (test_fuzz_messages.py). HETLORA_TEST_SEED draws others.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch
from tiny import same_bits, trained_bank
from torch import Tensor, nn

import hetlora_kernels as hk
from hetlora import server
from hetlora.config import Config
from hetlora.merge import aggregate
from hetlora.server import ServerState

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("HETLORA_TEST_SEED", "0"))
SHAPES = {"q": (5, 4), "up": (3, 7)}
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def repeat(case: Callable[[random.Random], None], uploads: int) -> None:
    for number in range(uploads):
        seed = f"{case.__name__} {SEED} {number}"
        torch.manual_seed(number)
        try:
            case(random.Random(seed))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} in {case.__name__}(random.Random({seed!r})): {error}") from error


# ---------------------------------------------------------------- into a bank


def same(t: Tensor) -> Tensor:
    return t


GOOD = {
    "as it is": same,
    "transposed in memory": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: torch.stack((t, t), -1).flatten(1)[:, ::2],
    "read from a file": lambda t: (
        torch.frombuffer(bytearray(t.contiguous().view(torch.uint8).numpy().tobytes()), dtype=t.dtype).view(t.shape) if t.numel() else t
    ),
    "trained": lambda t: nn.Parameter(t.clone()),
    "wider": lambda t: t.double(),
    "one number": lambda t: t.flatten()[:1].view(1, 1).expand(t.shape) if t.numel() else t,
}
BAD = {
    "complex": lambda t: t + 1j,
    "int64": lambda t: t.long(),
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t > 0,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.float().to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([row for row in t]),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nan": lambda t: t.index_fill(0, torch.tensor([len(t) - 1]), float("nan")),
    "infinity": lambda t: t.index_fill(1, torch.tensor([0]), -float("inf")),
    "too large": lambda t: t.double() + 1e300,
    "a row more": lambda t: torch.cat((t, t[:1])),
    "a row less": lambda t: t[:-1],
    "a column more": lambda t: torch.cat((t, t[:, :1]), 1),
    "flat": lambda t: t.flatten(),
    "deeper": lambda t: t[None],
    "transposed": lambda t: t.t(),
    "huge rank": lambda t: t[:1].expand(2**40, -1),
    "no tensor": lambda t: t.tolist(),
    "numpy": lambda t: t.float().numpy(),
    "none": lambda t: None,
}
KEYS = {
    "missing": lambda state, key: state.pop(key),
    "another": lambda state, key: state.__setitem__(key + ".x", state.pop(key)),
    "one more": lambda state, key: state.__setitem__("base_model.model.q.lora_C.weight", state[key]),
    "number": lambda state, key: state.__setitem__(7, state[key]),
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors|deprecated):UserWarning")
def into_a_bank(draw: random.Random) -> None:
    bank = trained_bank(SHAPES, [[2, 3], [1, 4, 3], [4, 1]][draw.randrange(3)], dtype=draw.choice(TYPES), seed=draw.randrange(99))
    client = draw.randrange(bank.num_clients)
    before = {key: value.clone() for key, value in bank.state_dict().items()}
    state = {key: draw.choice(list(GOOD.values()))(torch.randn_like(value)) for key, value in bank.adapter(client).items()}
    key, kind = draw.choice(list(state)), draw.choice([*GOOD, *BAD, *BAD, *KEYS])
    shape = state[key].shape
    if kind in KEYS:
        KEYS[kind](state, key)
    else:
        state[key] = {**GOOD, **BAD}[kind](state[key])
    fits = {"transposed": shape[0] == shape[1], "too large": bank.dtype == torch.float64}
    unlike = kind in KEYS or (kind in BAD and not fits.get(kind, False))
    try:
        bank.load_adapter(client, state)
    except (ValueError, TypeError) as error:
        assert unlike, f"{kind} is refused: {error}"
        assert str(error).startswith("state_dict: ") and (kind in KEYS or key in str(error)), error
        assert all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
        return
    assert not unlike, f"{kind} was taken"
    for name, value in bank.adapter(client).items():
        assert torch.equal(value, state[name].detach().to(bank.dtype))
    for other in set(range(bank.num_clients)) - {client}:
        for side, factors in (("a", bank.a), ("bt", bank.bt)):
            for name, layout in bank.layouts.items():
                assert torch.equal(factors[name][layout.rows(other)], before[f"{side}.{name}"][layout.rows(other)])


@pytest.mark.filterwarnings("ignore")
def test_into_a_bank():
    repeat(into_a_bank, 200)


# ---------------------------------------------------------------- into a merge


def into_a_merge(draw: random.Random) -> None:
    """What is refused are the uploads with a NaN, an infinity or a norm that overflows, and the merge is that of the others."""
    merge = draw.choice(["factors", "delta", "svd", "owners-svd", "trimmed", "median"])
    settings = {"weights": "uniform"} if merge in ("trimmed", "median") else {"weights": draw.choice(["sparsity", "uniform", "samples"])}
    cfg = Config.create("test", merge=merge, **settings)
    clients, dtype = draw.randrange(1, 6), draw.choice(TYPES[:2])
    ranks = [draw.randrange(1, 5) for _ in range(clients)]
    uploads = trained_bank(SHAPES, ranks, dtype, seed=draw.randrange(99))
    bad = {k for k in range(clients) if draw.random() < 0.3}
    for k in bad:
        name, (factors, value) = (
            draw.choice(list(SHAPES)),
            (draw.choice([uploads.a, uploads.bt]), draw.choice([float("nan"), float("inf"), -float("inf"), 3e38])),
        )
        rows = factors[name].data[uploads.layouts[name].rows(k)]
        rows[draw.randrange(len(rows)), draw.randrange(rows.shape[1])] = value
    dropped = server.refused(uploads)
    assert set(dropped) == bad and all(text.startswith("update has non-finite values in ") for text in dropped.values())
    arrived = [k for k in range(clients) if k not in dropped]
    if not arrived:
        return
    results = []
    for own in (uploads.select(arrived), hk.AdapterBank.concat([uploads.select([k]) for k in arrived])):
        state = ServerState(trained_bank(SHAPES, [4], dtype), {}, 1, 4)
        received = state.bank.truncate([ranks[k] for k in arrived])
        before = own.to()
        merged = aggregate(state, own, received, [k + 1 for k in arrived], cfg, nn.Module())
        assert bool(merged.weights.isfinite().all()) and bool((merged.weights >= 0).all()) and bool(((merged.weights.sum(0) - 1).abs() < 1e-9).all())
        assert all(bool(value.isfinite().all()) for value in state.bank.state_dict().values())
        assert same_bits(own, before), "a merge changes no upload"
        results.append(state.bank)
    assert same_bits(*results)


def test_into_a_merge():
    repeat(into_a_merge, 100)
