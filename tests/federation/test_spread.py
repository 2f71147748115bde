"""A run in several processes gives the bits of the run in one where every client computes alone, and ends when one of them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from test_resume import assert_same
from tiny import SIZES, lines, tiny_config, tiny_federation, tiny_state
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from hetlora import checkpoint, processor, spread
from hetlora.cli import asks_for_help
from hetlora.config import Config, ConfigError
from hetlora.evaluate import Whole
from hetlora.fleet import LocalFleet
from hetlora.kinds import TRAININGS
from hetlora.loop import simulate
from hetlora.processes import Place, deal, place
from hetlora.shares import joined, shared_out

HERE = Path(__file__).parent
PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
COMMON = {"lr": 0.05, "rounds": 3, "ranks": "2,8,4,6", "local_steps": 3, "evaluate": "all", "max_tokens_per_step": 30, "eval_tokens": 100}
HETLORA = {**COMMON, "gamma": 0.5, "prune_lambda": 5.0}
PRIVATE = {"weights": "uniform", "dp_clipping_norm": 0.5, "dp_noise_multiplier": 0.3}
RUNS = {
    "hetlora": {**HETLORA, "prune_scope": "module", "dropout": 0.1},
    "alone": {**HETLORA, "cobatch": False},
    "stack": {**HETLORA, "merge": "stack"},
    "fold": {**COMMON, "gamma": 0.99, "train": "fold", "cobatch": False},
    "svd": {**HETLORA, "merge": "svd", "keep_best": True, "cobatch": False, "server_optimizer": "fedadam", "server_lr": 0.001},
    "private": {**COMMON, **PRIVATE, "gamma": 0.99, "train": "fold", "cobatch": False},
}


def fresh():
    return tiny_federation(SIZES, held_out=1)


@pytest.fixture
def several(monkeypatch):
    """The environment of process 0 of 2."""
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


# ---------------------------------------------------------------- who does what


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_whole_and_balanced(count):
    costs = [7, 1, 1, 9, 4, 4, 2]
    shares = deal(costs, count)
    assert len(shares) == count and sorted(k for share in shares for k in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    spent = [sum(costs[k] for k in share) for share in shares]
    assert max(spent) <= sum(costs) / count + max(costs), "greedy, so no share is above the mean by more than one part"
    assert shares == deal(list(costs), count)


def test_a_share_is_tokens_times_base_and_rank(tmp_path):
    """Two clients of the same text: the one with the larger rank costs more, and is dealt first."""
    federation = fresh()
    local, cfg = LocalFleet(federation), tiny_config(tmp_path, local_epochs=1)
    names = local.names
    state = tiny_state(federation, [1, 1, 1, 1])
    assert shared_out(local, cfg, state, names, 1, 0.1, 2).of == deal([sum(map(len, local.clients[name].train)) for name in names], 2)
    equal = [federation.data.clients[0]] * 2
    local.clients = dict(zip(names[:2], equal, strict=True))
    state = tiny_state(federation, [1, 8, 1, 1])
    assert shared_out(local, cfg, state, names[:2], 1, 0.1, 2).of == [[1], [0]]


def test_the_place_of_a_process(several):
    assert place() == Place(0, 2, 0, 2) and not place().follows
    several.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="RANK=2, WORLD_SIZE=2"):
        place()
    several.delenv("MASTER_PORT")
    assert place() == Place(), "not of torchrun"


def test_each_process_of_a_machine_takes_its_share_of_the_cores(several):
    several.delitem(sys.modules, "torch")
    several.setattr(processor, "cores", lambda: 8)
    several.setattr(processor, "used_by_others", lambda: 0.0)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        several.setenv(name, "1" if name == "OMP_NUM_THREADS" else "")  # as torchrun sets it
    assert processor.prepare().startswith("threads: 4 (cores here: 8, for 2 processes); they spin")
    several.setenv("OMP_NUM_THREADS", "3")
    assert processor.prepare().startswith("threads: 3 (OMP_NUM_THREADS)") and processor.prepare(1).startswith("threads: 1 (--threads)")


# ---------------------------------------------------------------- the same results


def train_in_shares(monkeypatch, processes: int) -> None:
    """In one process: the clients of a round train in the cohorts that so many processes would."""
    train = LocalFleet.train

    def by_shares(self, cfg, state, names, number, lr, progress):
        shares = shared_out(self, cfg, state, names, number, lr, processes)
        return joined([(own, train(self, cfg, state, [names[k] for k in own], number, lr, progress)) for own in shares.of if own])

    monkeypatch.setattr(LocalFleet, "train", by_shares)


@pytest.mark.parametrize("train", [name for name in TRAININGS if name != "full"])
def test_shares_of_clients_that_train_alone_join_to_the_same_bits(tmp_path, monkeypatch, train):
    """Whatever they train: every field of what a round's training gives is put in the clients' order."""
    settings = {**(RUNS["alone"] if TRAININGS[train].prunes else RUNS["fold"]), "train": train, "rounds": 2}
    whole = simulate(tiny_config(tmp_path / "whole", **settings), federation=fresh())
    train_in_shares(monkeypatch, 3)
    assert_same(simulate(tiny_config(tmp_path / "shares", **settings), federation=fresh()), whole)


def test_a_refused_upload_keeps_its_place(tmp_path, monkeypatch):
    """Client 1 of four, in one of two shares, sends a NaN."""
    from hetlora import training

    cohort = training.train_one_by_one

    def spoilt(model, bank, clients, *rest):
        trained, results = cohort(model, bank, clients, *rest)
        for k, client in enumerate(clients):
            if client.name == "client1":
                next(iter(trained.a.values())).data[next(iter(trained.layouts.values())).rows(k)] = float("nan")
        return trained, results

    monkeypatch.setattr(training, "train_one_by_one", spoilt)
    settings = {**RUNS["alone"], "clients_per_round": 4}
    whole = simulate(tiny_config(tmp_path / "whole", **settings), federation=fresh())
    assert [[d["name"] for d in record["dropped"]] for record in whole.history] == [[], *[["client1"]] * 3]
    train_in_shares(monkeypatch, 2)
    assert_same(simulate(tiny_config(tmp_path / "shares", **settings), federation=fresh()), whole)


class Half(Whole):
    """One of two processes, whose other half is at hand."""

    def __init__(self, number: int) -> None:
        self.number, self.found = number, []

    def mine(self, costs):
        return deal(costs, 2)[self.number]

    def gathered(self, own):
        self.found.append(own)
        return list(own.values())


def test_an_evaluation_in_parts_is_of_the_same_batches(tmp_path):
    """Each process does some of the batches of the whole; what they give adds up to the same bits in the batches' order."""
    federation, cfg = fresh(), tiny_config(tmp_path, max_tokens_per_step=30)
    state = tiny_state(federation, [2, 8, 4, 6])
    halves = [Half(0), Half(1)]
    for half in halves:
        LocalFleet(federation, half).evaluate(cfg, state, lambda *_: None)
    whole = LocalFleet(federation).evaluate(cfg, state, lambda *_: None)
    first = {number: value for half in halves for number, value in half.found[0].items()}
    assert all(half.found[0] for half in halves)
    loss = sum(float(first[number]) for number in sorted(first)) / whole["client_text"]["tokens"]
    assert loss == whole["client_text"]["loss"]


