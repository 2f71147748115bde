"""simulate() on a model, a tokenizer and data that a program holds: the run that files with the same content would have given."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import Interrupt, Stop, lines, tiny_clients, tiny_config, tiny_model
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from hetlora.config import Config, ConfigError
from hetlora.data import FederatedData
from hetlora.loop import simulate
from hetlora.run_folder import read_config

TEXTS = {"ann": ["birds in the garden, " * 9, "and rain. " * 9], "bob": ["screws and an invoice. " * 12]}
ROWS = [{"client": name, "text": text} for name, texts in TEXTS.items() for text in texts]
TOKENIZER = ByT5Tokenizer()


def byte_model(dtype=torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=384, **sizes)).to(dtype)


def config(folder, **settings) -> Config:
    return tiny_config(folder, **{"seq_len": 32, "ranks": "2,4", "rounds": 2, "lr": 0.02, **settings})


@pytest.fixture
def from_files(tmp_path):
    """The run on files."""
    byte_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    simulate(config(tmp_path / "files", model=str(tmp_path / "model"), data=str(tmp_path / "data.jsonl")), quiet=True)
    return tmp_path / "files"


class Frame:
    """What a frame of pandas does here: iterated, it gives the names of its columns."""

    columns = ("client", "text")

    def __iter__(self):
        return iter(self.columns)

    def to_dict(self, orient):
        return {"records": ROWS}[orient]


Frame.__module__ = "pandas.core.frame"


class Own(Frame):
    """A frame of a class made from pandas' own, as geopandas has one."""


@pytest.mark.parametrize("data", [TEXTS, ROWS, (row for row in ROWS), Frame(), Own()], ids=["texts", "rows", "generator", "frame", "own frame"])
def test_objects_give_the_run_that_files_give(tmp_path, from_files, data):
    result = simulate(config(tmp_path / "run"), model=byte_model(), tokenizer=TOKENIZER, data=data, quiet=True)
    assert lines(tmp_path / "run") == lines(from_files)
    saved = read_config(tmp_path / "run")
    assert (saved.model, saved.data, saved.dtype, saved.device) == ("in memory", "in memory", "float32", "cpu")
    assert result.summary["clients"][0]["name"] == "ann"


def test_a_frame_of_the_real_pandas(tmp_path, from_files):
    pandas = pytest.importorskip("pandas", reason="needs the extra 'pandas'")
    simulate(config(tmp_path / "run"), model=byte_model(), tokenizer=TOKENIZER, data=pandas.DataFrame(ROWS), quiet=True)
    assert lines(tmp_path / "run") == lines(from_files)


class Twice(Frame):
    columns = ("client", "text", "text")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (Twice(), "data: the column 'text' of the frame comes twice; rename one"),
        ({"ann": Frame()}, r"got a frame for 'ann'; give its column, frame\['text'\]"),
        ({"ann": {"text": "ho"}}, "expected texts in a list for each client, got dict for 'ann'"),
    ],
)
def test_tables_in_the_wrong_place_are_named(tmp_path, data, reason):
    with pytest.raises(ConfigError, match=reason):
        simulate(config(tmp_path / "run"), model=byte_model(), tokenizer=TOKENIZER, data=data, quiet=True)


def test_one_of_them_and_the_rest_from_the_settings(tmp_path, from_files):
    model, data = str(tmp_path / "model"), str(tmp_path / "data.jsonl")
    simulate(config(tmp_path / "a", model=model), data=TEXTS, quiet=True)
    loaded = LlamaForCausalLM.from_pretrained(model)
    simulate(config(tmp_path / "b", data=data), model=loaded, quiet=True)  # its tokenizer is where it says it is from
    assert lines(tmp_path / "a") == lines(tmp_path / "b") == lines(from_files)
    assert read_config(tmp_path / "b").model == model


def test_tokens_that_are_ready_need_no_tokenizer(tmp_path):
    data = FederatedData(tiny_clients([3, 5]), [], "mine")
    result = simulate(config(tmp_path / "run"), model=tiny_model(), data=data, quiet=True)
    assert sorted(result.ranks) == ["client0", "client1"]


