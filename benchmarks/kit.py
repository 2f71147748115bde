"""Measure this machine: its ceilings first, then every operation beside what the device could do and beside other ways to the same result.

Every result is checked on this device before it is timed. What is wrong, or fails in another way such as for want of memory, has no figure: a line says
NOT MEASURED and why, and the exit status is 1. `compare A.json B.json` and `report FILE.json` read what --json writes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from hetlora_kernels import _library
from hetlora_kernels._torch import multiplies_fast

from . import clocks, compare, figures, lora, losses, run, static
from .timing import How

NEEDS = {"peft": ("peft", "transformers"), "round": ("peft", "transformers", "pydantic")}  # packages, beside torch
PAGE_NEEDS = ("matplotlib", "jinja2", "pydantic", "safetensors")
ONE_RUNG = ("loss", "peft", "round")
WAY_OUT = f"pip install '{'.' if (Path(__file__).resolve().parents[1] / 'pyproject.toml').is_file() else 'hetlora'}[bench]'"  # in a checkout, and installed
QUICK_SECONDS = 110.0
ALIASES = {"model": "peft"}  # whole models are in it, beside single layers
DEFAULT = ("server", "lora", "loss", "peft", "round")
QUICK = ("loss", "peft", "lora", "server")  # those that need least first: what they leave of their part goes to the others
QUICK_TIMED = 0.6  # seconds of the calls of a case; its checks, warm-up and memory take as long again


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options")


def arguments(argv: list[str], prog: str) -> argparse.Namespace:
    parser = Parser(prog=prog, description=__doc__, formatter_class=static.Paragraphs)
    parser.add_argument("--quick", action="store_true", help="two minutes: a layer by rank, clients and tokens, a loss, a model, the server's operations")
    some = f"only these suites of {', '.join(DEFAULT)}; the ceilings are measured in any case [default: all; quick: not round]"
    parser.add_argument("--suite", nargs="+", type=lambda name: ALIASES.get(name, name), choices=DEFAULT, metavar="NAME", help=some)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only cases with these names of operation, shape and type: gram adamw float32")
    limit = f"an equal part of what is left for each suite, which begins no case that would end later [quick: {QUICK_SECONDS:g}, else no limit]"
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=limit)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, after each of them")
    drawn = "draw page and pictures there too, as 'report' does [quick without --json: hetlora-bench, with the file in it]"
    parser.add_argument("--report", type=Path, metavar="DIR", help=drawn)
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="counts of threads [default: 1 and all; quick: all; on a GPU 1]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="[default: cuda where there is one]")
    rungs = f"measure hetlora on these rungs of {', '.join(_library.RUNGS)}, in server and lora [default: that in use; lora: all]"
    parser.add_argument("--rungs", nargs="+", choices=_library.RUNGS, metavar="NAME", help=rungs)
    parser.add_argument("--cold", action="store_true", help="overwrite the caches before every call, but for the ceilings; else calls follow each other")
    parser.add_argument("--static", action="store_true", help="in place of measuring: read the compiled CUDA kernels; --static --help has its options")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to see that all of it runs; such figures mean nothing")
    options = parser.parse_args(argv)
    if options.budget is not None and not options.budget > 0:
        raise ValueError(f"--budget: expected seconds above 0, got {options.budget:g}")
    if options.threads and min(options.threads) < 1:
        raise ValueError(f"--threads: expected numbers from 1, got {min(options.threads)}")
    if options.quick and not options.tiny and options.json is None and options.report is None:
        options.report = Path("hetlora-bench")
    if options.report is not None:
        options.report.mkdir(parents=True, exist_ok=True)
        options.json = options.json or options.report / "bench.json"
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"--json {options.json}: expected a file in a folder that exists")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU; 'hetlora info' says why")
    for rung in options.rungs or []:
        _library.check_rung(rung, "--rungs")
        if rung == "cpu" and chosen_device(options).type == "cuda":
            raise ValueError("--rungs cpu: its kernels are for CPU tensors; add --device cpu")
    return options


def chosen_device(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def free_gb(device: torch.device) -> float:
    """Memory that a case may hold: half of what is free, at most 8 GB."""
    if device.type == "cuda":
        return min(8.0, torch.cuda.mem_get_info()[0] / 2e9)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return min(8.0, next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 2e9)
    return 2.0


def describe(result: dict[str, Any], counts: list[int]) -> list[str]:
    """What is measured, before anything is."""
    device, build = result["device"], result["build"]
    name = f"{device['cpu']}, {device['cores']} cores"
    if "gpu" in device:
        name = f"{device['gpu']}, compute capability {device['capability']}, {device['memory_gb']} GB; {name}"
    name += "".join(f"; {device[fact]}" for fact in ("board", "release", "power_mode") if fact in device)
    rungs: dict[str, list[str]] = {}
    for op, rung in result["backends"].items():
        rungs.setdefault(rung, []).append(op)
    built = [f"{part} {'built' if build[part]['built'] else 'not built: ' + build[part]['reason']}" for part in ("cpu", "cuda") if part in build]
    return [
        f"device    {name}; {device['system']}",
        f"versions  {', '.join(f'{package} {version}' for package, version in result['versions'].items())}",
        f"threads   {' and '.join(map(str, counts))}; load average before {result['load_average']['before']:.1f}",
        f"rungs     {'; '.join(f'{rung}: {len(ops)} operations' for rung, ops in rungs.items())} (present: {', '.join(_library.available())})",
        f"compiled  {'; '.join(built) or 'nothing'}",
    ]


def chosen_suites(options: argparse.Namespace, device: torch.device) -> tuple[list[str], list[str]]:
    """(those measured after the ceilings, why the others are not)."""
    found, why = [], []
    for name in options.suite or (QUICK if options.quick else DEFAULT):
        missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
        if options.rungs and name in ONE_RUNG:
            why.append(f"{name}: --rungs: it is measured on the rung in use")
        elif missing:
            why.append(f"{name}: not installed: {', '.join(missing)} ({WAY_OUT})")
        else:
            found.append(name)
    if "lora" in found and importlib.util.find_spec("peft") is None:
        why.append(f"lora: its rows of stock PEFT, not installed: peft ({WAY_OUT})")
    if "loss" in found and device.type == "cuda" and (lacking := losses.why_no_liger(device)):
        why.append(f"loss: its row of Liger: {lacking}")
    if "lora" in found:
        dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,)
        why += [f"lora: its rows of grouped products: {reason}" for dtype in dtypes if (reason := lora.no_grouped_mm(device, dtype))]
    return found, why


def left_of_quick(options: argparse.Namespace, device: torch.device) -> list[str]:
    """What a quick run leaves out by itself, however much time there is."""
    if not options.quick or options.tiny:
        return []
    found = ["quick: other shapes, and bfloat16 of most of the server's operations; without --quick all are measured, which takes hours"]
    if not options.suite:
        found.append("round: not part of a quick run; --suite round measures it")
    if not multiplies_fast(torch.bfloat16, device.type):
        slow = "this processor has no instructions for it, and a call takes many times as long"
        found.append(f"quick: bfloat16 of the loss, and of the layer but for one small case: {slow}; without --quick both are measured")
    return found


def import_others(suites: Sequence[str]) -> None:
    """Import what the suites compare with. What is there then is not looked through for garbage at every measurement of memory: that took longer than calls."""
    for package in ("peft", "transformers"):
        if {*suites} & {"lora", *NEEDS} and importlib.util.find_spec(package) is not None:
            importlib.import_module(package)
    if gc.get_freeze_count() == 0:
        gc.collect()
        gc.freeze()


@contextlib.contextmanager
def progress(total: int) -> Iterator[Any]:
    """Called with each case that is done; a bar on a terminal that has rich."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)


