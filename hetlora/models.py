"""The frozen base model: how it is loaded, and which of its linear layers carry adapters."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import regex
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hetlora.config import Config, ConfigError
from hetlora_kernels._torch import multiplies_fast
from hetlora_kernels.linear import linear_shape
from hetlora_kernels.peft.experts import is_stack


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises `ConfigError` when there is none, or when it brings code of its own that is not trusted."""
    from transformers import AutoTokenizer

    with quiet(path):
        try:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except Exception as error:  # transformers raises unrelated types for missing, malformed and unreachable models
            _refuse_code(path, error)
            raise ConfigError(f"model {path!r}: tokenizer cannot be loaded ({first_line(error)}); {_advice(path)}") from None


def load_model(cfg: Config, path: str, trains: bool = True) -> Any:
    """The causal language model at `path`: frozen, in eval mode, in `cfg.dtype` on `cfg.device`, `use_cache` off, quantised if asked.

    trains: with warnings that matter to a run alone: of dropout of the base's own, which is not applied, as co-batched training keeps it in eval mode,
    and of a type that torch multiplies slowly on this processor.
    Raises `ConfigError`: no model there, not a causal language model, weights missing from the checkpoint, unusable device or quantisation.
    """
    from transformers import AutoModelForCausalLM

    device = resolve_device(cfg.device)
    dtype = getattr(torch, cfg.dtype)
    check_quantization(cfg)
    if trains and not multiplies_fast(dtype, device.type):
        warnings.warn(
            f"dtype {cfg.dtype!r}: this processor has no instructions for it, and torch's products of it take many times those of float32; "
            "the adapted layers and the losses go round that, the rest of the model does not; use --dtype float32 where memory allows",
            stacklevel=2,
        )
    options = _quantization(cfg, device) if cfg.quantize != "none" else {}
    with quiet(path):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, trust_remote_code=cfg.trust_remote_code, **options)
            model, info = loaded
            if not options:
                model = model.to(device=device, dtype=dtype)
        except torch.OutOfMemoryError:
            raise ConfigError(f"model {path!r}: does not fit on {device}; use --dtype bfloat16, --quantize 4bit or a smaller model") from None
        except Exception as error:  # as above
            _refuse_code(path, error)
            reason = first_line(error)
            if "Unrecognized configuration class" in reason:
                reason = "not a causal language model of transformers"
            raise ConfigError(f"model {path!r}: cannot be loaded ({reason}); {_advice(path)}") from None
    faulty = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if faulty:
        raise ConfigError(
            f"model {path!r}: {len(faulty)} weights of {type(model).__name__} are not in its checkpoint ({faulty[0]}, ...); "
            "give a complete causal language model"
        )
    make_ready(model, path, trains)
    return model


def make_ready(model: Any, path: str, trains: bool = True) -> None:
    """Freeze a model that is loaded, and put it in eval mode without a cache. `ConfigError` where it is not causal.

    trains: with a warning where it has dropout.
    """
    model.requires_grad_(False).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes: in eval mode it would pack 4-bit weights for inference, and gradients would not pass
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    _check_causal(model, path)
    if trains:
        _warn_dropout(model)


def empty_model(cfg: Config, path: str) -> nn.Module:
    """The model at `path` without weights (on torch's meta device), for its layers' names and widths. Errors as `load_model`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet(path):
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=cfg.trust_remote_code)
            with torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
        except Exception as error:  # as above
            _refuse_code(path, error)
            raise ConfigError(f"model {path!r}: its configuration cannot be loaded ({first_line(error)}); {_advice(path)}") from None
    return model


@dataclass(frozen=True)
class Limits:
    """What a model's configuration says before its weights are loaded.   positions: tokens that it sees, inf where it names no number; vocabulary: of ids."""

    positions: float
    vocabulary: float


def read_limits(cfg: Config, path: str) -> Limits:
    """`Limits` of the model at `path`. Errors as `load_model`, and for a seq_len above its positions."""
    from transformers import AutoConfig

    with quiet(path):
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=cfg.trust_remote_code).get_text_config()
        except Exception as error:  # as above
            _refuse_code(path, error)
            raise ConfigError(f"model {path!r}: its configuration cannot be loaded ({first_line(error)}); {_advice(path)}") from None
    positions, vocabulary = (getattr(config, name, None) or math.inf for name in ("max_position_embeddings", "vocab_size"))
    if cfg.seq_len > positions > 0:
        raise ConfigError(f"seq_len: expected at most the {positions} tokens that model {cfg.model!r} sees, got {cfg.seq_len}; lower --seq-len")
    return Limits(positions if positions > 0 else math.inf, vocabulary)


def _refuse_code(path: str, error: Exception) -> None:
    """transformers asks on the terminal whether to run a model's own code, unless it is told; then it raises this."""
    if "custom code" in str(error) and "trust_remote_code" in str(error):
        raise ConfigError(f"model {path!r}: brings Python code of its own, which would run with your rights; read it, then give --trust-remote-code") from None


