"""What a training step takes of a device's memory, and how many tokens it may have: the model behind `--max-tokens-per-step auto`."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import hetlora_kernels as hk
from hetlora.client import token_losses
from hetlora.config import Config, ConfigError
from hetlora.models import checkpoint_layers
from hetlora.seeds import probe_generator
from hetlora.server_optimizer import moment_bytes
from hetlora_kernels.peft import attach, client_segments, detach
from hetlora_kernels.peft.losses import CHUNK

SHARE = 0.9
"""Of the memory that is free: the rest is for what the model of memory leaves out (fragments of the allocator, the libraries' own work space)."""

PAGED = 0.5
"""Of the memory that there is: where adapters, gradients and moments of a round's clients take more, and the step does not fit, the clients train in groups."""

GIB = 2**30

Shapes = Mapping[str, tuple[int, int]]  # {module: (m, n)}


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step of T tokens: M(T) = W + A + T k + max(T g, c min(T V, C)).

    base: W, the weights, once whatever the number of clients.
    adapters: A = N (w_a (1 + 1 + o) - h) for N trained numbers of w_a bytes: the factors, their gradients, o = 2 moments of AdamW (SGD: 1 with momentum,
        else 0). h = 0, or 2 with moments_dtype = 'bfloat16', where the first moment takes 2 bytes and not 4.
    kept: k, what a token leaves for the backward pass. Without checkpointing it is measured, and is a sum over L layers; with it, k = L d w + k / L: the inputs
        of all layers (d numbers of w bytes), and what one layer leaves while it is computed again.
    moved: g, what the backward pass holds of a token besides: gradients of the widest layer and of its inputs.
    chunk: c min(T V, C), logits of a chunk of rows (`client_losses`): V words, at most C numbers, c = w bytes for each, as slopes take the place of logits.
        Where no kernel serves `cross_entropy_` they do so in float32, 6 bytes beside a 16-bit model's, and a softcap (Gemma's) takes three float32 and w.
    """

    base: int
    adapters: int
    kept: float
    moved: float
    words: int
    most_logits: int
    logit_bytes: int

    def of(self, tokens: int) -> float:
        """M(T), bytes."""
        return self.base + self.adapters + tokens * self.kept + max(tokens * self.moved, self.logit_bytes * min(tokens * self.words, self.most_logits))

    def tokens(self, free: float) -> int:
        """The largest T with M(T) <= `free`; 0 where nothing fits. M rises with T."""
        low, high = 0, 1
        while self.of(high) <= free and high < 2**40:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.of(middle) <= free else (low, middle)
        return low


def adapter_bytes(shapes: Shapes, total_rank: int, cfg: Config) -> int:
    """A of `StepMemory`: clients of `total_rank` rank rows together in every module."""
    numbers = total_rank * sum(m + n for m, n in shapes.values())
    moments = 2 if cfg.optimizer == "adamw" else int(cfg.momentum > 0)
    element = getattr(torch, cfg.adapter_dtype).itemsize
    saved = 0 if cfg.moments_dtype == "same" else element - getattr(torch, cfg.moments_dtype).itemsize
    return numbers * (element * (2 + moments) - saved)


def step_memory(model: nn.Module, shapes: Shapes, total_rank: int, rank: int, cfg: Config, layers: int | None = None) -> StepMemory:
    """The memory of a step on this model, whose k is measured in forward passes of one and two sequences of cfg.seq_len tokens.

    total_rank: of all clients of a round together.   rank: of a client, the mean.
    layers: L, for a model of L layers of which `model` has some: k is measured on these and goes on as a straight line.
    """
    config: Any = model.config
    text = config.get_text_config()
    here = int(text.num_hidden_layers)
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    width, element = int(text.hidden_size), weight.dtype.itemsize
    words = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    kept = _kept(model, shapes, rank, cfg)
    if cfg.gradient_checkpointing:
        checkpoint_layers(model)  # an error where there are none
        kept = (layers or here) * width * element + kept / here
    elif layers:
        kept *= layers / here
    widest = max(m for name, m in _linears(model) if m != words)
    wide = 8 if weight.dtype == torch.float64 else 4  # losses are in float32
    if hk.backends(weight.device.type)["cross_entropy_"][0] != "reference":
        logit_bytes = element
    elif getattr(text, "final_logit_softcapping", None):
        logit_bytes = 3 * wide + element
    else:
        logit_bytes = wide if element == wide else wide + element
    base = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    most = CHUNK.get(weight.device.type, CHUNK["cuda"])
    return StepMemory(base, adapter_bytes(shapes, total_rank, cfg), kept, (3 * widest + 2 * width) * element, words, most, logit_bytes)


def _linears(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, int(module.out_features)) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _no_backward(saved: object) -> Tensor:
    raise ConfigError("max_tokens_per_step = 'auto': this model takes gradients inside its forward pass, which the probe keeps nothing for; give a number")


def _kept(model: nn.Module, shapes: Shapes, rank: int, cfg: Config) -> float:
    """Bytes that autograd keeps of a token: of two sequences less those of one, so that what is no token's falls out."""
    device = next(model.parameters()).device
    draw = probe_generator()
    bank = hk.AdapterBank(dict(shapes), [rank], dtype=getattr(torch, cfg.adapter_dtype), device=device, generator=draw)
    words = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    own = {StorageWeakRef(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers(), *bank.parameters())}
    attach(model, bank, dropout=cfg.dropout)
    try:
        sizes = []
        for rows in (1, 1, 2):  # a model whose losses turn out to need its logits is run twice at its first call
            ids = torch.randint(words, (rows, cfg.seq_len), generator=draw).to(device)
            seen: dict[StorageWeakRef, int] = dict.fromkeys(own, 0)  # none comes twice: what such a reference stands for keeps its address

            def note(tensor: Tensor, seen: dict[StorageWeakRef, int] = seen) -> None:
                storage = tensor.untyped_storage()
                seen.setdefault(StorageWeakRef(storage), storage.nbytes())

            owner = torch.zeros(rows, dtype=torch.int64)
            # What a layer leaves is counted and let go: the probe takes the memory of a forward pass without gradients.
            with torch.autograd.graph.saved_tensors_hooks(note, _no_backward), client_segments(model, owner, seeds=torch.zeros(1, dtype=torch.int64)):
                token_losses(model, ids, ids, owner, 1)
            sizes.append(sum(seen.values()))
    finally:
        detach(model)
    return (sizes[2] - sizes[1]) / cfg.seq_len