def test_rows_may_be_conversations(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    template = "{% for m in messages %}{{ '<' + m['role'][0] + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<a' }}{% endif %}"
    (tmp_path / "t.jinja").write_text(template)
    cfg = config(tmp_path / "run", messages_field="messages", template=str(tmp_path / "t.jinja"))
    result = simulate(cfg, model=byte_model(), tokenizer=TOKENIZER, data=[{"client": name, "messages": talk} for name in "aabb"], quiet=True)
    assert result.history[0]["evaluation"]["client_text"]["tokens"] == 2 * 3  # 'h', 'o' and EOS of a client's one test


def test_a_run_in_memory_goes_on_from_python_and_says_so_elsewhere(tmp_path):
    common = {"model": byte_model(), "tokenizer": TOKENIZER, "data": TEXTS}
    simulate(config(tmp_path / "whole"), **common, quiet=True)
    with pytest.raises(Stop):
        simulate(config(tmp_path / "run"), **common, observer=Interrupt("round_end", 2))
    with pytest.raises(ConfigError, match="was given by a Python program"):
        simulate(read_config(tmp_path / "run").model_copy(update={"model": "demo"}), resume=True, model=byte_model(), tokenizer=TOKENIZER, quiet=True)
    simulate(config(tmp_path / "run"), resume=True, **common, quiet=True)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_the_type_of_the_model_is_that_of_the_run(tmp_path):
    simulate(config(tmp_path / "run"), model=byte_model(torch.bfloat16), tokenizer=TOKENIZER, data=TEXTS, quiet=True)
    assert read_config(tmp_path / "run").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "given", "reason"),
    [
        ({"dtype": "bfloat16"}, {}, "dtype = 'bfloat16': the model that is given has float32"),
        ({"quantize": "4bit"}, {}, "quantize = '4bit': the model that is given has its own"),
        ({"device": "cuda"}, {}, "device = 'cuda': the model that is given has cpu"),
        ({"seq_len": 65}, {}, "seq_len: expected at most the 64 tokens that the model sees, got 65"),
        ({"prompt_field": "ask"}, {}, "data: prompts and conversations are given as rows"),
        ({}, {"tokenizer": None}, "tokenizer: the model that is given does not say where its own is"),
        ({}, {"model": "demo"}, "model: expected a causal language model of transformers, got str"),
        ({}, {"tokenizer": "folder"}, "tokenizer: expected one of transformers, as AutoTokenizer.from_pretrained gives it, got 'folder'"),
        ({}, {"data": {"ann": [*TEXTS["ann"], 3]}}, "data: expected texts in a list for each client, got 3 among those of 'ann'"),
        ({}, {"data": {"ann": 3}}, "data: expected texts in a list for each client, got int for 'ann'"),
        ({}, {"data": {3: ["text"]}}, "data: expected the name of a client, a text, got 3"),
        ({}, {"model": torch.nn.Linear(2, 2)}, "model: expected a causal language model of transformers, got Linear"),
        ({}, {"data": "texts"}, "data: expected {client: texts}, rows as of a JSONL file, or FederatedData, got str; a path is cfg.data"),
        ({}, {"data": {"ann": "text"}}, "data: expected texts in a list for each client, got str for 'ann'"),
        ({}, {"data": [{"client": "ann"}]}, "data row 1: no key 'text'"),
        ({}, {"data": {}}, "in memory: no clients in it"),
        ({}, {"data": FederatedData(tiny_clients([3, 3]), [], "mine"), "model": tiny_model().to(torch.float32)}, None),
        ({}, {"model": None, "data": None}, "tokenizer: belongs to a model or data that is given"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, settings, given, reason):
    values = {"model": byte_model(), "tokenizer": TOKENIZER, "data": TEXTS, **given}
    if reason is None:
        simulate(config(tmp_path / "run", **settings), **values, quiet=True)
        return
    with pytest.raises(ConfigError) as error:
        simulate(config(tmp_path / "run", **settings), **values, quiet=True)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_tokens_beyond_the_vocabulary_and_adapters_of_peft_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has token id 1\d\d, but model 'in memory' knows 50"):
        simulate(config(tmp_path / "run"), model=tiny_model(), tokenizer=TOKENIZER, data=TEXTS, quiet=True)
    adapted = get_peft_model(byte_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="model: it carries adapters of PEFT"):
        simulate(config(tmp_path / "run"), model=adapted, tokenizer=TOKENIZER, data=TEXTS, quiet=True)
