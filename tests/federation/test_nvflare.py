"""Deployment through NVFLARE, in one process: the rounds are those of the simulation, and nothing a site sends can hurt them."""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare", reason="NVFLARE is not installed (pip install '.[nvflare]'; make nvflare runs these tests)")

import doctest
import json
import subprocess
import sys
from types import SimpleNamespace

import torch
from click.testing import CliRunner
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare_sites import Here, site_federation
from tiny import lines, tiny_config

import hetlora.nvflare
from hetlora.cli import cli
from hetlora.config import ConfigError
from hetlora.deployed import members as members_module
from hetlora.deployed.settings import server_settings
from hetlora.loop import simulate
from hetlora.nvflare import HetLoraAggregator
from hetlora.nvflare.client import node_settings
from hetlora.nvflare.models import KEY

SIZES = [3, 5, 2]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(members_module, "POLL", 0.01)


def mixed(output, **changes):
    return tiny_config(output, **{"ranks": "2,4,8", "rounds": 2, "clients_per_round": 3, **changes})


METHODS = {
    "published": {},
    "two of three": {"clients_per_round": 2, "weights": "samples", "shared_rows": "owners", "rounds": 3},
    "bfloat16": {"adapter_dtype": "bfloat16"},
    "fold": {"train": "fold", "gamma": 0.99, "download": "exact"},
    "fold in 8 bits": {"train": "fold", "gamma": 0.99},
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_run_through_nvflare_has_the_bits_of_the_simulated_one(tmp_path, settings):
    cfg = mixed(tmp_path / "here", cobatch=False, **settings)
    simulate(cfg, federation=site_federation(SIZES), quiet=True)
    Here(cfg.model_copy(update={"output": str(tmp_path / "there")}), tmp_path, SIZES).run()
    for mine, other in zip(lines(tmp_path / "here"), lines(tmp_path / "there"), strict=True):
        one, two = (record.pop("evaluation")["client_text"] for record in (mine, other))
        assert mine == other
        assert one["tokens"] == two["tokens"]
        if settings.get("download", cfg.download) == "exact" or cfg.train != "fold":
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_a_site_is_sent_the_rows_of_its_rank_and_no_more(tmp_path):
    controller = Here(mixed(tmp_path / "run", rounds=1), tmp_path, SIZES)
    controller.run()
    sent = {site: size for site, task, size in controller.asked if task == "train"}
    row = sum(4 * (m + n) for m, n in site_federation(SIZES).shapes.values())
    assert sent == {"site-1": 2 * row, "site-2": 4 * row, "site-3": 8 * row}


# ---------------------------------------------------------------- what sites may do wrong


def change(kind: str, result: FLModel) -> FLModel | None:
    """A result of site-2 that is wrong in one way."""
    words, rows = result.meta[KEY], result.params["rows"]
    tensor = torch.from_numpy(rows.copy()).view(torch.float32)
    if kind == "lost":
        return None
    if kind == "nan":
        tensor[3] = float("nan")
    if kind == "huge":
        tensor *= 1e38
    if kind in ("nan", "huge"):
        result.params["rows"] = tensor.view(torch.uint8).numpy()
    elif kind == "short":
        result.params["rows"] = rows[:-4]
    elif kind == "shape":
        words["arrays"]["rows"][1] = [2, 2]
    elif kind == "shape of words":
        words["arrays"]["rows"][1] = ["2"]
    elif kind == "type":
        words["arrays"]["rows"][0] = "float64"
    elif kind == "floats":
        result.params["rows"] = tensor.numpy()
    elif kind == "key":
        result.params["other"] = result.params.pop("rows")
    elif kind == "more":
        result.params["extra"], words["arrays"]["extra"] = rows, words["arrays"]["rows"]
    elif kind == "rank":
        words["config"]["ranks"] = [rank + 1 for rank in words["config"]["ranks"]]
    elif kind == "no metrics":
        del words["metrics"]
    elif kind == "no arrays":
        del words["arrays"]
    elif kind == "a list":
        words["config"] = [1, 2]
    elif kind == "no words":
        del result.meta[KEY]
    return result


WRONG = {
    "lost": "no result within 3600 s",
    "nan": "update has non-finite values in model.layers.0.self_attn.q_proj",
    "huge": "update has non-finite values in",
    "short": "upload: expected float32 [",
    "shape": "upload: expected float32 [",
    "shape of words": "record 'arrays', 'rows': expected type, shape and kind",
    "type": "upload: expected float32 [",
    "floats": "params 'rows': expected bytes (uint8, one dimension), got float32",
    "key": "params: expected the arrays ['rows'], got ['other']",
    "more": "upload: expected the arrays ['rows'], got ['extra', 'rows']",
    "rank": "in model.layers.0.self_attn.q_proj, expected",
    "no metrics": "expected the record 'metrics'",
    "no arrays": "its reply has no record 'arrays'",
    "a list": "record 'config': expected values by name",
    "no words": "expected a message with meta['hetlora']",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_result_is_named_and_left_out(tmp_path, kind):
    """Its round is that of the others alone, and the site stays in the run."""
    trained: list[str] = []

    def spoil(site, task, result):
        if site == "site-2" and task == "train":
            trained.append(site)
            return change(kind, result) if len(trained) == 2 else result
        return result

    controller = Here(mixed(tmp_path / "run", eval_every=2), tmp_path, SIZES, spoil)
    controller.run()
    last = lines(tmp_path / "run")[-1]
    assert [drop["name"] for drop in last["dropped"]] == ["site-2"]
    assert WRONG[kind] in last["dropped"][0]["reason"]
    assert f"round 2: site-2 is left out, {last['dropped'][0]['reason']}" in controller.lines
    assert [line["name"] for line in last["clients"]] == ["site-1", "site-3"]


def test_a_site_that_fails_once_is_named_and_works_again(tmp_path, monkeypatch):
    """Whatever goes wrong in a task, the site answers, and waits for the next."""
    controller = Here(mixed(tmp_path / "run"), tmp_path, SIZES)
    site, rounds = controller.sites["site-2"], []

    def failing(kind, *rest):
        rounds.append(kind)
        if rounds.count("train") == 1 and kind == "train":
            raise RuntimeError("a line of the client's text")
        return type(site).answer(site, kind, *rest)

    monkeypatch.setattr(site, "answer", failing)
    controller.run()
    _, first, second = lines(tmp_path / "run")
    assert first["dropped"] == [{"name": "site-2", "reason": "its client failed: RuntimeError; its own log says more"}]
    assert not second["dropped"]


def test_a_client_has_the_name_of_its_site(tmp_path):
    """A site that gives another's name takes no part; the run waits for the others as long as it was told."""

    def spoil(site, task, result):
        if site == "site-2" and task == "introduce":
            result.meta[KEY]["config"]["client"] = "site-1"
        return result

    controller = Here(mixed(tmp_path / "run"), tmp_path, SIZES, spoil, join_timeout=0)
    controller.run()
    assert "site-2 takes no part: it calls itself 'site-1'; a client has the name of its site" in controller.lines
    assert controller.lines[-1].startswith("panic: hetlora: error: 2 of 3 clients joined within 0 s (site-1, site-3)")


def test_a_site_that_goes_away_keeps_its_rank_and_is_asked_again_who_it_is(tmp_path):
    class Leaving(Here):
        def connected(self):
            done = sum(line.startswith(("round 1/", "round 2/")) for line in self.lines)
            return [site for site in super().connected() if site != "site-2" or done != 1]

    controller = Leaving(mixed(tmp_path / "run", rounds=3, gamma=1.0), tmp_path, SIZES)
    controller.run()
    trained = [{line["name"]: line["rank"] for line in record["clients"]} for record in lines(tmp_path / "run")]
    assert trained[1:] == [{"site-1": 2, "site-2": 4, "site-3": 8}, {"site-1": 2, "site-3": 8}, {"site-1": 2, "site-2": 4, "site-3": 8}]
    assert [site for site, task, _ in controller.asked if task == "introduce"] == ["site-1", "site-2", "site-3", "site-2"]
    assert "client 'site-2' is back, as node site-2" in controller.lines


def test_a_result_after_its_time_is_named(tmp_path):
    controller = Here(mixed(tmp_path / "run"), tmp_path, SIZES)
    controller.process_result_of_unknown_task(SimpleNamespace(name="site-2"), "train", "", None, None)
    assert controller.lines == ["site-2: its result for 'train' came too late and is not used"]


def test_of_a_client_that_was_not_asked_nothing_counts():
    aggregator = HetLoraAggregator(tiny_config("unused"))
    assert aggregator.accept_model(FLModel(params={}, meta={"client_name": "x"})) is False
    assert aggregator.aggregate_model().metrics == {"arrived": 0, "bytes_up": 0}


def test_secure_aggregation_is_refused():
    with pytest.raises(ConfigError, match="secure_aggregation = True: of hetlora's Flower deployment"):
        HetLoraAggregator(tiny_config("unused", secure_aggregation=True, clip_median=0.0))


def test_settings_that_cannot_be_used_end_the_job_with_one_line(tmp_path):
    controller = Here(mixed(tmp_path / "run"), tmp_path, SIZES)
    controller.settings["merge"] = "stack"
    controller.run()
    assert controller.lines[-1].startswith("panic: hetlora: error: merge = 'stack'")
    controller.settings |= {"merge": "factors", "output": "run", "resume": True}
    controller.run()
    assert controller.lines[-1].startswith("panic: hetlora: error: resume = True: expected an absolute output, got 'run'")


def test_a_run_goes_on_in_a_new_job(tmp_path):
    """The first job ends in round 2: no site answers."""
    cfg = mixed(tmp_path / "run", cobatch=False, rounds=3)
    tasks: list[str] = []

    def silent(site, task, result):
        tasks.append(task)
        return None if task == "train" and tasks.count("train") > 3 else result

    controller = Here(cfg, tmp_path, SIZES, silent)
    controller.run()
    assert controller.lines[-1].startswith("panic: hetlora: error: round 2: no clients left")
    Here(cfg, tmp_path, SIZES, resume=True).run()
    simulate(cfg.model_copy(update={"output": str(tmp_path / "whole")}), federation=site_federation(SIZES), quiet=True)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_aborted_job_ends_without_a_complaint(tmp_path):
    controller = Here(mixed(tmp_path / "run"), tmp_path, SIZES)
    controller.abort_signal.trigger("user")
    controller.get_num_standing_tasks = lambda: 1
    controller.run()
    assert controller.lines[-1].startswith("aborted; with `resume`")


# ---------------------------------------------------------------- the job


@pytest.mark.parametrize("name", ["HetLora", "HetLoraAggregator"])
def test_the_examples_of_the_docstrings_run(name):
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(hetlora.nvflare, name), name)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_arguments_of_a_script_are_settings_of_its_node():
    assert node_settings(["partition-id=2", "data=/my folder", "padding-free=true", "client=007a"]) == {
        "partition-id": 2,
        "data": "/my folder",
        "padding-free": True,
        "client": "007a",
    }
    with pytest.raises(ConfigError, match="'partition': expected NAME=VALUE"):
        node_settings(["partition"])


def test_a_new_job_is_what_nvflare_takes(tmp_path):
    """Its settings are the server's, its sites have scripts, and hetlora's code is not copied into it."""
    done = CliRunner().invoke(cli, ["nvflare", "new", str(tmp_path / "my job")])
    assert done.exit_code == 0, done.output
    run = subprocess.run([sys.executable, "job.py", "--export", "jobs"], cwd=tmp_path / "my job", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    job = tmp_path / "my job" / "jobs" / "my-job"
    (workflow,) = json.loads((job / "app_server/config/config_fed_server.json").read_text())["workflows"]
    assert workflow["path"] == "hetlora.nvflare.controller.HetLora"
    cfg, waiting = server_settings(workflow["args"]["settings"])
    assert (cfg.ranks, waiting.min_clients) == ("2,4,8", 3)
    assert sorted(path.relative_to(job).as_posix() for path in job.rglob("*.py")) == [f"app_site-{k}/custom/client.py" for k in (1, 2, 3)]
