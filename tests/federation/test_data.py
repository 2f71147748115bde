"""Data: every source gives the same clients in the same order, nothing leaks from test to train, bad input is one line."""

from __future__ import annotations

import json
import os
import sys
import types
import warnings

import pytest
import torch
from transformers import ByT5Tokenizer

from hetlora import Config, ConfigError, sources
from hetlora.data import FederatedData, load_data, stdlib_packages
from hetlora.python_text import public_text

TOKENIZER = ByT5Tokenizer()
EOS = TOKENIZER.eos_token_id


def load(data, **settings) -> FederatedData:
    settings = {"seq_len": 32, **settings}
    return load_data(Config.create(data=str(data), **settings), TOKENIZER)


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def text_of(client) -> list[int]:
    return torch.cat(client.train + client.test).tolist()


def fails(data, *words: str, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        load(data, **settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def fill(root, **clients: str):
    for name, text in clients.items():
        (root / name).mkdir(parents=True)
        (root / name / "a.txt").write_text(text)
    return root


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_of(clients: dict[str, float], text: str = "x" * 100) -> list[dict]:
    return [{"client": name, "text": text, "ram": ram} for name, ram in clients.items()]


def test_blocks_are_consecutive_and_the_last_are_the_test(tmp_path):
    text = "".join(chr(33 + i % 90) for i in range(32 * 10 + 20))
    client = load(fill(tmp_path, ann=text), test_fraction=0.3).clients[0]
    assert [len(row) for row in client.train] == [32] * 8
    assert [len(row) for row in client.test] == [32, 32, 20]
    assert text_of(client) == ids(text)
    assert all(row.dtype == torch.int64 for row in client.train + client.test)


@pytest.mark.parametrize(("tail", "kept"), [(15, 0), (16, 16)])
def test_short_last_block(tmp_path, tail, kept):
    client = load(fill(tmp_path, ann="a" * (64 + tail))).clients[0]
    assert len(text_of(client)) == 64 + kept


@pytest.mark.parametrize(("length", "fraction", "train", "test"), [(32, 0.2, 16, 16), (47, 0.2, 31, 16), (47, 0.9, 16, 31), (40, 0.5, 20, 20)])
def test_text_of_one_block_is_split_inside(tmp_path, length, fraction, train, test):
    client = load(fill(tmp_path, ann="a" * length), test_fraction=fraction).clients[0]
    assert [len(row) for row in client.train + client.test] == [train, test]


def test_documents_are_joined_with_eos_in_path_order(tmp_path):
    fill(tmp_path, ann="second " * 5)
    (tmp_path / "ann" / "A.txt").write_text("first " * 5)
    (tmp_path / "ann" / "sub").mkdir()
    (tmp_path / "ann" / "sub" / "0.txt").write_text("third " * 5)
    assert text_of(load(tmp_path).clients[0]) == [*ids("first " * 5), EOS, *ids("second " * 5), EOS, *ids("third " * 5)][:96]


def test_tokenizer_without_eos_joins_directly_and_says_so(tmp_path):
    jsonl(tmp_path / "d.jsonl", [{"client": "ann", "text": "a" * 30}, {"client": "ann", "text": "b" * 30}])

    def tokenizer(text, **_):
        return {"input_ids": ids(text)}

    tokenizer.eos_token_id = None
    with pytest.warns(UserWarning, match="no EOS token"):
        data = load_data(Config.create(data=str(tmp_path / "d.jsonl"), seq_len=32), tokenizer)
    assert text_of(data.clients[0]) == ids("a" * 30 + "b" * 30)


def test_max_tokens_cuts_first(tmp_path):
    client = load(fill(tmp_path, ann="abcd" * 100), max_tokens_per_client=96).clients[0]
    assert text_of(client) == ids("abcd" * 24)
    assert len(client.test) == 1


def test_files_are_clients_without_sub_folders(tmp_path):
    for name in ("b.txt", "a.md", ".hidden"):
        (tmp_path / name).write_text(name * 50)
    data = load(tmp_path)
    assert [c.name for c in data.clients] == ["a.md", "b.txt"]
    assert "each file is a client" in data.source


def test_binary_and_undecodable_files_are_named_and_skipped(tmp_path):
    fill(tmp_path, ann="good " * 32)
    (tmp_path / "ann" / "photo.jpg").write_bytes(b"\xff\xd8\xff" * 50)
    (tmp_path / "ann" / "zeros.bin").write_bytes(b"abc\0" * 50)
    os.symlink("nowhere", tmp_path / "ann" / "broken")
    with pytest.warns(UserWarning, match=r"not readable UTF-8 text: '.*broken', '.*photo\.jpg', '.*zeros\.bin'"):
        client = load(tmp_path).clients[0]
    assert text_of(client) == ids("good " * 32)


def test_files_beside_sub_folders_are_named(tmp_path):
    (fill(tmp_path, ann="good " * 20) / "notes.txt").write_text("x" * 100)
    with pytest.warns(UserWarning, match=r"belong to no client.*'notes\.txt'"):
        assert [c.name for c in load(tmp_path).clients] == ["ann"]


def test_symlink_loops_end_and_links_to_folders_are_read_once(tmp_path):
    root = fill(tmp_path / "data", ann="a" * 64, bob="b" * 64)
    elsewhere = fill(tmp_path / "elsewhere", more="c" * 64)
    os.symlink(root, root / "ann" / "up")
    os.symlink(root, root / "loop")
    os.symlink("self", root / "ann" / "self")
    os.symlink(elsewhere / "more", root / "ann" / "z1")
    os.symlink(elsewhere / "more", root / "ann" / "z2")
    with pytest.warns(UserWarning, match="self"):
        data = load(root)
    assert [c.name for c in data.clients] == ["ann", "bob"]
    assert text_of(data.clients[0]) == [*ids("a" * 64), EOS, *ids("c" * 63)]


def test_two_clients_may_link_to_one_folder(tmp_path):
    shared = fill(tmp_path / "elsewhere", more="c" * 64)
    root = tmp_path / "data"
    for name in ("ann", "bob"):
        (root / name).mkdir(parents=True)
        os.symlink(shared / "more", root / name / "link")
    assert [len(text_of(c)) for c in load(root).clients] == [64, 64]


def test_folder_is_read_in_the_order_of_names_not_of_the_disk(tmp_path, monkeypatch):
    fill(tmp_path, ann="a" * 64, bob="b" * 64)
    (tmp_path / "ann" / "b.txt").write_text("z" * 64)
    before = load(tmp_path)
    listing = type(tmp_path).iterdir
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: iter(sorted(listing(self), reverse=True)))
    after = load(tmp_path)
    assert [(c.name, text_of(c)) for c in before.clients] == [(c.name, text_of(c)) for c in after.clients]


def test_empty_clients_stop_or_are_left_out(tmp_path):
    fill(tmp_path, ann="a" * 100, **{f"empty{i}": "short" for i in range(7)})
    message = fails(tmp_path, "'empty0', 'empty1', 'empty2', 'empty3', 'empty4' and 2 more", "--skip-empty", str(tmp_path))
    assert "empty5" not in message
    with pytest.warns(UserWarning, match="left out.*'empty0'"):
        assert [c.name for c in load(tmp_path, skip_empty=True).clients] == ["ann"]


def test_held_out_clients_depend_on_seed_only_and_never_train(tmp_path):
    fill(tmp_path, **{f"c{i}": "abcd" * 30 for i in range(8)})
    data = load(tmp_path, held_out_clients=3)
    assert (len(data.clients), len(data.held_out)) == (5, 3)
    assert all(c.train == [] and len(text_of(c)) == 120 for c in data.held_out)
    names = {tuple(c.name for c in load(tmp_path, held_out_clients=3, seed=s).held_out) for s in range(6)}
    assert len(names) > 1
    torch.manual_seed(123)
    assert [c.name for c in load(tmp_path, held_out_clients=3).held_out] == [c.name for c in data.held_out]
    fails(tmp_path, "held_out_clients", "8 of 8", held_out_clients=8)


def test_jsonl(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"user": 7, "body": "a" * 40}, "", {"user": "ann", "body": "b" * 80}, {"user": 7, "body": "c" * 40}])
    data = load(path, text_field="body", client_field="user")
    assert [c.name for c in data.clients] == ["7", "ann"]
    assert text_of(data.clients[0]) == [*ids("a" * 40), EOS, *ids("c" * 40)]
    assert data.clients[0].capability is None


