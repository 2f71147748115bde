"""Training without padding: sequences of several clients in one row are the same training to rounding, and a probe of the model decides whether it can."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from test_cohort import RANKS, SIZES, cohort, distance, plain_bank, setting, settings
from tiny import tiny_clients, tiny_config, tiny_federation, tiny_model, trained_bank

from hetlora import full_finetuning, packing
from hetlora.batches import Batch, Batching, batches, fill_rows
from hetlora.cli import cli
from hetlora.client import step_batches, token_losses
from hetlora.cohort import train_one_by_one
from hetlora.config import ConfigError
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.observer import Observer
from hetlora.packing import batching_of, probe
from hetlora.recorded import step_rows
from hetlora_kernels.peft import attach, client_segments, detach

PACKED = Batching("packed")
CPU = torch.device("cpu")
LR = 0.01
SMALL = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def sequences(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 50, (length,), generator=draw) for length in lengths]


def test_rows_hold_every_sequence_once_and_no_more_than_they_have_room_for():
    dice = random.Random(0)
    for _ in range(200):
        lengths = [dice.randint(2, 40) for _ in range(dice.randint(1, 60))]
        room = max(lengths) + dice.choice([0, 0, 17])
        rows = fill_rows(lengths, room)
        assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
        assert all(sum(lengths[place] for place in row) <= room for row in rows)
        halves = sum(sum(lengths[place] for place in row) <= room / 2 for row in rows)
        assert halves <= 1, "two rows that are half empty would be one"


@pytest.mark.parametrize("max_tokens", [1, 24, 10_000])
@pytest.mark.parametrize("batching", [PACKED, Batching("packed", one_row=True), Batching("sorted"), Batching("padded")], ids=str)
def test_every_token_of_a_step_is_in_one_batch_with_its_client_and_its_label(batching, max_tokens):
    rows = [(k % 3, k // 3, sequence) for k, sequence in enumerate(sequences([9, 4, 2, 12, 7, 5, 3]))]
    rows[4] = (1, 1, torch.where(torch.arange(7) < 3, ~rows[4][2], rows[4][2]))  # a prompt, not predicted
    found = {}
    for batch in batches(rows, max_tokens, CPU, batching):
        assert batch.ids.numel() <= max(max_tokens, 12)
        own = batch if batch.positions is not None else _by_token(batch)
        for client, index, place, token, label in zip(*(t.flatten().tolist() for t in (own.owner, own.index, own.positions, own.ids, own.labels)), strict=True):
            if client >= 0:
                assert (client, index, place) not in found
                found[client, index, place] = token, label
    expected = {}
    for client, index, sequence in rows:
        for place, token in enumerate(sequence.tolist()):
            expected[client, index, place] = (~token, -100) if token < 0 else (token, token)
    for key, (token, label) in found.items():
        client, index, place = key
        if key in expected:
            assert token == expected[key][0]
            assert label == expected[key][1] or (place == 0 and label == -100), "a first token is predicted by nothing"
        else:
            assert label == -100, "padding"
    assert expected.keys() <= found.keys()


def _by_token(batch: Batch) -> Batch:
    shape = batch.ids.shape
    return Batch(batch.ids, batch.labels, *(t[:, None].expand(shape) for t in (batch.owner, batch.index)), torch.arange(shape[1]).expand(shape))


@pytest.mark.parametrize(
    "change",
    [{}, {"max_tokens_per_step": 20}, {"optimizer": "sgd", "clip_norm": 0.0, "weight_decay": 0.0, "prune_lambda": 0.5, "batch_size": 5}],
    ids=["default", "micro-batches", "sgd"],
)
def test_packed_padded_alone_and_plain_pytorch_agree(tmp_path, change):
    """In float64, dropout masks included: row keys name a token by its sequence and place, whatever row it is in."""
    cfg = settings(tmp_path, padding_free="on", **change)
    model, start, clients, keep = setting(cfg, torch.float64)
    clients = [replace(data, train=[s[: 3 + (5 * i + k) % 8] for i, s in enumerate(data.train)]) for k, data in enumerate(clients)]
    drawn = [step_batches(data, cfg, 1) for data in clients]
    work = step_rows(clients, drawn, 0)
    parts = list(batches(work.rows, cfg.max_tokens_per_step, CPU, batching_of(model, cfg)))
    assert any(part.positions is not None and bool(((part.positions == 0).sum(1) > 1).any()) for part in parts), "or nothing is packed here"
    together = cohort(model, start, clients, cfg, keep)
    alone, _ = train_one_by_one(model, start, clients, cfg, 1, LR, keep)
    padded = cohort(model, start, clients, cfg.model_copy(update={"padding_free": "off"}), keep)
    plain = plain_bank(model, start, clients, cfg, keep)
    assert distance(together, start) > 0.005, "training must move the factors for this test to say anything"
    for other in (alone, padded, plain):
        assert distance(together, other) < 1e-12


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("one_row", [False, True])
def test_losses_of_others_keep_their_bits_when_a_sequence_changes(attention, one_row):
    model = tiny_model()
    model.set_attn_implementation(attention)
    bank = trained_bank(target_shapes(model, "attention"), [2, 4, 3])
    rows = [(k % 3, k // 3, sequence) for k, sequence in enumerate(sequences([12, 5, 7, 6, 4, 3]))]
    attach(model, bank)
    outcomes = []
    for changed in (False, True):
        if changed:
            rows[3] = (0, 1, (rows[3][2] + 7) % 50)
        for factor in bank.parameters():
            factor.grad = None
        (part,) = batches(rows, 1000, CPU, Batching("packed", one_row=one_row))
        assert part.positions is not None and bool((part.positions == 0).sum(1).max() > 1)
        with client_segments(model, part.owner, sequence_index=part.index, positions=part.positions):
            losses = token_losses(model, part.ids, part.labels, part.owner, 3, part.positions)
            losses.sum().backward()
        outcomes.append((losses.detach(), [bank.select([k]) for k in range(3)], [_grads(bank, k) for k in range(3)]))
    detach(model)
    (before, _, grads), (after, _, grads_after) = outcomes
    assert before[0] != after[0] and torch.equal(before[1:], after[1:])
    for k in (1, 2):
        assert all(torch.equal(one, other) for one, other in zip(grads[k], grads_after[k], strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(grads[0], grads_after[0], strict=True))


def _grads(bank, k):
    return [rows[name].grad[layout.rows(k)].clone() for name, layout in bank.layouts.items() for rows in (bank.a, bank.bt)]


def test_full_fine_tuning_packs_too(tmp_path):
    model, (client,) = tiny_model(torch.float64), tiny_clients([6])
    client = replace(client, train=[s[: 3 + (5 * i) % 8] for i, s in enumerate(client.train)])
    updates = []
    for padding_free in ("on", "off"):
        cfg = tiny_config(tmp_path, batch_size=6, padding_free=padding_free)
        with full_finetuning._trainable(model):
            optimizer = full_finetuning._Optimizer(list(model.parameters()), cfg, LR)
            full_finetuning.local_steps(model, client, cfg, 1, optimizer, CPU, lambda *_: torch.enable_grad())
            updates.append([weight.detach().clone() for weight in model.parameters()])
    assert batching_of(model, cfg.model_copy(update={"padding_free": "on"})).name == "packed"
    assert any(not torch.equal(one, weight) for one, weight in zip(updates[0], model.parameters(), strict=True))
    for one, other in zip(*updates, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- which models can


def made(cls, config, **options):
    torch.manual_seed(0)
    model = getattr(tf, cls)(getattr(tf, config)(**options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)  # at their own scale tiny models hardly attend
    return model


CAN = {
    "llama": lambda: made("LlamaForCausalLM", "LlamaConfig", **SMALL),
    "gpt2, whose absolute positions are position_ids": lambda: made("GPT2LMHeadModel", "GPT2Config", **GPT),
    "experts": lambda: made("MixtralForCausalLM", "MixtralConfig", **SMALL, num_local_experts=4, num_experts_per_tok=2),
    "a window longer than a row": lambda: made("MistralForCausalLM", "MistralConfig", **SMALL, sliding_window=64),
}
CANNOT = {
    "absolute positions": (lambda: made("OPTForCausalLM", "OPTConfig", **SMALL, ffn_dim=40, word_embed_proj_dim=24, dropout=0.0), "mixes packed sequences"),
    "ALiBi": (lambda: made("BloomForCausalLM", "BloomConfig", vocab_size=50, hidden_size=24, n_layer=2, n_head=4), "mixes packed sequences"),
    "state space": (lambda: made("MambaForCausalLM", "MambaConfig", vocab_size=50, hidden_size=24, num_hidden_layers=2, state_size=4), "mixes packed"),
    "hybrid": (lambda: made("Lfm2ForCausalLM", "Lfm2Config", **SMALL, layer_types=["conv", "full_attention"]), "mixes packed sequences"),
    "a window": (lambda: made("MistralForCausalLM", "MistralConfig", **SMALL, sliding_window=8), "has sliding_window = 8, shorter than seq_len = 32"),
    "a window in some layers": (
        lambda: made("Gemma3ForCausalLM", "Gemma3TextConfig", **SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        "has sliding_window = 8",
    ),
}


def shapes_of(model):
    return target_shapes(model, "x_proj" if type(model).__name__.startswith("Mamba") else "attention")


@pytest.mark.parametrize("name", CAN)
def test_a_model_that_keeps_packed_sequences_apart_packs(name):
    model = CAN[name]()
    batching = probe(model, shapes_of(model), 32)
    assert batching.name == "packed", batching.reason
    assert all(parameter.requires_grad for parameter in model.parameters()), "the probe gives the model back as it was"


@pytest.mark.parametrize("name", CANNOT)
def test_a_model_that_does_not_show_it_takes_sorted_padding(name):
    make, reason = CANNOT[name]
    model = make()
    batching = probe(model, shapes_of(model), 32)
    assert batching.name == "sorted" and batching.reason.startswith(reason), batching.reason


def test_a_model_whose_mask_alone_is_lost_is_refused(monkeypatch):
    """Positions restart, but each sequence sees the ones before it in its row: what attention without block masks does."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    model = CAN["llama"]()
    assert probe(model, shapes_of(model), 32).reason.startswith("mixes packed sequences")


