"""The frozen base model: where it comes from, how it is loaded, and which of its linear layers carry adapters; the demo's own model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hetlora.config import Config, ConfigError
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


def resolve_model(cfg: Config, progress: Progress | None = None, demo: DemoModel | None = None) -> str:
    """Path or hub id of `cfg.model`; for 'demo' the folder of the demo model, pre-trained at the first call (about a minute) and then cached.

    Raises `ConfigError` when a local path does not exist or the cache folder cannot be written.
    """
    if cfg.model == "demo":
        return str(_demo_folder(demo or DemoModel(), progress))
    path = os.path.expanduser(cfg.model)
    if os.path.isdir(path):
        return path
    if cfg.model.startswith((".", "/", "~")) or cfg.model.count("/") > 1 or os.path.exists(path):
        raise ConfigError(f"model {cfg.model!r}: no such folder; give a folder with config.json and weights, a hub id (ORG/NAME) or 'demo'")
    return cfg.model


def load_tokenizer(path: str) -> Any:
    """The model's tokenizer. Raises `ConfigError` when there is none."""
    from transformers import AutoTokenizer

    with _quiet(path):
        try:
            return AutoTokenizer.from_pretrained(path)
        except Exception as error:  # transformers raises unrelated types for missing, malformed and unreachable models
            raise ConfigError(f"model {path!r}: tokenizer cannot be loaded ({_reason(error)}); {_advice(path)}") from None


def load_model(cfg: Config, path: str) -> Any:
    """The causal language model at `path`: frozen, in eval mode, in `cfg.dtype` on `cfg.device`, `use_cache` off, quantised if asked.

    Warns when the base has dropout of its own: co-batched training keeps it in eval mode, so that dropout is not applied.
    Raises `ConfigError`: no model there, not a causal language model, weights missing from the checkpoint, unusable device or quantisation.
    """
    from transformers import AutoModelForCausalLM

    device = resolve_device(cfg.device)
    dtype = getattr(torch, cfg.dtype)
    options = _quantization(cfg, device) if cfg.quantize != "none" else {}
    with _quiet(path):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
            model, info = loaded
            if not options:
                model = model.to(device=device, dtype=dtype)
        except torch.OutOfMemoryError:
            raise ConfigError(f"model {path!r}: does not fit on {device}; use --dtype bfloat16, --quantize 4bit or a smaller model") from None
        except Exception as error:  # as above
            reason = _reason(error)
            if "Unrecognized configuration class" in reason:
                reason = "not a causal language model of transformers"
            raise ConfigError(f"model {path!r}: cannot be loaded ({reason}); {_advice(path)}") from None
    faulty = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if faulty:
        raise ConfigError(
            f"model {path!r}: {len(faulty)} weights of {type(model).__name__} are not in its checkpoint ({faulty[0]}, ...); "
            "give a complete causal language model"
        )
    model.requires_grad_(False).eval()
    model.config.use_cache = False
    _check_causal(model, path)
    _warn_dropout(model)
    return model


