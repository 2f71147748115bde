"""What comes in from outside: names, files, folders, expressions, signals. Each is right or refused in one line, and none hangs."""

from __future__ import annotations

import codecs
import json
import os
import random
import string
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_cli import assert_one_line_error, invoke
from test_data import TOKENIZER, fails, fill, jsonl, load, text_of
from tiny import tiny_model
from transformers import ByT5Tokenizer

from hetlora import data, models
from hetlora.config import Config, ConfigError
from hetlora.federation import prepare
from hetlora.models import target_shapes
from hetlora.report.terminal import ConsoleObserver
from hetlora.report.text import printable

NAUGHTY = "e\x1b[2J\x07\x9b31m\u202e\r\n\u2028x"


# ---------------------------------------------------------------- names on a terminal


def test_nothing_of_a_name_reaches_a_terminal_raw(monkeypatch, tmp_path):
    console = Console(force_terminal=True, width=400, no_color=True, file=open(tmp_path / "out", "w", encoding="utf-8"))
    with ConsoleObserver(console) as observer:
        observer.message(NAUGHTY)
        observer.start(Config(rounds=2), {"data": NAUGHTY})
        drop = {"name": NAUGHTY, "reason": NAUGHTY}
        observer.round_end({"round": 1, "clients": [], "dropped": [drop], "mean_rank": 5.0, "evaluation": None})
    from hetlora.report.terminal import print_summary

    client = {"name": NAUGHTY, "rank_start": 2, "rank_end": 2, "rounds": 1, "sequences": 1, "perplexity_before": 2.0, "perplexity_after": 1.0}
    sizes = dict.fromkeys(("bytes_down", "bytes_up", "bytes_down_homlora", "bytes_up_homlora", "homlora_rank"), 1)
    print_summary(console, {"clients": [client], "notes": [NAUGHTY], "evaluation_before": None, "evaluation_after": None, **sizes}, "the global adapter")
    console.file.close()
    text = (tmp_path / "out").read_text(encoding="utf-8")
    assert text.count("e\\x1b[2J\\x07") == 6
    assert not any(mark in text for mark in ("\x1b[2J", "\x07", "\x9b", "\u202e", "\u2028", "\r\nx"))


def test_printable_keeps_what_people_write():
    assert printable("한국어 é ß 🙂 a\u00a0b") == "한국어 é ß 🙂 a\\xa0b"
    assert printable(NAUGHTY) == "e\\x1b[2J\\x07\\x9b31m\\u202e\\r\\n\\u2028x" and printable("\udcff") == "\\udcff"


def test_errors_and_warnings_show_no_control_character(tmp_path):
    result = invoke("report", f"{tmp_path}/{NAUGHTY}")
    assert_one_line_error(result, "no run there")
    assert all(c.isprintable() for c in result.stderr.rstrip("\n"))
    result = invoke("run", "--model", NAUGHTY, "--data", str(tmp_path), "--output", str(tmp_path / "run"))
    assert result.exit_code == 2 and all(c.isprintable() for c in result.stderr.replace("\n", "")), result.stderr


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ["data", "model", "device", "target_modules", "text_field", "client_field", "split", "ranks", "output"])
def test_an_empty_text_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name}: "):
        Config.create("here", **{name: ""})
    assert_one_line_error(invoke("run", f"--{name.replace('_', '-')}", ""), name)


def test_a_zero_byte_is_refused_by_name():
    for name in ("data", "output", "model"):
        with pytest.raises(ConfigError, match=f"{name}: expected text without a zero byte"):
            Config.create("here", **{name: "a\0b"})


@pytest.mark.parametrize("name", ["rounds", "local_steps", "local_epochs", "batch_size", "seq_len", "rouge_tokens"])
def test_numbers_beyond_any_use_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"{name}: .*less than or equal to \d+, got 1000000000000"):
        Config.create("here", **{name: 10**12})


SETTINGS_FILES = {
    "number.yaml": ("1: 2\n", "expected the name of a setting, got 1"),
    "null.yaml": ("~: 2\n", "expected the name of a setting, got None"),
    "twice.yaml": ("lr: 1\nrounds: 2\nlr: 3\n", "the key 'lr' comes twice"),
    "twice.json": ('{"lr": 1, "lr": 2}', "the key 'lr' comes twice"),
    "twice.toml": ("lr = 1\nlr = 2\n", "not valid .toml"),
    "reference.yaml": ("a: &a 3\nrounds: *a\n", "line 2: references"),
    "merge.yaml": ("a: &a {lr: 3}\n<<: *a\n", "references"),
    "deep.json": ("[" * 100_000, "nested too deep"),
    "deep.yaml": ("[" * 5_000, "not valid .yaml"),
    "deep.toml": ("a = " + "[" * 5_000, "not valid .toml"),
    "large.yaml": ("#" * (2**18 + 1), "expected at most 262144"),
    "list.yaml": ("- lr\n", "got list"),
    "flow.yaml": ("lr: 0.1\nranks: [1\nrounds: 3\n", "line 3, column 7: "),
    "code.yaml": ("!!python/object/apply:os.system ['true']\n", "not valid .yaml"),
}


