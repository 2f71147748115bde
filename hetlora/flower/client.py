"""The client's side: a Flower `ClientApp` that answers who it is, trains its rows and evaluates the bank on its own text.

Nothing but the adapter's rows and the numbers in `messages` leaves the client.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore import log
from torch import nn

from hetlora import __version__
from hetlora.config import Config, ConfigError
from hetlora.data import ClientData, load_data
from hetlora.evaluate import evaluate_bank, evaluate_clients, pool_text
from hetlora.federation import resolve_model
from hetlora.flower import device, messages
from hetlora.flower.exchange import Order, Reply, exchange
from hetlora.flower.settings import Node, client_settings
from hetlora.memory import with_step_tokens
from hetlora.models import checkpointed, load_model, load_tokenizer, read_limits, target_shapes
from hetlora.ranks import Capability, Device
from hetlora.server import ServerState
from hetlora.training import Work

REFUSED = 400  # code of an error that this client states itself


@dataclass(frozen=True)
class Local:
    """What a client computes with."""

    model: nn.Module
    data: ClientData
    shapes: dict[str, tuple[int, int]]
    device: Device | None = None
    unmeasured: str = ""  # why there is none, where the server asked for one


LoadModel = Callable[[Config], nn.Module]
LoadData = Callable[[Config, Node], ClientData]


def base_model(cfg: Config) -> nn.Module:
    """The base model that the settings name, frozen and in eval mode."""
    path = resolve_model(cfg)
    read_limits(cfg, path)
    model: nn.Module = load_model(cfg, path)
    return model


def own_text(cfg: Config, node: Node) -> ClientData:
    """The text of the client that `node` is among the clients of `cfg.data`."""
    return _who(_clients(cfg), cfg, node)


@lru_cache(maxsize=1)
def _clients(cfg: Config) -> list[ClientData]:
    return load_data(cfg, load_tokenizer(resolve_model(cfg), cfg.trust_remote_code)).clients


def _who(clients: list[ClientData], cfg: Config, node: Node) -> ClientData:
    names = [client.name for client in clients]
    if node.client:
        if node.client not in names:
            raise ConfigError(f"node config: client = {node.client!r} is not in the data {cfg.data!r}, which has {names[:5]}")
        return clients[names.index(node.client)]
    if node.partition_id is not None:
        if node.partition_id >= len(names):
            raise ConfigError(f"node config: partition_id = {node.partition_id}, but the data {cfg.data!r} has {len(names)} clients")
        return clients[node.partition_id]
    if len(names) != 1:
        raise ConfigError(f"node config: the data {cfg.data!r} has {len(names)} clients, {names[:5]}; name this one with client=NAME")
    return clients[0]


def client_app(model: LoadModel = base_model, data: LoadData = own_text) -> ClientApp:
    """A `ClientApp` for `hetlora.flower.server_app`.

    model: of the settings, the base model, frozen and in eval mode.   data: of the settings and the node, this client's sequences. The defaults load what
        the settings `model` and `data` name; give your own to train on the tokens of your own loader.

    Flower starts a process for every message in a deployment. Within a process, as in Flower's simulation, the model is loaded once.

    A request that cannot be done is answered with one line that says why.

    >>> import torch
    >>> from hetlora.data import ClientData
    >>> from hetlora.flower import client_app
    >>> def my_data(cfg, node):
    ...     return ClientData(node.client, train=[torch.arange(9)], test=[torch.arange(5)])
    >>> client_app(data=my_data)
    <flwr.clientapp.client_app.ClientApp object at 0x...>
    """
    app = ClientApp()
    load = lru_cache(maxsize=1)(model)

    def answer(message: Message, context: Context, work: Callable[[Message, Config, Local], RecordDict]) -> Message:
        try:
            cfg, node = client_settings(context.run_config, context.node_config)
            base = load(cfg)
            shapes = target_shapes(base, cfg.target_modules)
            # a measure comes before `data` is called, which reads the text
            measured = _device(cfg, base, shapes) if work is _introduce and messages.measure_wanted(message.content) else (None, "")
            return Message(work(message, cfg, Local(base, data(cfg, node), shapes, *measured)), reply_to=message)
        except (ConfigError, OSError) as error:
            reason = " ".join(str(error).split())
            log(WARNING, "refused: %s", reason)
            return Message(Error(REFUSED, reason), reply_to=message)

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        return answer(message, context, _introduce)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, _train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, _evaluate)

    return app


def _device(cfg: Config, model: nn.Module, shapes: dict[str, tuple[int, int]]) -> tuple[Device | None, str]:
    """What the device measured, and why it could not: only the server knows whether this client has a rank already."""
    if not isinstance(cfg.rank_rule, Capability):
        return None, ""
    try:
        found, line = device.measure(cfg, model, shapes, base_digest(model))
    except ConfigError as error:
        reason = " ".join(str(error).split())[: messages.REASON_LENGTH]
        log(WARNING, "%s", reason)
        return None, reason
    log(INFO, "%s", line)
    return found, ""


def _introduce(message: Message, cfg: Config, local: Local) -> RecordDict:
    data, measured = local.data, local.device or Device(0, math.nan)
    capability = math.nan if data.capability is None else data.capability
    digests = modules_digest(local.shapes), base_digest(local.model)
    own = messages.Introduction(data.name, len(data.train), *digests, capability, measured.rank, measured.seconds, local.unmeasured, __version__)
    return RecordDict({messages.CONFIG: ConfigRecord(vars(own))})


def _order(message: Message, local: Local) -> Order:
    order = messages.order(message.content)
    if order.name != local.data.name:
        raise ConfigError(f"the server calls this client {order.name!r}, it is {local.data.name!r}")
    return order


def _state(message: Message, cfg: Config, order: Order, local: Local) -> tuple[Config, ServerState]:
    own, state = exchange(cfg).receive(cfg, message.content.array_records[messages.ARRAYS], order, local.shapes)
    state.bank = state.bank.to(next(local.model.parameters()).device)
    return own, state


def _train(message: Message, cfg: Config, local: Local) -> RecordDict:
    order = _order(message, local)
    cfg, _ = with_step_tokens(cfg, local.model, local.shapes, [max(order.ranks, default=1)])
    own, state = _state(message, cfg, order, local)
    work = Work(own.model_copy(update={"cobatch": False}), local.model, state, [local.data], order.number, order.lr)
    with checkpointed(local.model, cfg.gradient_checkpointing):
        trained = cfg.training_kind.load()(work)
    if trained.dropped:
        raise ConfigError(trained.dropped[0])
    reply = Reply(list(trained.ranks[0].values()), trained.results[0], trained.tails[0])
    return RecordDict({messages.ARRAYS: exchange(cfg).up(trained), **messages.reply_records(reply)})


def _evaluate(message: Message, cfg: Config, local: Local) -> RecordDict:
    """The message brings the whole bank; the client's own rows are the leading ones of it."""
    order = _order(message, local)
    share = math.ceil(cfg.eval_tokens / len(order.fleet)) if cfg.eval_tokens else 0
    own, state = _state(message, cfg, replace(order, ranks=[order.r_max] * len(local.shapes)), local)
    state.ranks[order.name] = dict(zip(local.shapes, order.ranks, strict=True))
    sized, _ = with_step_tokens(cfg, local.model, local.shapes, [max(order.ranks, default=1)])
    scale, tokens = cfg.scale_at(order.r_max), sized.max_tokens_per_step
    found: dict[str, tuple[float, int]] = {"train": (0.0, 0)}
    found["whole"] = _sum(evaluate_bank(local.model, state.bank, pool_text([local.data], share), scale, tokens))
    with own.training_kind.load_receives()(state, own, local.model, [order.name]) as (bank, ranks):
        found["own"] = _sum(evaluate_clients(local.model, bank, ranks, [local.data], scale, tokens, share)[0])
        if cfg.evaluate == "all":
            found["train"] = _sum(evaluate_clients(local.model, bank, ranks, [local.data], scale, tokens, share, part="train")[0])
    return RecordDict({messages.METRICS: messages.evaluated_record(messages.Evaluated(**found))})


def _sum(found: dict[str, Any] | None) -> tuple[float, int]:
    return (found["loss"] * found["tokens"], found["tokens"]) if found and found["tokens"] else (0.0, 0)


# ---------------------------------------------------------------- is it the same model?


def modules_digest(shapes: dict[str, tuple[int, int]]) -> str:
    """Of the names and widths of the modules that carry adapters, in order."""
    return hashlib.blake2b(repr(list(shapes.items())).encode(), digest_size=16).hexdigest()


def base_digest(model: nn.Module) -> str:
    """Of the leading numbers, rounded to bfloat16, of every embedding and norm: equal for one base model in any type and quantised or not."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding) or (weight.dim() == 1 and "norm" in type(module).__name__.lower()):
                leading = weight.detach().flatten()[:4096].cpu().bfloat16().view(torch.int16)
                digest.update(f"{name}.{own}".encode() + leading.numpy().tobytes())
    return digest.hexdigest()
