"""hetlora on many machines through NVIDIA FLARE: a controller, an aggregator and a client's loop. The simulation of `hetlora run` needs nothing of it.

The names are loaded at first use. `ImportError` names the extra to install where NVFLARE is missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetlora.late_names import late_names

if TYPE_CHECKING:
    from hetlora.nvflare.aggregator import HetLoraAggregator
    from hetlora.nvflare.client import run_client
    from hetlora.nvflare.controller import HetLora

__all__ = ["HetLora", "HetLoraAggregator", "run_client"]

_PLACES = {"HetLora": "hetlora.nvflare.controller", "HetLoraAggregator": "hetlora.nvflare.aggregator", "run_client": "hetlora.nvflare.client"}

__getattr__ = late_names(__name__, _PLACES, ("nvflare", "NVFLARE", "nvflare"))