@pytest.mark.parametrize("name", SETTINGS_FILES)
def test_files_that_are_valid_and_no_settings_are_refused(tmp_path, name):
    content, message = SETTINGS_FILES[name]
    (tmp_path / name).write_text(content)
    assert_one_line_error(invoke("run", "--config", tmp_path / name), name, message)


def test_an_alias_bomb_is_refused_at_its_first_reference(tmp_path):
    lines = ['a: &a ["1","1","1","1","1","1","1","1","1"]']
    lines += [f"{one}: &{one} [{','.join([f'*{before}'] * 9)}]" for before, one in zip("abcdefgh", "bcdefghi", strict=True)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines).replace("i: &i", "ranks:") + "\n")
    assert_one_line_error(invoke("run", "--config", tmp_path / "bomb.yaml"), "bomb.yaml", "line 2: references (*name) are not allowed")


@pytest.mark.parametrize(("encoding", "named"), [("utf-16", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32"), ("latin-1", "byte 12 is 0xe9")])
def test_settings_in_another_encoding_are_refused(tmp_path, encoding, named):
    text = 'model: "caf\u00e9"\n'
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "x.yaml").write_bytes(mark + text.encode(encoding))
    named = named if encoding != "latin-1" else "not UTF-8 text, byte 11 is 0xe9"
    assert_one_line_error(invoke("run", "--config", tmp_path / "x.yaml"), "x.yaml", named)


def test_a_byte_order_mark_of_utf_8_is_no_fault(tmp_path):
    for name, text in (("x.json", '{"lr": 0.5}'), ("x.yaml", "lr: 0.5"), ("x.toml", "lr = 0.5")):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode())
        assert Config.read(tmp_path / name) == {"lr": 0.5}


@pytest.mark.parametrize("command", ["run", "compare"])
def test_the_source_of_a_fault_is_named(tmp_path, command):
    (tmp_path / "x.yaml").write_text("rounds: 3\n")
    assert_one_line_error(invoke(command, "--config", tmp_path / "x.yaml", "--lr", "-1"), f"config file {tmp_path / 'x.yaml'} and command line: lr: ")
    assert_one_line_error(invoke(command, "--lr", "-1"), "error: command line: lr: ")
    (tmp_path / "x.yaml").write_text("lr: -1\n")
    assert_one_line_error(invoke(command, "--config", tmp_path / "x.yaml"), f"error: config file {tmp_path / 'x.yaml'}: lr: ")


def test_the_source_of_a_fault_in_the_plan_is_named(tmp_path):
    assert_one_line_error(invoke("compare", "--seeds", "0"), "error: command line: seeds: ")


# ---------------------------------------------------------------- what never ends


@pytest.mark.parametrize("option", ["--data", "--config", "--ranks"])
def test_a_named_pipe_is_refused(tmp_path, monkeypatch, option):
    monkeypatch.setattr("hetlora.federation.resolve_model", lambda *_, **__: "nowhere")
    monkeypatch.setattr("hetlora.federation.load_tokenizer", lambda *_: ByT5Tokenizer())
    monkeypatch.setattr("hetlora.federation.read_limits", lambda *_: models.Limits(1024, 384))
    monkeypatch.setattr("hetlora.federation.outline", lambda *_: None)
    name = {"--data": "x.jsonl", "--config": "x.yaml", "--ranks": "x.json"}[option]
    os.mkfifo(tmp_path / name)
    assert_one_line_error(invoke("run", option, tmp_path / name, "--output", tmp_path / "run"), name, "a named pipe")


def test_a_named_pipe_in_a_models_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json is a named pipe"):
        prepare(Config(model=str(tmp_path)))


def test_an_expression_that_backtracks_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(models, "_MATCH_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"target_modules .*not matched against 'aaa.* within 0\.2 s"):
        models._match_expression({"a" * 200: (4, 4)}, r"(a|aa)+\1b")


@pytest.mark.parametrize("spec", ["(([a-z._0-9])+)+x", "(a+)+$|x", "(.*a){20}"])
def test_such_expressions_end_on_a_model(spec):
    with pytest.raises(ConfigError, match="target_modules"):
        target_shapes(tiny_model(), spec)


@pytest.mark.slow
def test_folders_a_thousand_deep_are_read(tmp_path):
    here = os.getcwd()
    try:
        os.chdir(fill(tmp_path / "data", ann="x" * 100, bob="y" * 100) / "ann")
        for _ in range(3000):  # deeper than a path can be long, too
            os.mkdir("d")
            os.chdir("d")
            if _ in (900, 2900):
                Path("z.txt").write_text(f"{'z' * 50}{_}")
    finally:
        os.chdir(here)
    with pytest.warns(UserWarning, match="files skipped"):
        ann = load(tmp_path / "data").clients[0]
    assert len(text_of(ann)) == 100 + 1 + 53
    subprocess.run(["rm", "-rf", str(tmp_path / "data")], check=True)  # shutil.rmtree goes by paths


class CountingTokenizer(ByT5Tokenizer):
    seen = 0

    def __call__(self, text, **options):
        type(self).seen += len(text)
        return super().__call__(text, **options)


@pytest.mark.parametrize("prompts", [False, True])
def test_of_a_very_long_text_only_what_is_wanted_is_tokenised(tmp_path, monkeypatch, prompts):
    monkeypatch.setattr(data, "_LONG", 1000)
    text = "".join(random.Random(0).choice(string.ascii_letters) for _ in range(200_000))
    rows = [{"client": "a", "text": text, "p": "q" * 8}] * 2
    settings = {"prompt_field": "p"} if prompts else {"max_tokens_per_client": 500}
    path = jsonl(tmp_path / "d.jsonl", rows)
    CountingTokenizer.seen = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = data.load_data(Config.create(data=str(path), seq_len=32, **settings), CountingTokenizer()).clients[0]
        monkeypatch.setattr(data, "_LONG", 10**9)
        whole = data.load_data(Config.create(data=str(path), seq_len=32, **settings), TOKENIZER).clients[0]
    assert CountingTokenizer.seen < 5000
    assert all(torch.equal(a, b) for a, b in zip(short.train + short.test, whole.train + whole.test, strict=True))


# ---------------------------------------------------------------- data


def test_links_that_lead_out_of_the_folder_are_named(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("s" * 100)
    root = fill(tmp_path / "data", ann="x" * 100, bob="y" * 100)
    os.symlink(root / "ann" / "a.txt", root / "bob" / "inside.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(root)
    os.symlink(secret, root / "ann" / "b.txt")
    with pytest.warns(UserWarning, match=rf"links that lead out of the folder, their text is used: '.*b\.txt -> {secret}'$"):
        load(root)


def test_two_names_that_are_one_once_written_out_are_refused(tmp_path):
    for name in (b"\xff", b"\\udcff"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        Path(os.fsdecode(folder), "a.txt").write_text("x" * 100)
    fails(tmp_path, "two entries are named", "rename one")
    path = jsonl(tmp_path / "d.jsonl", ['{"client": "\\ud800", "text": "x"}', '{"client": "\\\\ud800", "text": "x"}'])
    fails(path, "line 2", "cannot be told from")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_data_in_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "d.jsonl"
    path.write_bytes('{"client": "a", "text": "x"}\n'.encode(encoding))
    fails(path, f"d.jsonl is {encoding.upper()} text; save it as UTF-8")
    root = fill(tmp_path / "data", ann="x" * 96, bob="y" * 96)
    (root / "ann" / "b.txt").write_bytes(("z" * 50).encode(encoding))
    with pytest.warns(UserWarning, match=rf"files skipped, not readable UTF-8 text: '.*b\.txt \({encoding.upper()}\)'"):
        assert len(text_of(load(root).clients[0])) == 96


def test_line_separators_of_unicode_stand_in_a_text(tmp_path):
    text = "x" * 50 + "\u2028\u2029\x85\x0c\x1c" + "y" * 68  # 128 bytes
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"client": "a\u2028b", "text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    client = load(path).clients[0]
    assert client.name == "a\u2028b" and bytes(i - 3 for i in text_of(client)).decode() == text
    ranks = tmp_path / "ranks.csv"
    ranks.write_text("a\u2028b,3\n", encoding="utf-8")
    assert Config(ranks=str(ranks)).rank_rule.table() == {"a\u2028b": "3"}


def test_a_key_that_comes_twice_is_a_bad_row(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", ['{"client": "a", "text": "x", "text": "y"}'])
    fails(path, "line 1", "the key 'text' comes twice")


def test_a_client_whose_every_answer_is_empty_has_too_little_text(tmp_path):
    rows = [{"client": name, "p": "why", "text": " " if name == "mute" else "because"} for name in ("ann", "mute") for _ in range(4)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    fails(path, "'mute'", "need at least 2 examples", prompt_field="p")
    with pytest.warns(UserWarning, match="clients left out.*'mute'"):
        assert [client.name for client in load(path, prompt_field="p", skip_empty=True).clients] == ["ann"]


def test_examples_longer_than_seq_len_are_cut_and_counted(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"client": "a", "p": "why", "text": "b" * n} for n in (5, 28, 29, 400)])
    with pytest.warns(UserWarning, match="2 examples of more than seq_len = 32 tokens: cut at their end"):
        client = load(path, prompt_field="p").clients[0]
    assert [len(sequence) for sequence in client.train + client.test] == [9, 32, 32, 32]


def test_sequences_beyond_the_models_context_are_refused(tmp_path):
    model = tiny_model()
    model.resize_token_embeddings(384)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    root = fill(tmp_path / "data", ann="x" * 300, bob="y" * 300)
    prepare(Config(model=str(tmp_path / "model"), data=str(root), seq_len=64, ranks="fixed:2"))
    with pytest.raises(ConfigError, match=r"seq_len: expected at most the 64 tokens that model .* sees, got 65; lower --seq-len"):
        prepare(Config(model=str(tmp_path / "model"), data=str(root), seq_len=65, ranks="fixed:2"))


GOOD = {"client": "a", "text": "x" * 40}


def test_bad_rows_are_counted_and_the_first_named(tmp_path):
    rows = [GOOD] * 3 + ["{", '{"client": "a"}', '{"client": null, "text": "x"}', "[]"] + [GOOD] * 3
    path = jsonl(tmp_path / "d.jsonl", rows)
    message = fails(path, "4 bad rows", "line 4: not valid JSON", "line 5: no key 'text'", "line 6", "and 1 more", "--skip-bad-rows")
    assert "line 7" not in message
    with pytest.warns(UserWarning, match=r"4 rows left out: .*line 4: not valid JSON"):
        left = load(path, skip_bad_rows=True)
    assert text_of(left.clients[0]) == text_of(load(jsonl(tmp_path / "good.jsonl", [GOOD] * 6)).clients[0])
    with open(path, "ab") as file:
        file.write(b'{"client": "a", "text": "\xff"}\n')
    fails(path, "5 bad rows")


def test_a_reason_that_many_rows_share_is_said_once(tmp_path):
    """Conversations without --messages-field: the hint of 60 words came three times."""
    path = jsonl(tmp_path / "d.jsonl", [{"client": "a", "messages": []}, "{", {"client": "a", "messages": []}])
    message = fails(path, "3 bad rows", "line 1: no key 'text'", "line 2: not valid JSON", "line 3: the same; correct them")
    assert message.count("--messages-field") == 1


def test_one_bad_row_is_named_with_the_way_out(tmp_path):
    message = fails(jsonl(tmp_path / "d.jsonl", [GOOD] * 50 + ["}"] + [GOOD] * 50), "line 51: not valid JSON", "--skip-bad-rows")
    assert "bad rows:" not in message


def test_a_bad_row_leaves_nothing_behind(tmp_path):
    rows = [GOOD, {"client": "b", "text": "x", "p": 5}, {"client": "c", "text": 5, "p": "x"}]
    rows = [{"p": "why", **row} for row in rows]
    with pytest.warns(UserWarning, match="2 rows left out"):
        assert load(jsonl(tmp_path / "d.jsonl", [*rows, rows[0]]), prompt_field="p", skip_bad_rows=True).clients[0].name == "a"


# ---------------------------------------------------------------- models with code of their own


@pytest.fixture
def model_with_code(tmp_path):
    """Loading it with its code leaves the file `ran`."""
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    own = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    (folder / "own_config.py").write_text(own)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_config.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_with_code_of_its_own_is_refused_without_a_question(model_with_code, monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    root = fill(tmp_path / "data", ann="x" * 100, bob="y" * 100)
    result = invoke("run", "--model", model_with_code, "--data", root, "--output", tmp_path / "run")
    assert_one_line_error(result, "brings Python code of its own", "--trust-remote-code")
    with pytest.raises(ConfigError, match="brings Python code of its own"):
        models.load_model(Config(model=str(model_with_code)), str(model_with_code))
    assert not (tmp_path / "ran").exists()


def test_a_model_with_code_of_its_own_runs_where_it_is_trusted(model_with_code, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ConfigError) as error:  # the configuration loads, and transformers knows no model for it
        models.load_model(Config(model=str(model_with_code), trust_remote_code=True), str(model_with_code))
    assert "brings Python code" not in str(error.value) and (tmp_path / "ran").exists()
