"""Models that wrappers share among processes: refused by name, or told on what terms a batch of several clients fits them."""

from __future__ import annotations

import pytest
import torch
from model_cases import token_batch
from peft_cases import TIGHT, several_adapters
from torch import nn

import hetlora_kernels as hk
from hetlora_kernels.peft import FusedLinear, attach, client_segments, fuse


def test_wrappers_that_divide_a_model(device):
    model = several_adapters(device)
    fuse(model)

    class DistributedDataParallel(nn.Module):
        find_unused_parameters = False

        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    class FSDPLlama(DistributedDataParallel):
        pass

    wrapped, tokens = DistributedDataParallel(), token_batch(2, 5, device)
    with pytest.raises(ValueError, match=r"^model: .*find_unused_parameters=True"), client_segments(wrapped, [0, 1]):
        pass
    with pytest.raises(ValueError, match=r"^model: FSDPLlama divides weights"), client_segments(FSDPLlama(), [0, 1]):
        pass
    with pytest.raises(ValueError, match=r"^model: FSDPLlama divides weights"), client_segments(nn.Sequential(FSDPLlama()), [0, 1]):
        pass
    wrapped.find_unused_parameters = True
    with client_segments(wrapped, [0, 1]):
        out = wrapped(tokens).logits
    with client_segments(model, [0, 1]):
        torch.testing.assert_close(out, model(tokens).logits, **TIGHT)


def test_weights_that_fsdp_divides_are_refused(device, tmp_path):
    """Of one layer alone too, where the model itself is not wrapped: an attached bank's and a fused model's. Without clients a fused model runs in FSDP."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or device.type != "cpu":
        pytest.skip("one gloo process of torch.distributed serves the CPU")
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = several_adapters(device)
        fuse(model)
        fully_shard(next(module for module in model.modules() if isinstance(module, FusedLinear)), mesh=mesh)
        with pytest.raises(ValueError, match=r"^model: FSDP\w+ divides weights or batches past client_segments"), client_segments(model, [0, 1]):
            pass
        alone, sharded = several_adapters(device), several_adapters(device)
        fuse(sharded)
        sharded = FullyShardedDataParallel(sharded, use_orig_params=True, device_id=torch.device("cpu"))
        tokens = token_batch(2, 5, device)
        torch.testing.assert_close(sharded(tokens).logits, alone(tokens).logits, **TIGHT)
        with pytest.raises(ValueError, match=r"^model: FullyShardedDataParallel divides weights"), client_segments(sharded, [0, 1]):
            pass
        plain = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
        attach(plain, hk.AdapterBank({"0": (4, 4)}, [2, 3]))
        plain[0].weight = nn.Parameter(distributed.tensor.distribute_tensor(plain[0].weight, mesh), requires_grad=False)
        with pytest.raises(ValueError, match=r"^model: a DTensor weight divides weights"), client_segments(plain, [0, 1]):
            pass
    finally:
        distributed.destroy_process_group()


def test_adapters_of_processes_are_compared_and_their_mean_is_told(monkeypatch, device):
    """The two processes are told by hand: what the other holds comes by `all_gather_object`."""
    model = several_adapters(device)
    fuse(model)

    class DistributedDataParallel(nn.Module):
        find_unused_parameters, process_group = True, object()

        def __init__(self):
            super().__init__()
            self.module = model

    others = [["elsewhere"], list(model.peft_config)]
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda found, mine, group: found.__setitem__(slice(None), [mine, others.pop(0)]))
    wrapped = DistributedDataParallel()
    with pytest.raises(ValueError, match=r"average adapters of different clients: process 1 holds \['elsewhere'\]"), client_segments(wrapped, [0, 1]):
        pass
    with pytest.warns(UserWarning, match=r"gets 1/2 of the gradient that it has alone: multiply the loss by 2"), client_segments(wrapped, [0, 1]):
        pass
    with client_segments(wrapped, [0, 1]):  # once
        pass
    assert not others
