"""How the `hetlora` command speaks: a result, a warning or an error is one line, bad input has no traceback, and a reader that left is no fault."""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import click

from hetlora import signals
from hetlora.report.json_lines import print_line
from hetlora.report.text import printable, wrap

SHOWN = "hetlora.shown"  # of click's context: 'quiet' or 'json' where that was asked for


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def say(text: object, err: bool = False) -> None:
    """One line; in a terminal as many as it takes, broken between words. What closed the terminal (SIGHUP) must not become the command's error."""
    stream, text = sys.stderr if err else sys.stdout, printable(text)
    stream = getattr(stream, "rich_proxied_file", stream)  # beside a progress bar rich stands in for it, and says that it is no terminal
    try:
        click.echo("\n".join(wrap(text, shutil.get_terminal_size().columns)) if stream.isatty() else text, err=err)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not err:
            raise


def tell(text: str) -> None:
    """One line about the command's work, in the form that --quiet or --json asks for."""
    shown = click.get_current_context().meta.get(SHOWN)
    if shown == "json":
        print_line("message", text=text)
    elif shown is None:
        say(text)


def _describe(error: BaseException) -> str:
    """What went wrong, in one line without the name of a Python class."""
    if isinstance(error, click.ClickException):
        return _usage_text(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or 'cannot be used').lower()}"
    return _one_line(error) or type(error).__name__


def _usage_text(error: click.ClickException) -> str:
    """Click's message, beginning in lower case; for unknown options the nearest known ones."""
    text = _one_line(error.format_message()).rstrip(".")
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        known = [name for parameter in error.ctx.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        close = difflib.get_close_matches(error.option_name, known, n=2, cutoff=0.7)
        hint = f"did you mean {' or '.join(close)}?" if close else f"'{error.ctx.command_path} --help' lists them"
        return f"no such option {error.option_name} ({hint})"
    return text[:1].lower() + text[1:]


def _fail(error: BaseException) -> NoReturn:
    if os.environ.get("HETLORA_DEBUG") == "1":
        traceback.print_exception(error)
    say(f"hetlora: error: {_describe(error)}", err=True)
    sys.exit(2)


def leave_quietly(error: BrokenPipeError) -> NoReturn:
    """Nobody reads the output any more, as after `| head`: the status that SIGPIPE gives, and nothing written at the interpreter's end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(signals.exit_status(error))


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None) -> None:
    say(f"hetlora: warning: {_one_line(message)}", err=True)


class Commands(click.Group):
    """Click's group with the project's rules for errors: one line, no traceback for bad input."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=2)
            raise click.UsageError(
                f"no such command '{args[0]}' ({'did you mean ' + ' or '.join(close) if close else 'there are ' + ', '.join(self.commands)})"
            )
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            leave_quietly(error)
        except KeyboardInterrupt as error:  # here, as click's own handling writes an empty line first
            say(f"hetlora: {signals.how(error)}", err=True)
            sys.exit(signals.exit_status(error))

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run_command: Callable[..., Any] = super().main
        if not standalone_mode:
            return run_command(*args, standalone_mode=False, **extra)
        for stream in (sys.stdout, sys.stderr):
            # A client's name must not stop a run because the terminal cannot show it.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        with warnings.catch_warnings(), signals.as_interrupts():
            warnings.showwarning = _show_warning
            try:
                sys.exit(run_command(*args, standalone_mode=False, **extra) or 0)
            except (click.ClickException, ValueError, OSError, ImportError) as error:
                _fail(error)
