"""Training with fused layers: dropout, mixed precision, checkpointing, compilation, the Trainer, and losses as exact as plain PEFT's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
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


def losses_of_training(base, config, dtype, fused, steps, autocast=None, seed=0):
    """Losses of a training run with AdamW from the same start; the adapters are float32 unless `dtype` is float64, as PEFT has them."""
    model = get_peft_model(base(torch.float64), LoraConfig(r=4, lora_alpha=6, **config), autocast_adapter_dtype=False)
    filled(model, seed)
    for name, parameter in model.named_parameters():  # the same numbers in every type
        adapter = "lora_" in name
        parameter.data = parameter.data.to(torch.float32 if adapter else torch.bfloat16)
        parameter.data = parameter.data.to(torch.float32 if adapter and dtype != torch.float64 else dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(dtype) if buffer.is_floating_point() else buffer.data
    model.train()
    if fused:
        assert not fuse(model).left
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, eps=1e-5)
    tokens, losses = token_batch(6, 12, seed=seed), []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = next_token_loss(model, tokens)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


CONFIGS = {"llama": (tiny_llama, {"target_modules": TARGETS}), "bert": (tiny_bert, {"target_modules": ["query", "value", "dense"]})}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast to bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_within_plain_pefts_error(name, precision):
    """Training runs from four starts: the fused losses are as near to those in float64 as plain PEFT's are (root mean square; a factor of two for luck)."""
    base, config = CONFIGS[name]
    dtype, autocast = (torch.bfloat16, None) if precision == "bfloat16" else (torch.float32, torch.bfloat16 if "autocast" in precision else None)
    runs = []
    for seed in range(4):
        truth = losses_of_training(base, config, torch.float64, False, 6, seed=seed)
        assert float(truth[0] - truth[-1]) > 0.005  # it learns
        runs.append([losses_of_training(base, config, dtype, fused, 6, autocast, seed) - truth for fused in (False, True)])
    plain, fused = (float(torch.cat(own).square().mean().sqrt()) for own in zip(*runs, strict=True))
    assert 0 < fused <= 2 * plain, f"fused {fused:.3e}, plain {plain:.3e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_float64_run_is_the_same_run(name):
    base, config = CONFIGS[name]
    runs = [losses_of_training(base, config, torch.float64, fused, 6) for fused in (False, True)]
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-10)


def test_gradients_in_half_precision_are_as_exact_as_pefts(device):
    """bfloat16 base, float32 adapters: every factor's gradient, against float64."""
    truth, errors = None, []
    for dtype, fused in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = lora_model(tiny_llama(torch.float64, device))
        for parameter_name, parameter in model.named_parameters():
            parameter.data = (
                parameter.data.bfloat16().to(dtype)
                if "lora_" not in parameter_name
                else parameter.data.float().to(max(dtype, torch.float32, key=lambda t: t.itemsize))
            )
        if fused:
            fuse(model)
        result = {key: value.double() for key, value in outcome(model, token_batch(4, 16, device)).items()}
        if truth is None:
            truth = result
        else:
            errors.append(sum((result[key] - truth[key]).square().sum() / truth[key].square().sum() for key in truth if key != "logits").sqrt())
    assert float(errors[1]) <= 1.5 * float(errors[0]), f"fused {float(errors[1]):.3e}, plain {float(errors[0]):.3e}"


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
    model = lora_model(tiny_llama(torch.float32, device))
    twin, tokens, truth = copy.deepcopy(model), token_batch(3, 7, device), outcome(copy.deepcopy(model).double(), token_batch(3, 7, device))
    assert not fuse(twin).left
    results = []
    for m in (model, twin):
        with torch.autocast(device.type, dtype=dtype):
            results.append(outcome(m, tokens))
    assert calls["lora_linear"] == 6 and results[0]["logits"].dtype == results[1]["logits"].dtype
    for name, true in truth.items():
        plain, fused = (float((r[name].double() - true).norm() / true.norm()) for r in results)
        assert fused <= 2 * plain, f"{name}: fused {fused:.2e}, plain {plain:.2e}"


def block_outcome(run, model, x):
    model.zero_grad()
    y = run(x)
    y.square().sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("backend", "kind"),
    [("aot_eager", "plain"), ("aot_eager", "two active adapters"), ("aot_eager", "dropout"), pytest.param("inductor", "plain", marks=pytest.mark.slow)],
)
def test_compile_in_one_graph(backend, kind, device):
    """Forward and backward traced without a break; a second length of the batch too."""
    block = nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 12, bias=False)).to(device, torch.float64)
    options = {"target_modules": ["0", "2"], "lora_dropout": 0.3 if kind == "dropout" else 0.0}
    model = lora_model(block, **options)
    if kind == "two active adapters":
        model.add_adapter("b", LoraConfig(r=2, **options))
        filled(model).to(torch.float64).base_model.set_adapter(["default", "b"])
    assert not fuse(model).left
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for rows in (5, 8):
        x = torch.randn(rows, 12, dtype=torch.float64, device=device)
        if kind == "dropout":
            model.train()
            assert not torch.equal(compiled(x), compiled(x))
            model.eval()
        assert_same(block_outcome(compiled, model, x), block_outcome(model, model, x))


@pytest.mark.slow
def test_compile_a_whole_model_in_one_graph(device):
    model, tokens = lora_model(device=device), token_batch(3, 7, device)
    assert not fuse(model).left
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(outcome(model, tokens, lambda m, t: compiled(t).logits), outcome(model, tokens))


def test_a_compiled_stock_model_can_be_fused_later(device):
    model = lora_model(nn.Sequential(nn.Linear(12, 20)).to(device, torch.float64), target_modules=["0"])
    x = torch.randn(5, 12, dtype=torch.float64, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    fuse(model)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-9, atol=1e-11)


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