def resolve_device(device: str) -> torch.device:
    """'auto' is 'cuda' where there is one, else 'cpu'. Raises `ConfigError` for a device that this machine cannot use."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(1, device=found)
    except Exception as error:  # RuntimeError, AssertionError or NotImplementedError, by the kind of device
        raise ConfigError(f"device {device!r}: not usable here ({_reason(error)}); use 'auto', 'cpu' or 'cuda:N'") from None
    return found


def target_shapes(model: nn.Module, spec: str) -> dict[str, tuple[int, int]]:
    """{dotted module name: (out_features, in_features)} of the linear layers that `spec` selects, in the model's order.

    spec: 'attention': linear layers inside self-attention modules; 'all-linear': all but the output head, as in PEFT; 'peft': PEFT's default for the
        architecture; else comma-separated name suffixes or a regular expression over full names, matched by PEFT's own rule.
    Linear layers are `nn.Linear`, its quantised kinds, and the `Conv1D` of GPT-2 (whose base weight is stored transposed).
    Raises `ConfigError` naming some of the model's linear layers when `spec`, or one suffix of it, selects none.
    """
    linear = {name: shape for name, module in model.named_modules() if (shape := _linear_shape(module))}
    if not linear:
        raise ConfigError(f"target_modules {spec!r}: the model {type(model).__name__} has no linear layers")
    if spec == "attention":
        chosen = _inside_attention(model)
        names = [name for name in linear if name in chosen]
    elif spec == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        names = [name for name in linear if model.get_submodule(name) is not head]
    else:
        names = _match(linear, spec, model)
    if not names:
        raise ConfigError(f"target_modules {spec!r}: matches no linear layer of the model; it has {_kinds(linear)}")
    return {name: linear[name] for name in names}


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    for out_name, in_name in (("out_features", "in_features"), ("nf", "nx")):
        shape = getattr(module, out_name, None), getattr(module, in_name, None)
        # a layer has its weight itself; composite modules may repeat its sizes
        if isinstance(shape[0], int) and isinstance(shape[1], int) and "weight" in dict(module.named_parameters(recurse=False)):
            return shape[0], shape[1]
    return None


def _inside_attention(model: nn.Module) -> set[str]:
    """Names under a module that is self-attention by its attribute or class name; blocks named after their attention also hold an MLP."""
    holders = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        by_class = "attention" in kind.lower() and not kind.endswith(("Layer", "Block", "Model", "Stack"))
        label = name.rpartition(".")[2].lower()
        by_name = any(word in label for word in ("attn", "attention"))
        if name and (by_class or by_name):
            holders.append((name + ".", "cross" in (label + kind.lower()) or label == "encoder_attn"))
    inside = set()
    for name, _ in model.named_modules():
        above = [cross for holder, cross in holders if name.startswith(holder)]
        if above and not any(above):
            inside.add(name)
    return inside


def _match(linear: dict[str, tuple[int, int]], spec: str, model: nn.Module) -> list[str]:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if spec == "peft":
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as defaults

        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in defaults:
            raise ConfigError(f"target_modules 'peft': PEFT has no default for model type {kind!r}; use 'attention', 'all-linear' or names of {_kinds(linear)}")
        targets: str | list[str] = list(defaults[kind])
    elif all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        targets = parts
        for part in parts:
            if not any(name == part or name.endswith(f".{part}") for name in linear):
                raise ConfigError(f"target_modules: {part!r} matches no linear layer of the model; it has {_kinds(linear)}")
    else:
        try:
            re.compile(spec)
        except re.error as error:
            raise ConfigError(f"target_modules {spec!r}: neither a list of names nor a regular expression ({error})") from None
        targets = spec
    config = LoraConfig(target_modules=targets)
    return [name for name in linear if check_target_module_exists(config, name)]


def _kinds(linear: dict[str, tuple[int, int]]) -> str:
    """Distinct last names of the linear layers, for messages."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    return ", ".join(kinds[:12]) + (", ..." if len(kinds) > 12 else "")


def _quantization(cfg: Config, device: torch.device) -> dict[str, Any]:
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"quantize {cfg.quantize!r}: needs {' and '.join(missing)}; pip install {' '.join(missing)}, or use --quantize none")
    if cfg.dtype == "float64":
        raise ConfigError(f"quantize {cfg.quantize!r}: computes in float32 or bfloat16, got dtype 'float64'")
    from transformers import BitsAndBytesConfig

    if cfg.quantize == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, cfg.dtype))
    return {"quantization_config": quantization, "device_map": {"": str(device)}}


@torch.no_grad()
def _check_causal(model: Any, path: str) -> None:
    """Encoders such as BERT load as causal models without complaint: look whether the first position sees the second."""
    device = model.get_input_embeddings().weight.device
    # two calls of one shape, not one batch: the same kernels then round the first position the same way
    first, other = (model(input_ids=torch.tensor([[1, token]], device=device)).logits[0, 0].float() for token in (1, 2))
    if (first - other).abs().max() > 0.01 * first.abs().max():
        raise ConfigError(f"model {path!r}: not a causal language model ({type(model).__name__}: a position sees those after it); give a decoder")


def _warn_dropout(model: Any) -> None:
    modules = sorted({f"{name.rpartition('.')[2]} p={m.p}" for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0})
    settings = [f"{k}={v}" for k, v in model.config.to_dict().items() if k in ("attention_dropout", "attn_pdrop") and isinstance(v, float) and v > 0]
    if found := modules + settings:
        warnings.warn(
            f"the base model has dropout of its own ({', '.join(found)}); it is not applied, because the frozen base stays in eval mode; "
            "use --dropout for the adapters",
            stacklevel=3,
        )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _advice(path: str) -> str:
    if os.path.isdir(path):
        return "expected a folder written by save_pretrained of a causal language model and its tokenizer"
    return "check the hub id and the connection, or give a local folder"


@contextmanager
def _quiet(path: str | Path) -> Iterator[None]:
    """transformers reports loading and missing weights on the terminal; what matters of that is raised here. Download bars stay."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if os.path.isdir(path):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _demo_folder(demo: DemoModel, progress: Progress | None) -> Path:
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
        return f"{type(error).__name__}: {_reason(error)}"
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
    with _quiet(folder):
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
