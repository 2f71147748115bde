"""Exported adapters load in PEFT and compute what the run's factors say."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from synthetic_run import write_checkpoint, write_run
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from hetlora import export
from hetlora.checkpoint import write_adapter
from hetlora.config import ConfigError
from hetlora.export import export_adapter

SCALE = 1.5
PROJECTIONS = ("q_proj", "v_proj")
MODULES = {f"model.layers.{layer}.self_attn.{name}": 32 for layer in range(12) for name in PROJECTIONS}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=12, num_attention_heads=4)
    return LlamaForCausalLM(config).eval()


def make_factors(ranks: dict[str, int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: (torch.randn(ranks[name], width), torch.randn(width, ranks[name])) for name, width in MODULES.items()}


def write_factors(folder: Path, factors) -> None:
    tensors = {f"base_model.model.{n}.lora_A.weight": a for n, (a, _) in factors.items()}
    write_adapter(folder, tensors | {f"base_model.model.{n}.lora_B.weight": b for n, (_, b) in factors.items()}, SCALE, "some/model")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a global adapter of rank 6."""
    write_run(tmp_path / "run", clients=4, rounds=1)
    write_factors(tmp_path / "run" / "adapter", make_factors(dict.fromkeys(MODULES, 6)))
    return tmp_path / "run"


def expected_logits(base, factors, ranks) -> torch.Tensor:
    """Logits of W + s B[:, :r] A[:r] in plain PyTorch."""
    weights = {name: base.get_submodule(name).weight for name in MODULES}
    deltas = {name: SCALE * b[:, : ranks[name]] @ a[: ranks[name]] for name, (a, b) in factors.items()}
    changed = {f"{name}.weight": weights[name] + deltas[name] for name in MODULES}
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        return torch.func.functional_call(base, changed, (tokens,)).logits


def loaded_logits(base, folder: Path) -> torch.Tensor:
    copy = LlamaForCausalLM(base.config).eval()
    copy.load_state_dict(base.state_dict())
    model = PeftModel.from_pretrained(copy, str(folder)).eval()
    with torch.no_grad():
        return model(torch.arange(16)[None]).logits


def read_factors(folder: Path):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {n: (tensors[f"base_model.model.{n}.lora_A.weight"], tensors[f"base_model.model.{n}.lora_B.weight"]) for n in MODULES}


@pytest.mark.parametrize("rank", [None, 1, 4, 6])
def test_global_adapter_at_a_rank(run, base, tmp_path, rank):
    out = export_adapter(run, tmp_path / "out", rank=rank)
    kept = rank or 6
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (kept, SCALE * kept)
    expected = expected_logits(base, read_factors(run / "adapter"), dict.fromkeys(MODULES, kept))
    torch.testing.assert_close(loaded_logits(base, out), expected, rtol=1e-4, atol=1e-4)
    without = expected_logits(base, read_factors(run / "adapter"), dict.fromkeys(MODULES, 0))
    assert not torch.allclose(expected, without, atol=1e-2), "the adapter must change the logits for this test to say anything"


def test_trailing_dead_rows_are_left_out_and_said(run, tmp_path):
    factors = make_factors(dict.fromkeys(MODULES, 6))
    short, inner, dead, odd, *_ = MODULES
    factors[short][1][:, 4:] = 0  # rows 4 and 5 are dead
    factors[inner][0][2] = 0  # a dead row in front of live ones stays
    factors[dead][1].zero_()
    factors[odd][1][:, 5], factors[odd][0][5, 0] = 0, torch.inf  # 0 times inf adds NaN, so the row stays
    write_factors(run / "adapter", factors)
    with pytest.warns(UserWarning, match=f"7 trailing rows of the adapter, in 2 of {len(MODULES)} modules"):
        out = export_adapter(run, tmp_path / "out")
    kept = read_factors(out)
    assert {name: a.shape[0] for name, (a, _) in kept.items()} == dict.fromkeys(MODULES, 6) | {short: 4, dead: 1}
    for name, (a, b) in factors.items():
        rank = kept[name][0].shape[0]
        assert torch.equal(kept[name][0], a[:rank])
        assert torch.equal(kept[name][1], b[:, :rank])
        assert not (b[:, rank:] @ a[rank:]).any(), "what is left out adds nothing"
    with_all = export_adapter(run, tmp_path / "six", rank=6)
    assert {a.shape[0] for a, _ in read_factors(with_all).values()} == {6}


def test_an_adapter_that_adds_nothing_is_said_to(run, tmp_path):
    """As after a run with keep_best whose best round is round 0."""
    factors = make_factors(dict.fromkeys(MODULES, 6))
    for _, b in factors.values():
        b.zero_()
    write_factors(run / "adapter", factors)
    with pytest.warns(UserWarning, match="the adapter adds nothing to its base model, as B A is zero in every module") as seen:
        out = export_adapter(run, tmp_path / "out")
    assert not any("computes the same" in str(each.message) for each in seen)
    assert {a.shape[0] for a, _ in read_factors(out).values()} == {1}


