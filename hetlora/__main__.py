"""Entry of the `hetlora` command and of `python -m hetlora`: one line and exit status 2 where the `fed` extra is not installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys

from hetlora import _missing_extra, processor, signals
from hetlora.errors import ConfigError
from hetlora.processes import place


def main() -> int | None:
    """Run the command line; returns its exit status."""
    if _follows():
        return _follow()
    message = _missing_extra()
    if message is not None and sys.argv[1:] == ["info"]:  # it needs the kernels alone
        from hetlora.info import print_info

        print_info()
        print(f"\n{message}")
        return 0
    if message is not None and sys.argv[1:2] == ["bench"]:
        return _bench(sys.argv[2:])
    if sys.argv[1:] == ["tune"] and importlib.util.find_spec("triton") is None:
        print("hetlora: error: tune: needs triton, whose kernels it measures; pip install triton", file=sys.stderr)
        return 2
    if message is not None and sys.argv[1:] == ["tune"]:  # it needs torch and triton alone
        return int(importlib.import_module("hetlora_kernels.triton.tune").main())
    if message is not None:
        print(message, file=sys.stderr)
        return 2
    with signals.quiet():
        from hetlora.cli import main as command_line

    return command_line()


def _bench(arguments: list[str]) -> int:
    """With torch alone: it says itself which rows are left out for want of a package."""
    try:
        if not {"-h", "--help", "--static", "compare", "report"} & {*arguments}:
            print(processor.prepare(), flush=True)
        return int(importlib.import_module("hetlora_kernels.benchmarks.kit").main(arguments))
    except ConfigError as error:
        print(f"hetlora: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what was measured is in the file of --json", file=sys.stderr)
        return 130


def _follows() -> bool:
    try:
        return place().follows
    except ConfigError:
        return False  # the command line says it


def _follow() -> int:
    """One process of several: it reads no argument and says nothing, but does what process 0 orders."""
    signals.end_at_once()
    given = sys.argv[1 + (sys.argv[1:2] == ["--"]) :]
    if given[:1] != ["run"]:
        return 0  # process 0 does it alone, or refuses it
    if message := _missing_extra():
        print(f"{message} (process {place().number})", file=sys.stderr)
        return 2
    from hetlora.cli import asks_for_help

    if asks_for_help(given[1:]):
        return 0
    processor.prepare()
    from hetlora.spread import follow

    return follow()


if __name__ == "__main__":
    sys.exit(main())