def test_on_is_an_error_for_a_model_that_cannot_and_auto_sorts(tmp_path):
    model = CANNOT["ALiBi"][0]()
    with pytest.raises(ConfigError, match=r"padding_free = 'on': BloomForCausalLM mixes packed sequences: .*; use 'auto'"):
        batching_of(model, tiny_config(tmp_path, padding_free="on"))
    batching = batching_of(model, tiny_config(tmp_path, padding_free="auto"))
    rows = [(0, i, sequence) for i, sequence in enumerate(sequences([3, 9, 4, 8, 5]))]
    assert [tuple(part.ids.shape) for part in batches(rows, 18, CPU, batching)] == [(2, 9), (3, 5)]
    assert [tuple(part.ids.shape) for part in batches(rows, 18, CPU)] == [(2, 9), (2, 8), (1, 5)]
    assert [part.index.tolist() for part in batches(rows, 1000, CPU, batching)] == [[0, 1, 2, 3, 4]], "one batch needs no order"


def test_sorted_batches_train_the_same(tmp_path):
    cfg = settings(tmp_path, max_tokens_per_step=24)
    model, start, clients, keep = setting(cfg, torch.float64, RANKS, SIZES)
    padded = cohort(model, start, clients, cfg, keep)
    packing._known[model] = {(cfg.seq_len, cfg.target_modules, cfg.adapter_dtype, packing._attention(model)): Batching("sorted", "mixes")}
    ordered = cohort(model, start, clients, cfg.model_copy(update={"padding_free": "auto"}), keep)
    assert 0 < distance(padded, ordered) < 1e-12


