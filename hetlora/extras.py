"""The command that installs an extra of this copy of the project."""

from __future__ import annotations

from pathlib import Path

_CHECKOUT = (Path(__file__).parents[1] / "pyproject.toml").is_file()


def install(extra: str) -> str:
    """`pip install '.[extra]'` in a checkout, `pip install 'hetlora[extra]'` where a wheel is installed: pip keeps the wheel and adds what the extra needs."""
    return f"pip install '{'.' if _CHECKOUT else 'hetlora'}[{extra}]'"
