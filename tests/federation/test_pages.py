"""What a page says first, and how it is laid out: sure or not, worse clients, telephones, dark mode, many clients, comparisons opened again."""

from __future__ import annotations

import base64
import io
import json
import re
from functools import partial
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from synthetic_run import write_run
from test_compare import compared
from test_report import text_of
from tiny import tiny_config, tiny_federation

from hetlora.compare import saved
from hetlora.compare.figures import Tally, tabulate
from hetlora.compare.page import sentence, write_comparison
from hetlora.compare.pictures import _gap
from hetlora.config import Config, ConfigError
from hetlora.loop import simulate
from hetlora.report import pictures
from hetlora.report.drawing import _NARROW, Picture, legend_below, render
from hetlora.report.page import write_report
from hetlora.report.verdict import group_rows, rank_groups, run_sentence
from hetlora.run_folder import read_run


def edited(folder: Path, changes: list[tuple[float, float]]) -> None:
    """The synthetic run with these perplexities (before, after) of its clients."""
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    for client, (before, after) in zip(summary["clients"], changes, strict=True):
        client |= {"perplexity_before": before, "perplexity_after": after}
    file.write_text(json.dumps(summary))


def test_the_first_sentence_says_what_happened_and_how_sure_it_is(tmp_path):
    write_run(tmp_path / "run", clients=4, rounds=3)
    edited(tmp_path / "run", [(10.0, 9.0), (10.0, 8.0), (10.0, 9.0), (10.0, 8.0)])
    said = run_sentence(read_run(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    first, last = (lines[i]["evaluation"]["client_text"]["perplexity"] for i in (0, -1))
    assert said.startswith(f"In 3 rounds the perplexity of the clients' held-out text fell from {first:.2f} to {last:.2f} ({100 * (last / first - 1):+.1f} %)")
    assert "4 of 4 clients got better, by -15.0 ± 2.9 % on average" in said, "5.77 / sqrt(4)"
    assert "one seed" in said and "chance" not in said
    source = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert source.index('class="verdict"') < source.index('class="tiles"')


def test_it_says_where_chance_would_do(tmp_path):
    write_run(tmp_path / "run", clients=4, rounds=3)
    edited(tmp_path / "run", [(10.0, 9.0), (10.0, 11.0), (10.0, 8.0), (10.0, 11.5)])
    assert "too little to tell from chance" in run_sentence(read_run(tmp_path / "run"))


def test_a_stopped_run_says_so(tmp_path):
    write_run(tmp_path / "run", rounds=10, done=3)
    assert run_sentence(read_run(tmp_path / "run")).startswith("In 3 of 10 rounds (the run is not complete)")


def test_worse_clients_are_marked_and_percentages_stand_beside(tmp_path):
    names = write_run(tmp_path / "run", clients=3, rounds=2)
    edited(tmp_path / "run", [(8.0, 7.0), (8.0, 8.2), (8.0, 6.0)])
    source = write_report(tmp_path / "run").read_text(encoding="utf-8")
    rows = re.findall(r'<tr class="worse"><td[^>]*data-label="client">(.*?)</td>', source)
    assert rows == [sorted(names)[1]] and "+2.5 % <strong>worse</strong>" in source and "-12.5 %" in source


def test_date_and_command_of_a_run_are_on_its_page(tmp_path, monkeypatch):
    from hetlora.run_folder import origin

    monkeypatch.setattr("sys.argv", ["/usr/bin/hetlora", "run", "--data", "my texts"])
    made = origin()
    assert made["command"] == "hetlora run --data 'my texts'" and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00", made["started"])
    write_run(tmp_path / "run")
    for where in ("", "reached through Flower"):
        (tmp_path / "run" / "versions.json").write_text(json.dumps({**made, "clients": where}))
        text = text_of(write_report(tmp_path / "run"))
        assert f"Started {made['started']} by hetlora run --data 'my texts'" in text
        assert ("All clients were reached through Flower." in text) == bool(where) and "simulated in one process" not in text


def test_a_run_says_where_its_clients_were(tmp_path):
    """A page of a deployed federation must not call it simulated."""
    simulate(tiny_config(tmp_path / "run", rounds=1), federation=tiny_federation([3, 3]), quiet=True)
    assert "All clients were simulated in one process; no byte crossed a network." in text_of(write_report(tmp_path / "run"))


def test_a_unit_stays_on_the_line_of_its_number(tmp_path):
    write_run(tmp_path / "run", clients=4, rounds=3)
    source = write_report(tmp_path / "run").read_text(encoding="utf-8")
    first = re.search(r'<p class="verdict">(.*?)</p>', source, re.DOTALL)[1]
    tiles = re.search(r'<dl class="tiles">(.*?)</dl>', source, re.DOTALL)[1]
    assert "\u00a0%" in first and "\u00a0±" in first and "\u00a0%" in tiles and not re.search(" [%±]|± ", first + tiles)


def size_and_corner(png: bytes) -> tuple[int, float]:
    """(width in pixels, brightness of the first pixel)."""
    pixels = matplotlib.image.imread(io.BytesIO(png))
    return pixels.shape[1], float(np.asarray(pixels)[0, 0, :3].mean())


def test_pictures_are_drawn_anew_for_telephones_and_dark_pages(tmp_path, every_look):
    write_run(tmp_path / "run", clients=5, rounds=3)
    drawn = pictures.draw_all(read_run(tmp_path / "run"))
    source = write_report(tmp_path / "run").read_text(encoding="utf-8")
    for name, picture in drawn.items():
        wide, light = size_and_corner(picture.png)
        found = {kind: size_and_corner(png) for kind, png in picture.others.items()}
        assert light == 1.0 and found["narrow"][1] == 1.0 and found["dark"][1] < 0.2 and found["narrow dark"][1] < 0.2, name
        assert found["dark"][0] == wide > found["narrow"][0] == found["narrow dark"][0] == 731, name
        assert all(base64.b64encode(png).decode() in source for png in picture.others.values())
    queries = re.findall(r'<source media="([^"]*)"', source)
    assert queries[:3] == ["(max-width: 40rem) and (prefers-color-scheme: dark)", "(max-width: 40rem)", "(prefers-color-scheme: dark)"]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("length", [3, 30, 120])
@pytest.mark.parametrize("narrow", [True, False])
def test_long_names_of_a_legend_stay_in_the_picture(narrow, length):
    """In fewer columns, then on more lines; short names share a line."""
    figure = Figure(figsize=(_NARROW if narrow else 13, 8), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    names = [f"{k} {'homlora+gamma=0.95,lambda=1 '[:length] * (length // 28 + 1)}" for k in range(4)]
    for name in names:
        axes.plot([0, 1], label=name)
    legend_below(figure, 4)
    canvas.draw()
    (legend,) = figure.legends
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    assert [text.get_text().split() for text in legend.get_texts()] == [name.split() for name in names]
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.width for box in boxes)
    assert (len({round(box.y0) for box in boxes}) < len(names)) == (length == 3 or (not narrow and length == 30))


@pytest.mark.usefixtures("drawn")
def test_every_dotted_line_is_in_the_legend_and_no_legend_lies_on_lines(tmp_path):
    """The legend inside the narrow picture of perplexities lay on the dotted lines, and said nothing of them."""
    write_run(tmp_path / "run", clients=5, rounds=3)
    run = read_run(tmp_path / "run")
    table = tabulate(compared(tmp_path / "c", "hetlora,homlora-min"))
    drawings = [partial(draw, run) for draw in (pictures._perplexity, pictures._ranks, pictures._bytes)]
    said = []
    for draw in [*drawings, partial(_gap, table, ["hetlora", "homlora-min"])]:
        figure = Figure(figsize=(_NARROW, 4.2), layout="constrained")
        draw(figure)
        drawn = {line.get_linestyle() for axes in figure.axes for line in axes.get_lines() if len(line.get_xdata())}
        (legend,) = figure.legends
        assert all(axes.get_legend() is None for axes in figure.axes)
        assert not {"--", ":"} & drawn - {line.get_linestyle() for line in legend.get_lines()}
        said += [text.get_text() for text in legend.get_texts() if ":" in drawn]
    assert {"before training", "one rank for all"} <= set(said)


@pytest.mark.usefixtures("drawn")
def test_ranks_have_whole_numbers_on_their_axis(tmp_path):
    write_run(tmp_path / "run", clients=4, rounds=2)
    run = read_run(tmp_path / "run")
    for record in run.records:
        record["mean_rank"] = 2.0
        for client in record["clients"]:
            client["rank"] = client["rank_before"] = 2
    run.start_ranks.update(dict.fromkeys(run.start_ranks, 2))
    figure = Figure()
    pictures._ranks(run, figure)
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_yticks())


def test_a_page_says_the_method_and_an_answer_that_cannot_be_seen(tmp_path):
    """The page of a run by fold was headed "HETLORA run", and an empty answer was an empty cell."""
    write_run(tmp_path / "run", clients=4, rounds=2, train="fold", weights="samples", gamma=Config().gamma)
    file = tmp_path / "run" / "summary.json"
    summary = json.loads(file.read_text())
    summary["evaluation_after"]["samples"] = [{"prompt": "why?", "answer": "because"}]
    file.write_text(json.dumps(summary))
    log = tmp_path / "run" / "rounds.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    records[0]["evaluation"]["samples"] = [{"prompt": "why?", "answer": "\n "}]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "run" / "versions.json").write_text(json.dumps({"started": "2026-11-28 01:55:24+00:00", "command": "hetlora run --lr 0.1"}))
    source = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "HETLORA" not in source[: source.index("verdict")] and "Clients trained B alone, over fresh rows of A" in source
    assert re.search(r'data-label="before"><span class="quiet">nothing that can be seen</span></td><td data-label="after">because</td>', source)
    assert source.count('<span class="word">2026-11-28</span>') == 2 and source.count('<span class="word">--lr</span>') == 2, "the opening and the versions"


def test_a_short_name_stays_on_one_line_and_a_long_one_may_break(tmp_path):
    """A table of differences at 1400 pixels had "homlora-" above "max"."""
    write_run(tmp_path / "run", names=["a-b", "c-" * 30], rounds=1)
    source = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert '<td class="unbroken" data-label="client">a-b</td>' in source and f'<td data-label="client">{"c-" * 30}</td>' in source
    assert ".unbroken, .cards td.unbroken { white-space: nowrap; }" in source
    page = write_comparison(tabulate(compared(tmp_path / "c", "hetlora,homlora-min"))).read_text(encoding="utf-8")
    assert page.count('<td class="unbroken" data-label="method"') == 3 * 2 + 1, "three tables of two methods, and one difference"


def test_no_line_is_as_dark_as_a_dark_page(every_look):
    def draw(figure):
        axes = figure.subplots()
        axes.axhspan(0, 1, color="black")
        axes.set_ylim(0, 1)
        axes.set_axis_off()
        return "", "", ""

    def middle(png):
        pixels = matplotlib.image.imread(io.BytesIO(png))
        return float(pixels[pixels.shape[0] // 2, pixels.shape[1] // 2, :3].mean())

    picture: Picture = render(draw)
    assert middle(picture.png) == 0 and middle(picture.others["dark"]) > 0.8


def test_every_heat_map_names_its_axes(tmp_path, monkeypatch, every_look):
    seen: list[Figure] = []
    draw = FigureCanvasAgg.draw
    monkeypatch.setattr(FigureCanvasAgg, "draw", lambda self: (seen.append(self.figure), draw(self))[1])
    write_run(tmp_path / "run", clients=5, rounds=3)
    write_report(tmp_path / "run")
    write_comparison(tabulate(compared(tmp_path / "c", "hetlora,homlora-min")))
    maps = [axes for figure in seen for axes in figure.axes if axes.images]
    assert len(maps) == 4 * 3, "weights of the run, energy of two methods, in four drawings"
    assert all(axes.get_xlabel() == "round" and axes.get_ylabel() in ("client", "rank row") for axes in maps)


def test_cells_of_a_telephone_have_labels(tmp_path):
    """There the head of a table is hidden: each cell says what it is."""
    write_run(tmp_path / "run", clients=5, rounds=2)
    pages = [write_report(tmp_path / "run"), write_comparison(tabulate(compared(tmp_path / "c", "hetlora,homlora-min")))]
    for page in pages:
        assert "clip-path" in re.search(r"\.cards thead \{(.*?)\}", page.read_text(encoding="utf-8"))[1], "a wide head beside the page would reach into it"
        whole = r"\.cards td\.n \{ white-space: nowrap; \}\s*\.cards td::before \{[^}]*overflow-wrap: normal"
        assert re.search(whole, page.read_text(encoding="utf-8")), "numbers and the words of labels stay whole"
        tables = re.findall(r'<table class="cards">(.*?)</table>', page.read_text(encoding="utf-8"), re.DOTALL)
        assert len(tables) >= 2
        for table in tables:
            cells, heads = re.findall(r"<td([^>]*)>", table), re.findall(r"<th[ >]", table)
            inside = re.findall(r"<td[^>]*>(.*?)</td>", table, re.DOTALL)
            assert all("<" not in cell or re.fullmatch(r"<(\w+)>.*</\1>", cell, re.DOTALL) for cell in inside), "parts of a cell would be drawn apart"
            assert cells and all('data-label="' in cell for cell in cells) and len(heads) <= 10, "more columns fit no page of 64rem"


def test_tables_of_words_are_lines_on_a_telephone_and_a_command_breaks_between_words(tmp_path):
    """Beside a column of sentences, names and values of settings had a letter a line at 400 pixels. A browser breaks "--data" behind its first hyphen."""
    write_run(tmp_path / "run", clients=5, rounds=2)
    made = json.loads((tmp_path / "run" / "versions.json").read_text())
    (tmp_path / "run" / "versions.json").write_text(json.dumps({**made, "command": "hetlora run --data '<my> texts'"}))
    for page in (write_report(tmp_path / "run"), write_comparison(tabulate(compared(tmp_path / "c", "hetlora,homlora-min")))):
        source = page.read_text(encoding="utf-8")
        narrow = source[source.index("@media (max-width: 40rem)") :]
        wide = source[source.index("@media (min-width: 40.01rem)") : source.index("@media (max-width: 40rem)")]
        assert ".stack td:first-child code { white-space: nowrap; }" in wide, "names of settings were broken at 1400 pixels"
        assert "min-width: 9rem; max-width: 24rem; overflow-wrap: break-word" in wide, "a path of 21 letters was broken there"
        assert ".stack tr { display: flex; flex-wrap: wrap;" in narrow and ".stack td:last-child { flex-basis: 100%; }" in narrow
        tables = re.findall(r"<table( class=\"\w+\")?>", source)
        assert all(tables) and 'class="stack"' in "".join(tables), "no table without a layout for telephones"
        assert re.search(r"\.word \{ display: inline-block;", source)
    source = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert '<span class="word">--data</span> <span class="word">&#39;&lt;my&gt;</span> <span class="word">texts&#39;</span>' in source


def test_hundreds_of_clients_are_grouped_by_rank(tmp_path, every_look):
    write_run(tmp_path / "run", clients=300, rounds=6)
    run = read_run(tmp_path / "run")
    groups = rank_groups(run.start_ranks)
    assert sum(map(len, groups.values())) == 300 and 2 <= len(groups) <= 8
    assert "groups of ranks by 6 rounds" in pictures.draw_all(run)["weights.png"].alt
    source = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "<details><summary>Every client (300)</summary>" in source and all(f">{label}</td>" in source for label in groups)


def test_a_group_has_the_mean_of_its_clients(tmp_path):
    clients = [
        {"name": name, "rank_start": rank, "perplexity_before": before, "perplexity_after": after}
        for name, rank, before, after in (("a", 5, 4.0, 2.0), ("b", 5, 9.0, 8.0), ("c", 50, 3.0, 6.0))
    ]
    small, big = group_rows(clients)
    assert (small["rank"], small["clients"], small["before"], small["after"], small["worse"]) == ("5", 2, pytest.approx(6.0), pytest.approx(4.0), 0)
    assert (big["rank"], big["worse"]) == ("50", 1)


def test_a_comparison_says_who_won_and_whether_that_is_established(tmp_path):
    table = tabulate(compared(tmp_path / "c", "hetlora,homlora-min", seeds=2))

    def said(ours, theirs):
        for name, values in (("hetlora", ours), ("homlora-min", theirs)):
            table.tallies[name]["global_final"] = Tally(values)
        return sentence(table)

    assert "hetlora reached the lowest" in said([6.0, 6.2], [7.0, 7.2]) and "ahead in all 2 seeds (chance alone would do that once in 4 times)" in sentence(
        table
    )
    assert "ahead in 1 of 2 seeds only, so the order of the two is not established" in said([6.0, 7.2], [7.0, 6.4])
    one = tabulate(compared(tmp_path / "one", "hetlora,homlora-min"))
    assert "one seed, which does not establish an order" in sentence(one)
    assert 'class="verdict"' in write_comparison(one).read_text(encoding="utf-8")


def test_a_comparison_is_opened_again_with_the_same_page(tmp_path):
    found = compared(tmp_path / "c", "hetlora,homlora-min", search="lr=0.001,0.05")
    with pytest.raises(ConfigError, match="not finished; give its 'hetlora compare' command again"):
        saved.reopen(tmp_path / "c")
    saved.save(found)
    page = write_comparison(tabulate(found)).read_text(encoding="utf-8")
    again = saved.reopen(tmp_path / "c")
    assert again.chosen == found.chosen and [c.cfg for c in again.cells] == [c.cfg for c in found.cells]
    assert write_comparison(tabulate(again)).read_text(encoding="utf-8") == page
    (tmp_path / "c" / saved.RUNS).write_text("{}")
    with pytest.raises(ConfigError, match=r"comparison-runs\.json: damaged"):
        saved.reopen(tmp_path / "c")
