"""train = 'fold': fresh rows on the folded bank. Its parts against their equations, then whole runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import SIZES, Interrupt, Stop, contents, lines, same_bits, tiny_config, tiny_federation, tiny_model, trained_bank
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import hetlora_kernels as hk
from hetlora import fold
from hetlora.checkpoint import load_checkpoint
from hetlora.client import step_batches
from hetlora.compare.methods import METHODS
from hetlora.config import ConfigError
from hetlora.evaluate import evaluate_bank, pool_text
from hetlora.export import export_adapter
from hetlora.loop import simulate
from hetlora.merge import MergeCall
from hetlora.models import target_shapes
from hetlora.run_folder import read_rounds
from hetlora_kernels.peft import attach, detach

SHAPES = {"square": (16, 16), "wide": (8, 16), "tall": (24, 16)}
FOLD = {"train": "fold", "weights": "samples", "gamma": 0.99}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


IDS = torch.arange(24).view(2, 12)

# ---------------------------------------------------------------- the download


@pytest.mark.parametrize(("kind", "bits"), [("8bit", 8), ("4bit", 4)])
def test_a_download_is_the_bank_in_few_bits_and_counts_what_travels(kind, bits):
    bank = trained_bank({"square": (16, 16), "odd": (7, 5)}, [3])
    got = fold.download(bank, kind)
    total = 0
    for own, source in zip(got.bank.parameters(), bank.parameters(), strict=True):
        codes, scales = hk.quantize_rows(source.detach(), bits)
        total += codes.numel() * codes.element_size() + scales.numel() * scales.element_size()
        assert torch.equal(own, hk.dequantize_rows(codes, scales, source.shape[1])) and not torch.equal(own, source)
    assert got.num_bytes == total == fold.download_bytes(bank.shapes, 3, kind, bank.dtype)


def test_an_exact_download_is_the_bank():
    bank = trained_bank(SHAPES, [3], torch.float64)
    got = fold.download(bank, "exact")
    assert same_bits(got.bank, bank) and got.num_bytes == bank.num_bytes(0) == fold.download_bytes(SHAPES, 3, "exact", torch.float64)
    got.bank.a["wide"].data.zero_()
    assert bool(bank.a["wide"].any())


# ---------------------------------------------------------------- the folded base


def test_the_folded_model_is_the_adapted_one_and_the_base_comes_back_untouched():
    model = tiny_model(torch.float64)
    bank = trained_bank(target_shapes(model, "attention"), [4], torch.float64)
    bank.bt["model.layers.0.self_attn.q_proj"].data.zero_()
    attach(model, bank, scale=2.0)
    expected = logits(model, IDS)
    detach(model)
    before, plain = dict(model.named_parameters()), logits(model, IDS)
    copies = {name: weight.clone() for name, weight in before.items()}
    with fold.folded(model, bank, 2.0):
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-12, atol=1e-12)
        inside = dict(model.named_parameters())
        assert not any(weight.requires_grad for weight in inside.values())
        changed = {name for name in before if inside[name] is not before[name]}
        assert changed == {f"{name}.weight" for name in bank.shapes} - {"model.layers.0.self_attn.q_proj.weight"}
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] and torch.equal(after[name], copies[name]) for name in before)
    assert torch.equal(logits(model, IDS), plain) and not torch.equal(plain, expected)


def test_the_base_comes_back_after_an_error_too():
    model = tiny_model()
    before = dict(model.named_parameters())
    with pytest.raises(KeyError), fold.folded(model, trained_bank(target_shapes(model, "attention"), [2]), 1.0):
        raise KeyError
    assert all(weight is before[name] for name, weight in model.named_parameters())


def test_the_base_comes_back_though_the_clean_up_is_interrupted_too(monkeypatch):
    """A second Ctrl-C, in the middle of putting the weights back."""
    model = tiny_model()
    before = dict(model.named_parameters())
    real, left = nn.Module.__setattr__, [2]

    def interrupted(module, name, value):
        if name == "weight" and isinstance(value, nn.Parameter):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        real(module, name, value)

    with pytest.raises(KeyboardInterrupt), fold.folded(model, trained_bank(target_shapes(model, "attention"), [2]), 1.0):
        assert sum(weight is not before[name] for name, weight in model.named_parameters()) == 8
        monkeypatch.setattr(nn.Module, "__setattr__", interrupted)
        raise ValueError
    assert left[0] < 0 and all(weight is before[name] for name, weight in model.named_parameters())


def test_conv1d_stores_its_weight_the_other_way():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager")
    model = GPT2LMHeadModel(config).double().requires_grad_(False).eval()
    bank = trained_bank(target_shapes(model, "attention"), [3], torch.float64)
    attach(model, bank, scale=0.5)
    expected = logits(model, IDS)
    detach(model)
    with fold.folded(model, bank, 0.5):
        torch.testing.assert_close(logits(model, IDS), expected, rtol=1e-12, atol=1e-12)


class Quantised(nn.Module):
    """A linear layer that keeps integers, as those of bitsandbytes do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = float(linear.weight.abs().max() / 127)
        self.weight = nn.Parameter((linear.weight / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step)


@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32])
def test_a_quantised_layer_keeps_its_weight_and_has_the_rows_beside_it(factor_dtype):
    """Gradients through the rows, too, are those of the adapted model: a client trains behind them."""
    model = tiny_model(torch.float64)
    for name in target_shapes(model, "attention"):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Quantised(model.get_submodule(name)))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in model.named_modules() if isinstance(layer, Quantised)}
    bank, client = trained_bank(shapes, [4], factor_dtype), trained_bank(shapes, [2], torch.float64, seed=1)
    grads = []
    for beside in (True, False):
        if beside:
            with fold.folded(model, bank, 2.0):
                attach(model, client, scale=2.0)
                model(input_ids=IDS).logits.square().mean().backward()
                grads.append([t.grad.clone() for t in client.parameters()])
                detach(model)
        else:
            both = hk.AdapterBank.stack([bank.to(dtype=torch.float64), client])
            attach(model, both, scale=2.0)
            model(input_ids=IDS).logits.square().mean().backward()
            grads.append([t.grad[4:].clone() for t in both.parameters()])
            detach(model)
    tolerance = 1e-10 if factor_dtype == torch.float64 else 1e-4
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    assert not any(layer._forward_hooks for layer in model.modules())


