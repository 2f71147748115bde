"""The `hetlora` command: demo, run, compare, report, export, info, tune, bench, and those of cli_flower and cli_nvflare.

Bad input is one line on stderr and exit status 2.

A command loads what it needs when it runs: torch, transformers and matplotlib take seconds, and help and most faults need none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from hetlora import __version__, cli_flower, cli_nvflare, processor, signals
from hetlora.cli_lines import SHOWN, Commands, leave_quietly, say, tell
from hetlora.cli_options import GroupedOptions, comparison_options, config_options, json_option, quiet_option, threads_option
from hetlora.compare.methods import ComparisonPlan, default_method, left_out, make_plan, method_settings, refuse_private
from hetlora.config import Config, ConfigError
from hetlora.processes import only_run, place
from hetlora.report.json_lines import JsonObserver, SilentObserver, print_line
from hetlora.run_folder import BITS_ONLY, LENGTH, is_run, read_config


def _settings(config_file: str | None, flags: dict[str, Any]) -> Config:
    """Defaults, then the file, then the flags that were given; says which method the run has."""
    source, values = _given(config_file, flags)
    values, chosen = (values, flags["method"]) if "method" in flags else default_method(values)
    cfg = Config.create(source, **values)
    tell(f"method: {chosen}")
    return cfg


def _given(config_file: str | None, flags: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(where the settings come from, the settings): flags override the row of --method, which overrides the file.

    They are checked together, as some are refused only in company.
    """
    values = Config.read(config_file) if config_file is not None else {}
    rest = {name: value for name, value in flags.items() if name != "method"}
    if "method" in flags:
        if dropped := [name for name in left_out(flags["method"], values) if name not in rest]:
            warnings.warn(f"--method {flags['method']} leaves out {', '.join(dropped)} (from {config_file})", stacklevel=2)
        values = method_settings(flags["method"], values)
    source = "command line" if config_file is None else f"config file {config_file}" + (" and command line" if flags else "")
    return source, {**values, **rest}


def saved_settings(config_file: str | None, flags: dict[str, Any]) -> Config:
    """The config of the run folder to continue; what the file or the flags ask for must agree with it, but for `BITS_ONLY` and `LENGTH`."""
    source, asked = _given(config_file, flags)
    output = Path(asked.pop("output", Config.model_fields["output"].default))
    saved = read_config(output)
    wanted = Config.create(source, **{**saved.model_dump(), **asked})
    contradicting = [name for name in asked if name not in (*BITS_ONLY, *LENGTH) and getattr(wanted, name) != getattr(saved, name)]
    if contradicting:
        what = ", ".join(f"--{name.replace('_', '-')} {getattr(wanted, name)} (the run has {getattr(saved, name)})" for name in contradicting)
        raise ConfigError(f"--resume: the run in {output} goes on with its own settings; leave out {what}, or start a new run in another folder")
    return wanted.model_copy(update={"output": str(output)})


class _Watched(AbstractContextManager["_Watched"]):
    """A run under a console observer; an interrupt becomes one line that says how to continue, and exit status 130 (143 for SIGTERM, 129 for SIGHUP)."""

    def __init__(self, output: str | None, comparison: bool = False, again: str = "") -> None:
        from hetlora.report.terminal import ComparisonObserver, ConsoleObserver

        self.shown: str | None = click.get_current_context().meta.get(SHOWN)
        self.observer: Any = {"json": JsonObserver, "quiet": SilentObserver}.get(self.shown or "", ComparisonObserver if comparison else ConsoleObserver)()
        self._output, self._comparison = output, comparison
        self._again = again or f"the same command continues the comparison in {output}"

    def __enter__(self) -> _Watched:
        if self.shown is None:
            self.observer.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if self.shown is None:
            with contextlib.suppress(OSError):  # a terminal that is gone
                self.observer.__exit__(kind, error, trace)
        if not isinstance(error, (KeyboardInterrupt, BrokenPipeError)):
            return
        how = signals.how(error)
        output = self.observer.cfg.output if self.observer.cfg else self._output
        if self._comparison:
            say(f"{how}; {self._again}", err=True)
        elif output and is_run(Path(output)):
            say(f"{how}; continue with hetlora run --resume --output {output}", err=True)
        else:
            say(f"{how} before the first round; nothing was written that could be continued", err=True)
        if isinstance(error, BrokenPipeError):
            leave_quietly(error)
        raise SystemExit(signals.exit_status(error))


def _loaded(module: str) -> Any:
    """A module that takes seconds to import; an interrupt meanwhile is quiet."""
    with signals.quiet():
        return importlib.import_module(module)


def _finish(watched: _Watched, result: Any) -> None:
    from hetlora.report.terminal import print_summary

    if watched.shown is None:
        print_summary(watched.observer.console, result.summary, read_config(result.run_dir).training_kind.own_text)
    page = _loaded("hetlora.report.page").write_report(result.run_dir)
    _close(watched, {"run folder": result.run_dir, "report": page})


