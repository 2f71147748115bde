"""hetlora on many machines through NVIDIA FLARE: a controller, an aggregator and a client's loop. The simulation of `hetlora run` needs nothing of it.

The names are loaded at first use. `ImportError` names the extra to install where NVFLARE is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hetlora.nvflare.aggregator import HetLoraAggregator
    from hetlora.nvflare.client import run_client
    from hetlora.nvflare.controller import HetLora

__all__ = ["HetLora", "HetLoraAggregator", "run_client"]

_PLACES = {"HetLora": "controller", "HetLoraAggregator": "aggregator", "run_client": "client"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'hetlora.nvflare' has no attribute {name!r}")
    if importlib.util.find_spec("nvflare") is None:
        raise ImportError("hetlora.nvflare needs NVFLARE; install it with: pip install '.[nvflare]'")
    value = getattr(importlib.import_module(f"hetlora.nvflare.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
