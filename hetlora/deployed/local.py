"""What a client does, whichever engine carries the messages: says who it is, trains its rows and evaluates the bank on its own text.

Nothing but the adapter's rows and the numbers in `messages` leaves the client.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hetlora import __version__
from hetlora.config import Config, ConfigError
from hetlora.data import ClientData, load_data
from hetlora.deployed import device, messages
from hetlora.deployed.exchange import Order, Reply, exchange
from hetlora.deployed.messages import Content, Sent
from hetlora.deployed.settings import Node, client_settings
from hetlora.deployed.wire import Arrays
from hetlora.evaluate import evaluate_bank, evaluate_clients, pool_text
from hetlora.federation import resolve_model
from hetlora.memory import with_step_tokens
from hetlora.models import checkpointed, empty_model, load_model, load_tokenizer, read_limits, target_shapes
from hetlora.ranks import Capability, Device
from hetlora.secure_sum import contribution
from hetlora.server import ServerState
from hetlora.training import Trained, Work


@dataclass(frozen=True)
class Local:
    """What a client computes with."""

    model: nn.Module
    data: ClientData
    shapes: dict[str, tuple[int, int]]
    device: Device | None = None
    unmeasured: str = ""  # why there is none, where the server asked for one


@dataclass(frozen=True)
class Masking:
    """What secure aggregation asks for.   samples, most: sequences of this client, and of the one that has most.   rows: of each module that are summed.
    hide: masks whole numbers.
    """

    samples: int
    most: int
    rows: list[int]
    hide: Callable[[Config, Tensor], Arrays]


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


Kind = Literal["introduce", "train", "evaluate"]


@lru_cache(maxsize=1)
def _loaded(model: LoadModel, cfg: Config) -> nn.Module:
    """Once in a process. A `Client` holds no model: Flower's simulation pickles it for every message."""
    return model(cfg)