# ---------------------------------------------------------------- what is free


def free_memory(device: torch.device) -> tuple[int, str]:
    """(bytes, where the number comes from) that a step may still take on `device`.

    A GPU: `torch.cuda.mem_get_info`, and what torch's allocator holds unused. A CPU: the least of MemAvailable and what the control group (a container) leaves.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused, f"free on {device}"
    found = {"MemAvailable": available} if (available := _available()) is not None else {}
    if (left := _group_left()) is not None:
        found["the control group's limit"] = left
    if not found:
        raise ConfigError("max_tokens_per_step = 'auto': this system does not say how much memory is free; give a number")
    name = min(found, key=found.__getitem__)
    return found[name], name


def _available(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        return next(int(line.split()[1]) * 1024 for line in path.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def _group_left(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes to the nearest limit of the process's control group and those around it, version 2 or 1; None where there is none.

    Files that the system has read and would drop first (`inactive_file`) are in a group's use, and count as free.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="ascii").splitlines()]
    except OSError:
        lines = []
    paths = {"memory" if "memory" in kinds.split(",") else kinds: path.strip("/") for _, kinds, path in lines}
    left = []
    for kind, limit, used, files in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        inner = Path(paths.get(kind, ""))
        for group in (inner, *inner.parents):
            folder = root / kind / group
            try:
                text, now = ((folder / name).read_text(encoding="ascii").strip() for name in (limit, used))
            except OSError:
                continue
            if text != "max" and int(text) < 2**60:
                left.append(max(0, int(text) - max(0, int(now) - _stat(folder, files))))
    return min(left, default=None)


def _stat(folder: Path, name: str) -> int:
    try:
        return next(int(line.split()[1]) for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines() if line.startswith(f"{name} "))
    except (OSError, StopIteration):
        return 0


@contextmanager
def refusing_without_memory(refusal: str) -> Iterator[None]:
    """`ConfigError` of `refusal` in place of torch's errors for want of memory; on a CPU these have no class of their own."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("out of memory", "allocate memory", "enough memory")):
            raise
        raise ConfigError(refusal) from None


