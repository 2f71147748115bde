"""Whose rows are whose in a fused PEFT model: routed rows, recomputation after the block, and who owns rows but does not train."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from model_cases import tiny_llama, token_batch
from peft import LoraConfig, get_peft_model
from peft_cases import TIGHT, filled, lora_model, several_adapters
from torch import nn
from torch.utils.checkpoint import checkpoint

from hetlora_kernels.peft import client_losses, client_segments, fuse

WIDTH = 8


class Experts(nn.Module):
    """Each token goes to the expert that its values choose; the experts are linear layers of their own."""

    def __init__(self, count=3):
        super().__init__()
        self.gate = nn.Linear(WIDTH, count, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        choice, out = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero()[:, 0]
            out = out.index_put((rows,), expert(flat[rows]))
        return out.view_as(x)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora_bias", [False, True])
def test_routed_rows(lora_bias, device):
    """Outputs, and the gradients of one adapter's own loss, are those of stock PEFT with that adapter alone."""
    torch.manual_seed(0)
    options = {"r": 3, "target_modules": ["0", "1", "2"], "lora_bias": lora_bias}
    model = get_peft_model(Experts().double().to(device), LoraConfig(**options), adapter_name="a", autocast_adapter_dtype=False)
    model.add_adapter("b", LoraConfig(**options), autocast_adapter_dtype=False)
    filled(model)
    stock = copy.deepcopy(model)
    fuse(model)
    model.base_model.set_adapter(["a", "b"])
    for seed in range(6):
        x = torch.randn(3, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)
        names = ["b", "a", "b"]
        model.zero_grad()
        with client_segments(model, names):
            out = model(x)
            out[1].square().sum().backward()
        for row, name in enumerate(names):
            stock.set_adapter(name)
            torch.testing.assert_close(out[row], stock(x[row : row + 1])[0], **TIGHT)
        stock.set_adapter("a")
        stock.zero_grad()
        stock(x[1:2]).square().sum().backward()
        own = {name: grad for name, grad in gradients(model).items() if bool(grad.any())}
        for name, grad in gradients(stock).items():
            torch.testing.assert_close(own.pop(name, torch.zeros_like(grad)), grad, **TIGHT)
        assert not own  # nothing of b


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("active", "ids"), [(["default"], [1, 1, 1, 1]), (["default", "b", "c"], [0, 1, 2, 0])])
def test_backward_after_the_block(active, ids, reentrant, device):
    """transformers' checkpointed layers are computed again with their own batch, whichever adapters are active, whatever other blocks came in between."""
    tokens, results = token_batch(4, 9, device), []
    for outside in (False, True):
        model = several_adapters(device)
        fuse(model)
        model.base_model.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model.train()
        if outside:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with client_segments(model, ids):
            loss = client_losses(model(tokens, use_cache=False).logits, tokens, ids, 3).sum()
            if not outside:
                loss.backward()
        if outside:
            with client_segments(model, [2, 2]):
                model(token_batch(2, 5, device), use_cache=False)
            loss.backward()
            with client_segments(model, ids):  # and the block after it is as ever
                model(tokens, use_cache=False)
        results.append(gradients(model))
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, **TIGHT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_by_hand_after_the_block_is_refused(reentrant, device):
    """Nothing says there which batch it was; inside the block, and for a model with no block, it is as ever."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=reentrant)

    model = lora_model(Checkpointed().double().to(device), target_modules=["layer"])
    model.add_adapter("b", LoraConfig(r=2, target_modules=["layer"]))
    filled(model).double()
    fuse(model)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, device=device, requires_grad=True)
    with client_segments(model, ["b", "b"]):
        loss = model(x).sum()
    with pytest.raises(RuntimeError, match=r"^client_segments: .*computed again by a backward pass after its block; call backward\(\) inside"):
        loss.backward()
    with client_segments(model, ["b", "b"]):
        model(x).sum().backward()
    model(x).sum().backward()


# ---------------------------------------------------------------- who owns rows and does not train


def test_an_adapter_that_is_not_active_is_named_once(device):
    model, tokens = several_adapters(device), token_batch(2, 6, device)
    fuse(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match=r"^client_segments: adapter 'b' owns rows and is not trained.*set_adapter"), client_segments(model, ["default", "b"]):
        model(tokens)
    inference = several_adapters(device)
    fuse(inference)
    inference.set_adapter("default")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="client_segments")
        with client_segments(model, ["default", "b"]):
            model(tokens)
        model.base_model.set_adapter(["default", "b", "c"])
        with client_segments(model, ["c", "b"]):
            model(tokens).logits.sum().backward()
        with torch.no_grad(), client_segments(inference, ["default", "b"]):
            inference(tokens)  # nothing is to be trained


def test_an_adapter_that_a_backward_pass_went_by_is_named(device):
    """Reentrant checkpointing of inputs that require no gradient: torch leaves the checkpointed layers out."""
    base = tiny_llama(device=device)
    model = lora_model(base)
    fuse(model)
    model.train()
    layers = model.base_model.model.model.layers
    own, tokens = layers[0].forward, token_batch(2, 6, device)
    layers[0].forward = lambda h, **kwargs: checkpoint(lambda given: own(given, **kwargs), h, use_reentrant=True)
    for once in (True, False):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with client_segments(model, [0, 0]):
                model(tokens, use_cache=False).logits.sum().backward()
        text = [str(one.message) for one in told if "owns rows and got no gradient" in str(one.message)]
        assert len(text) == once and all("adapter 'default'" in one and "in 3 layers" in one and "layers.0" in one for one in text)
