"""`hetlora bench`: what it measures, that a wrong result has no figure and fails the command, what it says where something is missing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess

import pytest
import torch

from hetlora_kernels import _library
from hetlora_kernels.benchmarks import ceilings, figures, kit, providers, run, saved, shapes

CPU = torch.device("cpu")
TINY = ["--tiny", "--device", "cpu", "--threads", "1"]


def test_a_run_says_what_it_measures_and_writes_ceilings_and_rows(tmp_path, capsys):
    file = tmp_path / "a.json"
    assert kit.main([*TINY, "--suite", "server", "--only", "gram", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:5]] == ["device", "versions", "threads", "rungs", "compiled"]
    assert out.index("copy float32") < out.index("product bfloat16") < out.index("gram, tiny, 5 clients, float32, 1 thread")
    assert "torch loop" in out and "x the time of hetlora" in out and "% of read" in out and "mean nothing" in out
    data = saved.read(file)
    assert {r["op"] for r in data["results"] if r["suite"] == "ceilings"} == {"copy", "read", "product"}
    assert {(r["op"], r["suite"]) for r in data["results"] if r["suite"] != "ceilings"} == {("gram", "server")}
    assert data["measurement"] is False and data["refused"] == [] and data["left_out"] == []
    assert data["command"].startswith("hetlora bench --tiny") and data["versions"]["torch"] == torch.__version__ and data["backends"]["gram"]


def test_a_wrong_result_has_no_figure_and_fails_the_command(tmp_path, monkeypatch, capsys):
    real = providers.PROVIDERS["gram"]["hetlora"]

    def wrong(p):
        work, result = real(p)
        return work, lambda: [t * (1.01 if p.dtype == torch.float32 else 1.0) for t in result()]

    monkeypatch.setitem(providers.PROVIDERS["gram"], "another", wrong)
    file = tmp_path / "a.json"
    assert kit.main([*TINY, "--suite", "server", "--only", "gram", "--json", str(file)]) == 1
    data, said = saved.read(file), capsys.readouterr()
    assert [r["dtype"] for r in data["results"] if r["op"] == "gram"] == ["bfloat16"] * 4, "float32 is not timed, the next case is"
    (refused,) = data["refused"]
    assert "WrongResultError: another: gram on tiny, torch.float32" in refused and f"NOT MEASURED {refused}" in said.err
    assert "gram, tiny, 5 clients, float32" not in said.out


def test_rungs_are_measured_one_by_one_and_no_other(tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.json"
    present = [rung for rung in ("reference", "cpu") if rung in _library.available()]
    forced, real = [], providers.PROVIDERS["gram"]["hetlora"]

    def seen(p):
        work, result = real(p)
        return lambda: (forced.append(_library._forced), work()), result

    monkeypatch.setitem(providers.PROVIDERS["gram"], "hetlora", seen)
    assert kit.main([*TINY, "--suite", "server", "lora", "peft", "--only", "gram", "smallest call", "--rungs", *present, "--json", str(file)]) == 0
    assert {*forced} == {*present}, "and nothing on the rung in use"
    data = saved.read(file)
    rows = [r for r in data["results"] if r["suite"] != "ceilings"]
    assert {r["provider"] for r in rows if r["op"] == "gram"} == {"read", "torch loop", *(f"hetlora {rung}" for rung in present)}
    own = {r["provider"] for r in rows if r["suite"] == "lora" and r["provider"].startswith("hetlora")}
    assert own == {f"hetlora {rung}" for rung in present} and not [r for r in rows if r["suite"] == "peft"]
    assert "left out  peft: --rungs: it is measured on the rung in use" in capsys.readouterr().out


def test_only_narrows_by_each_kind():
    cases = [(op, shape, kind) for op in ("gram", "adamw", "sgd") for shape in ("tiny", "576->576") for kind in ("float32", "bfloat16")]

    def left(*words):
        return [case for case in cases if shapes.chosen(argparse.Namespace(only=list(words)), *case)]

    assert left() == cases and left("gram", "adamw") == cases[:8]
    assert left("gram", "adamw", "float32") == [case for case in cases[:8] if case[2] == "float32"]
    assert left("sgd", "576->576", "bfloat16") == [("sgd", "576->576", "bfloat16")]
    assert left("gram", "float64") == left("gram", "T=8") == []


def test_a_rung_that_is_not_there_is_refused(monkeypatch, capsys):
    if "cuda" not in _library.available():
        assert kit.main([*TINY, "--rungs", "cuda"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("hetlora bench: error: --rungs: the 'cuda' rung is not available (") and err.count("\n") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "check_rung", lambda rung, origin: rung)
    assert kit.main(["--device", "cuda", "--rungs", "cpu"]) == 2
    assert "--rungs cpu: its kernels are for CPU tensors; add --device cpu" in capsys.readouterr().err


def test_without_peft_its_rows_are_left_out_and_said(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else real(name, *rest))
    file = tmp_path / "a.json"
    assert kit.main([*TINY, "--suite", "lora", "peft", "--only", "smallest call", "--json", str(file)]) == 0
    results = saved.read(file)["results"]
    assert {r["suite"] for r in results} == {"ceilings", "lora"} and "torch padded bmm" in {r["provider"] for r in results}
    assert not [r for r in results if "PEFT" in r["provider"]]
    out = capsys.readouterr().out
    assert "peft: not installed: peft (pip install '.[bench]')" in out and "lora: its rows of stock PEFT, not installed: peft" in out
    assert kit.main([*TINY, "--suite", "peft"]) == 2
    assert capsys.readouterr().err == "hetlora bench: error: nothing to measure: peft: not installed: peft (pip install '.[bench]')\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--frob"], "unrecognized arguments: --frob"),
        (["--only", "gram", "frob"], "--only frob: no case of server, lora, loss, peft, round has this name; there are aggregate, truncate,"),
        (["--only", "gram", "T=16"], "--only gram T=16: no case of server, lora, loss, peft, round has all of these; names of one kind widen"),
        (["--budget", "0"], "--budget: expected seconds above 0, got 0"),
        (["--threads", "0"], "--threads: expected numbers from 1, got 0"),
        (["--json", "no/such/folder/a.json"], "--json no/such/folder/a.json: expected a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(given, said, capsys):
    assert kit.main([*TINY, *given] if "--threads" not in given else given) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hetlora bench: error: {said}") and err.count("\n") == 1


def test_a_wrong_copy_is_no_ceiling(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: target)
    case = ceilings.Case("copy", 1 << 10, torch.float32)
    with pytest.raises(ceilings.WrongResultError, match=r"copy of .* is off by 1.00e\+00; nothing is timed"):
        ceilings.measure(case, None, CPU, 1)


def record(op, provider, seconds, **more):
    head = {"op": op, "shape": "s", "clients": 1, "dtype": "float32", "threads": 1, "yardstick": "frozen layer", "bytes": 8e9, "flops": 4e12}
    return {**head, "provider": provider, "median_s": seconds, "ratio": seconds, **more}


def test_shares_and_ratios_are_those_of_the_figures():
    """A device that copies 8 GB/s and multiplies at 2 TFLOP/s needs 2 s for 4 TFLOP, 1 s for 8 GB."""
    roof = [record("copy", "torch", 1.0, yardstick="torch", flops=None), record("product", "torch", 2.0, yardstick="torch")]
    roof += [record("product", "torch", 8.0, yardstick="torch")]  # a slower product is no ceiling
    rows = [record("x", "frozen layer", 3.0), record("x", "hetlora cpu", 4.0), record("x", "hetlora reference", 8.0), record("x", "PEFT", 10.0)]
    best = figures.ceilings(roof + rows)
    assert best == {("copy", "float32", 1): 8e9, ("product", "float32", 1): 2e12}
    ((key, case),) = figures.by_case(roof + rows).items()
    assert key == ("x", "s", 1, "float32", 1) and figures.own(case) is rows[1]
    assert figures.share(rows[1], best) == (0.5, "product") and figures.share({**rows[1], "bytes": 24e9}, best) == (0.75, "copy")
    assert figures.alternatives(case) == {"PEFT": 2.5}, "nobody can use the frozen layer instead"
    assert [figures.rate(r) for r in rows] == ["", "1e+03 GFLOP/s", "500 GFLOP/s", "400 GFLOP/s"], "the frozen layer does not do LoRA's operations"
    assert figures.share({**rows[1], "flops": None}, best) is None and figures.share(rows[1], {}) is None and figures.share(roof[0], best) is None
    assert figures.share(record("gram", "hetlora", 4.0, yardstick="read", ratio=1.25), best) == (0.8, "read")
    slow = {("copy", "bfloat16", 1): 8e9, ("product", "bfloat16", 1): 1e11}
    half = {**rows[1], "dtype": "bfloat16"}
    assert figures.share(half, best | slow) == (0.5, "float32 product"), "torch's own products of the type are slower than the device"
    assert figures.share(half, best | slow | {("product", "bfloat16", 1): 4e12}) == (0.25, "product") and figures.share(half, slow) == (10.0, "product")
    assert figures.share(half, best) is None


def written(path, records, **head):
    device = {"type": "cpu", "cpu": "a processor", "cores": 2}
    saved.write({"device": device, "versions": {"torch": "1"}, "backends": {}, "load_average": {"before": 0.0, "after": 0.0}, **head, "results": records}, path)
    return str(path)


def timed(provider, seconds, op="gram", **more):
    return record(op, provider, seconds, p20_s=seconds * 0.99, p80_s=seconds * 1.01, yardstick="read", note="", rounds=3, **more)


def test_compare_fails_above_its_bound_and_looks_at_this_project_alone(tmp_path, capsys):
    a = written(tmp_path / "a.json", [timed("hetlora", 1.0), timed("torch loop", 1.0), timed("hetlora", 1.0, op="adamw")])
    b = written(tmp_path / "b.json", [timed("hetlora", 1.04), timed("torch loop", 3.0), timed("hetlora", 1.0, op="sgd")])
    for limit, status in (([], 0), (["--fail-above", "5%"], 0), (["--fail-above", "3.9"], 1), (["--fail-above", "4.1%"], 0)):
        assert kit.main(["compare", a, b, *limit]) == status, limit
        out = " ".join(capsys.readouterr().out.split())
    assert "same device, versions and rungs" in out and "differs" not in out
    assert " 1.040 1 s 1.04 s hetlora: gram" in out and " 3.000 1 s 3 s torch loop: gram" in out
    assert "not compared, only in A: 1 rows, the first hetlora: adamw" in out and "not compared, only in B: 1 rows, the first hetlora: sgd" in out
    assert kit.main(["compare", a, b, "--fail-above", "3%"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert " 1.040! 1 s 1.04 s hetlora: gram" in out and "! 1 rows of hetlora take longer by more than 3 %, the worst 1.040 times" in out


def test_compare_says_first_what_else_differs(tmp_path, capsys):
    a = written(tmp_path / "a.json", [timed("hetlora", 1.0)], load_average={"before": 3.0, "after": 2.0})
    b = written(tmp_path / "b.json", [timed("hetlora", 1.005)], versions={"torch": "2", "peft": "3"}, refused=["gram: wrong"], measurement=False)
    assert kit.main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    head, table = out.split("\n\n")
    assert "differs: version torch: 1 in A, 2 in B\ndiffers: version peft: none in A, 3 in B" in head
    assert "A was measured on a busy machine: load average 3.0 before, 2.0 after" in head and "B has tiny shapes: its figures mean nothing" in head
    assert " 1.005~ 1 s 1 s hetlora: gram" in " ".join(table.split()) and "not measured in B: gram: wrong" in table
    assert kit.main(["compare", a, b, "--fail-above", "50%"]) == 1, "a result that is wrong now is no smaller fault than a slow one"


def a_file(*without, head=None, **other):
    """The text of a file with one row that has `other` values and is `without` some."""
    case = {name: value for name, value in {**timed("hetlora", 1.0), **other}.items() if name not in without}
    own = {name: case.pop(name) for name in ("median_s", "p20_s", "p80_s", "ratio")}
    return json.dumps({"schema": 2, "device": {}, "versions": {}, **(head or {}), "cases": [{**case, "providers": {case.pop("provider"): own}}]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file or directory"),
        ("{", "not JSON (line 1:"),
        ("[]", "not a file of figures"),
        ('{"schema": 2, "cases": [], "device": {}, "versions": {}}', "holds no figures"),
        ('{"schema": 2, "device": {}, "versions": {}}', "no 'cases' where one is expected"),
        ('{"schema": 2, "device": {}, "versions": {}, "cases": [{"op": "a", "bytes": 1, "providers": {"x": {"median_s": "1"}}}]}', "not a file of figures"),
        ('{"schema": 2, "device": {}, "versions": {}, "cases": [{"op": "a", "bytes": 1, "providers": {"x": {"median_s": 0}}}]}', "not a file of figures"),
        ('{"schema": 2, "device": {}, "versions": {}, "cases": [{"op": "a", "providers": {"x": {"median_s": 1}}}]}', "no 'shape' where one is expected"),
        (b"\xff\xfe\x00", "not text"),
        (a_file(clients="8"), "not a file of figures (clients of gram, hetlora is '8', no whole number from 1)"),
        (a_file(threads=None), "not a file of figures (threads of gram, hetlora is None, no whole number from 1)"),
        (a_file(threads=0), "not a file of figures (threads of gram, hetlora is 0, no whole number from 1)"),
        (a_file(ratio=0), "not a file of figures (ratio of gram, hetlora is 0, no positive number)"),
        (a_file(ratio=float("inf")), "not a file of figures (ratio of gram, hetlora is inf, no positive number)"),
        (a_file(median_s=True), "not a file of figures (median_s of gram, hetlora is True, no positive number)"),
        (a_file(shape=8), "not a file of figures (shape is 8, no text)"),
        (a_file(flops="1"), "not a file of figures (flops of gram, hetlora is '1', no positive number)"),
        (a_file(op="product", yardstick="torch", flops=None), "not a file of figures (flops of product, hetlora is None, no positive number)"),
        (a_file("bytes", op="copy", yardstick="torch"), "no 'bytes' where one is expected"),
        (a_file(head={"load_average": {"before": None}}), "not a file of figures (load_average is {'before': None}, no object of numbers)"),
        (a_file(head={"refused": "gram"}), "not a file of figures (refused is 'gram', no list)"),
        (a_file(head={"left_out": 1}), "not a file of figures (left_out is 1, no list)"),
        (a_file(head={"backends": [1]}), "not a file of figures (backends is no object)"),
    ],
)
def test_compare_refuses_a_damaged_file_in_one_line(tmp_path, capsys, text, said):
    good, path = written(tmp_path / "a.json", [timed("hetlora", 1.0)]), tmp_path / "b.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert kit.main(["compare", good, str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hetlora bench: error: {path}: {said}") and err.count("\n") == 1


def test_compare_of_files_without_a_common_row_is_an_error(tmp_path, capsys):
    a, b = (written(tmp_path / f"{op}.json", [timed("hetlora", 1.0, op=op)]) for op in ("gram", "adamw"))
    assert kit.main(["compare", a, b]) == 2 and "have no row in common" in capsys.readouterr().err
    for bad in ("x", "-1%", "nan"):
        assert kit.main(["compare", a, a, f"--fail-above={bad}"]) == 2 and "expected per cent" in capsys.readouterr().err


def test_compare_with_a_revision_of_git(tmp_path, monkeypatch, capsys):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    file = written(tmp_path / "a.json", [timed("hetlora", 1.0)])
    for command in (["init", "-q"], ["add", "a.json"], ["commit", "-qm", "before"]):
        subprocess.run([*git, *command], check=True)
    written(tmp_path / "a.json", [timed("hetlora", 1.25)])
    assert kit.main(["compare", file, "--base", "HEAD", "--fail-above", "5%"]) == 1
    out = capsys.readouterr().out
    assert f"A  {file} of HEAD: a processor" in out and f"B  {file}: a processor" in out and " 1.250!" in out
    monkeypatch.chdir(tmp_path)
    assert kit.main(["compare", "a.json", "--base", "HEAD"]) == 0
    capsys.readouterr()
    for given, said in (
        ([file, "--base", "gone"], f"--base gone: git says of {file}: fatal: "),
        ([file], "expected two files, or one with --base REV, got 1"),
        ([file, file, "--base", "HEAD"], "expected one file with --base, got 2"),
        (["no/a.json", "--base", "HEAD"], "no/a.json: no such file or directory"),
    ):
        assert kit.main(["compare", *given]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"hetlora bench: error: {said}") and err.count("\n") == 1, err


def layer_record(rank, clients, provider, ratio):
    of = {"op": "lora_linear p=0.1", "shape": f"8->4 T=64 r={rank}", "clients": clients, "rounds": 3, "note": "", "gb_per_s": 1.0, "peak_extra_bytes": 2e6}
    return {**record("", provider, ratio, p20_s=ratio * 0.9, p80_s=ratio * 1.1), **of, "flops": 2e12}


LEFT = ["round: not part of a quick run", "lora: 3 cases"]


@pytest.mark.slow
def test_a_report_is_one_page_with_pictures_of_what_the_file_has(tmp_path, capsys):
    roof = {"yardstick": "torch", "clients": 1, "note": "", "rounds": 3, "gb_per_s": 1.0}
    rows = [timed("torch", 1.0, op="copy") | roof | {"flops": None}, timed("torch", 2.0, op="product") | roof]
    for rank, clients in ((4, 1), (16, 1), (16, 4), (16, 8), ("4..64", 8)):
        times = {"frozen layer": 1.0, "hetlora cpu": 2.0, "hetlora reference": 9.0, "PEFT one by one": 4.0 + clients}
        rows += [layer_record(rank, clients, name, ratio) for name, ratio in times.items()]
    head = {"refused": ["<b>gram</b> is wrong"], "left_out": LEFT, "load_average": {"before": 3.0, "after": 3.0}, "date": "measured 2026-01-02"}
    file = written(tmp_path / "a.json", rows, **head)
    out = tmp_path / "pages"
    assert kit.main(["report", file, "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out / 'a.html'} (6 pictures)\n"
    names = {"a.html", "a-shares.png", "a-ratios.png", "a-roofline.png", "a-overhead.png", "a-memory.png", "a-curves-lora_linear-p-0.1-float32.png"}
    assert {path.name for path in out.iterdir()} == names and all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    text = (out / "a.html").read_text(encoding="utf-8")
    assert "<h1>hetlora on a processor</h1>" in text and "measured 2026-01-02" in text and "Other work was running on the machine" in text
    assert "Bars of the overhead over the frozen layer. hetlora: lora_linear p=0.1, float32: 100 %" in text and "Left out of this run: 2 items" in text
    assert "<li>round: not part of a quick run</li>" in text
    assert "Not measured: &lt;b&gt;gram&lt;/b&gt; is wrong" in text and "<b>gram" not in text
    assert not [link for link in re.findall(r'(?:src|href|srcset)="([^"]{0,9})', text) if not link.startswith("data:")], "nothing external"
    assert "lora_linear p=0.1, float32: 50 %" in text and "lora_linear p=0.1, float32: 4.00" in text, "medians: 1 s over 2 s; 5, 5, 8, 12, 12 s over 2 s"
    assert kit.main(["report", file, "-o", str(out)]) == 0, "a page of its own is written anew"
    (out / "a.html").write_text("mine")
    assert kit.main(["report", file, "-o", str(out)]) == 2 and "exists and is no page of hetlora bench" in capsys.readouterr().err
    assert (out / "a.html").read_text() == "mine"


def test_curves_are_of_one_layer_by_rank_and_by_clients():
    from hetlora_kernels.benchmarks import page

    points = ((4, 1, 2.0), (16, 1, 3.0), (16, 4, 4.0), (16, 8, 5.0), (64, 4, 9.0), ("4..64", 8, 9.0))
    rows = [layer_record(*of, name, 1.0 if name in figures.FLOORS else ratio) for *of, ratio in points for name in ("frozen layer", "hetlora cpu")]
    ((group, (where, lines)),) = page.curves(figures.by_case(rows)).items()
    assert group == ("lora_linear p=0.1", "float32") and where == "8->4, 64 rows, 1 thread; ranks at one client, clients of rank 16"
    by_rank, by_clients = {"hetlora cpu": {4: 2.0, 16: 3.0}}, {"hetlora cpu": {1: 3.0, 4: 4.0, 8: 5.0}}
    assert lines == {"rank of the one client": by_rank, "clients": by_clients}
    more = [{**row, "shape": f"8->4 T=256 r={row['shape'].split('=')[-1]}", "ratio": row["ratio"] / 2} for row in rows[2:6]]
    ((_, (where, lines)),) = page.curves(figures.by_case(rows + more)).items()
    assert lines == {"rank of the one client": by_rank, "clients": by_clients, "tokens of each client": {"hetlora cpu": {16: 4.0, 64: 2.0}}}
    assert where.endswith("; tokens of 4 clients of rank 16")
    slower = [{**row, "threads": 2, "ratio": 7 * row["ratio"]} for row in rows[2:6] + more]
    ((_, (_, mixed)),) = page.curves(figures.by_case(rows + more + slower)).items()
    assert mixed == lines, "points of another number of threads are another line's"
    assert page.curves(figures.by_case(rows[:2])) == {}, "one point is no curve"


def test_a_way_that_needs_several_clients_is_in_the_legend():
    from matplotlib.figure import Figure

    from hetlora_kernels.benchmarks import page

    shown = {"rank of the one client": {"hetlora cpu": {4: 1.0, 16: 2.0}}, "clients": {"hetlora cpu": {1: 1.0, 4: 2.0}, "torch padded grouped_mm": {4: 2.0}}}
    page.draw_curves(("lora_linear p=0.1", "float32"), "8->4", shown, figure := Figure())
    (legend,) = [*figure.legends, *(own for axes in figure.axes if (own := axes.get_legend()))]
    assert [text.get_text() for text in legend.get_texts()] == ["hetlora cpu", "torch padded grouped_mm"]


def test_memory_is_that_of_the_case_that_takes_most():
    from hetlora_kernels.benchmarks import page

    def case(shape, **mib):
        names = {"own": "hetlora cpu", "reference": "hetlora reference", "floor": "frozen layer"}
        return [record("x", names.get(name, name), 1.0, shape=shape, peak_extra_bytes=None if value is None else value * 2**20) for name, value in mib.items()]

    rows = [*case("s", own=1, PEFT=9, bmm=2, reference=50, floor=60), *case("t", own=2, PEFT=8, bmm=None), *case("u", own=3, PEFT=None)]
    assert page.memory(figures.by_case(rows)) == {("x", "float32"): (1.0, {"PEFT": 9.0, "bmm": 2.0})}
    assert page.memory(figures.by_case(case("s", own=0.5, PEFT=0.9))) == {}


def test_a_jetson_says_its_board_release_and_power_mode(tmp_path, monkeypatch):
    """By stand-ins: none was at hand."""
    assert run.board_facts(tmp_path) == {}
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.0, BOARD: generic\n# more\n")
    (tmp_path / "proc" / "device-tree").mkdir(parents=True)
    (tmp_path / "proc" / "device-tree" / "model").write_bytes(b"NVIDIA Jetson Orin\x00")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    known = {"release": "R36 (release), REVISION: 4.0, BOARD: generic", "board": "NVIDIA Jetson Orin"}
    assert run.board_facts(tmp_path) == {**known, "power_mode": "not said"}
    tool = tmp_path / "bin" / "nvpmodel"
    tool.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'; echo 0\n")
    tool.chmod(0o755)
    assert run.board_facts(tmp_path) == {**known, "power_mode": "NV Power Mode: MAXN 0"}