def give_back_freed_memory() -> None:
    """Let glibc return every freed block of a MiB to the system. By itself it keeps blocks of up to 32 MiB, in pieces that later ones do not fit."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 20)


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def _factors(shapes: Shapes, total_rank: int, cfg: Config) -> int:
    """Bytes of the factors alone."""
    return total_rank * sum(m + n for m, n in shapes.values()) * int(getattr(torch, cfg.adapter_dtype).itemsize)


def _at_once(memory: StepMemory, shapes: Shapes, largest: Sequence[int], free: float, cfg: Config, waiting: int) -> tuple[int, float]:
    """(how many of a round's clients train at once, the bytes that are left to their step) where cfg.clients_at_once says none.

    All, where a step of them fits, or where their adapters, gradients and moments take at most `PAGED` of what there is and a sequence fits beside; else as
    many as do.   largest: ranks of the round's clients, falling.   waiting: bytes of a round's rows that lie in `free` besides, for each group but the one.
    """
    for count in range(len(largest), 1, -1):
        own, left = replace(memory, adapters=adapter_bytes(shapes, sum(largest[:count]), cfg)), free - waiting * (count < len(largest))
        modest = own.adapters <= PAGED * left and own.of(cfg.seq_len) <= own.base + left
        if modest or own.of(count * cfg.seq_len * cfg.batch_size) <= own.base + left:
            return count, left
    return 1, free - waiting * (len(largest) > 1)


def check_auto(cfg: Config) -> None:
    """`ConfigError` for max_tokens_per_step = 'auto' with a kind of training that the model of memory does not know."""
    if not cfg.max_tokens_per_step and cfg.training_kind.no_ranks:
        raise ConfigError(f"max_tokens_per_step = 'auto': its model of memory is that of adapters, and train = {cfg.train!r} trains none; give a number")


def with_step_tokens(cfg: Config, model: nn.Module, shapes: Shapes, ranks: Sequence[int]) -> tuple[Config, list[str]]:
    """`cfg` with max_tokens_per_step as a number, and lines that say how 'auto' came to it.   ranks: of all clients; the largest that make a round count.

    With it comes clients_at_once, where that is 0 and not all of a round's clients fit.
    """
    if cfg.max_tokens_per_step:
        return cfg, []
    check_auto(cfg)
    device = next(model.parameters()).device
    if device.type == "cpu":
        give_back_freed_memory()
    free, source = free_memory(device)
    sampled = sorted((max(1, rank) for rank in ranks), reverse=True)[: cfg.clients_per_round]
    largest = sampled[: cfg.clients_at_once or None] if cfg.cobatch else sampled[:1]
    why = f"the probe of two sequences of {cfg.seq_len} tokens found no memory"
    with refusing_without_memory(f"max_tokens_per_step = 'auto': {why}; give a number, or a shorter seq_len"):
        memory = step_memory(model, shapes, sum(largest), max(1, round(sum(largest) / len(largest))), cfg)
    rows = _factors(shapes, sum(sampled), cfg)  # as received; where clients train in turn they wait in host memory, which is a CPU's own, with those trained
    here = device.type == "cpu"
    server = moment_bytes(cfg, shapes, max(ranks, default=0))  # of its optimiser, which are not made yet
    left, said = SHARE * free - server - rows, []
    if len(largest) < len(sampled):
        left = SHARE * free - server - 2 * rows * (here or not cfg.cobatch)
    elif not cfg.clients_at_once:
        count, left = _at_once(memory, shapes, largest, left, cfg, rows if here else -rows)
        if count < len(largest):
            whole, largest = memory.adapters, largest[:count]
            cfg = cfg.model_copy(update={"clients_at_once": count})
            memory = replace(memory, adapters=adapter_bytes(shapes, sum(largest), cfg))
            said.append(
                f"clients_at_once: {count} of a round's {len(sampled)} (auto), modelled: adapters, gradients and moments of all take {whole / GIB:.2f} GiB, of "
                f"{count} {memory.adapters / GIB:.2f}; the others' adapters wait in host memory"
            )
    most = cfg.seq_len * cfg.batch_size * len(largest)
    fitting = memory.tokens(memory.base + left)  # the base is there already
    tokens = min(max(fitting, cfg.seq_len), most)
    said.append(
        f"max_tokens_per_step: {tokens} (auto), modelled: {memory.of(tokens) / GIB:.2f} GiB with a base of {memory.base / GIB:.2f}, adapters and optimiser of "
        f"{memory.adapters / GIB:.2f} and {memory.kept / 1024:.0f} KiB a token; {free / GIB:.2f} GiB are free ({source})"
    )
    if fitting < cfg.seq_len:
        said.append(f"one sequence of {cfg.seq_len} tokens may not fit; give --gradient-checkpointing or a shorter --seq-len")
    return cfg.model_copy(update={"max_tokens_per_step": tokens}), said
