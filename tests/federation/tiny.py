"""A tiny random Llama and tiny clients, made in memory: what the federation's tests run on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hetlora_kernels as hk
from hetlora import training
from hetlora.config import Config, ConfigError
from hetlora.data import ClientData, FederatedData
from hetlora.federation import Federation
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.observer import Observer
from hetlora.server import ServerState

VOCABULARY = 50
SIZES = [3, 5, 2, 7]


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        # Eager attention has its softmax in float32, whatever the model's type. The order in which it adds a row depends on padding and on the processor.
        attn_implementation="sdpa" if dtype == torch.float64 else "eager",
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval()


def tiny_clients(sizes: list[int], seed: int = 0, length: int = 12) -> list[ClientData]:
    """One client per entry of `sizes`, with that many training sequences of mixed lengths over a client's own part of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    clients = []
    for k, size in enumerate(sizes):
        low = 3 + 5 * k % 20

        def draw(low: int = low) -> torch.Tensor:
            n = int(torch.randint(length // 2, length + 1, (), generator=generator))
            return torch.randint(low, low + 20, (n,), generator=generator)

        clients.append(ClientData(f"client{k}", [draw() for _ in range(size)], [draw() for _ in range(2)]))
    return clients


def tiny_federation(sizes: list[int], dtype: torch.dtype = torch.float32, target: str = "attention", held_out: int = 0) -> Federation:
    model = tiny_model(dtype)
    clients = tiny_clients(sizes)
    apart = [ClientData(f"apart{k}", [], c.test) for k, c in enumerate(tiny_clients([1] * held_out, seed=9))]
    return Federation(model, "tiny", target_shapes(model, target), FederatedData(clients, apart, "tiny clients"))


def tiny_config(output: Path, **values) -> Config:
    settings = {"ranks": "powerlaw:2:8:0.8", "rounds": 3, "clients_per_round": 3, "local_steps": 2, "batch_size": 2, "eval_tokens": 0, "gamma": 0.8}
    if values.get("local_epochs"):
        del settings["local_steps"]
    return Config.create("test", **{**settings, "output": str(output), **values})


def capable(tmp_path, **changes) -> Config:
    """Settings of a run whose ranks are by device."""
    return tiny_config(tmp_path / "run", **{"ranks": "capability:2:8", "seq_len": 16, "batch_size": 2, **changes})


def trained_bank(shapes: dict[str, tuple[int, int]], ranks, dtype: torch.dtype = torch.float32, seed: int = 0) -> hk.AdapterBank:
    """A bank whose A and B are all non-zero, as after some rounds."""
    generator = torch.Generator().manual_seed(seed)
    bank = hk.AdapterBank(shapes, ranks, dtype=dtype)
    with torch.no_grad():
        for factor in bank.parameters():
            factor.copy_(0.1 * torch.randn(factor.shape, generator=generator, dtype=torch.float64))
    return bank


def whole_bank(shapes: dict[str, tuple[int, int]], ranks, seed: int) -> hk.AdapterBank:
    """A float64 bank of whole numbers from -4 to 4: sums of products with weights that are powers of two are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    bank = hk.AdapterBank(shapes, ranks, dtype=torch.float64)
    with torch.no_grad():
        for factor in bank.parameters():
            factor.copy_(torch.randint(-4, 5, factor.shape, generator=generator))
    return bank


def row(bank: hk.AdapterBank, side: str, name: str, k: int, j: int) -> torch.Tensor:
    """Rank row j of client k, of `side` 'a' or 'bt'."""
    return getattr(bank, side)[name].detach()[bank.layouts[name].rows(k)][j]


def dense(bank: hk.AdapterBank, name: str) -> torch.Tensor:
    """B A of a bank of one client, [m, n]."""
    return bank.bt[name].detach().t() @ bank.a[name].detach()


def tiny_state(federation: Federation, ranks: list[int], r_min: int = 1, r_max: int = 8, dtype: torch.dtype = torch.float32) -> ServerState:
    """A server in mid-run: a bank with non-zero B, and a rank per client."""
    names = [client.name for client in federation.data.clients]
    everywhere = [dict.fromkeys(federation.shapes, rank) for rank in ranks]
    return ServerState(trained_bank(federation.shapes, [r_max], dtype), dict(zip(names, everywhere, strict=True)), r_min, r_max)


def lines(run: Path) -> list[dict]:
    """rounds.jsonl without the times."""
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in ("seconds", "cpu_seconds")} for record in records]


def same_bits(one: hk.AdapterBank, other: hk.AdapterBank) -> bool:
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[key], yours[key]) for key in mine)


@dataclass
class Training:
    """One call of local training inside a round: what each client received, and what it trained."""

    names: list[str]
    received: hk.AdapterBank
    trained: hk.AdapterBank


def watch_training(monkeypatch, change=None) -> list[Training]:
    """Every round's downloads and uploads, as the loop sees them; `change(round, names, bank)` may alter what the clients trained."""
    seen: list[Training] = []
    train = training.train_cohort

    def watched(model, bank, clients, cfg, number, lr, keep, progress=None):
        received = bank.select(range(bank.num_clients))
        results = train(model, bank, clients, cfg, number, lr, keep, progress)
        names = [client.name for client in clients]
        if change:
            with torch.no_grad():
                change(number, names, bank)
        seen.append(Training(names, received, bank.select(range(bank.num_clients))))
        return results

    monkeypatch.setattr(training, "train_cohort", watched)
    return seen


@torch.no_grad()
def multiply(bank: hk.AdapterBank, client: int, factor: float) -> None:
    """Multiply one client's factors in place."""
    for rows, layout in [*zip(bank.a.values(), bank.layouts.values(), strict=True), *zip(bank.bt.values(), bank.layouts.values(), strict=True)]:
        rows[layout.rows(client)] *= factor


class Stop(Exception):
    """What `Interrupt` raises."""


class Interrupt(Observer):
    """Stops the run at its `at`-th event of one kind: 'local_step', 'evaluate', 'round_start', 'round_end', 'start' or 'finish'."""

    def __init__(self, kind: str, at: int = 1) -> None:
        self.left = at

        def count(*_) -> None:
            self.left -= 1
            if self.left == 0:
                raise Stop

        setattr(self, kind, count)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def resume(folder: Path, observer=None, **settings):
    """A stopped run of tiny clients, continued."""
    return simulate(tiny_config(folder, **settings), resume=True, federation=tiny_federation(SIZES), observer=observer)


def refused(folder: Path, *words: str, **settings) -> str:
    """The one line, with these words in it, by which a resume is refused."""
    with pytest.raises(ConfigError) as error:
        resume(folder, **settings)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
    return str(error.value)
