"""Adapters of one fused PEFT model in one training batch: exactly stock PEFT, one adapter after another."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from model_cases import VOCAB, tiny_llama, token_batch
from peft import LoraConfig
from peft_cases import TIGHT, assert_same, filled, lora_model, several_adapters, tiny_bert
from torch import nn

from hetlora_kernels.peft import client_losses, client_segments, fuse

NAMES = ["c", "default", "__base__", "b", "default", "c"]
IDS = [2, 0, -1, 1, 0, 2]
ADAPTERS = ["default", "b", "c"]


def trainable(model):
    """Every adapter active, hence trained."""
    model.base_model.set_adapter(ADAPTERS)
    return model


def one_by_one(model, tokens, names=NAMES):
    """Stock PEFT: each adapter alone on its own sequences. Logits of the batch, and every gradient."""
    stock = copy.deepcopy(model)
    logits, grads = torch.zeros(*tokens.shape, VOCAB, dtype=torch.float64, device=tokens.device), {}
    for name in dict.fromkeys(names):
        mine = torch.tensor([own == name for own in names])
        if name == "__base__":
            with stock.disable_adapter():
                logits[mine] = stock(tokens[mine]).logits.detach().double()
            continue
        stock.set_adapter(name)
        stock.zero_grad()
        out = stock(tokens[mine]).logits
        F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[mine][:, 1:].flatten()).backward()
        logits[mine] = out.detach().double()
        grads |= {key: p.grad.clone() for key, p in stock.named_parameters() if p.grad is not None and f".{name}." in key}
    return {"logits": logits} | grads


def together(model, tokens, ids=NAMES, **options):
    model.zero_grad()
    with client_segments(model, ids, **options) as clients:
        logits = model(tokens).logits
        client_losses(logits, tokens, clients, len(ADAPTERS)).sum().backward()
    return {"logits": logits.detach()} | {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 1}}])
@pytest.mark.parametrize("ids", [NAMES, IDS])
def test_a_mixed_batch_is_stock_peft_adapter_by_adapter(ids, options, calls, device):
    model, tokens = trainable(several_adapters(device, **options)), token_batch(6, 8, device)
    expected = one_by_one(model, tokens)
    fuse(model)
    for training in (False, True):
        model.train(training)
        result = together(model, tokens, ids)
        assert_same(result, expected)
    assert calls["lora_linear"] + calls["lora_add"] == 2 * 8
    assert float((expected["logits"][0] - expected["logits"][2]).abs().max()) > 1e-3


def test_an_encoder(device):
    model = lora_model(tiny_bert(device=device), target_modules=["query", "dense"])
    for name, rank in (("b", 2), ("c", 5)):
        model.add_adapter(name, LoraConfig(r=rank, target_modules=["query", "value"]))
    trainable(filled(model).to(torch.float64))
    tokens = token_batch(6, 8, device)
    expected = one_by_one(model, tokens)
    fuse(model)
    assert_same(together(model, tokens), expected)


def test_ids_per_token(device):
    model, tokens = trainable(several_adapters(device)), token_batch(2, 8, device)
    fuse(model)
    whole = together(model, tokens, ["b", "c"])
    assert_same(together(model, tokens, [["b"] * 8, ["c"] * 8]), whole)
    split = together(model, tokens, torch.tensor([[1] * 4 + [2] * 4, [2] * 8]))
    torch.testing.assert_close(split["logits"][0, :4], whole["logits"][0, :4], **TIGHT)  # a causal model does not see what comes later
    assert float((split["logits"][0, 4:] - whole["logits"][0, 4:]).abs().max()) > 1e-3


def test_an_adapter_without_rows_gets_no_gradient(device):
    model = trainable(several_adapters(device))
    fuse(model)
    result = together(model, token_batch(2, 5, device), ["b", "__base__"])
    assert {key.split(".")[-2] for key in result if key != "logits"} == {"b"}
    logits = together(model, token_batch(2, 5, device), ["b", "c"])["logits"]
    torch.testing.assert_close(logits[0], result["logits"][0], **TIGHT)


def test_frozen_adapters_and_active_ones_do_not_matter(device):
    """Rows get the adapter they name, whichever are active; only those with requires_grad are trained."""
    model, tokens = several_adapters(device), token_batch(6, 8, device)
    expected = one_by_one(model, tokens)
    model.set_adapter("c")
    fuse(model)
    result = together(model, tokens)
    torch.testing.assert_close(result["logits"], expected["logits"], **TIGHT)
    assert {key.split(".")[-2] for key in result if key != "logits"} == {"c"}
    model.base_model.disable_adapter_layers()
    with client_segments(model, NAMES):
        torch.testing.assert_close(model(tokens).logits, tiny_llama(device=device)(tokens).logits, **TIGHT)


def test_sixteen_steps_are_sixteen_steps_of_each_alone(device):
    """Co-batched training with AdamW equals training each adapter by itself, in float64, to rounding."""
    start, tokens = trainable(several_adapters(device)), token_batch(6, 8, device)
    owners = {name: torch.tensor([own == name for own in NAMES]) for name in ADAPTERS}

    def optimiser(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)

    alone = {}
    for name in ADAPTERS:
        model = copy.deepcopy(start)
        model.set_adapter(name)
        steps = optimiser(model)
        for _ in range(16):
            model.zero_grad()
            out = model(tokens[owners[name]]).logits
            F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[owners[name]][:, 1:].flatten()).backward()
            steps.step()
        alone |= {key: p.detach() for key, p in model.named_parameters() if f".{name}." in key}
    model = copy.deepcopy(start)
    fuse(model)
    steps = optimiser(model)
    for _ in range(16):
        together(model, tokens)
        steps.step()
    assert_same({key: p.detach() for key, p in model.named_parameters() if key in alone}, alone, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- dropout


def dropout_model(device, rates):
    model = trainable(several_adapters(device))
    for module in model.modules():
        for name in getattr(module, "lora_dropout", {}):
            module.lora_dropout[name] = nn.Dropout(rates[name]) if rates[name] else nn.Identity()
    assert not fuse(model).left
    return model


RATES = {"default": 0.4, "b": 0.0, "c": 0.25}


def test_masks_do_not_depend_on_batch_mates(device):
    """Adapters of different dropout: with seeds, each one's rows and gradients are those it has alone."""
    model, tokens = dropout_model(device, RATES), token_batch(6, 8, device)
    seeds = torch.tensor([11, 22, 33])
    plain = together(model, tokens)
    whole = together(model, tokens, seeds=seeds, step=3)
    for name in ADAPTERS:
        mine = [i for i, own in enumerate(NAMES) if own == name]
        alone = together(model, tokens[mine], [name] * len(mine), seeds=seeds, step=3)
        torch.testing.assert_close(whole["logits"][mine], alone["logits"], rtol=1e-8, atol=1e-10)
        assert_same({key: whole[key] for key in alone if key != "logits"}, {key: alone[key] for key in alone if key != "logits"}, rtol=1e-8, atol=1e-10)
        assert torch.equal(whole["logits"][mine], plain["logits"][mine]) == (name == "b")
    other = together(model, tokens, seeds=seeds, step=torch.tensor([4, 3, 3]))
    changed = [not torch.equal(other["logits"][i], whole["logits"][i]) for i in range(6)]
    assert changed == [name == "default" for name in NAMES]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_inside_the_block(use_reentrant, device):
    results, tokens = [], token_batch(6, 8, device)
    for checkpointing in (False, True):
        model = dropout_model(device, RATES).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        results.append(together(model, tokens))
    assert_same(*results)


