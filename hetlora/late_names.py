"""Names of a package that are loaded when they are first asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hetlora.extras import install


def late_names(package: str, places: Mapping[str, str], needs: tuple[str, str, str] | None = None) -> Callable[[str], Any]:
    """The `__getattr__` of `package`: loads a name from its module, `places[name]`, and keeps it.

    needs: (module, what it is called, extra): without that module an `ImportError` names the extra to install.
    """

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if needs is not None and importlib.util.find_spec(needs[0]) is None:
            raise ImportError(f"{package} needs {needs[1]}; install it with: {install(needs[2])}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
