"""The round suite: seconds of one round of a federation whose clients have ranks from 5 to 46, by this project and by stock PEFT.

A round: K clients get their rows of the server's adapter, take STEPS steps of AdamW on text of their own, with gradients clipped, and what they send back is
averaged by the norms of B A. Nothing is evaluated or written. The forms:

- hetlora: all clients in one batch, as `hetlora run` does it;
- PEFT one by one: an adapter of a stock PEFT model for each client, torch's AdamW, one client after another, the mean in PyTorch;
- Flower: its simulation of those PEFT clients in Ray's processes, as many at a time as threads (`benchmarks.flower_round`); not in turns with the others.
  On a CPU, where `pip install '.[simulation]'` was given;
- frozen base: the floor. The same batches through the base alone, forward and backward to its embeddings, with the same loss.

The model has the shape of SmolLM2-135M, cut to LAYERS layers, with random weights; adapters are on attention. All forms take the same sequences in the same
steps, in batches of at most MOST_TOKENS. The losses of every client's first and last step are compared before anything is timed.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hetlora_kernels

from .peft_suite import smollm
from .server import WrongResultError
from .shapes import chosen
from .timing import Timing, interleaved, peak_extra_bytes

LAYERS, STEPS, LENGTH, MOST_TOKENS = 6, 2, 256, 2048
RANKS = (5, 46)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SCALE, LR, CLIP = 2.0, 1e-3, 1.0
CASES = [(4, 64), (8, 64), (16, 64), (32, 64), (4, 16), (4, 256), (4, 1024), (4, 8192)]  # (clients, tokens of each)
QUICK = [(4, 16), (8, 32)]
YARDSTICK = "frozen base"
FLOWER, FLOWER_ROUNDS = "Flower, PEFT clients", 3
FLOWER_TOKENS = (32, 64, 1024)  # of a client, with which it is measured: each case takes half a minute to start
TOLERANCE = 1e-4  # relative, of a loss in float32
Losses = list[tuple[float, float]]  # of each client's first and last step


@dataclass(frozen=True)
class Case:
    clients: int
    tokens: int  # of each client in the round

    @property
    def shape(self) -> str:
        return f"SmolLM2-135M {LAYERS} layers, {self.tokens} tokens a client"

    @property
    def ranks(self) -> list[int]:
        """Evenly spaced by ratio."""
        low, high = RANKS
        return [round(low * (high / low) ** (k / (self.clients - 1))) for k in range(self.clients)]


class Federation:
    """The clients, their settings and the base of a case."""

    def __init__(self, case: Case, quick: bool, device: torch.device) -> None:
        from hetlora.config import Config
        from hetlora.data import ClientData, FederatedData
        from hetlora.federation import Federation as Loaded
        from hetlora.models import target_shapes

        torch.manual_seed(0)
        self.case, self.device = case, device
        self.base = smollm(LAYERS, quick).to(device).requires_grad_(False).eval()
        length = min(LENGTH, case.tokens // STEPS)
        batch = case.tokens // STEPS // length
        draw = torch.Generator().manual_seed(1)
        words = self.base.config.vocab_size
        texts = [[torch.randint(words, (length,), generator=draw) for _ in range(STEPS * batch)] for _ in range(case.clients)]
        self.clients = [ClientData(f"client{k:02d}", own, []) for k, own in enumerate(texts)]
        settings = {"local_steps": STEPS, "batch_size": batch, "max_tokens_per_step": MOST_TOKENS, "lr": LR, "scale": SCALE, "clip_norm": CLIP}
        off = {"gamma": 1.0, "prune_lambda": 0.0, "clip_median": 0.0}  # what stock PEFT has not
        self.cfg = Config(ranks=",".join(map(str, case.ranks)), clients_per_round=case.clients, **settings, **off)
        self.shapes = target_shapes(self.base, "attention")
        self.loaded = Loaded(self.base, "SmolLM2-135M", self.shapes, FederatedData(self.clients, [], "random tokens"))

    def steps(self, k: int) -> list[list[Tensor]]:
        """The sequences of each of client k's steps."""
        from hetlora.client import step_batches

        return [[self.clients[k].train[i] for i in batch] for batch in step_batches(self.clients[k], self.cfg, 1)]

    def twin(self) -> nn.Module:
        """The base with modules of its own around the same weights."""
        return copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})