def names_of(chosen: argparse.Namespace, suites: list[str], device: torch.device) -> list[str]:
    """Operations that `--only` may name."""
    every = argparse.Namespace(**{**vars(chosen), "only": None})
    found = [case[0] for case in run.SUITES["server"].wanted(every, device)] if "server" in suites else []
    found += ["lora_linear", "smallest call"] if "lora" in suites else []
    found += ["loss"] if "loss" in suites else []
    found += ["layer", *run.SUITES["peft"].MODELS] if "peft" in suites else []
    return [f"'{name}'" if " " in name else name for name in dict.fromkeys(found + ["round"] * ("round" in suites))]


def measure(options: argparse.Namespace, command: str) -> int:
    budget = options.budget or (QUICK_SECONDS if options.quick else float("inf"))
    end = time.monotonic() + budget
    device = chosen_device(options)
    read_clocks, how = clocks.reader(device)
    every = torch.get_num_threads()
    counts = options.threads or ([1] if device.type == "cuda" else [every] if options.quick or options.tiny else sorted({1, every}))
    suites, why = chosen_suites(options, device)
    why += left_of_quick(options, device)
    of_a_case = QUICK_TIMED if options.quick else 4.0
    setting = {"only": options.only, "rungs": options.rungs, "memory_gb": free_gb(device), "seconds": 0.02 if options.tiny else of_a_case}
    chosen = argparse.Namespace(quick=options.tiny, short=options.quick and not options.tiny, how=How(cold=options.cold), **setting)
    numbers = {name: len(run.SUITES[name].wanted(chosen, device)) for name in suites}
    if not suites:
        raise ValueError(f"nothing to measure: {'; '.join(why)}")
    for name in options.only or []:
        one = argparse.Namespace(**{**vars(chosen), "only": [name]})
        if not any(run.SUITES[suite].wanted(one, device) for suite in suites):
            raise ValueError(f"--only {name}: no case of {', '.join(suites)} has this name; there are {', '.join([*names_of(chosen, suites, device), *why])}")
    if options.only and not any(numbers.values()):
        narrow = "names of one kind widen, those of different kinds (operation or model, shape, type, T=, K=) narrow"
        raise ValueError(f"--only {' '.join(options.only)}: no case of {', '.join(suites)} has all of these; {narrow}")
    result = run.opening("kit", command, device)
    result |= {"measurement": not options.tiny, "left_out": why, "refused": [], "cold": options.cold} | ({"clocks": how} if how else {})
    print("\n".join(describe(result, counts)), flush=True)
    if how:
        print(f"clocks    {how}")
    if options.cold:
        print("caches    overwritten before every call")
    if options.tiny:
        print("tiny shapes: these figures mean nothing")
    elif result["load_average"]["before"] > 0.5 * max(counts):
        print("other work is running here: wait for a quiet machine, or read these figures as those of a busy one")

    def refuse(suite: str, last: str, error: Exception) -> None:
        said = str(error).strip().splitlines() or [""]
        text = f"{suite}, after {last}: {type(error).__name__}: {said[0]}"
        result["refused"].append(text)
        print(f"  NOT MEASURED {text}", file=sys.stderr, flush=True)
        if os.environ.get("HETLORA_DEBUG") == "1":
            traceback.print_exception(error)

    import_others(suites)
    short_of_time: list[str] = []
    names = ["ceilings", *(name for name in suites if numbers[name])]
    total = len(counts) * (len(run.SUITES["ceilings"].wanted(chosen, device)) + sum(numbers.values()))
    with progress(total) as advance:
        for place, name in enumerate(names):
            print(f"\n{name}", flush=True)
            minutes = (end - time.monotonic()) / (len(names) - place) / 60  # an equal part of what is left
            case: list[dict[str, Any]] = []
            for one in run.measured(name, chosen, device, counts, minutes, refuse):
                if isinstance(one, str):
                    why.append(f"{name}: {one}")
                    short_of_time.append(name)
                    continue
                new_case = not case or figures.key(case[0]) != figures.key(one)
                reading = read_clocks() if read_clocks and new_case else case[0].get("clocks") if case else None
                one = {"suite": name, **one} | ({"clocks": reading} if reading else {})
                if case and new_case:
                    show(case, result)
                    case = []
                    advance(name)
                case.append(one)
                result["results"].append(one)
                run.write(result, options.json)
            show(case, result)
    for text in why:
        print(f"left out  {text}")
    if suited := [name for name in suites if name in short_of_time]:
        print(f"          the same command with --suite {' '.join(suited)} --budget {4 * budget:g} measures more of {'it' if len(suited) == 1 else 'them'}")
    run.write(result, options.json)
    load = result["load_average"]["after"]
    print(f"load average after {load:.1f}" + (f"; written: {options.json}" if options.json else ""))
    if options.report is not None:
        draw(options.json, options.report)
    return 1 if result["refused"] else 0


