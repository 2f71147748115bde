"""What a model cannot take is one line before its weights are loaded; a float16 base trains with scaled losses."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import SIZES, Interrupt, Stop, lines, tiny_clients, tiny_config, tiny_federation, tiny_model
from transformers import ByT5Tokenizer

import hetlora_kernels as hk
from hetlora import federation as federation_module
from hetlora import info, models
from hetlora.client import LocalResult, train_client
from hetlora.cohort import train_cohort
from hetlora.config import Config, ConfigError
from hetlora.federation import prepare
from hetlora.loop import simulate
from hetlora.loss_scale import FIRST, LossScale
from hetlora.models import target_shapes
from hetlora_kernels.peft import attach, client_segments, detach


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"seq_len": 65}, r"seq_len: expected at most the 64 tokens that model '.*' sees, got 65; lower --seq-len"),
        ({}, r"data: client 'GREEK' has token id \d+, but model '.*' knows 50; use the model's own tokenizer"),
        ({"device": "cuda:99"}, r"device 'cuda:99': not usable here"),
        ({"target_modules": "nothing"}, r"target_modules: 'nothing' matches no linear layer of the model; it has q_proj"),
        ({"quantize": "4bit", "dtype": "float64"}, r"quantize '4bit': (needs|computes in float32, bfloat16 or float16)"),
        ({"ranks": "3,4,5"}, "ranks: expected 2 ranks"),
        ({"sample_prompts": "nowhere.txt"}, r"sample_prompts nowhere\.txt: cannot be read"),
    ],
    ids=["positions", "vocabulary", "device", "modules", "quantize", "ranks", "prompts"],
)
def test_settings_are_checked_before_the_weights_are_loaded(base, monkeypatch, settings, reason):
    monkeypatch.setattr(federation_module, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(ConfigError, match=reason) as error:
        prepare(Config(**{"model": str(base), "data": "unicode:GREEK,HEBREW", "seq_len": 32, "ranks": "2,4", **settings}))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- float16


def gradients(factor: float, dtype: torch.dtype, scaled: bool) -> tuple[torch.Tensor, LossScale]:
    """Of B, for a loss of `factor` times the mean loss of the tiny model."""
    model = tiny_model(dtype)
    shapes = target_shapes(model, "attention")
    bank = hk.AdapterBank(shapes, [4], generator=torch.Generator().manual_seed(1))
    scaling = LossScale(model)
    if not scaled:
        scaling.value = 1.0
    ids = tiny_clients([1])[0].train[0][None]

    def backward(scale: float) -> torch.Tensor:
        with client_segments(model, torch.zeros(1, dtype=torch.int64)):
            loss = factor * model(input_ids=ids, labels=ids).loss.float()
            (loss * scale).backward()
        return loss.detach()

    attach(model, bank, scale=2.0)
    try:
        scaling.gradients(backward, list(bank.parameters()), lambda: _clear(bank))
    finally:
        detach(model)
    return torch.cat([bt.grad.flatten() for bt in bank.bt.values()]), scaling


def _clear(bank) -> None:
    for tensor in bank.parameters():
        tensor.grad = None


def test_gradients_too_small_for_float16_are_kept():
    exact, _ = gradients(1e-6, torch.float32, scaled=False)
    plain, _ = gradients(1e-6, torch.float16, scaled=False)
    kept, scaling = gradients(1e-6, torch.float16, scaled=True)
    assert scaling.value == FIRST
    lost = (plain == 0) & (exact != 0)
    assert lost.float().mean() > 0.5 and (kept != 0)[lost].float().mean() > 0.9
    assert (kept - exact).norm() < 0.02 * exact.norm() < (plain - exact).norm()


def test_gradients_too_large_for_float16_halve_the_scale_until_they_fit():
    exact, _ = gradients(1000.0, torch.float32, scaled=False)
    kept, scaling = gradients(1000.0, torch.float16, scaled=True)
    assert 1 <= scaling.value < FIRST and kept.isfinite().all()
    assert (kept - exact).norm() < 0.02 * exact.norm()


def test_a_loss_that_is_no_number_is_no_overflow():
    scaling = LossScale(tiny_model(torch.float16))
    weight = torch.ones(2, requires_grad=True)

    def backward(scale: float) -> torch.Tensor:
        weight.grad = torch.full((2,), float("nan"))
        return torch.tensor(float("nan"))

    scaling.gradients(backward, [weight], lambda: None)
    assert scaling.value == FIRST


def test_other_types_are_not_scaled():
    assert [LossScale(tiny_model(dtype)).value for dtype in (torch.float32, torch.bfloat16, torch.float64)] == [1, 1, 1]


@pytest.mark.parametrize("settings", [{}, {"train": "fold", "gamma": 0.99}, {"merge": "stack"}], ids=["factors", "fold", "stack"])
def test_a_run_in_float16_learns_and_goes_on_after_a_stop(tmp_path, settings):
    """The loss falls, in a cohort and one at a time, about as far as in float32; and a stop changes nothing."""
    common = {"lr": 0.02, "rounds": 3, "ranks": "fixed:4", "clients_per_round": 4, "local_steps": 6, "evaluate": "all", **settings}
    fell = {}
    for name, dtype, more in (("wide", "float32", {}), ("half", "float16", {}), ("single", "float16", {"cobatch": False})):
        result = simulate(
            tiny_config(tmp_path / name, dtype=dtype, **common, **more), federation=tiny_federation(SIZES, dtype=getattr(torch, dtype)), quiet=True
        )
        first, last = (result.history[i]["evaluation"]["own_train"]["loss"] for i in (0, -1))
        fell[name] = first - last
    assert fell["wide"] > 0.05
    assert all(abs(fell[name] - fell["wide"]) < 0.2 * fell["wide"] for name in ("half", "single")), fell
    cfg = tiny_config(tmp_path / "stopped", dtype="float16", **common)
    with pytest.raises(Stop):
        simulate(cfg, federation=tiny_federation(SIZES, dtype=torch.float16), observer=Interrupt("local_step", 8))
    simulate(cfg, resume=True, federation=tiny_federation(SIZES, dtype=torch.float16), quiet=True)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "half")


def test_full_fine_tuning_in_float16_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"dtype = 'float16': train = 'full' steps the weights themselves"):
        tiny_config(tmp_path / "run", train="full", dtype="float16", weights="samples", gamma=0.99, ranks="powerlaw:5:50")


def test_one_client_and_a_cohort_of_one_take_the_same_steps():
    cfg = Config(local_steps=3, batch_size=2, lr=0.01)
    trained, results = [], []
    for alone in (True, False):
        federation = tiny_federation([4], dtype=torch.float16)
        bank = hk.AdapterBank(federation.shapes, [4], generator=torch.Generator().manual_seed(1))
        client = federation.data.clients[0]
        found = train_client(federation.model, bank, client, cfg, 1, 0.01, {}) if alone else train_cohort(federation.model, bank, [client], cfg, 1, 0.01, {})[0]
        assert isinstance(found, LocalResult)
        trained.append(bank)
        results.append(found)
    for one, two in zip(*(bank.parameters() for bank in trained), strict=True):
        assert torch.equal(one, two)
    assert results[0].loss_last == pytest.approx(results[1].loss_last, rel=1e-6)


@pytest.mark.parametrize("fast", [True, False])
def test_a_type_that_the_processor_multiplies_slowly_is_named(fast, tmp_path, monkeypatch):
    """By a warning before the model is read, and by `hetlora info`."""
    tiny_model().save_pretrained(tmp_path / "base")
    for module in (models, info):
        monkeypatch.setattr(module, "multiplies_fast", lambda dtype, device: fast or dtype != torch.bfloat16)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        models.load_model(tiny_config(tmp_path / "run", dtype="bfloat16"), str(tmp_path / "base"))
    assert any("dtype 'bfloat16': this processor has no instructions for it" in str(each.message) for each in seen) != fast
    rows = [text for name, text in info._devices() if "no instructions" in text]
    assert rows == ([] if fast else ["no instructions for products of bfloat16: float32 is faster, but for layers with adapters"])
