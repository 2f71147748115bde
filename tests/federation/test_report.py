"""The report of a run folder: finished, stopped, damaged, with names that could break a page or a picture."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from pathlib import Path

import pytest
from synthetic_run import write_run

from hetlora.config import ConfigError
from hetlora.report import pictures
from hetlora.report.page import write_report
from hetlora.run_folder import CHECKPOINT, PICTURES, read_run

PNG = b"\x89PNG\r\n\x1a\n"


def edit_rounds(folder: Path, change) -> None:
    file = folder / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def text_of(page: Path) -> str:
    """The page without its markup, styles and embedded pictures."""
    source = re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", source)))


def test_page_is_self_contained_and_embeds_the_pngs(tmp_path, every_look):
    names = write_run(tmp_path / "run", clients=6, rounds=4)
    page = write_report(tmp_path / "run")
    assert page == tmp_path / "run" / "report.html"
    source = page.read_text(encoding="utf-8")
    sources = re.findall(r"""\b(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", source)
    assert len(sources) == len(PICTURES)
    for name, link in zip(PICTURES, sources, strict=True):
        png = (page.parent / name).read_bytes()
        assert png.startswith(PNG) and len(png) > 5000
        assert link == "data:image/png;base64," + base64.b64encode(png).decode()
    assert "http://" not in source and "https://" not in source
    text = text_of(page)
    assert all(name in text for name in names)
    assert "not complete" not in text
    assert "2.13.0" in text and "gamma" in text and "asyncio has little text" in text


def test_numbers_on_the_page_are_those_of_the_run(tmp_path):
    write_run(tmp_path / "run", clients=12, rounds=6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    text = text_of(write_report(tmp_path / "run"))
    before, after = (lines[i]["evaluation"]["client_text"]["perplexity"] for i in (0, -1))
    assert f"{before:.2f} → {after:.2f}" in text
    up, full = (sum(line[key] for line in lines) for key in ("bytes_up", "bytes_up_homlora"))
    assert f"{up / 1e6:.2f} MB" in text and f"{100 * up / full:.1f} % of HomLoRA" in text


def test_ranks_picture_counts_prunings(tmp_path):
    write_run(tmp_path / "run", clients=30, rounds=12)
    run = read_run(tmp_path / "run")
    steps = [client for record in run.trained for client in record["clients"] if client["rank"] < client["rank_before"]]
    assert steps, "the synthetic run must prune for this test to say anything"
    alt = pictures.draw_all(run)["ranks.png"].alt
    assert alt.endswith(f"30 clients, {len({c['name'] for c in steps})} of them pruned, {len(steps)} prunings in all")


def test_stopped_run_with_a_cut_line_is_reported_as_such(tmp_path):
    folder = tmp_path / "run"
    names = write_run(folder, clients=20, rounds=10, done=3)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 4, "clients": [{"na')
    text = text_of(write_report(folder))
    assert "not complete: 3 of 10 rounds" in text and f"hetlora run --resume --output {folder}" in text
    assert "Line 5 of rounds.jsonl is cut off" in text
    assert all(name in text for name in names), "clients that have not trained are known from the checkpoint"
    assert "perplexity before" not in text


def test_before_the_first_round_a_stopped_run_still_has_a_report(tmp_path):
    write_run(tmp_path / "run", done=0)
    (tmp_path / "run" / CHECKPOINT).unlink()
    assert "No upload is on record" in text_of(write_report(tmp_path / "run"))


def test_later_record_of_a_round_counts(tmp_path):
    write_run(tmp_path / "run", rounds=3)
    edit_rounds(tmp_path / "run", lambda lines: lines.insert(2, {**lines[1], "seconds": 99.0}))
    run = read_run(tmp_path / "run")
    assert [record["round"] for record in run.records] == [0, 1, 2, 3]
    assert run.records[1]["seconds"] == 99.0


def test_hostile_names_stay_text(tmp_path, every_look):
    names = ["<script>alert(1)</script>", "$a_{b$", "x" * 90, "a&b", "한국어"]
    write_run(tmp_path / "run", names=names, rounds=2)
    page = write_report(tmp_path / "run")
    assert "<script" not in page.read_text(encoding="utf-8")
    assert all(name in text_of(page) for name in names)


def test_missing_and_infinite_values(tmp_path, every_look):
    def change(lines):
        lines[1]["evaluation"] = None
        lines[2]["evaluation"]["client_text"]["perplexity"] = math.inf
        lines[3]["clients"][0]["weight"] = math.nan
        lines[3]["dropped"] = [{"name": "xml", "reason": "update has non-finite values"}]

    write_run(tmp_path / "run", rounds=4, held_out=False)
    edit_rounds(tmp_path / "run", change)
    text = text_of(write_report(tmp_path / "run"))
    assert "1 values that are infinite or not a number are left out" in text
    assert "update has non-finite values" in text
    assert "Perplexity, held-out clients" not in text


def test_ranks_by_module_are_averaged(tmp_path):
    def change(lines):
        for line in lines[1:]:
            for client in line["clients"]:
                client["rank"] = {"q": client["rank"], "v": client["rank"] + 1}

    write_run(tmp_path / "run", clients=3, rounds=2, done=2, prune_scope="module")
    edit_rounds(tmp_path / "run", change)
    assert re.search(r"asyncio \d+ \d+\.5 2 ", text_of(write_report(tmp_path / "run")))


def test_many_clients_say_what_is_not_shown(tmp_path):
    write_run(tmp_path / "run", clients=200, rounds=2)
    caption = pictures.draw_all(read_run(tmp_path / "run"))["weights.png"].caption
    uploads = {c["name"] for record in read_run(tmp_path / "run").trained for c in record["clients"]}
    assert f"{200 - len(uploads)} clients that were never sampled are not shown" in caption


def test_report_replaces_its_own_files_only(tmp_path):
    write_run(tmp_path / "run", rounds=1)
    out = tmp_path / "out"
    write_report(tmp_path / "run", out)
    assert write_report(tmp_path / "run", out) == out / "report.html"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "ranks.png").write_text("mine")
    with pytest.raises(ConfigError, match=r"ranks\.png: exists and is not a hetlora report"):
        write_report(tmp_path / "run", foreign)
    assert [file.name for file in foreign.iterdir()] == ["ranks.png"] and (foreign / "ranks.png").read_text() == "mine"


@pytest.mark.parametrize(("missing", "message"), [("config.json", "no run there"), ("rounds.jsonl", "no round on record")])
def test_folder_without_a_run(tmp_path, missing, message):
    write_run(tmp_path / "run", rounds=1)
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(ConfigError, match=message):
        write_report(tmp_path / "run")
    assert not (tmp_path / "run" / "report.html").exists()


def test_damaged_config_and_versions_are_named(tmp_path):
    write_run(tmp_path / "run", rounds=1)
    (tmp_path / "run" / "config.json").write_text("{")
    (tmp_path / "run" / "versions.json").unlink()
    text = text_of(write_report(tmp_path / "run"))
    assert "config.json cannot be read" in text and "versions.json cannot be read" in text
