"""hetlora on many machines through Flower: a strategy, a client app and a server app. The simulation of `hetlora run` needs nothing of it.

The names are loaded at first use. `ImportError` names the extra to install where Flower is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetlora.late_names import late_names

if TYPE_CHECKING:
    from hetlora.deployed.local import Base, describe_base
    from hetlora.deployed.settings import Waiting
    from hetlora.flower.client import client_app
    from hetlora.flower.server import server_app
    from hetlora.flower.strategy import HetLora

__all__ = ["Base", "HetLora", "Waiting", "client_app", "describe_base", "server_app"]

_PLACES = {
    "Base": "hetlora.deployed.local",
    "HetLora": "hetlora.flower.strategy",
    "Waiting": "hetlora.deployed.settings",
    "client_app": "hetlora.flower.client",
    "describe_base": "hetlora.deployed.local",
    "server_app": "hetlora.flower.server",
}

__getattr__ = late_names(__name__, _PLACES, ("flwr", "Flower", "flower"))