# ---------------------------------------------------------------- fresh rows


def test_b_has_as_many_numbers_as_a_lora_of_the_clients_rank():
    ranks = {name: [1, 2, 5, 8] for name in SHAPES}
    rho = fold.fresh_ranks(ranks, SHAPES)
    assert rho == {"square": [2, 4, 10, 16], "wide": [3, 6, 15, 16], "tall": [1, 3, 8, 13]}
    for name, (m, n) in SHAPES.items():
        for rank, own in zip(ranks[name], rho[name], strict=True):
            assert m * own <= rank * (m + n) and (own == n or m * (own + 1) > rank * (m + n))


def test_fresh_rows_are_the_clients_own_whoever_else_trains():
    rho, means = {name: [4, 2, 8] for name in SHAPES}, dict.fromkeys(SHAPES, 4.0)
    names = ["ann", "bob", "cem"]
    together = fold.fresh_bank(SHAPES, rho, means, names, seed=3, round_number=2)
    for k, name in enumerate(names):
        alone = fold.fresh_bank(SHAPES, {module: [own[k]] for module, own in rho.items()}, means, [name], seed=3, round_number=2)
        for module, layout in together.layouts.items():
            assert torch.equal(together.a[module][layout.rows(k)], alone.a[module])
    assert not any(t.any() for t in together.bt.values())
    assert not any(t.requires_grad for t in together.a.values()) and all(t.requires_grad for t in together.bt.values())
    seen = [together.a["square"][:2]]
    seen.append(fold.fresh_bank(SHAPES, rho, means, names, seed=4, round_number=2).a["square"][:2])
    seen.append(fold.fresh_bank(SHAPES, rho, means, names, seed=3, round_number=3).a["square"][:2])
    seen.append(fold.fresh_bank(SHAPES, rho, means, ["dan", "bob", "cem"], seed=3, round_number=2).a["square"][:2])
    seen += [together.a["wide"][:2], together.a["square"][4:6]]
    assert all(not torch.equal(one, other) for i, one in enumerate(seen) for other in seen[:i])


