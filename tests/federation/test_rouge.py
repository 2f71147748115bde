"""Instruction data: prompts and responses become one sequence each; ROUGE-L scores the words that the adapter's greedy answers share with them, in order."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_config, tiny_model, trained_bank
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from hetlora import rouge
from hetlora.config import ConfigError
from hetlora.data import load_data
from hetlora.federation import Federation
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.report.page import write_report
from hetlora_kernels.peft import attach, client_segments, detach

ROWS = [{"user": f"u{k}", "ask": f"say {word} {n}", "answer": f"{word} number {n}"} for k, word in enumerate(["red", "green"]) for n in range(5)]
FIELDS = {"prompt_field": "ask", "text_field": "answer", "client_field": "user", "seq_len": 40, "ranks": "powerlaw:2:8"}


def write(folder, rows):
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / "data.jsonl")


def lcs_f1(answer: str, reference: str) -> float:
    """By the definition, over all subsequences of the answer's words."""
    mine, yours = answer.split(), reference.split()

    def longest(i: int, j: int) -> int:
        if i == len(mine) or j == len(yours):
            return 0
        return 1 + longest(i + 1, j + 1) if mine[i] == yours[j] else max(longest(i + 1, j), longest(i, j + 1))

    common = longest(0, 0)
    return 2 * common / (len(mine) + len(yours))


def test_each_row_is_one_sequence_and_test_rows_keep_prompt_and_response(tmp_path):
    tokenizer = ByT5Tokenizer()
    data = load_data(tiny_config(tmp_path, data=write(tmp_path, ROWS), **FIELDS), tokenizer)
    for client, word in zip(data.clients, ["red", "green"], strict=True):
        assert [tokenizer.decode(s, skip_special_tokens=True) for s in (*client.train, *client.test)] == [f"say {word} {n}{word} number {n}" for n in range(5)]
        assert all(int(s[-1]) == tokenizer.eos_token_id for s in client.train)
        assert [(tokenizer.decode(prompt), response) for prompt, response in client.examples] == [(f"say {word} 4", f"{word} number 4")]


def test_long_prompts_are_left_out_and_long_answers_cut(tmp_path):
    rows = [*ROWS, {"user": "u0", "ask": "x" * 40, "answer": "never"}, {"user": "u1", "ask": "y", "answer": "z" * 90}]
    with pytest.warns(UserWarning, match="1 examples left out"):
        data = load_data(tiny_config(tmp_path, data=write(tmp_path, rows), **FIELDS), ByT5Tokenizer())
    assert [len(client.train) + len(client.test) for client in data.clients] == [5, 6]
    assert len(data.clients[1].test[-1]) == 40 and data.clients[1].examples[-1][1] == "z" * 90


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"user": "u0", "answer": "a"}, {}, "no key 'ask'"),
        ({"user": "u0", "ask": 3, "answer": "a"}, {}, "'ask' must be text"),
        (None, {"data": "stdlib"}, "only a .jsonl, .csv or .parquet file or a hub data set has prompts"),
    ],
)
def test_faulty_prompts_are_named(tmp_path, row, settings, message):
    path = write(tmp_path, [*ROWS, row] if row else ROWS)
    with pytest.raises(ConfigError) as caught:
        load_data(tiny_config(tmp_path, **{"data": path, **FIELDS, **settings}), ByT5Tokenizer())
    assert message in str(caught.value)


PAIRS = [("the cat sat", "the cat sat"), ("the big cat sat down", "a cat sat"), ("sat cat the", "the cat sat"), ("dog", "cat"), ("나는 책을", "나는 글을")]


@pytest.mark.parametrize(("answer", "reference"), PAIRS)
def test_score_is_the_f1_of_the_longest_common_subsequence_in_any_script(answer, reference):
    assert rouge.scorer()([answer], [reference]) == pytest.approx(lcs_f1(answer, reference))
    assert rouge.scorer()([answer, "x"], [reference, "x"]) == pytest.approx((lcs_f1(answer, reference) + 1) / 2)
    assert rouge.words("Hello, WORLD-2: 안녕!") == ["hello", "world", "2", "안녕"]


def byte_federation(cfg) -> Federation:
    tokenizer = ByT5Tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes)
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    return Federation(model, "tiny", target_shapes(model, "attention"), load_data(cfg, tokenizer), tokenizer)


def test_answers_are_those_of_the_adapted_model_greedy_and_token_by_token(tmp_path, monkeypatch):
    cfg = tiny_config(tmp_path, data=write(tmp_path, ROWS), rouge_examples=2, rouge_tokens=9, **FIELDS)
    federation = byte_federation(cfg)
    bank = trained_bank(federation.shapes, [8])
    with torch.no_grad():
        for factor in bank.parameters():
            factor *= 8  # so that the adapter changes what is said
    seen = []
    monkeypatch.setattr(rouge, "scorer", lambda: lambda answers, references: seen.append((answers, references)) or 0.5)
    assert rouge.evaluate(federation, bank, cfg) == {"f1": 0.5, "examples": 2}
    expected, plain = [], []
    for adapted, found in ((True, expected), (False, plain)):
        for client in federation.data.clients:
            ids = client.examples[0][0].tolist()
            for _ in range(9):
                if adapted:
                    attach(federation.model, bank, scale=cfg.scale)
                    with client_segments(federation.model, torch.zeros(1, dtype=torch.int64)), torch.no_grad():
                        logits = federation.model(input_ids=torch.tensor([ids]), use_cache=False).logits
                    detach(federation.model)
                else:
                    logits = federation.model(input_ids=torch.tensor([ids])).logits
                ids.append(int(logits[0, -1].argmax()))
                if ids[-1] == federation.tokenizer.eos_token_id:
                    break
            found.append(federation.tokenizer.decode(ids[len(client.examples[0][0]) :], skip_special_tokens=True))
    assert seen == [(expected, ["red number 4", "green number 4"])]
    assert expected != plain


def test_a_run_scores_before_the_first_and_after_the_last_round(tmp_path):
    cfg = tiny_config(tmp_path / "run", data=write(tmp_path, ROWS), rouge_examples=2, rouge_tokens=4, rounds=2, clients_per_round=2, **FIELDS)
    result = simulate(cfg, federation=byte_federation(cfg))
    assert [("rouge_l" in record["evaluation"]) for record in result.history] == [True, False, True]
    assert result.history[-1]["evaluation"]["rouge_l"]["examples"] == 2
    assert "ROUGE-L of answers" in write_report(tmp_path / "run").read_text()


def test_rouge_without_prompts_or_library_is_refused(tmp_path, monkeypatch):
    model = tiny_model()
    with pytest.raises(ConfigError, match="prompt_field names none"):
        simulate(tiny_config(tmp_path / "run", rouge_examples=1), federation=Federation(model, "tiny", target_shapes(model, "attention"), None))
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional.text.rouge", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[rouge\]'"):
        rouge.scorer()