def test_autocast(device):
    """The whole batch at once is as near to float64 as stock PEFT is, one adapter after another."""
    model, tokens = trainable(several_adapters(device)).float(), token_batch(6, 8, device)
    truth = one_by_one(copy.deepcopy(model).double(), tokens)
    results = []
    for run in (one_by_one, together):
        if run is together:
            fuse(model)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            results.append(run(model, tokens))
    plain, fused = (sum((r[key].double() - true).square().sum() / true.square().sum() for key, true in truth.items()).sqrt() for r in results)
    assert 0 < float(fused) <= 2 * float(plain), f"fused {float(fused):.3e}, plain {float(plain):.3e}"


# ---------------------------------------------------------------- errors


def test_the_block_ends(device):
    model, tokens = several_adapters(device), token_batch(2, 5, device)
    fuse(model)
    before = model(tokens).logits
    with pytest.raises(ZeroDivisionError), client_segments(model, ["b", "c"]):
        inner = model(tokens).logits
        with client_segments(model, ["c", "b"]):
            assert not torch.equal(model(tokens).logits, inner)
        assert torch.equal(model(tokens).logits, inner) and not torch.equal(inner, before)
        1 / 0  # noqa: B018
    assert torch.equal(model(tokens).logits, before)


def test_packed_rows_are_each_adapter_alone(device):
    """Dropout masks too: one row of three adapters' sequences, against a row for each."""
    model, tokens = trainable(several_adapters(device, lora_dropout=0.3)).train(), token_batch(3, 6, device)
    fuse(model)
    options = {"seeds": torch.tensor([5, 6, 7]), "step": 2}
    apart = together(model, tokens, [2, 0, 1], **options)
    ids, index = torch.tensor([2, 0, 1]).repeat_interleave(6)[None], torch.zeros(1, 18, dtype=torch.int64)
    positions, labels = torch.arange(6).repeat(3)[None], tokens.clone()
    labels[:, 0] = -100
    model.zero_grad()
    with client_segments(model, ids, sequence_index=index, positions=positions, **options) as clients:
        logits = model(tokens.reshape(1, 18), position_ids=positions.to(device)).logits
        client_losses(logits, labels.reshape(1, 18), clients, len(ADAPTERS)).sum().backward()
    packed = {"logits": logits.detach().reshape(3, 6, -1)} | {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert_same(packed, apart, **TIGHT)


BAD = [
    ({"ids": ["b", "nobody"]}, ValueError, r"^ids: expected one of the adapters \['default', 'b', 'c'\] or '__base__', got 'nobody'"),
    ({"ids": [0, 3]}, ValueError, r"^ids: expected -1 \(base only\) or a client below 3"),
    ({"ids": [0.5, 1]}, TypeError, "^ids: expected integers"),
    ({"ids": None}, TypeError, "^ids: expected the client of each sequence.*got None"),
    ({"ids": [0, 1], "seeds": [1, 2, 3]}, TypeError, r"^seeds: expected an int64 tensor of shape \(3,\), got a list"),
    ({"ids": [0, 1], "seeds": torch.zeros(2, dtype=torch.int64)}, ValueError, r"^seeds: .*\(3,\)"),
    ({"ids": [0, 1], "step": torch.zeros(2, dtype=torch.int64)}, ValueError, r"^step: "),
    ({"ids": [0, 1], "sequence_index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"^sequence_index: "),
    ({"ids": [0, 1, 2]}, ValueError, r"^ids: expected one client per sequence"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD)
def test_bad_arguments(arguments, error, text, device):
    model = several_adapters(device)
    fuse(model)
    with pytest.raises(error, match=text), client_segments(model, **arguments):
        model(token_batch(2, 5, device))


def test_models_that_cannot_share_a_batch(device):
    stock = several_adapters(device)
    with pytest.raises(ValueError, match="no PEFT layer is fused; call attach"), client_segments(stock, ["b"]):
        pass
    saved = lora_model(device=device, modules_to_save=["lm_head"])
    fuse(saved)
    with pytest.raises(ValueError, match=r"lm_head' is kept by modules_to_save"), client_segments(saved, [0]):
        pass
    embedding = lora_model(device=device, target_modules=["q_proj", "embed_tokens"])
    with pytest.warns(UserWarning):
        fuse(embedding)
    with pytest.raises(ValueError, match="embed_tokens' is a Embedding that is not fused"), client_segments(embedding, [0]):
        pass
    dora = several_adapters(device)
    dora.add_adapter("d", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    dora.to(torch.float64)
    with pytest.warns(UserWarning):
        fuse(dora)
    with pytest.raises(RuntimeError, match="client_segments: adapter 'd' is a LoRA variant"), client_segments(dora, ["d", "b"]):
        dora(token_batch(2, 5, device))
    with client_segments(dora, ["c", "b"]):
        dora(token_batch(2, 5, device))
    merged = several_adapters(device)
    fuse(merged)
    merged.merge_adapter(["b"])
    with pytest.raises(RuntimeError, match=r"adapters \['b'\] are merged"), client_segments(merged, ["b", "c"]):
        merged(token_batch(2, 5, device))


def test_a_block_is_one_threads(device):
    model, tokens, told = several_adapters(device), token_batch(2, 5, device), []
    fuse(model)

    def other():
        try:
            with client_segments(model, [0, 1]):
                model(tokens)
        except RuntimeError as error:
            told.append(str(error))

    with client_segments(model, [1, 0]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with client_segments(model, [1, 1]):  # within one thread they may be nested
            model(tokens)
    assert told == ["client_segments: another thread is inside a block of this model; give each thread a model of its own"]
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(told) == 1


def test_adapters_are_named_on_the_host_whatever_the_default_device(device):
    model, tokens = several_adapters(device), token_batch(6, 8, device)
    fuse(model)
    model.eval()
    with torch.device("meta"):
        by_name = model(tokens, adapter_names=NAMES).logits
        with client_segments(model, NAMES):
            inside = model(tokens).logits
    with client_segments(model, NAMES):
        assert torch.equal(inside, model(tokens).logits) and torch.equal(by_name, inside)
