"""A run that is stopped or killed anywhere and resumed ends with the same bits as one that was not; what does not fit is named and left alone."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, Interrupt, Stop, contents, lines, same_bits, tiny_config, tiny_federation, tiny_model

from hetlora import checkpoint, run_folder
from hetlora.checkpoint_file import FORMAT
from hetlora.config import ConfigError
from hetlora.data import ClientData, FederatedData
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.seeds import derive_seed

SETTINGS = {
    "default": {},
    "stack": {"merge": "stack"},
    "module": {"prune_scope": "module", "merge": "svd", "optimizer": "sgd", "momentum": 0.5, "dropout": 0.1},
}
COMMON = {"lr": 0.05, "rounds": 4, "ranks": "2,8,4,6", "gamma": 0.5, "prune_lambda": 5.0, "local_steps": 3, "lr_schedule": "cosine"}


def config(folder, **settings):
    return tiny_config(folder, **{**COMMON, **settings})


def fresh():
    """What a new process would load."""
    return tiny_federation(SIZES, held_out=1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """{name: the result of a run from start to end}, made once per choice."""
    made = {}

    def get(name, **settings):
        if name not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            made[name] = simulate(config(folder, **settings), federation=fresh())
        return made[name]

    return get


def adapters(folder) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith(("adapter/", "clients/"))}


def assert_same(result, expected) -> None:
    assert same_bits(result.bank, expected.bank)
    assert result.ranks == expected.ranks
    assert lines(result.run_dir) == lines(expected.run_dir)
    assert [{**r, "seconds": 0, "cpu_seconds": 0} for r in result.history] == [{**r, "seconds": 0, "cpu_seconds": 0} for r in expected.history]
    assert {**result.summary, "seconds": 0, "cpu_seconds": 0} == {**expected.summary, "seconds": 0, "cpu_seconds": 0}
    saved, whole = checkpoint.load_checkpoint(result.run_dir), checkpoint.load_checkpoint(expected.run_dir)
    assert saved[0] == whole[0] and all(torch.equal(saved[1][key], whole[1][key]) for key in saved[1] | whole[1])
    assert adapters(result.run_dir) == adapters(expected.run_dir)


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_run_prunes_and_learns_for_these_tests_to_say_anything(uninterrupted, kind):
    result = uninterrupted(kind, **SETTINGS[kind])
    changes = [c["rank"] < c["rank_before"] for record in result.history for c in record["clients"]]
    assert any(changes) or kind == "stack"
    assert len({record["evaluation"]["client_text"]["loss"] for record in result.history}) == 5


@pytest.mark.parametrize("kind", list(SETTINGS))
@pytest.mark.parametrize(("event", "at"), [("local_step", 5), ("round_end", 3), ("evaluate", 3)])
def test_stopped_and_resumed(tmp_path, uninterrupted, kind, event, at):
    cfg = config(tmp_path / "run", **SETTINGS[kind])
    with pytest.raises(Stop):
        simulate(cfg, federation=fresh(), observer=Interrupt(event, at))
    assert_same(simulate(cfg, resume=True, federation=fresh()), uninterrupted(kind, **SETTINGS[kind]))


@pytest.mark.parametrize("event", ["start", "evaluate", "round_start", "finish"])
def test_stopped_at_the_edges(tmp_path, uninterrupted, event):
    """Before the first checkpoint, right after it, and after the last round."""
    cfg = config(tmp_path / "run", **SETTINGS["default"])
    with pytest.raises(Stop):
        simulate(cfg, federation=fresh(), observer=Interrupt(event))
    assert (tmp_path / "run" / "config.json").is_file() and (checkpoint.load_checkpoint(tmp_path / "run") is None) == (event in ("start", "evaluate"))
    assert_same(simulate(cfg, resume=True, federation=fresh()), uninterrupted("default", **SETTINGS["default"]))


@pytest.mark.parametrize(
    ("kind", "at", "function"),
    [
        *(("default", at, function) for at in (1, 3, 5) for function in ("save_checkpoint", "write_adapter")),
        ("stack", 3, "save_checkpoint"),  # it keeps no global adapter
    ],
)
def test_stopped_while_a_round_is_being_closed(tmp_path, uninterrupted, monkeypatch, kind, at, function):
    """Between the line in rounds.jsonl and the checkpoint, and between the checkpoint and the global adapter; rounds 0, 2 and 4 (the last)."""
    cfg = config(tmp_path / "run", **SETTINGS[kind])
    real, calls = getattr(checkpoint, function), []

    def fail(folder, *arguments):
        if function == "save_checkpoint" or folder.name == "adapter":
            calls.append(folder)
            if len(calls) == at:
                raise Stop
        real(folder, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoint, function, fail)
        simulate(cfg, federation=fresh())
    assert [record["round"] for record in lines(tmp_path / "run")] == list(range(at))
    assert_same(simulate(cfg, resume=True, federation=fresh()), uninterrupted(kind, **SETTINGS[kind]))


def test_resumed_in_the_same_process_after_a_fold(tmp_path, uninterrupted, monkeypatch):
    """merge = 'stack': the base in memory already holds a round that the checkpoint does not."""
    cfg = config(tmp_path / "run", **SETTINGS["stack"])
    federation = fresh()
    with pytest.raises(Stop):
        simulate(cfg, federation=federation, observer=Interrupt("evaluate", 3))
    assert_same(simulate(cfg, resume=True, federation=federation), uninterrupted("stack", **SETTINGS["stack"]))


def test_a_base_with_folded_updates_serves_no_other_run(tmp_path):
    federation = fresh()
    simulate(config(tmp_path / "run", merge="stack", rounds=1), federation=federation)
    with pytest.raises(ConfigError, match=r"base model holds the folded updates of .*run"):
        simulate(config(tmp_path / "other"), federation=federation)
    assert not (tmp_path / "other").exists()


def test_a_line_cut_short_is_left_out(tmp_path, uninterrupted):
    cfg = config(tmp_path / "run", **SETTINGS["default"])
    with pytest.raises(Stop):
        simulate(cfg, federation=fresh(), observer=Interrupt("round_start", 3))
    with open(tmp_path / "run" / "rounds.jsonl", "a") as file:
        file.write('{"round": 3, "clients": [{"na')
    assert_same(simulate(cfg, resume=True, federation=fresh()), uninterrupted("default", **SETTINGS["default"]))


def test_killed_while_a_file_is_written(tmp_path, uninterrupted, monkeypatch):
    """What a kill leaves of a file in the making is gone after the resumed run, and never taken for the file."""
    cfg = config(tmp_path / "run")
    replace, targets = os.replace, []

    def stop_at_the_fourth(source, target):
        targets.append(Path(target).name)
        if targets.count("adapter_config.json") == 4:
            raise Stop
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
        patch.setattr(os, "replace", stop_at_the_fourth)
        simulate(cfg, federation=fresh())
    left = contents(tmp_path / "run")
    assert len([name for name in left if name.endswith(".tmp")]) == 1 and all(left.values()), "the old file stands until the new one is whole"
    assert_same(simulate(cfg, resume=True, federation=fresh()), uninterrupted("default"))
    assert not [name for name in contents(tmp_path / "run") if name.endswith(".tmp")]


def test_a_finished_run_can_be_resumed_and_repeated(tmp_path, uninterrupted):
    cfg = config(tmp_path / "run", **SETTINGS["default"])
    expected = uninterrupted("default", **SETTINGS["default"])
    assert_same(simulate(cfg, federation=fresh()), expected)
    before = contents(tmp_path / "run")
    assert_same(simulate(cfg, resume=True, federation=fresh()), expected)
    assert contents(tmp_path / "run") == before


def test_another_seed_is_another_run(tmp_path, uninterrupted):
    result = simulate(config(tmp_path / "run", **SETTINGS["default"], seed=1), federation=fresh())
    expected = uninterrupted("default", **SETTINGS["default"])
    assert not same_bits(result.bank, expected.bank)
    assert [[c["name"] for c in r["clients"]] for r in result.history] != [[c["name"] for c in r["clients"]] for r in expected.history]


def test_seeds_are_frozen():
    """Another value would change every published run."""
    assert derive_seed(0, "batches", 1, "a") == 2043506345316920399
    assert len({derive_seed(seed, *purpose) for seed in (0, 1) for purpose in (("a",), ("a", 1), ("a", "1"), ("a1",), ("b",))}) == 10
    assert all(0 <= derive_seed(seed, "x") < 2**63 for seed in range(200))


# ---------------------------------------------------------------- what cannot be resumed is named, and nothing is changed


@pytest.fixture
def stopped(tmp_path):
    """A run that stands at round 2."""
    cfg = config(tmp_path / "run", **SETTINGS["default"])
    with pytest.raises(Stop):
        simulate(cfg, federation=fresh(), observer=Interrupt("round_start", 3))
    return cfg, tmp_path / "run"


def refuse(cfg, folder, message, federation=None):
    before = contents(folder)
    with pytest.raises(ConfigError, match=message) as error:
        simulate(cfg, resume=True, federation=federation or fresh())
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert contents(folder) == before


def test_other_settings_are_named(stopped):
    _, folder = stopped
    other = config(folder, **SETTINGS["default"] | {"lr": 0.06, "batch_size": 9})
    refuse(other, folder, r"lr was 0\.05, now 0\.06, .*batch_size was 2, now 9|batch_size was 2, now 9, .*lr was 0\.05, now 0\.06")


def changed_data(change):
    federation = fresh()
    clients = change(list(federation.data.clients))
    federation.data = FederatedData(clients, federation.data.held_out, "changed")
    return federation


@pytest.mark.parametrize(
    "change",
    [
        lambda clients: [ClientData("renamed", clients[0].train, clients[0].test), *clients[1:]],
        lambda clients: [ClientData("client0", clients[0].train, [clients[0].test[0] + 1, *clients[0].test[1:]]), *clients[1:]],
        lambda clients: [ClientData("client0", [torch.cat(clients[0].train[:2]), *clients[0].train[2:]], clients[0].test), *clients[1:]],
    ],
    ids=["name", "token", "division"],
)
def test_changed_data_is_named(tmp_path, change):
    cfg = config(tmp_path / "run", ranks="powerlaw:2:8")
    with pytest.raises(Stop):
        simulate(cfg, federation=fresh(), observer=Interrupt("round_start", 2))
    refuse(cfg, tmp_path / "run", "the data is not the data this run began with", changed_data(change))


def test_changed_ranks_file_is_named(tmp_path):
    ranks = tmp_path / "ranks.json"
    ranks.write_text(json.dumps({f"client{k}": rank for k, rank in enumerate([2, 8, 4, 6])}))
    cfg = config(tmp_path / "run", ranks=str(ranks))
    with pytest.raises(Stop):
        simulate(cfg, federation=fresh(), observer=Interrupt("round_start", 2))
    ranks.write_text(json.dumps({f"client{k}": rank for k, rank in enumerate([1, 8, 4, 6])}))
    refuse(cfg, tmp_path / "run", "not the ranks that the run in .* began with")


def test_another_model_is_named(stopped):
    cfg, folder = stopped
    federation = fresh()
    federation.shapes = target_shapes(federation.model, "q_proj")
    refuse(cfg, folder, r"checkpoint\.safetensors: does not fit the model", federation)


def test_damaged_checkpoints_are_named(stopped):
    cfg, folder = stopped
    path = folder / run_folder.CHECKPOINT
    good = path.read_bytes()
    for damaged in (b"", good[:100], good[: len(good) // 2], b"\x80\x04not safetensors", os.urandom(500)):
        path.write_bytes(damaged)
        refuse(cfg, folder, r"checkpoint\.safetensors: not a readable checkpoint")
    path.write_bytes(good)
    for tensors, metadata in (({"x": torch.ones(2)}, None), (load_file(path), {"format": "pt"}), (load_file(path), {"hetlora": f'{{"format": {FORMAT - 1}}}'})):
        save_file(tensors, path, metadata=metadata)
        refuse(cfg, folder, r"not a checkpoint of this version \(format")
    for own in ("[", "{}", "[]", f'{{"format": {FORMAT}}}'):
        save_file({"x": torch.ones(2)}, path, metadata={"hetlora": own})
        refuse(cfg, folder, r"checkpoint\.safetensors: not a readable checkpoint")


def test_checkpoint_of_another_run_is_named(stopped, tmp_path):
    cfg, folder = stopped
    other = config(tmp_path / "other", ranks="2,2,2,3", **SETTINGS["default"])
    simulate(other, federation=fresh())
    (folder / run_folder.CHECKPOINT).write_bytes((tmp_path / "other" / run_folder.CHECKPOINT).read_bytes())
    refuse(cfg, folder, r"not what the checkpoint was made with \(ranks was '2,2,2,3', now '2,8,4,6'")


def test_lost_files_are_named(stopped):
    cfg, folder = stopped
    rounds, saved = folder / run_folder.ROUNDS, folder / run_folder.CHECKPOINT
    log, state = rounds.read_text(), saved.read_bytes()
    saved.unlink()
    refuse(cfg, folder, r"checkpoint\.safetensors: missing, though rounds are on record")
    saved.write_bytes(state)
    for kept in (log.splitlines()[:2], log.splitlines()[1:], []):
        rounds.write_text("".join(line + "\n" for line in kept))
        refuse(cfg, folder, r"rounds\.jsonl: expected one line for each of the rounds 0 to 2")
    rounds.unlink()
    refuse(cfg, folder, r"rounds\.jsonl: expected one line for each of the rounds 0 to 2")


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="no run there"):
        simulate(config(tmp_path / "nowhere"), resume=True, federation=fresh())
    assert not (tmp_path / "nowhere").exists()


def test_no_pickle_and_no_leftovers(tmp_path, monkeypatch):
    def refuse_pickle(*arguments, **options):
        raise AssertionError("pickle was used")

    for owner, name in ((torch, "save"), (torch, "load"), (pickle, "dump"), (pickle, "dumps"), (pickle, "Pickler")):
        monkeypatch.setattr(owner, name, refuse_pickle)
    cfg = config(tmp_path / "run", merge="stack")
    simulate(cfg, federation=fresh())
    simulate(cfg, resume=True, federation=fresh())
    files = contents(tmp_path / "run")
    assert {name.rpartition(".")[2] for name in files} == {"json", "jsonl", "safetensors"}
    assert not any(data[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK") for data in files.values())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()} == {0o666 & ~umask()}


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_client_adapters_are_left_out_on_request(tmp_path):
    simulate(config(tmp_path / "run", save_clients=False, rounds=1), federation=fresh())
    assert not (tmp_path / "run" / "clients").exists() and (tmp_path / "run" / "adapter").is_dir()


def test_model_is_not_changed_by_a_run(tmp_path):
    federation = fresh()
    simulate(config(tmp_path / "run", rounds=1), federation=federation)
    assert all(torch.equal(value, federation.model.state_dict()[name]) for name, value in tiny_model().state_dict().items())