# ---------------------------------------------------------------- processes


def in_processes(*runs: dict) -> list[dict]:
    """What the processes of each run said and ended with."""
    done = forked.call(HERE / "spread_runs.py", {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}, runs, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    found, said = [], {}
    for line in done.stdout.splitlines():
        said |= json.loads(line)
        if "codes" in said:
            found.append(said)
            said = {}
    return found


def assert_same_folder(folder: Path, expected) -> None:
    """The finished run in `folder` has the bits of the result `expected`."""
    summary = json.loads((folder / "summary.json").read_text())
    assert {**summary, "seconds": 0, "cpu_seconds": 0} == {**expected.summary, "seconds": 0, "cpu_seconds": 0}
    cfg = Config.create("the folder", **{**json.loads((folder / "config.json").read_text()), "output": str(folder)})
    assert_same(simulate(cfg, resume=True, federation=fresh()), expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_runs_in_processes_have_the_bits_of_one_process(tmp_path, monkeypatch):
    """Two and three processes; those that train in batches have the bits of the same batches."""
    counts = {"hetlora": 2, "alone": 3, "stack": 2, "fold": 3, "svd": 2, "private": 2}
    runs = in_processes(*({"folder": str(tmp_path / kind), "processes": counts[kind], "settings": RUNS[kind]} for kind in RUNS))
    for kind, run in zip(RUNS, runs, strict=True):
        assert run["codes"] == [0] * counts[kind] and run["messages"][0].startswith(f"processes: {counts[kind]} on 1 machine, cpu")
        with monkeypatch.context() as patch:
            if RUNS[kind].get("cobatch", True):
                train_in_shares(patch, counts[kind])
            assert_same_folder(tmp_path / kind, simulate(tiny_config(tmp_path / f"{kind} whole", **RUNS[kind]), federation=fresh()))
        saved, _ = checkpoint.saved_versions(tmp_path / kind)
        assert saved["processes"] == str(counts[kind]) and saved["clients"].startswith(f"simulated in {counts[kind]} processes")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_dies_ends_the_run_which_can_be_resumed(tmp_path):
    """Killed in round 2 of 3; it goes on with another number of processes, to the bits of one."""
    run = {"folder": str(tmp_path / "run"), "settings": RUNS["alone"]}
    killed, resumed = in_processes({**run, "processes": 3, "kill_at": 2}, {**run, "processes": 2})
    assert killed["codes"][0] == 2 and -9 in killed["codes"] and 0 not in killed["codes"]
    assert killed["error"].startswith("another process of the run has ended or does not answer (") and "--resume" in killed["error"]
    assert resumed["codes"] == [0, 0] and any("processes was 3, is 2" in text for text in resumed["messages"])
    assert_same_folder(tmp_path / "run", simulate(tiny_config(tmp_path / "whole", **RUNS["alone"]), federation=fresh()))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_process_that_differs_or_fails_is_named_by_the_first(tmp_path):
    """Other data, prompts or settings of the model; no model; a fault in the middle of an evaluation. A process without a client is no fault."""
    odd, prompts, missing, other, full, idle = in_processes(
        {"folder": str(tmp_path / "odd"), "processes": 2, "settings": RUNS["alone"], "odd": 1},
        {
            "folder": str(tmp_path / "prompts"),
            "processes": 2,
            "settings": {**RUNS["alone"], "sample_prompts": "prompts.txt"},
            "prompts": ["first\nsecond", "first\nanother"],
        },
        {"folder": str(tmp_path / "missing"), "processes": 3, "settings": RUNS["alone"], "fails": 2},
        {"folder": str(tmp_path / "other"), "processes": 2, "settings": RUNS["alone"], "eps": 1},
        {"folder": str(tmp_path / "full"), "processes": 3, "settings": RUNS["alone"], "full": 1},
        {"folder": str(tmp_path / "idle"), "processes": 3, "settings": {**RUNS["alone"], "rounds": 1, "clients_per_round": 1}},
    )
    assert odd["error"].startswith("process 1 on ") and "its data are not those of process 0" in odd["error"] and 0 not in odd["codes"]
    assert prompts["error"].startswith("process 1 on ") and "its sample prompts are not those of process 0" in prompts["error"] and 0 not in prompts["codes"]
    assert missing["error"].startswith("process 2 on ") and missing["error"].endswith(": model 'x': not here") and 0 not in missing["codes"]
    assert not (tmp_path / "odd").exists() and not (tmp_path / "missing").exists()
    assert "its settings of the model are not those of process 0" in other["error"] and 0 not in other["codes"]
    assert full["codes"] == [2, 2, 2] and full["error"] == f"process 1: held-out text: no room; continue with --resume --output {tmp_path / 'full'}"
    assert idle["codes"] == [0, 0, 0] and any("2 of 3 processes have no client to train in a round" in text for text in idle["messages"])


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("command", ["compare", "demo"])
def test_commands_that_cannot_share_their_work_are_refused(several, command):
    from test_cli import assert_one_line_error, invoke

    assert_one_line_error(invoke(command), command, "torchrun started 2 processes", "start it without torchrun")


def test_full_fine_tuning_is_refused(several, tmp_path):
    with pytest.raises(ConfigError, match=r"train = 'full': .* start it without torchrun"):
        spread.lead(Config(train="full", weights="samples", output=str(tmp_path)), load=lambda *_: pytest.fail("loaded"))


@pytest.mark.parametrize(("found", "gpus", "text"), [("cuda:1", 2, "2 processes take a device each"), ("cuda", 1, "2 processes here, and 1 GPUs")])
def test_a_device_for_each_or_a_refusal(several, tmp_path, found, gpus, text):
    several.setattr(spread, "resolve_device", lambda _: torch.device(found))
    several.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=text):
        spread.lead(tiny_config(tmp_path, device=found), load=lambda *_: pytest.fail("loaded"))


def test_process_3_of_a_machine_takes_gpu_3(several, tmp_path):
    several.setattr(spread, "resolve_device", lambda _: torch.device("cuda"))
    several.setattr(torch.cuda, "device_count", lambda: 4)
    assert spread._device(tiny_config(tmp_path), Place(7, 8, 3, 4)) == torch.device("cuda:3")


@pytest.mark.parametrize("arguments", [["report", "x"], ["run", "--help"], ["nonsense"]])
def test_other_processes_are_silent_where_there_is_nothing_to_share(several, arguments):
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1"}
    done = subprocess.run([sys.executable, "-m", "hetlora", *arguments], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("arguments", "asks"), [("-h", 1), ("--rounds 3 --help", 1), ("--output --help", 0), ("--output=--help", 0), ("--nonsense -h", 0)])
def test_a_value_that_reads_help_asks_for_none(arguments, asks):
    assert asks_for_help(arguments.split()) == bool(asks)


@pytest.fixture
def model(tmp_path) -> Path:
    sizes = LlamaConfig(vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(sizes).save_pretrained(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def torchrun(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hetlora", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in PLACE}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=HERE.parents[1], **options)


def processes_of(folder: Path) -> dict[int, str]:
    """{process: its RANK} of those alive whose command names `folder`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in command:
                names = dict(pair.split(b"=", 1) for pair in environment.split(b"\0") if b"=" in pair)
                found[int(entry.name)] = names.get(b"RANK", b"").decode()
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun(tmp_path, model):
    """A process is killed: torchrun ends, nothing is left, and the resumed run has the bits of one that one process made."""
    folder = tmp_path / "run"
    flags = ["--method", "hetlora", "--model", model, "--data", "unicode:GREEK,HEBREW,ARABIC", "--ranks", "2,4,8", "--rounds", 4, "--no-cobatch"]
    flags += ["--seq-len", 32, "--batch-size", 2, "--local-steps", 2, "--eval-tokens", 256, "--device", "cpu", "--threads", 1]
    child = torchrun("run", *flags, "--output", folder, "--json")
    for line in child.stdout:
        if '"event": "round"' in line and '"round": 1' in line:
            os.kill(next(pid for pid, number in processes_of(folder).items() if number == "1"), 9)
            break
    _, said = child.communicate(timeout=240)
    assert child.returncode == 1 and processes_of(folder) == {}, said
    resumed = torchrun("run", "--resume", "--output", folder, "--json", "--threads", 1)
    out, said = resumed.communicate(timeout=240)
    assert resumed.returncode == 0 and out.splitlines()[-1].startswith('{"event": "end"') and processes_of(folder) == {}, said
    assert "Traceback" not in said and "hetlora: " not in said
    cfg = Config.create("the folder", **{**json.loads((folder / "config.json").read_text()), "output": str(tmp_path / "alone")})
    simulate(cfg, quiet=True)
    assert lines(folder) == lines(tmp_path / "alone") and len(lines(folder)) == 5
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == (tmp_path / "alone" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_with_a_wrong_setting_is_one_line_of_one_process(tmp_path):
    child = torchrun("run", "--rounds", 0, "--output", tmp_path / "run")
    out, said = child.communicate(timeout=240)
    own = [line for line in (out + said).splitlines() if line.startswith(("hetlora: ", "threads: "))]
    assert child.returncode == 1 and len(own) == 2 and own[1].startswith("hetlora: error: command line: rounds: "), out + said
    assert processes_of(tmp_path / "run") == {}