def hetlora_round(of: Federation) -> Callable[[], Losses]:
    from hetlora.fleet import LocalFleet
    from hetlora.merge import aggregate
    from hetlora.server import ServerState, fresh_bank

    fleet, cfg = LocalFleet(of.loaded), of.cfg
    bank = fresh_bank(of.shapes, RANKS[1], cfg, of.device)
    ranks = {name: dict.fromkeys(of.shapes, rank) for name, rank in zip(fleet.names, of.case.ranks, strict=True)}

    def run() -> Losses:
        state = ServerState(bank, dict(ranks), *RANKS)
        trained = fleet.train(cfg, state, fleet.names, 1, LR, lambda *_: None)
        aggregate(state, trained.uploads, trained.received, [STEPS] * len(fleet.names), cfg, fleet.model, trained.weighed)
        return [(own.loss_first, own.loss_last) for own in trained.results]

    return run


def with_adapters(of: Federation, ranks: list[int]) -> nn.Module:
    """Stock PEFT on the base of `of`, an adapter "0", "1", ... of each rank."""
    from peft import LoraConfig, get_peft_model

    def config(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=TARGETS, lora_dropout=0.0)

    model = get_peft_model(of.twin(), config(ranks[0]), adapter_name="0")
    for k, rank in enumerate(ranks[1:], 1):
        model.add_adapter(str(k), config(rank))
    return model.eval()


Factors = dict[str, tuple[Tensor, Tensor]]  # {module: (A [r, n], B [m, r])}


def factors_of(model: nn.Module, name: str) -> Factors:
    prefix = "base_model.model."
    return {
        key.removeprefix(prefix): (module.lora_A[name].weight, module.lora_B[name].weight)
        for key, module in model.named_modules()
        if hasattr(module, "lora_A") and name in module.lora_A
    }