def test_lone_surrogates_are_text(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", ['{"client": "a\\ud800", "text": "' + "\\ud800 " * 30 + '"}'])
    assert load(path).clients[0].name == "a\\ud800"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2", "not valid JSON"]),
        ("[1]", ["line 2", "got list"]),
        ("null", ["line 2", "got NoneType"]),
        ('{"text": "x"}', ["line 2", "no key 'client'", "--client-field"]),
        ('{"client": "x"}', ["line 2", "no key 'text'", "; set --text-field"]),
        ('{"client": "x", "chat": [{"role": "user", "content": "?"}]}', ["line 2", "no key 'text'", "--messages-field chat if that is a conversation"]),
        ('{"client": "x", "text": 3}', ["line 2", "'text' must be text, got int"]),
        ('{"client": null, "text": "x"}', ["line 2", "'client'", "None"]),
        ('{"client": true, "text": "x"}', ["line 2", "'client'", "True"]),
        ("1" * 5000, ["line 2", "not valid JSON"]),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, words):
    if line.startswith("11") and not hasattr(sys, "get_int_max_str_digits"):
        words = ["line 2"]
    fails(jsonl(tmp_path / "d.jsonl", [{"client": "a", "text": "x" * 100}, line]), "d.jsonl", *words)


def test_undecodable_jsonl(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"client": "a", "text": "\xff"}\n')
    fails(tmp_path / "d.jsonl", "line 1", "not UTF-8")


