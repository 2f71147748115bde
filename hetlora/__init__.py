"""Federated fine-tuning with LoRA adapters of different ranks: `Config`, `ConfigError`, `simulate`.

Raises `ImportError` naming the extra to install when a package of the `fed` extra is missing. The names are loaded at first use, so that
`import hetlora` itself loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hetlora.extras import install
from hetlora.late_names import late_names

if TYPE_CHECKING:
    from hetlora.config import Config, ConfigError
    from hetlora.loop import simulate

__version__ = "0.1.0"
__all__ = ["Config", "ConfigError", "__version__", "simulate"]

_FED_MODULES = ("transformers", "peft", "safetensors", "regex", "pydantic", "yaml", "rich", "click", "matplotlib", "jinja2", "platformdirs")
if sys.version_info < (3, 11):
    _FED_MODULES += ("tomli",)


def _missing_extra() -> str | None:
    """One line naming the absent modules of the `fed` extra and the command that installs them; None when all are there."""
    missing = [name for name in _FED_MODULES if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"hetlora needs its 'fed' extra (not installed: {', '.join(missing)}); run: {install('fed')}"


def _started_as_command() -> bool:
    """True under the `hetlora` script and `python -m hetlora`, which both import this package before their own `main` can catch anything."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    return "hetlora" in sys.orig_argv if program == "-m" else Path(program).stem in ("hetlora", "hetlora-script")


__getattr__ = late_names(__name__, {"Config": "hetlora.config", "ConfigError": "hetlora.config", "simulate": "hetlora.loop"})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if (_message := _missing_extra()) and not _started_as_command():
    raise ImportError(_message)