def test_clients_own_adapter_with_a_rank_per_module(run, base, tmp_path):
    name = "a/b c.한"
    ranks = {module: 1 + i % 5 for i, module in enumerate(MODULES)}
    factors = make_factors(ranks)
    write_factors(run / "clients" / quote(name, safe=""), factors)
    out = export_adapter(run, tmp_path / "out", client=name)
    torch.testing.assert_close(loaded_logits(base, out), expected_logits(base, factors, ranks), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_module", [False, True])
def test_client_that_never_trained_gets_the_truncated_global_adapter(run, base, tmp_path, by_module):
    rank = {module: 1 + i % 3 for i, module in enumerate(MODULES)} if by_module else 3
    write_checkpoint(run, {"email": rank})
    with pytest.warns(UserWarning, match="'email' has no adapter of its own .* global adapter truncated"):
        out = export_adapter(run, tmp_path / "out", client="email")
    ranks = rank if by_module else dict.fromkeys(MODULES, 3)
    assert {name: a.shape[0] for name, (a, _) in read_factors(out).items()} == ranks
    expected = expected_logits(base, read_factors(run / "adapter"), ranks)
    torch.testing.assert_close(loaded_logits(base, out), expected, rtol=1e-4, atol=1e-4)


def test_rank_of_an_untrained_client_from_the_summary(run, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    next(c for c in summary["clients"] if c["name"] == "email")["rank_end"] = 2
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.warns(UserWarning, match="rank 2"):
        out = export_adapter(run, tmp_path / "out", client="email")
    assert {len(a) for a, _ in read_factors(out).values()} == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 7}, "rank: expected 1 to 6 .* got 7"),
        ({"rank": 0}, "rank: expected 1 to 6 .* got 0"),
        ({"client": "emial"}, "unknown client 'emial' .*did you mean 'email'"),
        ({"client": "../../x"}, "unknown client"),
        ({"client": ".."}, "unknown client"),
        ({"client": ""}, "unknown client"),
        ({"client": "email", "rank": 2}, "not both"),
    ],
)
def test_refused_requests_write_nothing(run, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        export_adapter(run, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_run_whose_updates_are_in_the_base_is_refused(tmp_path):
    write_run(tmp_path / "run", rounds=1, merge="stack")
    with pytest.raises(ConfigError, match="folded its updates into the base"):
        export_adapter(tmp_path / "run", tmp_path / "out")


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists already; give a new folder, nothing is overwritten"):
        export_adapter(run, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


def test_folders_without_a_run_or_an_adapter(run, tmp_path):
    with pytest.raises(ConfigError, match="no run there"):
        export_adapter(tmp_path / "nowhere", tmp_path / "out")
    weights = run / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="not a readable adapter"):
        export_adapter(run, tmp_path / "out")
    weights.unlink()
    with pytest.raises(ConfigError, match=f"missing; .*--resume --output {run}"):
        export_adapter(run, tmp_path / "out")


# ---------------------------------------------------------------- loads as what was trained


@pytest.mark.parametrize("ranks", [{"lin": 8, "block.lin": 4}, {"lin": 4, "block.lin": 8}])
def test_a_rank_is_of_one_module_only(ranks, tmp_path):
    """One module's full name is the end of the other's."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.block = torch.nn.Linear(6, 6), torch.nn.ModuleDict({"lin": torch.nn.Linear(6, 6)})

        def prepare_inputs_for_generation(self):
            """PEFT's causal models have one."""

    tensors = {f"base_model.model.{name}.lora_A.weight": torch.randn(rank, 6) for name, rank in ranks.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.randn(6, rank) for name, rank in ranks.items()}
    write_adapter(tmp_path, tensors, 2.0, "tiny")
    loaded = PeftModel.from_pretrained(Model(), tmp_path)
    found = {name.removeprefix("base_model.model."): m for name, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert {name: (m.r["default"], m.scaling["default"]) for name, m in found.items()} == {name: (rank, 2.0) for name, rank in ranks.items()}
    assert all(torch.equal(m.lora_A["default"].weight, tensors[f"base_model.model.{name}.lora_A.weight"]) for name, m in found.items())


def deepseek(folder: Path) -> DeepseekV3ForCausalLM:
    """Of a model type whose experts' names PEFT rewrites on loading."""
    attention = {"num_attention_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **attention, **experts, n_shared_experts=1))
    model.config.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kinds", [("o_proj", "q_a_proj"), ("o_proj", "down_proj", "gate_proj")])
def test_what_peft_would_load_otherwise_is_refused(kinds, run, tmp_path):
    model = deepseek(tmp_path / "base")
    layers = {name: m for name, m in model.named_modules() if name.endswith(kinds)}
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.randn(3, m.in_features) for name, m in layers.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.randn(m.out_features, 3) for name, m in layers.items()}
    write_adapter(run / "adapter", tensors, SCALE, str(tmp_path / "base"))
    if "down_proj" not in kinds:
        assert (export_adapter(run, tmp_path / "out") / "adapter_model.safetensors").is_file()
        return
    with pytest.raises(ConfigError, match=r"^export: the adapter does not load as it was trained on a model of type 'deepseek_v3': .*mlp.*--target-modules"):
        export_adapter(run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_what_was_written_is_read_again(run, tmp_path, monkeypatch):
    def spoilt(folder, tensors, scale, model):
        key = next(iter(tensors))
        write_adapter(folder, {**tensors, key: tensors[key] + 1}, scale, model)

    monkeypatch.setattr(export, "write_adapter", spoilt)
    with pytest.raises(ConfigError, match="reads back as something else"):
        export_adapter(run, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
