"""hetlora on many machines through Flower: a strategy, a client app and a server app. The simulation of `hetlora run` needs nothing of it."""

try:
    import flwr.app  # noqa: F401
except ImportError as error:
    raise ImportError(f"hetlora.flower needs Flower's Message API ({error}); install it with pip install '.[flower]'") from None

from hetlora.flower.client import client_app
from hetlora.flower.members import Base
from hetlora.flower.server import describe_base, server_app
from hetlora.flower.settings import Waiting
from hetlora.flower.strategy import HetLora

__all__ = ["Base", "HetLora", "Waiting", "client_app", "describe_base", "server_app"]