def page_module() -> Any:
    return importlib.import_module(f"{__package__}.page")  # matplotlib and jinja2: the extra


def not_installed() -> str:
    """What drawing needs and is not there, and how to get it; "" where all is."""
    missing = [package for package in PAGE_NEEDS if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(missing)} ({WAY_OUT})" if missing else ""


def draw(file: Path, folder: Path) -> None:
    if lacking := not_installed():
        print(f"no report: {lacking}; then: hetlora bench report {shlex.quote(str(file))}")
        return
    page_module().main(argparse.Namespace(file=file, output=folder))


def show(case: list[dict[str, Any]], result: dict[str, Any]) -> None:
    if not case:
        return
    best, rows = figures.ceilings(result["results"]), {record["provider"]: record for record in case}
    if figures.is_ceiling(case[0]):
        (record,) = case
        text = figures.line({**record, "provider": f"{record['op']} {record['dtype']}, t={record['threads']}"}, rows, best)
        print(f"{text}  {record['shape']}", flush=True)
        return
    print("\n".join([figures.title(figures.key(case[0])), *(figures.line(record, rows, best) for record in case)]), flush=True)
    if reading := case[0].get("clocks"):
        print(f"  {clocks.line(reading)}", flush=True)


def said(error: Exception) -> str:
    """One line; of a file what is wrong with it, without the number of the error."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or 'cannot be used').lower()}"
    return " ".join(str(error).split())


def main(argv: list[str] | None = None, prog: str = "hetlora bench") -> int:
    """The command; returns its exit status: 0, 1 where something was not measured or a bound broken, 2 for bad input, which is one line."""
    given = sys.argv[1:] if argv is None else argv
    try:
        if given[:1] == ["compare"]:
            return compare.main(compare.arguments(given[1:], f"{prog} compare", Parser))
        if given[:1] == ["report"]:
            if lacking := not_installed():
                raise ValueError(f"report: {lacking}")
            page = page_module()
            return int(page.main(page.arguments(given[1:], f"{prog} report", Parser)))
        command = shlex.join([*prog.split(), *given])
        if "--static" in given:
            return static.main(static.arguments(given, prog, Parser), command)
        return measure(arguments(given, prog), command)
    except (ValueError, OSError, ImportError) as error:
        print(f"{prog}: error: {said(error)}", file=sys.stderr)
        return 2