def checkpoint_layers(model: nn.Module) -> list[nn.Module]:
    """Those of the model's layers that transformers checkpoints, the outermost; `ConfigError` where there are none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    if not found:
        raise ConfigError(f"gradient_checkpointing: {type(model).__name__} has no layers that transformers can checkpoint; leave it out")
    return [*found.values()]


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """With `wanted`, each layer keeps its inputs alone and is computed again in the backward pass. Gradients keep their bits.

    transformers' own switch needs the layers in training mode, in which some models' layers drop out; here they stay as they are. Our dropout masks follow from
    seeds, so no state of a generator is kept.
    """
    layers = checkpoint_layers(model) if wanted else []
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


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
        raise ConfigError(f"device {device!r}: not usable here ({first_line(error)}); use 'auto', 'cpu' or 'cuda:N'") from None
    return found


def target_shapes(model: nn.Module, spec: str) -> dict[str, tuple[int, int]]:
    """{dotted module name: (out_features, in_features)} of the linear layers that `spec` selects, in the model's order.

    spec: 'attention': linear layers inside self-attention modules; 'all-linear': all but the output head, as in PEFT, and but gates of width 1 or 2 and
        experts in one parameter, which warnings name; 'peft': PEFT's default for the architecture; else comma-separated name suffixes or a regular
        expression over full names, matched by PEFT's own rule.
    Linear layers are `nn.Linear`, its quantised kinds, and the `Conv1D` of GPT-2 (whose base weight is stored transposed).
    Raises `ConfigError` naming some of the model's linear layers when `spec`, or one suffix of it, selects none.
    """
    linear = {name: shape for name, module in model.named_modules() if (shape := _target_shape(module))}
    if not linear:
        raise ConfigError(f"target_modules {spec!r}: the model {type(model).__name__} has no linear layers")
    if spec == "attention":
        chosen = _inside_attention(model)
        names = [name for name in linear if name in chosen]
    elif spec == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        names = [name for name in linear if model.get_submodule(name) is not head and min(linear[name]) > _NARROW]
        if gates := [name for name in linear if min(linear[name]) <= _NARROW]:
            warnings.warn(f"target_modules 'all-linear': {len(gates)} gates of width 1 or 2 carry no adapter ({gates[0]}, ...)", stacklevel=3)
        if stacks := [name for name, module in model.named_modules() if is_stack(module)]:
            warnings.warn(
                f"target_modules 'all-linear': the experts of {len(stacks)} layers lie in one parameter and carry no adapter ({stacks[0]}, ...)", stacklevel=3
            )
    else:
        names = _match(linear, spec, model)
    if not names:
        raise ConfigError(f"target_modules {spec!r}: matches no linear layer of the model; it has {_kinds(linear)}")
    return {name: linear[name] for name in names}


_NARROW = 2


def _target_shape(module: nn.Module) -> tuple[int, int] | None:
    """Widths of a layer that can carry an adapter: it has its weight itself, where composite modules may repeat its widths."""
    return linear_shape(module) if "weight" in dict(module.named_parameters(recurse=False)) else None


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
        targets = list(defaults[kind])
    elif all(re.fullmatch(r"[\w.-]+", part) for part in parts):
        targets = parts
        for part in parts:
            if not any(name == part or name.endswith(f".{part}") for name in linear):
                raise ConfigError(f"target_modules: {part!r} matches no linear layer of the model; it has {_kinds(linear)}")
    else:
        return _match_expression(linear, spec)
    config = LoraConfig(target_modules=targets)
    return [name for name in linear if check_target_module_exists(config, name)]


_MATCH_SECONDS = 5.0


def _match_expression(linear: dict[str, tuple[int, int]], spec: str) -> list[str]:
    """The layers whose whole name matches, as PEFT has it, in bounded time: the matcher of `re` can backtrack without end and cannot be stopped."""
    try:
        re.compile(spec)  # the language is that of `re`
        pattern = regex.compile(spec)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"target_modules {spec!r}: neither a list of names nor a regular expression ({error})") from None
    end = time.monotonic() + _MATCH_SECONDS
    found = []
    for name in linear:
        try:
            if pattern.fullmatch(name, timeout=max(end - time.monotonic(), 0.001)):
                found.append(name)
        except TimeoutError:
            raise ConfigError(
                f"target_modules {spec!r}: not matched against {name!r} within {_MATCH_SECONDS:g} s; a repeat within a repeat, as in (a+)+, does that"
            ) from None
    return found


def _kinds(linear: dict[str, tuple[int, int]]) -> str:
    """Distinct last names of the linear layers, for messages."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    return ", ".join(kinds[:12]) + (", ..." if len(kinds) > 12 else "")


def check_quantization(cfg: Config) -> None:
    """`ConfigError` where `cfg.quantize` cannot be done here."""
    if cfg.quantize == "none":
        return
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"quantize {cfg.quantize!r}: needs {' and '.join(missing)}; pip install {' '.join(missing)}, or use --quantize none")
    if cfg.dtype == "float64":
        raise ConfigError(f"quantize {cfg.quantize!r}: computes in float32, bfloat16 or float16, got dtype 'float64'")


def _quantization(cfg: Config, device: torch.device) -> dict[str, Any]:
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


def first_line(error: BaseException) -> str:
    """Of its message; with the lines that follow where the first one announces them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines if lines[0].endswith(":") else lines[:1])[:300].rstrip()


def _advice(path: str) -> str:
    if os.path.isdir(path):
        return "expected a folder written by save_pretrained of a causal language model and its tokenizer"
    return "check the hub id and the connection, or give a local folder"


@contextmanager
def quiet(path: str | Path) -> Iterator[None]:
    """transformers reports loading and missing weights on the terminal, the hub's client each try again; what matters of that is raised here. Bars stay."""
    from transformers.utils import logging as its

    hub = logging.getLogger("huggingface_hub")
    level, bars, hubs = its.get_verbosity(), its.is_progress_bar_enabled(), hub.level
    its.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    if os.path.isdir(path):
        its.disable_progress_bar()
    try:
        yield
    finally:
        its.set_verbosity(level)
        hub.setLevel(hubs)
        if bars:
            its.enable_progress_bar()


@contextmanager
def no_mask_advised() -> Iterator[None]:
    """transformers advises an attention mask where a sequence begins or ends in its padding token.

    Padding is on the right here, where no token of a causal model looks.
    """
    logger = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "passing in an `attention_mask`" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