def test_capability_column(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [*rows_of({"ann": 4, "bob": 8.5}), *rows_of({"ann": 4.0})])
    data = load(path, ranks="column:ram:2:8", held_out_clients=1)
    assert {c.name: c.capability for c in data.clients + data.held_out} == {"ann": 4.0, "bob": 8.5}


@pytest.mark.parametrize("value", ["4", None, True, float("nan"), float("inf"), [4], 10**400])
def test_capability_must_be_a_finite_number(tmp_path, value):
    fails(jsonl(tmp_path / "d.jsonl", rows_of({"ann": 1, "bob": value})), "line 2", "'ram'", "'bob'", "finite number", ranks="column:ram:2:8")


def test_capability_missing_or_inconsistent(tmp_path):
    fails(jsonl(tmp_path / "d.jsonl", rows_of({"ann": 1})), "no key 'cores'", ranks="column:cores:2:8")
    path = jsonl(tmp_path / "e.jsonl", [*rows_of({"ann": 4}), *rows_of({"ann": 5})])
    fails(path, "line 2", "'ann'", "5.0", "4.0", "earlier row", ranks="column:ram:2:8")
    fails(fill(tmp_path / "folder", ann="x" * 100), "column:ram", ".jsonl", ranks="column:ram:2:8")


def test_sources_that_are_not_there(tmp_path):
    fails(tmp_path / "nope", "no such file or folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no clients")
    (tmp_path / "empty.jsonl").write_text("")
    fails(tmp_path / "empty.jsonl", "no clients")
    (tmp_path / "keyless.jsonl").write_text("{}")
    fails(tmp_path / "keyless.jsonl", "no key 'text'; it has none at all;")
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n")
    fails(tmp_path / "blank", "no clients")
    (tmp_path / "d.tsv").write_text("a,b")
    fails(tmp_path / "d.tsv", ".jsonl, .csv or .parquet", "got .tsv")
    fails("hub:", "ORG/NAME")
    with pytest.warns(UserWarning):
        fails(fill(tmp_path / "short", ann="x"), "no client has enough text", skip_empty=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser reads every file")
def test_unreadable_file_is_an_error(tmp_path):
    fill(tmp_path, ann="x" * 100)
    (tmp_path / "ann" / "a.txt").chmod(0)
    fails(tmp_path, "a.txt", "cannot be read")


def test_read_errors_are_one_line(tmp_path, monkeypatch):
    fill(tmp_path, ann="x" * 100)

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources, "read_bytes", refuse)
    fails(tmp_path, "a.txt", "Permission denied")
    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    fails(tmp_path, str(tmp_path), "Permission denied")


