"""The server's state, and its side of a round up to the merge: sample, distribute by truncation, refuse bad uploads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

import hetlora_kernels as hk
from hetlora.config import Config
from hetlora.ranks import ClientRanks, bank_ranks
from hetlora.seeds import host_generator, torch_generator


@dataclass
class ServerState:
    """Everything a round changes. `bank`: the global factors at rank r_max; `ranks`: each client's present ranks."""

    bank: hk.AdapterBank
    ranks: dict[str, ClientRanks]
    r_min: int
    r_max: int
    round: int = 0
    rounds_trained: dict[str, int] = field(default_factory=dict)
    perplexity_before: dict[str, float] = field(default_factory=dict)
    ranks_start: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)  # {client: the last round that it downloaded in}
    moments: dict[str, torch.Tensor] = field(default_factory=dict)  # of the server's optimiser: {'m.<tensor>' or 'v.<tensor>': as the tensor}
    stacked_bytes: list[int] = field(default_factory=list)  # of each round's change of the base model, as it travels; empty where the base stays

    def missed_bytes(self, name: str) -> int:
        """What a client must download, besides its rows of the bank, to have the base model of now: every change since its last download."""
        return sum(self.stacked_bytes[self.seen.get(name, 1) - 1 :])  # in its round it had those of the rounds before

    @property
    def homlora_rank(self) -> int:
        """The largest rank that a client started with: that of the HomLoRA which a run's bytes are compared with."""
        return max(self.ranks_start.values())


def sample(names: Sequence[str], count: int, seed: int, round_number: int) -> list[str]:
    """`count` clients (all, if there are fewer), uniformly without replacement, in name order."""
    chosen = host_generator(seed, "sample", round_number).sample(range(len(names)), min(count, len(names)))
    return [names[i] for i in sorted(chosen)]


def toss(names: Sequence[str], probability: float, seed: int, round_number: int) -> list[str]:
    """Each client with `probability`, by a coin of its own that no other client's presence changes, in name order."""
    return [name for name in names if host_generator(seed, "toss", round_number, name).random() < probability]


def distribute(state: ServerState, names: Sequence[str]) -> hk.AdapterBank:
    """Each client's download: the leading rank rows of the bank, nothing reordered (HETLORA section 3.1)."""
    return state.bank.truncate(bank_ranks([state.ranks[name] for name in names], state.bank.shapes))


def refused(bank: hk.AdapterBank) -> dict[int, str]:
    """{client: reason} for uploads that hold a NaN or an infinity, or whose norm overflows."""
    norms_a, norms_b = bank.tail_norms([0] * bank.num_clients)
    # ||B A|| too: its float32 products overflow where a rung's tail norms, summed in float64, do not
    finite = torch.isfinite(norms_a + norms_b + bank.delta_norms()).cpu()
    modules = list(bank.shapes)
    return {k: f"update has non-finite values in {modules[int((~finite[k]).nonzero()[0])]}" for k in range(bank.num_clients) if not bool(finite[k].all())}


def fresh_bank(shapes: Mapping[str, tuple[int, int]], r_max: int, cfg: Config, device: torch.device, round_number: int = 0) -> hk.AdapterBank:
    """The bank a federation starts from: A Kaiming-uniform from the run's seed, B = 0."""
    dtype: torch.dtype = getattr(torch, cfg.adapter_dtype)
    return hk.AdapterBank(shapes, [r_max], dtype=dtype, generator=torch_generator(cfg.seed, "bank", round_number)).to(device)
