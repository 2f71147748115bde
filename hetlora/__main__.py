"""Entry of the `hetlora` command and of `python -m hetlora`: one line and exit status 2 where the `fed` extra is not installed."""

from __future__ import annotations

import sys

from hetlora import _missing_extra, signals


def main() -> int | None:
    """Run the command line; returns its exit status."""
    message = _missing_extra()
    if message is not None and sys.argv[1:] == ["info"]:  # it needs the kernels alone
        from hetlora.info import print_info

        print_info()
        print(f"\n{message}")
        return 0
    if message is not None:
        print(message, file=sys.stderr)
        return 2
    with signals.quiet():
        from hetlora.cli import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
