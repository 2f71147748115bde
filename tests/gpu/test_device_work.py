"""What Python gives a device to do, seen by the dispatcher: on the meta device every op, and every copy from the host, is there to be counted, and nothing can
be read back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hetlora_kernels as hk
from hetlora_kernels.casts import Casts
from hetlora_kernels.ops import lora
from hetlora_kernels.peft import attach, client_segments

META = torch.device("meta")
VIEWS = {"select", "slice", "view", "detach", "alias", "t", "transpose", "expand", "_unsafe_view", "as_strided"}
MADE = {"empty", "empty_like", "new_empty", "new_empty_strided"}


class Work(TorchDispatchMode):
    """Names of the ops that run on the device, without views and allocations, and of the copies that come from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.copies: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        results = [each for each in torch.utils._pytree.tree_leaves(out) if isinstance(each, torch.Tensor)]
        if not any(each.device == META for each in inputs + results):
            return out
        if any(each.device != META and each.dim() for each in inputs):
            self.copies.append(name)
        elif name not in VIEWS | MADE:
            self.ops.append(name)
        return out


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has no autocast to ask about."""
    monkeypatch.setattr(lora, "is_autocast_enabled", lambda kind: False)


def carried(clients: int, dropout: float) -> tuple[nn.Module, hk.AdapterBank, torch.Tensor]:
    """Three linear layers that carry a bank, all on the meta device: bfloat16 base, float32 factors."""
    model = nn.Sequential(*(nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(3)))
    bank = hk.AdapterBank({str(i): (16, 16) for i in range(3)}, range(2, 2 + clients))
    attach(model, bank, scale=2.0, dropout=dropout)
    model.to(META)
    for side in (bank.a, bank.bt):
        for name in side:
            side[name] = nn.Parameter(side[name].detach().to(META))
    return model, bank, torch.zeros(2 * clients, 3, 16, dtype=torch.bfloat16, device=META)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_is_one_op_each_way_and_copies_nothing(dropout):
    """After the first layer of a batch has brought the batch's tables."""
    model, bank, x = carried(3, dropout)
    with client_segments(model, [0, 0, 1, 1, 2, 2], seeds=torch.arange(3)):
        hidden = model[0](x)
        with Work() as forward:
            y = model[1](hidden)
        with Work() as backward:
            y.backward(torch.empty_like(y))
    assert forward.ops == ["lora_forward"] and not forward.copies
    assert backward.ops == ["lora_backward", "lora_backward"] and not backward.copies
    assert bank.a["1"].grad.dtype == torch.float32


def test_a_batch_brings_its_tables_once():
    """Seeds of all layers, row keys and the index of rows that lie apart; one number for a scale needs no copy."""
    model, _, x = carried(3, 0.1)
    with Work() as whole, client_segments(model, [0, 1, 2, 0, 2, 1], seeds=torch.arange(3)):
        for layer in model:
            x = layer(x)
    assert whole.copies == ["_to_copy"] * 3 and whole.ops.count("lora_forward") == 3


def test_a_layer_multiplies_with_the_casts_and_gives_gradients_of_the_factors():
    model, bank, x = carried(3, 0.1)
    bank.casts = Casts(bank.shapes, bank.parameters(), torch.bfloat16)
    seen: list[tuple[torch.dtype, ...]] = []

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "hetlora":
                name = func.overloadpacket.__name__
                seen.append(tuple(each.dtype for each in args[4:6] if name == "lora_forward") or tuple(each.dtype for each in args[3:5]))
            return func(*args, **(kwargs or {}))

    with client_segments(model, [0, 0, 1, 1, 2, 2], seeds=torch.arange(3)), Types():
        y = model[1](x)
        y.backward(torch.empty_like(y))
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    assert bank.a["1"].grad.dtype == bank.bt["1"].grad.dtype == torch.float32


class NothingReadBack(TorchDispatchMode):
    """Refuses what would wait for a device: a value read on the host, a result whose shape depends on values. A CUDA graph can hold none of it."""

    WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "is_nonzero", "equal", "bincount"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITS:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [hk.AdamW, hk.SGD])
def test_a_step_of_a_prepared_batch_waits_for_nothing(rule):
    """Forward, backward and the optimiser's step, once the batch's block is open and its first step has made the tables: what a CUDA graph may record."""
    model = nn.Sequential(*(nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(3)))
    bank = hk.AdapterBank({str(i): (16, 16) for i in range(3)}, [2, 3, 4])
    optimizer = rule(bank, lr=0.1, clip_norm=1.0, tail_penalty=(0.1, [1, 2, 2]), cast=torch.bfloat16)
    attach(model, bank, dropout=0.1)
    x = torch.randn(3, 5, 16).to(torch.bfloat16)

    def step() -> None:
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()

    with client_segments(model, [0, 2, 1], seeds=torch.arange(3)):
        step()
    with client_segments(model, [0, 2, 1], seeds=torch.arange(3)):
        step()
        before = [p.detach().clone() for p in bank.parameters()]
        with NothingReadBack():
            step()
    assert all(not torch.equal(p, old) for p, old in zip(bank.parameters(), before, strict=True))


def test_a_value_that_is_read_back_is_noticed():
    with NothingReadBack(), pytest.raises(AssertionError, match="waits"):
        torch.ones(1).item()
