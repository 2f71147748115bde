"""The alternative of `benchmarks.federation`: Flower's own FedAvg over clients of stock PEFT, which all have one rank.

FedAvg means arrays of one shape, so each client has the largest rank of the run. A client takes the sequences of its steps from the settings, as hetlora's
clients do, trains with torch's AdamW, and returns all of its adapter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from hetlora.batches import collate
from hetlora.client import step_batches
from hetlora.config import Config
from hetlora.data import ClientData
from hetlora.deployed.local import base_model, own_text
from hetlora.deployed.settings import Node, client_settings, server_settings

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
OUTPUT = "stock.json"

client, server = ClientApp(), ServerApp()
_kept: dict[Config, nn.Module] = {}  # of this process


def adapted(cfg: Config) -> nn.Module:
    """The base with one adapter of the run's largest rank, drawn from the run's seed."""
    from peft import LoraConfig, get_peft_model

    if cfg not in _kept:
        _kept.clear()
        rank = max(int(rank) for rank in cfg.ranks.split(","))
        torch.manual_seed(cfg.seed)
        _kept[cfg] = get_peft_model(base_model(cfg), LoraConfig(r=rank, lora_alpha=cfg.scale_at(rank) * rank, target_modules=TARGETS))  # type: ignore[arg-type]
    return _kept[cfg].eval()


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def train_round(cfg: Config, data: ClientData, start: Mapping[str, Tensor], number: int) -> tuple[dict[str, Tensor], int]:
    """The client's adapter after its steps from `start`, and its training sequences."""
    model = adapted(cfg)
    own = factors(model)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(start[name])
    optimizer = torch.optim.AdamW(own.values(), lr=cfg.lr, weight_decay=0.0)
    for batch in step_batches(data, cfg, number):
        ids, labels = collate([data.train[i] for i in batch], next(model.parameters()).device)
        optimizer.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in own.items()}, len(data.train)


@client.train()
def train(message: Message, context: Context) -> Message:
    cfg, node = client_settings(context.run_config, context.node_config)
    number = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    trained, sequences = train_round(cfg, own_text(cfg, node), message.content.array_records["arrays"].to_torch_state_dict(), number)
    return Message(RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": sequences})}), reply_to=message)  # type: ignore[arg-type]


class Timed(FedAvg):
    """Notes when each round's replies had been merged, and how many bytes they were."""

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_evaluate_nodes=clients, min_available_nodes=clients)
        self.rounds: list[dict[str, Any]] = []

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
        self._begin = time.perf_counter()
        sent = list(super().configure_train(server_round, arrays, config, grid))
        self._down = sum(_bytes(message) for message in sent)
        return sent

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        if failed := next((reply for reply in replies if reply.has_error()), None):
            raise RuntimeError(failed.error.reason)
        found = super().aggregate_train(server_round, replies)
        seconds = time.perf_counter() - self._begin
        self.rounds.append({"seconds": seconds, "bytes_down": self._down, "bytes_up": sum(map(_bytes, replies)), "clients": len(replies)})
        return found


def _bytes(message: Message) -> int:
    return sum(len(array.data) for array in message.content.array_records["arrays"].values())


@server.main()
def main(grid: Grid, context: Context) -> None:
    cfg, waiting = server_settings(context.run_config)
    start = {name: parameter.detach() for name, parameter in factors(adapted(cfg)).items()}
    strategy = Timed(waiting.min_clients)
    result = strategy.start(grid, ArrayRecord(start), num_rounds=cfg.rounds)  # type: ignore[arg-type]
    folder = Path(cfg.output)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result.arrays.to_torch_state_dict(), folder / "stock.pt")
    (folder / OUTPUT).write_text(json.dumps(strategy.rounds), encoding="utf-8")


def in_process(cfg: Config, clients: int) -> dict[str, Tensor]:
    """What the rounds come to in this process, summed in float64 in the clients' order."""
    _kept.clear()  # an earlier call has trained it
    mean: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in factors(adapted(cfg)).items()}
    for number in range(1, cfg.rounds + 1):
        trained = [train_round(cfg, own_text(cfg, Node(partition_id=k)), mean, number) for k in range(clients)]
        total = sum(weight for _, weight in trained)
        mean = {name: sum(own[name].double() * (weight / total) for own, weight in trained).float() for name in mean}  # type: ignore[union-attr]
    return mean