def test_fresh_rows_have_the_size_that_makes_steps_equal_at_every_rank():
    shapes, rho = {"q": (64, 1024)}, {"q": [4, 64, 16]}
    means = fold.mean_ranks(rho)
    assert math.isclose(means["q"], 16.0)  # the geometric mean
    bank = fold.fresh_bank(shapes, rho, means, ["a", "b", "c"], seed=0, round_number=1)
    for k, rank in enumerate(rho["q"]):
        own = bank.a["q"][bank.layouts["q"].rows(k)].detach()
        bound = math.sqrt(16 / rank / 1024)
        assert float(own.abs().max()) <= bound
        # the mean square of a uniform draw is bound^2 / 3, here of at least 4096 draws: 5 standard deviations
        assert abs(float(own.square().mean()) / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / own.numel())


# ---------------------------------------------------------------- the merge


@pytest.mark.parametrize("rank", [3, 40])
def test_the_merge_is_the_best_bank_of_its_rank(rank):
    bank, uploads = trained_bank(SHAPES, [rank], torch.float64), trained_bank(SHAPES, [4, 2, 9], torch.float64, seed=1)
    weights = torch.tensor([[0.5, 0.2, 0.25], [0.25, 0.7, 0.25], [0.25, 0.1, 0.5]], dtype=torch.float64)
    merged = fold.merge_bank(MergeCall(bank, uploads, weights, rank, tiny_config(Path("unused"), **FOLD), nn.Module())).bank
    for module, (name, (m, n)) in enumerate(SHAPES.items()):
        dense = bank.bt[name].detach().mT @ bank.a[name].detach()
        for k in range(3):
            rows = uploads.layouts[name].rows(k)
            dense += weights[k, module] * uploads.bt[name].detach()[rows].mT @ uploads.a[name].detach()[rows]
        u, s, vh = torch.linalg.svd(dense)
        kept = min(rank, m, n)
        truth = (u[:, :kept] * s[:kept]) @ vh[:kept]
        torch.testing.assert_close(merged.bt[name].mT @ merged.a[name], truth, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------- whole runs


def run(folder, dtype=torch.float32, sizes=SIZES, observer=None, resume=False, **settings):
    federation = tiny_federation(sizes, dtype, settings.get("target_modules", "attention"))
    types = dict.fromkeys(("dtype", "adapter_dtype"), str(dtype).removeprefix("torch."))
    cfg = tiny_config(folder, **{**FOLD, **types, "lr": 0.02, **settings})
    return simulate(cfg, federation=federation, observer=observer, resume=resume), federation, cfg


def test_a_run_learns_and_leaves_the_base_alone(tmp_path):
    federation = tiny_federation(SIZES)
    before = {name: (weight, weight.clone()) for name, weight in federation.model.named_parameters()}
    result = simulate(tiny_config(tmp_path / "run", **FOLD, rounds=6, lr=0.05, local_steps=4), federation=federation)
    assert all(weight is before[name][0] and torch.equal(weight, before[name][1]) for name, weight in federation.model.named_parameters())
    losses = [record["evaluation"]["client_text"]["loss"] for record in result.history]
    assert losses[-1] < losses[0]
    assert all(client["rank_before"] == client["rank"] for record in result.history for client in record["clients"])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_by_one_equals_co_batched(tmp_path, dropout):
    (together, *_), (alone, *_) = (run(tmp_path / str(cobatch), torch.float64, cobatch=cobatch, dropout=dropout) for cobatch in (True, False))
    for name in together.bank.shapes:
        one, other = (result.bank.bt[name].mT @ result.bank.a[name] for result in (together, alone))
        assert bool(one.any())
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_round_with_one_client_gives_the_model_that_the_client_trained(tmp_path):
    """No truncation (rank 8 is all that these modules have), no quantisation, one client: base + bank is the client's own model, to rounding."""
    result, federation, cfg = run(tmp_path / "run", torch.float64, clients_per_round=1, download="exact", ranks="fixed:8", target_modules="k_proj,v_proj")
    assert set(result.bank.shapes.values()) == {(8, 16)}
    saved = load_file(tmp_path / "run" / "clients" / result.history[-1]["clients"][0]["name"] / "adapter_model.safetensors")
    own = hk.AdapterBank(result.bank.shapes, [8 + 16], dtype=torch.float64)  # the bank's rows, then the fresh ones: 24 numbers of 8 a row, at most n
    own.load_adapter(0, saved)
    for name in result.bank.shapes:
        torch.testing.assert_close(own.bt[name].mT @ own.a[name], result.bank.bt[name].mT @ result.bank.a[name], rtol=1e-9, atol=1e-11)
    text = pool_text(federation.data.clients, 0)
    ours, theirs, base = (evaluate_bank(federation.model, bank, text, cfg.scale, 4096)["loss"] for bank in (result.bank, own, result.bank.prune([0])))
    assert abs(ours - theirs) < 1e-10 and abs(ours - base) > 1e-3


@pytest.mark.parametrize("cobatch", [True, False])
def test_clients_begin_where_the_downloaded_bank_stands(tmp_path, cobatch):
    """The loss of a client's first step, when its B is zero, is that of base and bank on its first batch."""
    settings = {"download": "4bit", "cobatch": cobatch, "lr": 0.1}
    first, federation, cfg = run(tmp_path / "first", torch.float64, rounds=1, **settings)
    both, *_ = run(tmp_path / "both", torch.float64, rounds=2, **settings)
    assert same_bits(first.bank, both.bank) is False and first.history[1]["clients"] == both.history[1]["clients"]
    bank, clients = fold.download(first.bank, "4bit").bank, {client.name: client for client in federation.data.clients}
    for line in both.history[2]["clients"]:
        data = clients[line["name"]]
        batch = [data.train[i] for i in step_batches(data, cfg, 2)[0]]
        under, base = (evaluate_bank(federation.model, own, batch, cfg.scale, 4096)["loss"] for own in (bank, bank.prune([0])))
        assert abs(line["loss_first"] - under) < 1e-9 < 1e-4 < abs(base - under)


@pytest.mark.parametrize("settings", [{}, {"download": "4bit", "cobatch": False}, {"optimizer": "sgd", "momentum": 0.9}])
def test_runs_repeat_to_the_bit_and_resume_to_it(tmp_path, settings):
    whole, *_ = run(tmp_path / "whole", **settings)
    again, *_ = run(tmp_path / "again", **settings)
    assert same_bits(whole.bank, again.bank) and lines(tmp_path / "whole") == lines(tmp_path / "again")
    with pytest.raises(Stop):
        run(tmp_path / "cut", observer=Interrupt("local_step", 5), **settings)
    assert 1 < len(read_rounds(tmp_path / "cut")) < len(read_rounds(tmp_path / "whole"))
    resumed, *_ = run(tmp_path / "cut", resume=True, **settings)
    assert same_bits(whole.bank, resumed.bank) and lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert contents(tmp_path / "whole" / "clients") == contents(tmp_path / "cut" / "clients")
    assert contents(tmp_path / "whole" / "adapter") == contents(tmp_path / "cut" / "adapter")


def test_the_bank_is_what_is_saved_and_exported(tmp_path):
    result, *_ = run(tmp_path / "run")
    _, tensors = load_checkpoint(tmp_path / "run")
    assert not any(key.startswith("base.") for key in tensors)
    adapter = load_file(export_adapter(tmp_path / "run", tmp_path / "out") / "adapter_model.safetensors")
    assert adapter.keys() == result.bank.adapter(0).keys() and all(torch.equal(adapter[key], value) for key, value in result.bank.adapter(0).items())
    name = result.history[-1]["clients"][0]["name"]
    assert export_adapter(tmp_path / "run", tmp_path / "own", client=name).is_dir()


def test_a_client_without_an_adapter_of_its_own_exports_all_rows_as_it_receives_them(tmp_path):
    result, *_ = run(tmp_path / "run", save_clients=False)
    name, rank = min(result.ranks.items(), key=lambda pair: pair[1])
    assert rank < result.bank.ranks[0]
    with pytest.warns(UserWarning, match=f"{name!r} has no adapter of its own .* the global adapter with all its rows, which every client .* receives"):
        out = export_adapter(tmp_path / "run", tmp_path / "out", client=name)
    adapter = load_file(out / "adapter_model.safetensors")
    assert adapter.keys() == result.bank.adapter(0).keys() and all(torch.equal(adapter[key], value) for key, value in result.bank.adapter(0).items())


@pytest.mark.parametrize("kind", ["8bit", "4bit", "exact"])
def test_traffic_is_what_travels(tmp_path, kind):
    result, federation, _ = run(tmp_path / "run", download=kind)
    shapes, rank = federation.shapes, result.bank.ranks[0]
    down = fold.download_bytes(shapes, rank, kind, torch.float32)
    for record in result.history[1:]:
        for client in record["clients"]:
            numbers = sum(fold.fresh_ranks({name: [client["rank"]]}, {name: shape})[name][0] * shape[0] for name, shape in shapes.items())
            assert client["bytes_down"] == down and client["bytes_up"] == 4 * numbers
            assert numbers <= client["rank"] * sum(m + n for m, n in shapes.values())
        assert record["bytes_down"] == down * 3 and record["trained_parameters"] * 4 == record["bytes_up"]
    homlora = rank * sum(m + n for m, n in shapes.values()) * 4
    assert down == homlora if kind == "exact" else down < homlora / 2


def test_a_clients_own_figure_is_under_the_bank_it_downloads(tmp_path):
    result, federation, cfg = run(tmp_path / "run", evaluate="all", download="4bit")
    own = fold.download(result.bank, "4bit").bank
    losses = [evaluate_bank(federation.model, own, pool_text([client], 0), cfg.scale, 4096)["loss"] for client in federation.data.clients]
    found = result.history[-1]["evaluation"]["own_text"]
    assert abs(found["loss"] - sum(losses) / len(losses)) < 1e-6
    exact = [evaluate_bank(federation.model, result.bank, pool_text([client], 0), cfg.scale, 4096)["loss"] for client in federation.data.clients]
    assert abs(found["loss"] - sum(exact) / len(exact)) > 1e-6  # four bits are seen


def test_diagnostics_say_what_truncation_lost(tmp_path):
    """With the width of the modules as rank nothing is lost (a norm through Gram matrices has no more than half the digits); with less, something is."""
    whole, *_ = run(tmp_path / "whole", torch.float64, ranks="fixed:8", target_modules="k_proj,v_proj", diagnostics=True)
    assert all(record["diagnostics"]["merge_error"] < 1e-7 for record in whole.history[1:])
    cut, *_ = run(tmp_path / "cut", torch.float64, ranks="fixed:2", diagnostics=True)
    assert all(0.01 < record["diagnostics"]["merge_error"] < 1 for record in cut.history[1:])
    for record in cut.history[1:]:
        assert record["diagnostics"]["effective_rank"] <= 2 + 1e-9


def test_an_upload_that_is_not_finite_is_left_out(tmp_path, monkeypatch):
    train = fold.train_cohort

    def spoiled(model, bank, clients, *rest):
        results = train(model, bank, clients, *rest)
        with torch.no_grad():
            next(iter(bank.bt.values()))[0] = float("nan")
        return results

    monkeypatch.setattr(fold, "train_cohort", spoiled)
    result, *_ = run(tmp_path / "run")
    assert all(len(record["dropped"]) == 1 and len(record["clients"]) == 2 for record in result.history[1:])
    assert all(bool(torch.isfinite(t).all()) for t in result.bank.parameters())


def test_clipping_bounds_what_a_client_adds(tmp_path):
    result, *_ = run(tmp_path / "run", clip_update=1e-6, rounds=1)
    assert float(result.bank.delta_norms().norm()) < 1e-5
    free, *_ = run(tmp_path / "free", rounds=1)
    assert float(free.bank.delta_norms().norm()) > 1e-3


@pytest.mark.parametrize(
    "settings", [{"gamma": 0.5}, {"prune_lambda": 0.5}, {"prune_scope": "module"}, {"merge": "svd"}, {"shared_rows": "owners"}, {"unowned_rows": "zero"}]
)
def test_settings_of_pruning_and_of_other_merges_are_refused(tmp_path, settings):
    with pytest.raises(ConfigError, match=rf"{next(iter(settings))} = "):
        tiny_config(tmp_path / "run", **{**FOLD, **settings})


def test_the_download_is_a_setting_of_this_kind_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"download = '4bit': only for train = 'fold'"):
        tiny_config(tmp_path / "run", download="4bit")


def test_the_method_is_a_row_of_settings():
    assert METHODS["fold"].settings == {"train": "fold", "weights": "samples"}