def _close(watched: _Watched, written: dict[str, Path]) -> None:
    """Say where everything is."""
    if watched.shown == "json":
        print_line("end", **{name.replace(" ", "_"): str(path) for name, path in written.items()})
    elif watched.shown is None:
        for name, path in written.items():
            say(f"{name}: {path}")


def _finish_comparison(watched: _Watched, comparison: Any, opening: Sequence[str] = (), columns: Mapping[str, int] | None = None) -> None:
    _loaded("hetlora.compare.saved").save(comparison, opening)
    pages = _loaded("hetlora.compare.page")
    table = _loaded("hetlora.compare.figures").tabulate(comparison)
    page = pages.write_comparison(table, opening)
    if watched.shown is None:
        pages.print_comparison(watched.observer.console, table, columns or pages.PRINTED)
    _close(watched, {"folder": comparison.folder, "report": page})


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="hetlora")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Federated fine-tuning with LoRA adapters of different ranks (HETLORA)."""
    only_run(ctx.invoked_subcommand)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command()
@click.option("--rounds", type=int, help="Rounds. [default: 9; with --fast: 2]")
@click.option("--output", help="Folder of the comparison; another number is put behind a name that is taken. [default: runs/demo]")
@click.option("--seed", type=int, help="Seed of everything drawn in the run.")
@click.option("--gamma", type=float, help="Rank decay of pruning.")
@click.option("--prune-lambda", type=float, help="Weight of the pruning regulariser; left out, it is chosen by a rule that the demo prints.")
@click.option("--fast", is_flag=True, help="A tiny model and very few rounds: shows that everything works, not what it achieves.")
@threads_option
@quiet_option
@json_option
def demo(fast: bool, **given: Any) -> None:
    """A whole federation on this machine, offline, in minutes, by four methods side by side.

    Makes a small byte-level model from text of Python's own library, then adapts it over packages of that library: one package is one client.
    """
    overrides = {name: value for name, value in given.items() if value is not None}
    demo_module = _loaded("hetlora.demo")
    with _Watched(overrides.get("output", demo_module.SETTINGS["output"]), comparison=True, again="hetlora demo starts anew") as watched:
        comparison, opening = demo_module.run_demo(watched.observer, **overrides, **({"fast": True} if fast else {}))
    _finish_comparison(watched, comparison, opening, demo_module.COLUMNS)


@config_options
@cli.command(cls=GroupedOptions)
@threads_option
@quiet_option
@json_option
@click.option("--config", "config_file", metavar="FILE", help="YAML, TOML or JSON file with settings of these names; flags override it.")
@click.option("--method", metavar="NAME", help="Take the settings that make up a method; all are listed below.")
@click.option(
    "--resume", is_flag=True, help="Continue the run in --output with its own settings, to the same result as without the stop; --rounds N lengthens it."
)
def run(config_file: str | None, resume: bool, **options: Any) -> None:
    """A federation of your own: your model, your data.

    The method is fold unless --method, or a setting of another method (--train, --merge, --gamma, ...), says otherwise. In the study of docs/results.md fold
    was behind HETLORA on no data set, and far ahead where the shift is large, for about the same bytes. --method hetlora is the published method.
    """
    flags = {name: value for name, value in options.items() if value is not None}
    cfg = saved_settings(config_file, flags) if resume else _settings(config_file, flags)
    simulate = _loaded("hetlora.loop").simulate if place().count == 1 else _loaded("hetlora.spread").lead
    with _Watched(cfg.output) as watched:
        result = simulate(cfg, resume=resume, observer=watched.observer)
    _finish(watched, result)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether `hetlora run` with these arguments prints its help and ends. An option's value that reads '--help' asks for none."""
    with click.Context(run, help_option_names=cli.context_settings["help_option_names"]) as ctx:
        try:
            _, _, given = run.make_parser(ctx).parse_args(list(arguments))
        except click.UsageError:
            return False
        return run.get_help_option(ctx) in given


@comparison_options
@cli.command(cls=GroupedOptions)
@threads_option
@quiet_option
@json_option
@click.option("--config", "config_file", metavar="FILE", help="YAML, TOML or JSON file with settings of these names; flags override it.")
def compare(config_file: str | None, **options: Any) -> None:
    """HETLORA against its baselines: same data, model, clients, seeds and budget; a table and pictures.

    Each method and seed is a run of its own under --output. The same command continues a comparison that was stopped, and runs nothing twice.
    """
    source, given = _given(config_file, {name: value for name, value in options.items() if value is not None})
    plan = make_plan(source, **{name: given.pop(name) for name in ComparisonPlan.model_fields if name in given})
    refuse_private(source, given)
    given.setdefault("output", "runs/comparison")
    common = Config.create(source, **given)
    runs = _loaded("hetlora.compare.run")
    with _Watched(common.output, comparison=True) as watched:
        comparison = runs.run_comparison(common, plan, watched.observer)
    _finish_comparison(watched, comparison)


