"""What torch.compile brings a cohort's step, and what it costs first: `python -m benchmarks.compiled`.

The decoder layers of a model that carries a bank are compiled one by one by inductor, as graphs without a break. Ranks and how many sequences each client has
are constants of a graph, so every other set of clients is compiled anew: the last column says after how many steps of one set that time is earned back.
Both ways give the same gradients to rounding, which is checked before anything is timed. Models of random weights. All times are the processor's. A step's: of
the thread, paired rounds in turn, one thread. To compile: of this process and the compilers that it starts, in the first step.
"""

from __future__ import annotations

import argparse
import copy
import os
import resource
import statistics
import tempfile
import time

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hetlora_kernels as hk
from hetlora.models import target_shapes
from hetlora_kernels.peft import Head, attach, client_losses, client_segments

from .packing import MODELS

LAYERS = 4


class Cohort:
    """A model with a bank, and one batch of one sequence for each client."""

    def __init__(self, model: nn.Module, ranks: list[int], tokens: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.model, self.ids = model, list(range(len(ranks)))
        self.bank = hk.AdapterBank(target_shapes(model, "all-linear"), ranks)
        for factor in self.bank.parameters():
            factor.data.normal_(0, 0.02, generator=draw)
        self.words = torch.randint(model.config.vocab_size, (len(ranks), tokens), generator=draw)
        attach(model, self.bank)

    def step(self) -> Tensor:
        """[gradients, end to end] of one step."""
        for factor in self.bank.parameters():
            factor.grad = None
        with client_segments(self.model, self.ids):
            states = self.model.model(self.words).last_hidden_state
            client_losses(states, labels=self.words, ids=self.ids, num_clients=len(self.ids), head=Head(self.model.lm_head.weight)).sum().backward()
        return torch.cat([factor.grad.flatten() for factor in self.bank.parameters() if factor.grad is not None])


def processor_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def compiled(cohort: Cohort, backend: str) -> tuple[float, Tensor]:
    """(seconds of the first step, gradients) with the decoder layers compiled from nothing."""
    torch._dynamo.reset()
    for layer in cohort.model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    # Compilers run in this process, whose time is counted. A layer's name is a constant of its graph.
    with torch._inductor.config.patch(compile_threads=1), torch._dynamo.config.patch(recompile_limit=LAYERS + 1):
        start = processor_seconds()
        gradients = cohort.step()
        return processor_seconds() - start, gradients


def measure(model: str, clients: int, tokens: int, rounds: int, backend: str = "inductor") -> str:
    torch.manual_seed(0)
    shape = {**MODELS[model], "num_hidden_layers": LAYERS}
    base = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=max(tokens, 64))).eval()
    ranks = [4 + 4 * k for k in range(clients)]
    cohorts = Cohort(copy.deepcopy(base), ranks, tokens), Cohort(base, ranks, tokens)
    expected = cohorts[0].step()
    seconds, found = compiled(cohorts[1], backend)
    off = float((found - expected).norm() / expected.norm())
    if not off <= 1e-4:
        raise SystemExit(f"compiled: gradients differ by {off:.1e}; nothing is measured")
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for way in (0, 1) if turn % 2 else (1, 0):
            start = time.thread_time()
            cohorts[way].step()
            times[way].append(time.thread_time() - start)
    eager, own = (statistics.median(side) for side in times)
    low, ratio, high = statistics.quantiles([two / one for one, two in zip(*times, strict=True)], n=4)
    steps = f"{seconds / (eager - own):.0f}" if own < eager else "never"
    cells = [model, f"{clients} x {tokens}", f"{1e3 * eager:.0f} ms", f"{1e3 * own:.0f} ms", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
    return f"| {' | '.join([*cells, f'{seconds:.0f} s', steps])} |"


def main() -> None:
    options = argparse.ArgumentParser(description="A cohort's step with its decoder layers compiled, and the time to compile them.")
    options.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS), help=f"shapes, cut to {LAYERS} layers (default all)")
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256], help="of each client (default 16 64 256)")
    options.add_argument("--rounds", type=int, default=15, help="paired rounds (default 15)")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    print(f"{LAYERS} layers, adapters in all seven linear layers, float32, one thread, torch {torch.__version__}, inductor\n")
    print("| model | clients x tokens | step, eager | compiled | compiled / eager (quartiles) | to compile | steps until earned back |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for model in chosen.model:
        for tokens in chosen.tokens:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # what an earlier run compiled would be taken
                print(measure(model, chosen.clients, tokens, chosen.rounds), flush=True)


if __name__ == "__main__":
    main()
