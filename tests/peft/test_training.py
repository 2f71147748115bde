"""Training with fused layers: dropout, mixed precision, checkpointing, the Trainer, and losses as exact as plain PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_exact_as, factor_of
from model_cases import VOCAB, tiny_llama, token_batch
from peft import LoraConfig, get_peft_model
from peft_cases import TARGETS, assert_fused_is_stock, assert_same, filled, lora_model, outcome, several_adapters, tiny_bert
from torch import nn

from hetlora_kernels.peft import fuse, unfuse


def next_token_loss(model, tokens):
    logits = model(tokens).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a loss in bfloat16 would round everything else away
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))


# ---------------------------------------------------------------- as exact as PEFT


def in_type(model, dtype):
    """The model's numbers, rounded once to what PEFT holds, in `dtype`: a bfloat16 base and float32 adapters, which stay so unless `dtype` is float64."""
    for name, parameter in model.named_parameters():
        adapter = "lora_" in name
        parameter.data = parameter.data.to(torch.float32 if adapter else torch.bfloat16)
        parameter.data = parameter.data.to(torch.float32 if adapter and dtype != torch.float64 else dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(dtype) if buffer.is_floating_point() else buffer.data
    return model.train()


def peft_model(base, config, dtype, seed=0):
    return in_type(filled(get_peft_model(base(torch.float64), LoraConfig(r=4, lora_alpha=6, **config), autocast_adapter_dtype=False), seed), dtype)


def fused(model):
    assert not fuse(model).left
    return model


def adapters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def losses_of_training(base, config, use, steps, seed=0, look=None):
    """Losses of a run in float64 with AdamW, whose adapters are float32 numbers at every step; `look(step, adapters)` sees them before each."""
    model = use(peft_model(base, config, torch.float64, seed))
    optimiser = torch.optim.AdamW(adapters(model), lr=3e-2, eps=1e-5)
    tokens, losses = token_batch(6, 12, seed=seed), []
    for step in range(steps):
        if look is not None:
            look(step, adapters(model))
        loss = next_token_loss(model, tokens)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for parameter in adapters(model):
            parameter.data = parameter.data.float().double()
        losses.append(loss.detach())
    return torch.stack(losses)


def token_losses(model, tokens):
    """[sequences, tokens - 1]"""
    logits = model(tokens).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").detach().double()


CONFIGS = {"llama": (tiny_llama, {"target_modules": TARGETS}), "bert": (tiny_bert, {"target_modules": ["query", "value", "dense"]})}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast to bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_within_plain_pefts_error(name, precision):
    """Along eight training runs: at each step the losses of twelve new sequences are as near to those in float64 as plain PEFT's are. The three have the same
    adapters at each step, so that nothing but this step's arithmetic differs, and 576 sequences tell (accuracy.py)."""
    base, config = CONFIGS[name]
    dtype, autocast = (torch.bfloat16, None) if precision == "bfloat16" else (torch.float32, torch.bfloat16 if "autocast" in precision else None)
    models = [peft_model(base, config, torch.float64), peft_model(base, config, dtype), fused(peft_model(base, config, dtype))]
    errors, runs = ([], []), []
    for seed in range(8):

        def look(step, parameters, seed=seed):
            tokens, losses = token_batch(12, 12, seed=1000 * seed + step), []
            for model in models:
                for own, now in zip(adapters(model), parameters, strict=True):
                    own.data.copy_(now.detach())
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None and model is not models[0]):
                    losses.append(token_losses(model, tokens))
            for side, own in zip(errors, losses[1:], strict=True):
                side.append(own - losses[0])

        runs.append(losses_of_training(base, config, lambda model: model, 6, seed, look))
    assert sum(float(run[0] - run.min()) for run in runs) > 8 * 0.005  # they learn
    plain, own = (torch.cat(side) for side in errors)
    assert bool((own != 0).any())
    assert_as_exact_as(own, plain, factor_of(autocast or dtype), "losses")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_float64_run_is_the_same_run(name):
    base, config = CONFIGS[name]
    runs = [losses_of_training(base, config, use, 6) for use in (lambda model: model, fused)]
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


def errors_of_batches(models, device, autocast=None, batches=300):
    """Of logits and gradients of every model but the first, against the first, by name: [batches, elements] relative to their norm."""
    errors = [{} for _ in models[1:]]
    for seed in range(batches):
        tokens, results = token_batch(2, 6, device, seed=seed), []
        for i, model in enumerate(models):
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None and i > 0):
                results.append(outcome(model, tokens))
        for side, result in zip(errors, results[1:], strict=True):
            for name, true in results[0].items():
                side.setdefault(name, []).append((result[name].double() - true).flatten() / true.norm())
    return [{name: torch.stack(rows) for name, rows in side.items()} for side in errors]


