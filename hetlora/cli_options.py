"""Options of the `hetlora` commands: those made of the fields of `Config` and `ComparisonPlan`, and those that several commands share."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import click

from hetlora import processor
from hetlora.cli_lines import SHOWN, tell
from hetlora.compare.methods import ALONE, METHODS, OWNED, ComparisonPlan
from hetlora.config import Config, setting_group

_WIDTH = 78  # columns of a page of help
_OF_OWN_RANKS = [name for name, method in METHODS.items() if method.ranks == "own"]


class GroupedOptions(click.Command):
    """A command whose help lists the options that come from `Config` under their groups, and what each method does."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "group", "command"), []).append(record)
        for name in sorted(sections, key=lambda name: name == "command"):
            with formatter.section({"command": "Other options"}.get(name, f"{name.capitalize()} settings")):
                formatter.write_dl(sections[name])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = _OF_OWN_RANKS if any(parameter.name == "method" for parameter in self.params) else METHODS
        with formatter.section("Methods (docs/methods.md has their equations)"):
            formatter.write_dl([(name, METHODS[name].text) for name in shown])


class _Tokens(click.ParamType):
    name = "integer or auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return 0 if value == "auto" else click.INT.convert(value, param, ctx)


class _ConfigOption(click.Option):
    """One field of `Config` on the command line; None when it was not given."""

    def __init__(self, name: str, hidden: bool = False) -> None:
        field = Config.model_fields[name]
        self.group = setting_group(name)
        flag, kind = f"--{name.replace('_', '-')}", field.annotation
        if kind is bool:
            flag, shown = f"{flag}/--no-{name.replace('_', '-')}", "yes" if field.default else "no"
            choice: Any = None
        else:
            shown = str(field.default)
            choice = click.Choice([str(v) for v in typing.get_args(kind)]) if typing.get_origin(kind) is typing.Literal else kind
        wide = isinstance(choice, click.Choice) and len(f"  {flag} [{'|'.join(choice.choices)}]") > _WIDTH
        choice = _Tokens() if name == "max_tokens_per_step" else choice
        metavar = "NAME" if wide else None  # a list wider than a terminal breaks inside a name; the description has all
        super().__init__([flag, name], type=choice, default=None, metavar=metavar, help=f"{field.description} [default: {shown}]", hidden=hidden)


def config_options(command: click.Command) -> click.Command:
    """Add an option for every field of `Config`, in its order, in front of the command's own."""
    command.params = [_ConfigOption(name) for name in Config.model_fields] + command.params
    return command


class _PlanOption(click.Option):
    """One field of `methods.ComparisonPlan` on the command line; None when it was not given."""

    group = "comparison"

    def __init__(self, name: str) -> None:
        field = ComparisonPlan.model_fields[name]
        shown = f" [default: {field.default}]" if field.default else ""
        super().__init__([f"--{name.replace('_', '-')}", name], type=field.annotation, default=None, help=f"{field.description}{shown}")


def comparison_options(command: click.Command) -> click.Command:
    """Add an option for every field of `ComparisonPlan`, and of `Config` but those that the methods set. Those of privacy, refused, are not listed."""
    own = [_ConfigOption(name, hidden=name.startswith("dp_")) for name in Config.model_fields if name not in (*OWNED, *ALONE)]
    command.params = [_PlanOption(name) for name in ComparisonPlan.model_fields] + own + command.params
    return command


def _choose_threads(ctx: click.Context, parameter: click.Parameter, value: int | None) -> None:
    if not ctx.resilient_parsing:
        tell(processor.prepare(value))


threads_option = click.option(
    "--threads",
    type=int,
    expose_value=False,
    callback=_choose_threads,
    help="Threads of the computation. [default: OMP_NUM_THREADS, else the cores this process may use]",
)


def _choose_output(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and ctx.meta.setdefault(SHOWN, parameter.name) != parameter.name:
        raise click.UsageError("--quiet and --json: expected one of them, got both")


def _output_option(flag: str, text: str) -> Callable[[Any], Any]:
    return click.option(flag, is_flag=True, is_eager=True, expose_value=False, callback=_choose_output, help=text)


quiet_option = _output_option("--quiet", "Show nothing but warnings and errors.")
json_option = _output_option("--json", "Show one JSON object a line, for scripts.")