@cli.command()
@click.argument("run_dir", metavar="RUN")
@click.option("-o", "--output", "out_dir", metavar="DIR", help="Folder for the report. [default: RUN]")
def report(run_dir: str, out_dir: str | None) -> None:
    """Write report.html and its pictures for the run folder RUN, finished or not; or the page of the finished comparison in RUN."""
    saved = _loaded("hetlora.compare.saved") if not is_run(Path(run_dir)) else None
    if saved is not None and saved.is_comparison(Path(run_dir)):
        if out_dir is not None:
            raise ConfigError(f"--output: the page of a comparison stands in its own folder, {run_dir}; leave it out")
        table = _loaded("hetlora.compare.figures").tabulate(saved.reopen(Path(run_dir)))
        say(f"report: {_loaded('hetlora.compare.page').write_comparison(table, saved.read(Path(run_dir)).get('opening', []))}")
        return
    say(f"report: {_loaded('hetlora.report.page').write_report(run_dir, out_dir)}")


@cli.command()
@click.argument("run_dir", metavar="RUN")
@click.option("--rank", type=int, help="Keep this many leading rank rows of the global adapter. [default: all]")
@click.option("--client", metavar="NAME", help="This client's own adapter, at its own rank, instead of the global one.")
@click.option("-o", "--output", "out_dir", metavar="DIR", help="Folder to write the adapter to; it must not exist or be empty.")
@click.option("--merged", "merged_dir", metavar="DIR", help="Folder to write the whole model to, base and adapter in one.")
@click.option("--dtype", help="Type of the weights that --merged writes: float32, bfloat16, float16 or float64. [default: that of the run]")
def export(run_dir: str, rank: int | None, client: str | None, out_dir: str | None, merged_dir: str | None, dtype: str | None) -> None:
    """Write an adapter of the run folder RUN in PEFT's format, for PeftModel.from_pretrained, or the whole model with --merged; each with a model card."""
    if out_dir is None and merged_dir is None:
        raise click.UsageError("export: expected -o DIR for the adapter or --merged DIR for the whole model, got neither")
    if dtype is not None and merged_dir is None:
        raise click.UsageError("--dtype: of the weights that --merged DIR writes; an adapter keeps its own type")
    if merged_dir is not None:
        _loaded("hetlora.export_model").check_target(merged_dir, dtype)
    if out_dir is not None:  # first, as it takes less: a run without an adapter is refused before a model is written
        exports = _loaded("hetlora.export")
        folder = exports.export_adapter(run_dir, out_dir, rank=rank, client=client)
        saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        ranks = {saved["r"], *saved["rank_pattern"].values()}
        shown = f"rank {saved['r']}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}, by module"
        say(f"adapter: {folder} ({shown})")
        if base := exports.base_model_of(run_dir):
            say(f"base model: {base}")
    if merged_dir is not None:
        say(f"merged model: {_loaded('hetlora.export_model').export_merged(run_dir, merged_dir, rank=rank, client=client, dtype=dtype)}")


@cli.command()
@click.option("--model", default="", help="A local folder, a hub id or 'demo': says too whether it trains without padding (--padding-free).")
def info(model: str) -> None:
    """Versions, devices, packages, and which backend serves each operation."""
    _loaded("hetlora.info").print_info()
    if model:
        say("")
        cfg = Config.create("info", model=model, padding_free="auto")
        path = _loaded("hetlora.federation").resolve_model(cfg)
        say(f"Batches of {model}: {_loaded('hetlora.packing').batching_of_path(cfg, path)}")


@cli.command()
def tune() -> None:
    """Measure the launch parameters of the Triton kernels on this machine's CUDA device, and keep them for it."""
    say(f"written: {_loaded('hetlora_kernels.triton.tune').tune(click.echo)}")


@cli.command(context_settings={"ignore_unknown_options": True}, add_help_option=False, options_metavar="[compare|report] [OPTIONS]")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="")
def bench(arguments: tuple[str, ...]) -> int:
    """Measure this machine: its ceilings, every operation beside them and beside other ways; compare such files, or write a page of one."""
    if not {"-h", "--help", "--static", "compare", "report"} & {*arguments}:
        tell(processor.prepare())
    return int(_loaded("hetlora_kernels.benchmarks.kit").main(list(arguments)))


for _command in (cli_flower.serve, cli_flower.join, cli_flower.flower, cli_nvflare.nvflare):
    cli.add_command(_command)


def main() -> int | None:
    """Entry of the `hetlora` script; ends the process with the command's exit status."""
    return cli()


if __name__ == "__main__":
    sys.exit(main())