class Client:
    """What answers a server's messages.   model, data: the user's loaders; the model is loaded once.   say: receives a line for the log."""

    def __init__(self, model: LoadModel, data: LoadData, say: Callable[[str], None]) -> None:
        self._model, self._data, self._say = model, data, say

    def answer(self, kind: Kind, content: Content, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Sent:
        """What goes back; `ConfigError` or `OSError` where it cannot be done, of which the server is told the line."""
        cfg, node = client_settings(run_config, node_config)
        base = _loaded(self._model, cfg)
        shapes = target_shapes(base, cfg.target_modules)
        # a measure comes before `data` is called, which reads the text
        measured = self._device(cfg, base, shapes) if kind == "introduce" and messages.measure_wanted(content) else (None, "")
        return _WORK[kind](content, cfg, Local(base, self._data(cfg, node), shapes, *measured))

    def masked(self, content: Content, run_config: Mapping[str, Any], node_config: Mapping[str, Any], asked: Masking) -> Sent:
        """`answer` to the order to train of a run with secure aggregation."""
        cfg, node = client_settings(run_config, node_config)
        base = _loaded(self._model, cfg)
        local = Local(base, self._data(cfg, node), target_shapes(base, cfg.target_modules))
        return _train_masked(content, cfg, local, asked)

    def _device(self, cfg: Config, model: nn.Module, shapes: dict[str, tuple[int, int]]) -> tuple[Device | None, str]:
        """What the device measured, and why it could not: only the server knows whether this client has a rank already."""
        if not isinstance(cfg.rank_rule, Capability):
            return None, ""
        try:
            found, line = device.measure(cfg, model, shapes, base_digest(model))
        except ConfigError as error:
            reason = " ".join(str(error).split())[: messages.REASON_LENGTH]
            self._say(reason)
            return None, reason
        self._say(line)
        return found, ""


def _introduce(content: Content, cfg: Config, local: Local) -> Sent:
    data, measured = local.data, local.device or Device(0, math.nan)
    capability = math.nan if data.capability is None else data.capability
    digests = modules_digest(local.shapes), base_digest(local.model)
    own = messages.Introduction(data.name, len(data.train), *digests, capability, measured.rank, measured.seconds, local.unmeasured, __version__)
    return messages.introduction_message(own)


def _order(content: Content, local: Local) -> Order:
    order = messages.order(content)
    if order.name != local.data.name:
        raise ConfigError(f"the server calls this client {order.name!r}, it is {local.data.name!r}")
    return order


def _state(content: Content, cfg: Config, order: Order, local: Local) -> tuple[Config, ServerState]:
    own, state = exchange(cfg).receive(cfg, content.array_records[messages.ARRAYS], order, local.shapes)
    state.bank = state.bank.to(next(local.model.parameters()).device)
    return own, state


def _train(content: Content, cfg: Config, local: Local) -> Sent:
    """The round's training with the function that simulates it."""
    if cfg.secure_aggregation:
        raise ConfigError("the server asks for a plain upload, and the run's settings have secure_aggregation")
    trained, reply = _trained(content, cfg, local)
    return messages.reply_message(reply, exchange(cfg).up(trained))


def _train_masked(content: Content, cfg: Config, local: Local, asked: Masking) -> Sent:
    """The scores of pruning are norms of the client's rows, and stay here."""
    own = len(local.data.train)
    if own != asked.samples or own > asked.most:
        raise ConfigError(f"the server counts {asked.samples} sequences here and at most {asked.most} elsewhere, this client has {own}")
    if len(asked.rows) != len(local.shapes):
        raise ConfigError(f"the server speaks of {len(asked.rows)} modules, this client's model has {len(local.shapes)}; check target_modules and the model")
    trained, reply = _trained(content, cfg, local)
    vector = contribution(cfg, trained.uploads, trained.received, own / asked.most, asked.rows)
    return messages.reply_message(replace(reply, tails=(0.0, 0.0)), asked.hide(cfg, vector))


def _trained(content: Content, cfg: Config, local: Local) -> tuple[Trained, Reply]:
    """What the client's own run of the round gave, and what it reports."""
    order = _order(content, local)
    cfg, _ = with_step_tokens(cfg, local.model, local.shapes, [max(order.ranks, default=1)])
    own, state = _state(content, cfg, order, local)
    work = Work(own.model_copy(update={"cobatch": False}), local.model, state, [local.data], order.number, order.lr)
    with checkpointed(local.model, cfg.gradient_checkpointing):
        trained: Trained = cfg.training_kind.load()(work)
    if trained.dropped:
        raise ConfigError(trained.dropped[0])
    return trained, Reply(list(trained.ranks[0].values()), trained.results[0], trained.tails[0])


def _evaluate(content: Content, cfg: Config, local: Local) -> Sent:
    """The message brings the whole bank; the client's own rows are the leading ones of it."""
    order = _order(content, local)
    share = math.ceil(cfg.eval_tokens / len(order.fleet)) if cfg.eval_tokens else 0
    own, state = _state(content, cfg, replace(order, ranks=[order.r_max] * len(local.shapes)), local)
    state.ranks[order.name] = dict(zip(local.shapes, order.ranks, strict=True))
    sized, _ = with_step_tokens(cfg, local.model, local.shapes, [max(order.ranks, default=1)])
    scale, tokens = cfg.scale_at(order.r_max), sized.max_tokens_per_step
    found: dict[str, tuple[float, int]] = {"train": (0.0, 0)}
    found["whole"] = _sum(evaluate_bank(local.model, state.bank, pool_text([local.data], share), scale, tokens))
    with own.training_kind.load_receives()(state, own, local.model, [order.name]) as (bank, ranks):
        found["own"] = _sum(evaluate_clients(local.model, bank, ranks, [local.data], scale, tokens, share)[0])
        if cfg.evaluate == "all":
            found["train"] = _sum(evaluate_clients(local.model, bank, ranks, [local.data], scale, tokens, share, part="train")[0])
    return messages.evaluated_message(messages.Evaluated(**found))


def _sum(found: dict[str, Any] | None) -> tuple[float, int]:
    return (found["loss"] * found["tokens"], found["tokens"]) if found and found["tokens"] else (0.0, 0)


_WORK: dict[Kind, Callable[[Content, Config, Local], Sent]] = {"introduce": _introduce, "train": _train, "evaluate": _evaluate}


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


# ---------------------------------------------------------------- what the server knows of it


@dataclass(frozen=True)
class Base:
    """What the server knows of the base model; it needs no weights. `describe_base` makes it from the settings.

    name: for logs and adapters.   shapes: {module: (m, n)} of the modules that carry adapters, in the model's order.   parameters: how many the base has.
    modules: digest of the shapes, which clients must report too.

    >>> from hetlora.flower import Base
    >>> Base("my model", {"layers.0.q_proj": (64, 64)}, 4096, "digest").shapes
    {'layers.0.q_proj': (64, 64)}
    """

    name: str
    shapes: dict[str, tuple[int, int]]
    parameters: int
    modules: str


def describe_base(cfg: Config) -> Base:
    """The base model of the settings as far as a server must know it, from its configuration alone: no weights are read.

    Raises `ConfigError`: no such model, no configuration there, no target modules in it.

    >>> import tempfile
    >>> from hetlora import Config
    >>> from hetlora.flower import describe_base
    >>> from transformers import LlamaConfig
    >>> folder = tempfile.mkdtemp()
    >>> LlamaConfig(vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    >>> base = describe_base(Config(model=folder))
    >>> list(base.shapes.values()), base.parameters
    ([(16, 16), (16, 16), (16, 16), (16, 16)], 14896)
    """
    path = resolve_model(cfg)
    model = empty_model(cfg, path)
    shapes = target_shapes(model, cfg.target_modules)
    return Base(path, shapes, sum(p.numel() for p in model.parameters()), modules_digest(shapes))