class HubRows(list):
    """The part of a `datasets.Dataset` that is used. Rows cannot be read before columns are chosen: a picture would be decoded."""

    chosen = False

    def __iter__(self):
        assert self.chosen
        return super().__iter__()

    @property
    def column_names(self):
        return list(self[0])

    def select_columns(self, names):
        rows = HubRows({name: row[name] for name in names} for row in list.__iter__(self))
        rows.chosen = True
        return rows


def test_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "nope":
            raise ValueError("Unknown split 'nope'.\nmore")
        return HubRows({"client": name, "text": "x" * 100, "ram": ram, "picture": object()} for name, ram in (("b", 1), ("a", 2)))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    data = load("hub:org/name", split="dev", ranks="column:ram:2:8")
    assert asked == [("org/name", "dev")]
    assert [(c.name, c.capability) for c in data.clients] == [("a", 2.0), ("b", 1.0)]
    fails("hub:org/name", "no column 'body'", "client, text, ram", text_field="body")
    fails("hub:org/name", "split 'nope'", "Unknown split", split="nope")


def test_hub_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("hub:org/name", "'datasets' library", "pip install '.[hub]'")


def test_hub_reads_a_real_data_set(tmp_path):
    pytest.importorskip("datasets", reason="the 'hub' extra is not installed")
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", rows_of({"b": 1, "a": 2}))
    assert [(c.name, c.capability) for c in load(f"hub:{tmp_path / 'set'}", ranks="column:ram:2:8").clients] == [("a", 2.0), ("b", 1.0)]
    fails(f"hub:{tmp_path / 'set'}", "split 'nope'", split="nope")


def test_stdlib_packages_are_clients():
    data = load("stdlib", max_tokens_per_client=6144, seq_len=256)
    assert len(data.clients) >= 24
    assert {len(c.train) + len(c.test) for c in data.clients} == {24}
    names = {c.name for c in data.clients}
    assert {"json", "asyncio", "email"} <= names
    assert not names & {"test", "idlelib", "lib2to3", "site-packages", "pydoc_data"}
    assert list(stdlib_packages()) == sorted(names)
    some = load("stdlib:json,email", max_tokens_per_client=6144, seq_len=256)
    by_name = {c.name: c for c in data.clients}
    assert [c.name for c in some.clients] == ["email", "json"]
    assert text_of(some.clients[1]) == text_of(by_name["json"])
    fails("stdlib:json,nope", "'nope'", "asyncio")


def test_clients_share_no_document_with_the_public_text():
    """A document of pre-training (all docstrings of a module) inside a client's text would make the clients' test seen data."""
    packages = "".join(stdlib_packages().values())
    documents = public_text()
    assert sum(map(len, documents)) > 500_000
    assert [d[:60] for d in documents if len(d) > 500 and d.strip() in packages] == []


def test_no_library_sources_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    fails("stdlib", "no sources", str(tmp_path))


def test_long_documents_give_no_length_warning(tmp_path, caplog):
    short = ByT5Tokenizer(model_max_length=8)
    path = jsonl(tmp_path / "d.jsonl", rows_of({"ann": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(Config.create(data=str(path), seq_len=32), short)
    assert not caplog.records


@pytest.mark.parametrize(("setting", "value", "what"), [("text_field", "body", "fields"), ("client_field", "user", "fields"), ("skip_bad_rows", True, "rows")])
def test_settings_of_rows_are_refused_where_the_data_has_none(tmp_path, setting, value, what):
    (tmp_path / "ann").mkdir()
    for data in (str(tmp_path), "stdlib", "unicode"):
        with pytest.raises(ConfigError, match=f"{setting} {value!r}: only a .jsonl, .csv or .parquet file or a hub data set has {what}, data is '{data}'"):
            sources.open_corpus(Config.create("test", data=data, **{setting: value}))