def test_gradients_in_half_precision_are_as_exact_as_pefts(device):
    """bfloat16 base, float32 adapters: logits and every factor's gradient, against float64, over 300 batches."""
    models = [peft_model(lambda dtype: tiny_llama(dtype, device, layers=1), {"target_modules": TARGETS}, dtype) for dtype in (torch.float64, torch.bfloat16)]
    models.append(fused(copy.deepcopy(models[1])))
    plain, own = errors_of_batches(models, device)
    for name in plain:
        assert_as_exact_as(own[name], plain[name], 1, name)


# ---------------------------------------------------------------- dropout


def test_dropout_has_pefts_distribution(device):
    """Identity adapters show the mask: each element kept with probability 1 - p and divided by it, other draws at each call, none in eval mode."""
    width, p = 64, 0.25
    model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), LoraConfig(r=width, lora_alpha=width, target_modules=["0"], lora_dropout=p))
    layer = model.base_model.model[0]
    layer.base_layer.weight.data.zero_()
    layer.lora_A["default"].weight.data.copy_(torch.eye(width))
    layer.lora_B["default"].weight.data.copy_(torch.eye(width))
    model.to(device).train()
    assert not fuse(model).left
    x = torch.ones(400, width, device=device, requires_grad=True)
    torch.manual_seed(7)
    first = model(x)
    kept = first != 0
    torch.testing.assert_close(first[kept], torch.full_like(first[kept], 1 / (1 - p)))
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) < 4 * deviation
    by_column = kept.double().mean(0)
    assert float((by_column - (1 - p)).abs().max()) < 5 * (p * (1 - p) / 400) ** 0.5
    first.sum().backward()
    torch.testing.assert_close(x.grad, kept / (1 - p))  # backward has the forward's mask
    second = model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(model(x), first)
    model.eval()
    torch.testing.assert_close(model(x), x.detach())


def test_dropout_of_one_adapter_among_two(device):
    model = several_adapters(device)
    for module in model.modules():
        if hasattr(module, "lora_dropout") and "b" in module.lora_dropout:
            module.lora_dropout["b"] = nn.Dropout(0.5)
    fuse(model)
    tokens = token_batch(2, 5, device)
    model.base_model.set_adapter(["default", "b"])
    model.train()
    torch.manual_seed(1)
    first, second = outcome(model, tokens), outcome(model, tokens)
    torch.manual_seed(1)
    assert_same(outcome(model, tokens), first)
    assert not torch.equal(first["logits"], second["logits"])
    model.set_adapter("default")
    assert_same(outcome(model, tokens), outcome(model, tokens))


# ---------------------------------------------------------------- checkpointing, autocast, compilation


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("base", [tiny_llama, tiny_bert])
def test_gradient_checkpointing(base, use_reentrant, dropout, device):
    targets, tokens, results = (TARGETS if base is tiny_llama else ["query", "dense"]), token_batch(3, 7, device), []
    for checkpointing in (False, True):
        model = lora_model(base(device=device), target_modules=targets, lora_dropout=dropout).train()
        assert not fuse(model).left
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        results.append(outcome(model, tokens))
    assert_same(*results)
    if dropout == 0:
        unfuse(model)
        assert_same(outcome(model, tokens), results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, calls, device):
    model = lora_model(tiny_llama(torch.float32, device, layers=1))
    models = [copy.deepcopy(model).double(), model, fused(copy.deepcopy(model))]
    plain, own = errors_of_batches(models, device, dtype)
    assert calls["lora_linear"] == 3 * 300
    for name in plain:
        assert_as_exact_as(own[name], plain[name], 1, name)
    with torch.autocast(device.type, dtype=dtype):
        assert len({outcome(m, token_batch(3, 7, device))["logits"].dtype for m in models[1:]}) == 1


# ---------------------------------------------------------------- the Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.tokens = token_batch(16, 10)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer(checkpointing, tmp_path, calls):
    from transformers import Trainer, TrainingArguments

    histories = []
    for fused in (False, True):
        model = lora_model(tiny_llama(torch.float64))
        if fused:
            assert not fuse(model).left
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(fused)),
            per_device_train_batch_size=4,
            max_steps=5,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=5,
            report_to=[],
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
            gradient_checkpointing=checkpointing,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert (tmp_path / str(fused) / "checkpoint-5" / "adapter_model.safetensors").is_file()
    assert len(histories[0]) == 5 and histories[0][-1] < histories[0][0] and calls["lora_linear"] >= 30
    assert histories[1] == pytest.approx(histories[0], rel=1e-6)


def test_an_encoder_in_training_mode(device):
    assert_fused_is_stock(lora_model(tiny_bert(device=device), target_modules=["query", "key", "value", "dense"]).train())
