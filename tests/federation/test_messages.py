"""A resumed run uses the run's own number of threads and says what else differs; client names stay inside the run folder."""

from __future__ import annotations

import json
import logging
import logging.handlers

import pytest
import torch
from tiny import tiny_clients, tiny_config, tiny_federation
from transformers import GPT2Config, GPT2LMHeadModel

from hetlora import run_folder
from hetlora.data import FederatedData
from hetlora.federation import Federation
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.observer import Observer


class Recorder(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def test_resume_takes_the_threads_of_the_run_and_names_other_versions(tmp_path) -> None:
    before = torch.get_num_threads()
    cfg = tiny_config(tmp_path / "run", rounds=1)
    simulate(cfg, federation=tiny_federation([3, 3, 3]))
    path = tmp_path / "run" / "versions.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "threads": str(before + 1), "torch": "0.1"}))
    seen = Recorder()
    try:
        simulate(cfg, federation=tiny_federation([3, 3, 3]), resume=True, observer=seen)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    text = "\n".join(seen.messages)
    assert f"using {before + 1} threads" in text and "torch was 0.1" in text and "python was" not in text


@pytest.mark.parametrize("name", ["..", ".", "../../x", "a/b", "x" * 300, "한국어" * 40])
def test_client_folders_stay_inside_and_are_distinct(tmp_path, name) -> None:
    folder = run_folder.client_folder(tmp_path, name)
    assert folder.parent == tmp_path / "clients" and folder.name not in (".", "..") and len(folder.name.encode()) < 255
    assert folder != run_folder.client_folder(tmp_path, name + "x")


def test_more_clients_per_round_than_there_are_is_said(tmp_path) -> None:
    seen = Recorder()
    simulate(tiny_config(tmp_path / "run", rounds=1, clients_per_round=9), federation=tiny_federation([3, 3]), observer=seen)
    assert any("clients_per_round = 9: there are 2 clients" in text for text in seen.messages)


def test_no_mask_is_advised_where_padding_is_right(tmp_path) -> None:
    """GPT-2 warns of rows that end in its padding token; it does so again when the run is over."""
    logger = logging.getLogger("transformers.modeling_utils")
    type(logger).warning_once.cache_clear()
    told = logging.handlers.BufferingHandler(100)
    logger.addHandler(told)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=50, bos_token_id=1, eos_token_id=1, pad_token_id=0)).eval()
    data = FederatedData(tiny_clients([3, 3]), [], "tiny clients")
    try:
        simulate(tiny_config(tmp_path / "run", rounds=1), federation=Federation(model, "tiny", target_shapes(model, "attention"), data), quiet=True)
        assert not told.buffer
        type(logger).warning_once.cache_clear()
        model(torch.tensor([[3, 0]]))
        assert ["attention_mask" in record.getMessage() for record in told.buffer] == [True]
    finally:
        logger.removeHandler(told)
