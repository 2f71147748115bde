"""What training without padding saves: `python -m benchmarks.packing`.

Steps of a cohort on sequences of varied lengths, padded, sorted by length and packed: the same adapters to rounding, which is checked before anything is timed.
Models of random weights. Time: of the thread's processor, paired rounds in turn, one thread. Padding: its share of the tokens that the model computes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hetlora_kernels as hk
from hetlora.batches import PADDED, Batch, Batching, batches
from hetlora.client import token_losses
from hetlora.models import target_shapes
from hetlora.packing import probe
from hetlora_kernels.peft import attach, client_segments

BATCHINGS = (PADDED, Batching("sorted"), Batching("packed"))
MODELS = {
    "small": {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    # SmolLM2-135M's shape, a tenth of its vocabulary: the loss of tokens that are padding is not computed on a CPU either
    "smollm2": {"vocab_size": 4915, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
}
LENGTHS = {"even": (1.0, 1.0), "uniform": (0.05, 1.0), "long tail": (0.0, 0.0)}


def lengths_of(kind: str, count: int, longest: int, draw: torch.Generator) -> list[int]:
    """even: all the longest. uniform: from a twentieth of it. long tail: log-normal around an eighth of it, as of chats, cut at the longest."""
    if kind == "long tail":
        drawn = (longest / 8) * torch.randn(count, generator=draw).exp()
    else:
        low, high = (share * longest for share in LENGTHS[kind])
        drawn = low + (high - low) * torch.rand(count, generator=draw)
    return [max(2, min(longest, round(float(length)))) for length in drawn]


@dataclass
class Case:
    model: torch.nn.Module
    bank: hk.AdapterBank
    rows: list[tuple[int, int, torch.Tensor]]
    max_tokens: int

    def parts(self, batching: Batching) -> list[Batch]:
        return list(batches(self.rows, self.max_tokens, torch.device("cpu"), batching))

    def step(self, batching: Batching) -> torch.Tensor:
        """[gradients, end to end] of one step."""
        for factor in self.bank.parameters():
            factor.grad = None
        for part in self.parts(batching):
            with client_segments(self.model, part.owner, sequence_index=part.index, positions=part.positions):
                token_losses(self.model, part.ids, part.labels, part.owner, self.bank.num_clients, part.positions).sum().backward()
        return torch.cat([factor.grad.flatten() for factor in self.bank.parameters() if factor.grad is not None])

    def padded_share(self, batching: Batching) -> float:
        computed = sum(part.ids.numel() for part in self.parts(batching))
        return 1 - sum(len(sequence) for _, _, sequence in self.rows) / computed


def check(case: Case) -> None:
    """Relative distance of the gradients: float32 sums in another order, over some hundred products."""
    expected = case.step(PADDED)
    for batching in BATCHINGS[1:]:
        off = float((case.step(batching) - expected).norm() / expected.norm())
        if not off <= 1e-4:
            raise SystemExit(f"{batching.name}: gradients differ by {off:.1e}; nothing is measured")


def main() -> None:
    options = argparse.ArgumentParser(description="Time and padding of a step on sequences of varied lengths.")
    options.add_argument("--model", choices=MODELS, default="small", help="shape (default small: 4 layers of width 256)")
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--batch-size", type=int, default=4, help="sequences of each client (default 4)")
    options.add_argument("--longest", type=int, default=256, help="tokens (default 256)")
    options.add_argument("--max-tokens", type=int, default=2048, help="of one forward and backward (default 2048)")
    options.add_argument("--rounds", type=int, default=7, help="paired rounds (default 7)")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODELS[chosen.model], max_position_embeddings=chosen.longest)).eval()
    shapes = target_shapes(model, "attention")
    print(f"probe: {probe(model, shapes, chosen.longest)}")
    print(
        f"{chosen.model}, {chosen.clients} clients of {chosen.batch_size} sequences, the longest {chosen.longest} tokens, at most {chosen.max_tokens} at once,"
    )
    print(f"one thread, torch {torch.__version__}\n")
    print("| lengths | padding, padded | sorted | packed | step, padded | sorted | packed | packed / padded (quartiles) |\n|---|--:|--:|--:|--:|--:|--:|--:|")
    bank = hk.AdapterBank(shapes, [4 + 4 * k for k in range(chosen.clients)])
    for factor in bank.parameters():
        factor.data.normal_(0, 0.02)
    attach(model, bank)
    for kind in LENGTHS:
        draw = torch.Generator().manual_seed(0)
        drawn = lengths_of(kind, chosen.clients * chosen.batch_size, chosen.longest, draw)
        places = itertools.product(range(chosen.clients), range(chosen.batch_size))
        words = MODELS[chosen.model]["vocab_size"]
        rows = [(*place, torch.randint(words, (length,), generator=draw)) for place, length in zip(places, drawn, strict=True)]
        case = Case(model, bank, rows, chosen.max_tokens)
        check(case)
        times: dict[str, list[float]] = {batching.name: [] for batching in BATCHINGS}
        for turn in range(chosen.rounds):
            for batching in BATCHINGS if turn % 2 else reversed(BATCHINGS):
                start = time.thread_time()
                case.step(batching)
                times[batching.name].append(time.thread_time() - start)
        ratios = statistics.quantiles([two / one for one, two in zip(times["padded"], times["packed"], strict=True)], n=4)
        shares = (f"{100 * case.padded_share(batching):.0f} %" for batching in BATCHINGS)
        medians = (f"{1e3 * statistics.median(times[batching.name]):.0f} ms" for batching in BATCHINGS)
        cells = [kind, *shares, *medians]
        print(f"| {' | '.join([*cells, f'{ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f})'])} |", flush=True)


if __name__ == "__main__":
    main()
