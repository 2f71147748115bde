"""hetlora on many machines through Flower: a strategy, a client app and a server app. The simulation of `hetlora run` needs nothing of it.

The names are loaded at first use. `ImportError` names the extra to install where Flower is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetlora.deployed.local import Base, describe_base
    from hetlora.deployed.settings import Waiting
    from hetlora.flower.client import client_app
    from hetlora.flower.server import server_app
    from hetlora.flower.strategy import HetLora

__all__ = ["Base", "HetLora", "Waiting", "client_app", "describe_base", "server_app"]

_PLACES = {
    "Base": "deployed.local",
    "HetLora": "flower.strategy",
    "Waiting": "deployed.settings",
    "client_app": "flower.client",
    "describe_base": "deployed.local",
    "server_app": "flower.server",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'hetlora.flower' has no attribute {name!r}")
    if importlib.util.find_spec("flwr") is None:
        raise ImportError("hetlora.flower needs Flower; install it with: pip install '.[flower]'")
    value = getattr(importlib.import_module(f"hetlora.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
