"""What a training step takes of memory, modelled and measured: `python -m benchmarks.memory`.

Measured: the peak of the resident set of a process that makes a model and trains a cohort on it, beyond what the process had when its libraries were loaded.
Modelled (`hetlora.memory.StepMemory`): whether known models fit known devices, and how many tokens at once. Two layers of each model are made, of random
weights, at its own width and in bfloat16. What a token of them leaves for the backward pass is counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import hetlora_kernels as hk
from hetlora.cohort import train_cohort, train_groups
from hetlora.config import Config
from hetlora.data import ClientData
from hetlora.memory import SHARE, StepMemory, adapter_bytes, give_back_freed_memory, step_memory
from hetlora.models import checkpointed, target_shapes

from .timing import peak_extra_mib

CLIENTS, RANK = 8, 16
RANKS = {"rows": 128}  # other than RANK, of a measured shape
MEASURED: dict[str, dict[str, Any]] = {
    "wide": {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8},
    "rows": {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8},
    "words": {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4},
}
TOKENS = 2048  # of a measured step: 8 clients of one sequence of 256
# (shape, checkpointing, tokens, moments_dtype, clients_at_once)
CASES = [(name, own, TOKENS, "same", 0) for name, own in (("wide", False), ("wide", True), ("words", False))]
CASES += [("rows", False, 256, *own) for own in (("same", 0), ("bfloat16", 0), ("same", 2))]

# Published shapes.
_SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
_QWEN = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
_LLAMA = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
KNOWN: dict[str, tuple[Any, Any, dict[str, Any], float]] = {
    "SmolLM2-135M": (LlamaForCausalLM, LlamaConfig, {**_SMOLLM2, "tie_word_embeddings": True}, 8),
    "Qwen2.5-1.5B": (Qwen2ForCausalLM, Qwen2Config, {**_QWEN, "tie_word_embeddings": True}, 16),
    "Llama-3.1-8B": (LlamaForCausalLM, LlamaConfig, {**_LLAMA, "tie_word_embeddings": False}, 80),
}


def settings(**values: Any) -> Config:
    return Config.create("benchmark", **{"local_steps": 2, "batch_size": 1, "dropout": 0.0, "max_tokens_per_step": 2**20, **values})


def measured(name: str, checkpointing: bool, tokens: int, moments: str, at_once: int) -> dict[str, float]:
    """{"modelled", "measured"} MiB of a cohort's training in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seq_len = tokens // CLIENTS
    cfg = settings(seq_len=seq_len, gradient_checkpointing=checkpointing, moments_dtype=moments, clients_at_once=at_once)
    give_back_freed_memory()
    _train({"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, cfg, 16, 2)  # loads late ones
    memory: list[StepMemory] = []
    taken = peak_extra_mib(lambda: memory.append(_train(MEASURED[name], cfg, seq_len, RANKS.get(name, RANK))))
    return {"modelled": memory[0].of(tokens) / 2**20, "measured": taken}


def _train(shape: dict[str, int], cfg: Config, seq_len: int, rank: int) -> StepMemory:
    model = LlamaForCausalLM(LlamaConfig(**shape)).requires_grad_(False).eval()
    shapes = target_shapes(model, cfg.target_modules)
    memory = step_memory(model, shapes, (cfg.clients_at_once or CLIENTS) * rank, rank, cfg)
    clients = [ClientData(f"client{k}", [torch.randint(shape["vocab_size"], (seq_len,))], []) for k in range(CLIENTS)]
    bank = hk.AdapterBank(shapes, [rank] * CLIENTS)
    with checkpointed(model, cfg.gradient_checkpointing):
        if not cfg.clients_at_once:
            train_cohort(model, bank, clients, cfg, 1, 1e-3, {})
            return memory
        train_groups(model, bank, clients, cfg, 1, 1e-3, {})
    rows = CLIENTS * rank * sum(m + n for m, n in shapes.values()) * bank.dtype.itemsize
    return replace(memory, base=memory.base + 2 * rows)  # as received and as trained, in the same memory here


def in_a_process(name: str, checkpointing: bool, tokens: int, moments: str, at_once: int) -> dict[str, float]:
    own = [sys.executable, "-m", f"{__package__}.memory", "--of", name, "--tokens", str(tokens), "--moments-dtype", moments, "--at-once", str(at_once)]
    own += ["--checkpointing"] if checkpointing else []
    done = subprocess.run(own, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def modelled(name: str, checkpointing: bool, seq_len: int) -> StepMemory:
    cls, config, shape, _ = KNOWN[name]
    layers = shape["num_hidden_layers"]
    cfg = settings(seq_len=seq_len, gradient_checkpointing=checkpointing)
    with torch.device("cpu"):
        few = cls(config(**{**shape, "num_hidden_layers": 2, "vocab_size": 1024, "dtype": torch.bfloat16})).to(torch.bfloat16).requires_grad_(False).eval()
    memory = step_memory(few, target_shapes(few, cfg.target_modules), CLIENTS * RANK, RANK, cfg, layers)
    with torch.device("meta"):
        whole = cls(config(**shape))
    shapes = target_shapes(whole, cfg.target_modules)
    base = 2 * sum(parameter.numel() for parameter in whole.parameters())
    return StepMemory(base, adapter_bytes(shapes, CLIENTS * RANK, cfg), memory.kept, memory.moved, shape["vocab_size"], 1 << 26, memory.logit_bytes)


def table(seq_len: int, names: Sequence[str], sizes_gib: Sequence[float] | None) -> None:
    print(f"modelled: {CLIENTS} clients of rank {RANK} on attention, AdamW in float32, a bfloat16 base, sequences of {seq_len}, {SHARE:.0%} of memory\n")
    print("| model | memory | checkpointing | base | adapters, optimiser | a token | fits | tokens at once | sequences |")
    print("|---|--:|---|--:|--:|--:|---|--:|--:|")
    for name in names:
        for checkpointing in (False, True):
            memory = modelled(name, checkpointing, seq_len)
            for gib in sizes_gib or [KNOWN[name][3]]:
                tokens = memory.tokens(SHARE * gib * 2**30)
                fits = "yes" if tokens >= seq_len else "no"
                sizes = [f"{size / 2**30:.2f} GiB" for size in (memory.base, memory.adapters)]
                cells = [name, f"{gib:g} GiB", "yes" if checkpointing else "no", *sizes, f"{memory.kept / 1024:.0f} KiB", fits]
                print(f"| {' | '.join([*cells, str(tokens), str(tokens // seq_len)])} |", flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description="Memory of a training step, modelled and measured.")
    options.add_argument("--seq-len", type=int, default=1024, help="tokens of a sequence in the table (default 1024)")
    options.add_argument("--tokens", type=int, help="of every measured step (default: each case has its own)")
    options.add_argument("--model", choices=KNOWN, action="append", help="this model alone in the table; may come again")
    options.add_argument("--of", choices=MEASURED, help=argparse.SUPPRESS)
    options.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--moments-dtype", default="same", help=argparse.SUPPRESS)
    options.add_argument("--at-once", type=int, default=0, help=argparse.SUPPRESS)
    options.add_argument("--free", type=float, nargs="+", metavar="GIB", help="the table alone, for so much free memory")
    chosen = options.parse_args()
    if chosen.of:
        print(json.dumps(measured(chosen.of, chosen.checkpointing, chosen.tokens or TOKENS, chosen.moments_dtype, chosen.at_once)))
        return
    for name, checkpointing, tokens, moments, at_once in [] if chosen.free else CASES:
        size = chosen.tokens or tokens
        found = in_a_process(name, checkpointing, size, moments, at_once)
        off = found["modelled"] / found["measured"] - 1
        said = {"checkpointing": checkpointing, f"moments in {moments}": moments != "same", f"{at_once} clients at once": at_once}
        how = "".join(f", {what}" for what, so in said.items() if so)
        print(f"{name}, {size} tokens{how}: modelled {found['modelled']:.0f} MiB, measured {found['measured']:.0f} MiB, {off:+.1%}", flush=True)
    print()
    table(chosen.seq_len, chosen.model or list(KNOWN), chosen.free)


if __name__ == "__main__":
    main()