def train_peft(model: nn.Module, name: str, start: dict[str, tuple[Tensor, Tensor]], steps: list[list[Tensor]], device: torch.device) -> tuple[float, float]:
    """A client as its user would write it: the leading rows of the server's adapter, then its steps; the losses of the first and the last."""
    from hetlora.batches import collate, micro_batches

    model.set_adapter(name)
    own = factors_of(model, name)
    with torch.no_grad():
        for module, (a, b) in own.items():
            a.copy_(start[module][0][: len(a)])
            b.copy_(start[module][1][:, : len(a)])
    trained = [factor for pair in own.values() for factor in pair]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
    losses = []
    for sequences in steps:
        optimizer.zero_grad()
        count, loss = sum(len(s) - 1 for s in sequences), 0.0
        for part in micro_batches([len(s) for s in sequences], MOST_TOKENS):
            ids, labels = collate(sequences[part], device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            part_loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count
            part_loss.backward()
            loss += float(part_loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        losses.append(loss)
    return losses[0], losses[-1]


@torch.no_grad()
def mean_by_norm(uploads: list[Factors], rank: int) -> Factors:
    """A <- sum p_k A_k and B <- sum p_k B_k, zero-padded, with p_k = ||B_k A_k|| over the sum of them, for each module."""
    merged = {}
    for module, (first_a, first_b) in uploads[0].items():
        norms = torch.stack([(own[module][1] @ own[module][0]).norm() for own in uploads])
        a, b = first_a.new_zeros(rank, first_a.shape[1]), first_b.new_zeros(first_b.shape[0], rank)
        for p, own in zip(norms / norms.sum(), uploads, strict=True):
            rows = len(own[module][0])
            a[:rows] += p * own[module][0]
            b[:, :rows] += p * own[module][1]
        merged[module] = (a, b)
    return merged


def start_of(of: Federation) -> Factors:
    """The server's adapter of the first round: that of `hetlora_round`."""
    from hetlora.server import fresh_bank

    bank = fresh_bank(of.shapes, RANKS[1], of.cfg, of.device)
    return {name: (bank.a[name].detach(), bank.bt[name].detach().t()) for name in of.shapes}


def peft_round(of: Federation) -> Callable[[], Losses]:
    model, start = with_adapters(of, of.case.ranks), start_of(of)
    steps = [of.steps(k) for k in range(of.case.clients)]

    def run() -> Losses:
        losses = [train_peft(model, str(k), start, own, of.device) for k, own in enumerate(steps)]
        mean_by_norm([factors_of(model, str(k)) for k in range(len(steps))], RANKS[1])
        return losses

    return run


def frozen_round(of: Federation) -> Callable[[], Losses]:
    from hetlora.batches import collate, micro_batches
    from hetlora.client import token_losses

    model = of.twin()
    model.enable_input_require_grads()
    steps = [[(k, s) for k, own in enumerate(each) for s in own] for each in zip(*(of.steps(k) for k in range(of.case.clients)), strict=True)]

    def run() -> Losses:
        for rows in steps:
            for part in micro_batches([len(s) for _, s in rows], MOST_TOKENS):
                ids, labels = collate([s for _, s in rows[part]], of.device)
                token_losses(model, ids, labels, torch.tensor([k for k, _ in rows[part]]), of.case.clients).sum().backward()
        return []

    return run


def flower_round(case: Case, quick: bool, threads: int) -> tuple[list[float], Losses] | None:
    """(seconds of its rounds, losses) in a process of its own; None, with the reason on stderr, where it cannot be."""
    missing = [name for name in ("flwr", "ray") if importlib.util.find_spec(name) is None]
    if missing or case.tokens not in FLOWER_TOKENS:
        why = f"{' and '.join(missing)} not installed (pip install '.[simulation]')" if missing else f"which it is with {FLOWER_TOKENS} tokens a client"
        print(f"{FLOWER}, {case.shape}, K={case.clients}: not measured, {why}", file=sys.stderr)
        return None
    given = {"clients": case.clients, "tokens": case.tokens, "quick": quick, "threads": threads, "turns": FLOWER_ROUNDS}
    root = str(Path(hetlora_kernels.__file__).resolve().parents[1])  # of a checkout and of an installation
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    command = [sys.executable, "-m", f"{__package__}.flower_round", json.dumps(given)]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:  # no pipes: Ray's processes would hold them open
        done = subprocess.run(command, env=environment, cwd=root, stdout=said, stderr=errors, timeout=600)
        said.seek(0)
        errors.seek(0)
        if done.returncode:
            raise RuntimeError(f"{FLOWER}, {case.shape}, K={case.clients}: {errors.read()[-2000:]}")
        found = json.loads(said.read().splitlines()[-1])
    return found["seconds"], [(first, last) for first, last in found["losses"]]


def check(case: Case, found: dict[str, Losses]) -> None:
    """`WrongResultError` where a client's loss differs from stock PEFT's."""
    truth = torch.tensor(found["PEFT one by one"], dtype=torch.float64)
    for name, losses in found.items():
        if losses:
            error = float(((torch.tensor(losses, dtype=torch.float64) - truth) / truth).abs().max())
            if not error <= TOLERANCE:
                raise WrongResultError(f"{name}: a loss of {case.shape}, K={case.clients} is off by {error:.2e}; nothing is timed")


def wanted(options: Any, device: torch.device) -> list[Case]:
    few = QUICK if options.quick else CASES[:1] if options.short else CASES
    return [case for case in (Case(*one) for one in few) if chosen(options, "round", f"K={case.clients}")]


def cases(options: Any, device: torch.device) -> Iterator[Case]:
    return iter(wanted(options, device))


def measure(case: Case, options: Any, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """One record for each form; bytes: the base's weights once forward and once backward in each step."""
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        of = Federation(case, options.quick, device)
        runs = {YARDSTICK: frozen_round(of), "hetlora": hetlora_round(of), "PEFT one by one": peft_round(of)}
        found, known = {}, {}
        for name, run in runs.items():
            start = time.perf_counter()
            found[name] = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            known[name] = time.perf_counter() - start
        flower = flower_round(case, options.quick, threads) if device.type == "cpu" and not options.short else None
        check(case, found if flower is None else {**found, FLOWER: flower[1]})
        timings = interleaved(runs, YARDSTICK, device, options.seconds, most_rounds=15, known=known, how=options.how)
        if flower is not None:
            own = Timing(flower[0], 0.0)
            timings[FLOWER] = Timing(flower[0], own.median / timings[YARDSTICK].median)
    size = 2 * STEPS * sum(p.numel() * p.element_size() for p in of.base.parameters())
    records = []
    for name, timing in timings.items():
        record = {"op": "round", "shape": case.shape, "clients": case.clients, "dtype": "float32", "threads": threads, "provider": name}
        record |= {"yardstick": YARDSTICK, "bytes": size, "note": ""} | timing.figures(size)
        record["peak_extra_bytes"] = peak_extra_bytes(runs[name], device) if name in runs and case.tokens <= 1024 else None
        records.append(record)
    return records