class Start(Observer):
    def start(self, cfg, info) -> None:
        self.info = info


def test_the_first_lines_say_which_way_and_why(tmp_path):
    seen = Start()
    settings = {"rounds": 1, "ranks": "fixed:2", "clients_per_round": 2}
    simulate(tiny_config(tmp_path / "a", padding_free="auto", **settings), observer=seen, federation=tiny_federation([3, 4]))
    assert seen.info["batches"].startswith("packed; a probe is off by ")
    simulate(tiny_config(tmp_path / "b", **settings), observer=seen, federation=tiny_federation([3, 4]))
    assert "batches" not in seen.info


def test_info_says_which_way_a_model_takes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_model().save_pretrained(tmp_path)
    found = CliRunner().invoke(cli, ["info", "--model", str(tmp_path)])
    assert found.exit_code == 0 and f"\n\nBatches of {tmp_path}: packed; a probe is off by" in found.output and "\\n" not in found.output


def test_a_recorded_step_is_padded(tmp_path):
    with pytest.raises(ConfigError, match=r"cuda_graph = True: a recorded step has one shape"):
        tiny_config(tmp_path, cuda_graph=True, padding_free="on")
    assert batching_of(tiny_model(), tiny_config(tmp_path, cuda_graph=True, padding_free="auto")).name == "padded"
