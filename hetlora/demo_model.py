"""The demo's own base model: a small byte-level decoder, pre-trained on this machine at first use and then cached."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetlora.config import ConfigError
from hetlora.models import first_line, quiet
from hetlora.python_text import public_text
from hetlora.seeds import pretraining_draws

Progress = Callable[[int, int, float], None]
"""progress(steps done, steps in all, training loss in nats per token)."""


@dataclass(frozen=True)
class DemoModel:
    """The demo's byte-level Llama decoder (0.69 M parameters) and its pre-training on public text of Python's library."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    intermediate: int = 384
    seq_len: int = 256
    batch_size: int = 8
    steps: int = 450
    lr: float = 3e-3
    warmup: int = 50
    seed: int = 0

    def folder(self) -> Path:
        """Cache folder whose name holds everything the weights depend on: these settings, Python (the text) and torch (the arithmetic)."""
        import platformdirs

        identity = {**asdict(self), "python": sys.version_info[:2], "torch": torch.__version__}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return Path(platformdirs.user_cache_dir("hetlora")) / f"demo-model-{digest}"


def demo_folder(demo: DemoModel, progress: Progress | None = None) -> Path:
    """The cached model, made first where it is missing or damaged. Two processes may make it at once: the first to finish wins."""
    folder = demo.folder()
    if folder.exists():
        if fault := _fault(folder):
            warnings.warn(f"demo model in {folder} is damaged ({fault}); it is made again", stacklevel=4)
        else:
            return folder
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".demo-model-", dir=folder.parent))
        _pretrain(demo, temporary, progress)
        if folder.exists() and _fault(folder):
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except OSError as error:
        if not folder.exists() or _fault(folder):
            raise ConfigError(
                f"model 'demo': cannot be kept in {folder.parent} ({error.strerror or error}); set XDG_CACHE_HOME to a folder that can be written"
            ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


_MANIFEST = "hetlora_demo.json"


def _fault(folder: Path) -> str | None:
    """What is wrong with a cached model, by the checksums of its files; None when all is well."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name, digest in files.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _pretrain(demo: DemoModel, folder: Path, progress: Progress | None) -> None:
    """Train on random windows of the public text and write an ordinary transformers folder. The same seed and threads give the same weights."""
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = ByT5Tokenizer()
    ids = _joined(tokenizer, public_text())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=demo.hidden, intermediate_size=demo.intermediate, num_hidden_layers=demo.layers, num_attention_heads=demo.heads,
        max_position_embeddings=demo.seq_len * 4, tie_word_embeddings=True, use_cache=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with pretraining_draws(demo.seed) as draw:
        model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=demo.lr, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, demo))
    window = torch.arange(demo.seq_len)
    for step in range(1, demo.steps + 1):
        starts = torch.randint(len(ids) - demo.seq_len, (demo.batch_size, 1), generator=draw)
        batch = ids[starts + window]  # [batch, seq_len]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step, demo.steps, loss.item())
    with quiet(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps({"model": asdict(demo), "torch": torch.__version__, "sha256": digests}, indent=2) + "\n", encoding="utf-8")


def _joined(tokenizer: Any, texts: list[str]) -> Tensor:
    parts = [torch.tensor([*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]) for text in texts]
    return torch.cat(parts)


def _warm_cosine(step: int, demo: DemoModel) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < demo.warmup:
        return (step + 1) / demo.warmup
    done = (step - demo.warmup) / max(1, demo.steps - demo.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
