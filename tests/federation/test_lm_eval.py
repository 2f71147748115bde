"""lm-evaluation-harness on an exported adapter gives the log-likelihoods of the run's own model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install '.[eval]')")

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from test_in_memory import TEXTS, config
from test_recipes import load_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hetlora.export import export_adapter
from hetlora.loop import simulate
from hetlora_kernels.peft import attach, client_segments, detach

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUESTIONS = [{"question": f"day {i}", "answers": ["rain", "sun"], "right": i % 2} for i in range(4)]


@torch.no_grad()
def log_likelihood(model, tokenizer, bank, question: str, answer: str) -> float:
    """Of the answer's tokens after the question's."""
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
    attach(model, bank, scale=2.0)
    try:
        with client_segments(model, torch.zeros(1, dtype=torch.int64)):
            logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    finally:
        detach(model)
    return sum(float(logits[len(before) + i - 1, token]) for i, token in enumerate(after))


def test_the_documented_task_on_an_exported_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    load_tiny_model().write_tiny_model("llama", "base")  # its tokenizer adds no mark of its own
    result = simulate(config(tmp_path / "run", model=str(tmp_path / "base"), lr=0.2), data=TEXTS, quiet=True)
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    shutil.copy(EXAMPLES / "lm-eval" / "task.yaml", tmp_path)
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": "base", "peft": "adapter", "dtype": "float32"},
        tasks=["mine"],
        task_manager=TaskManager(include_path=os.fspath(tmp_path)),
        device="cpu",
        log_samples=True,
    )
    own, tokenizer = AutoModelForCausalLM.from_pretrained("base").requires_grad_(False).eval(), AutoTokenizer.from_pretrained("base")
    for sample in found["samples"]["mine"]:
        row = QUESTIONS[sample["doc_id"]]
        expected = [log_likelihood(own, tokenizer, result.bank, row["question"], f" {answer}") for answer in row["answers"]]
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(expected, rel=1e-4)
    assert "acc,none" in found["results"]["mine"]
