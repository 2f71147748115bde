"""The client's side: the loop of a training script under NVFLARE's client API, whose work is that of `hetlora.deployed.local`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel

from hetlora.config import Config, ConfigError
from hetlora.data import ClientData
from hetlora.deployed import local
from hetlora.deployed.local import Client, LoadData, LoadModel, base_model
from hetlora.deployed.settings import Node
from hetlora.nvflare.models import REFUSED, SETTINGS, content_of, to_model, words_of

log = logging.getLogger("hetlora.nvflare")


def own_text(cfg: Config, node: Node) -> ClientData:
    """The text of the client that `node` is among the clients of `cfg.data`: at its place there, if it has one, else of its name."""
    return local.own_text(cfg, node if node.partition_id is None else replace(node, client=""))


def run_client(model: LoadModel = base_model, data: LoadData = own_text, settings: Sequence[str] | None = None) -> None:
    """Answer the server's tasks until the job ends: say who this is, train its rows of the bank, evaluate the bank on its own text.

    model: of the settings, the base model, frozen and in eval mode.   data: of the settings and the node, this client's sequences; `node.client` is the site's
        name where `settings` give no other. The defaults load what the settings `model` and `data` name.
    settings: NAME=VALUE of this node, default the script's arguments: client, partition-id, model, data, dtype, device, quantize, max-tokens-per-step,
        padding-free, gradient-checkpointing.

    The client has the name of its site. Adapter layers are fused in training. A task that fails is answered with one line that says why, and the next one is
    waited for.

    Call it in the script that a job gives to NVFLARE's `ScriptRunner`, with `framework=FrameworkType.RAW`.
    """
    flare.init()
    site = flare.get_site_name()
    own = {"client": site, **node_settings(sys.argv[1:] if settings is None else settings)}

    def named(cfg: Config, node: Node) -> ClientData:
        return replace(data(cfg, node), name=site)

    client = Client(model, named, log.info)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        flare.send(answer(client, str(flare.get_task_name()), received, own))


def answer(client: Client, task: str, received: FLModel, own: dict[str, Any]) -> FLModel:
    """What goes back for a task: what was asked for, or why it could not be done."""
    try:
        if task not in ("introduce", "train", "evaluate"):
            raise ConfigError(f"task {task!r}: expected introduce, train or evaluate")
        words = words_of(received)
        return to_model(client.answer(task, content_of(received), words.get(SETTINGS, {}), own))  # type: ignore[arg-type]
    except (ConfigError, OSError) as error:
        reason = " ".join(str(error).split())
        log.warning("refused: %s", reason)
    except Exception as error:  # NVFLARE would give up the client for the rest of the job
        reason = f"{type(error).__name__}; its own log says more"  # what such an error says may quote text
        log.exception("task %r failed", task)
    return to_model({}, **{REFUSED: reason[:1000]})


def node_settings(settings: Sequence[str]) -> dict[str, Any]:
    """{name: value} of NAME=VALUE: numbers and truth values as such, else text; `ConfigError` where it is none."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"{setting!r}: expected NAME=VALUE")
        truth = {"true": True, "false": False}.get(value)
        found[name] = truth if truth is not None else int(value) if value.isdecimal() else value
    return found
