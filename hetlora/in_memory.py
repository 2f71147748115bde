"""A run on what a program holds already: a model, a tokenizer, texts. What is not given is loaded as the settings say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hetlora.ahead import Known, Outline, check
from hetlora.config import Config, ConfigError
from hetlora.data import FederatedData, Federation, load_data, split_corpus
from hetlora.federation import prepare, starting_ranks
from hetlora.models import Limits, load_tokenizer, make_ready, target_shapes
from hetlora.observer import Observer
from hetlora.sources import IN_MEMORY, Corpus, rows_in_memory

_OF_A_MODEL = ("dtype", "device", "quantize", "trust_remote_code")


def settings_of(cfg: Config, model: Any, tokenizer: Any, data: Any) -> Config:
    """`cfg` with what the objects say: the settings `data`, and `model`, `dtype` and `device`, for the run folder.

    `ConfigError` where `cfg` itself says otherwise about a model that is given, and for objects that are none.
    """
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "eos_token_id")):
        raise ConfigError(f"tokenizer: expected one of transformers, as AutoTokenizer.from_pretrained gives it, got {tokenizer!r:.60}")
    update: dict[str, Any] = {} if data is None else {"data": IN_MEMORY}
    if model is not None:
        weight = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        if weight is None or not hasattr(model, "config"):
            raise ConfigError(f"model: expected a causal language model of transformers, got {type(model).__name__}; a path is cfg.model")
        if hasattr(model, "peft_config"):
            raise ConfigError("model: it carries adapters of PEFT; give its base model (model.unload()), and an adapter as init_adapter")
        found = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(weight.device)}
        for name in _OF_A_MODEL:
            given = getattr(cfg, name)
            if name == "device" and given == weight.device.type:  # 'cuda' for 'cuda:0'
                continue
            if given != Config.model_fields[name].default and given != found.get(name, given if name == "trust_remote_code" else None):
                raise ConfigError(f"{name} = {given!r}: the model that is given has {found.get(name, 'its own')}; leave it out, or convert the model")
        update |= {"model": getattr(model, "name_or_path", "") or IN_MEMORY, **found}
    return Config.create("simulate", **{**cfg.model_dump(), **update})


def federation_of(cfg: Config, model: Any, tokenizer: Any, data: Any, observer: Observer, resume: bool = False) -> Federation:
    """What `simulate` runs on; the arguments are its own, `cfg` from `settings_of`."""
    if model is None:
        if data is None:
            raise ConfigError("tokenizer: belongs to a model or data that is given; leave it out")
        return prepare(cfg, observer, lambda own: _data(cfg, tokenizer or own, data), resume)
    if tokenizer is None and not isinstance(data, FederatedData):
        if cfg.model == IN_MEMORY:
            raise ConfigError("tokenizer: the model that is given does not say where its own is; give it as tokenizer=")
        tokenizer = load_tokenizer(cfg.model, cfg.trust_remote_code)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and 0 < positions < cfg.seq_len:
        raise ConfigError(f"seq_len: expected at most the {positions} tokens that the model sees, got {cfg.seq_len}; lower seq_len")
    shapes = target_shapes(model, cfg.target_modules)
    found = _data(cfg, tokenizer, data) if data is not None else load_data(cfg, tokenizer)
    if tokenizer is None and cfg.sample_prompts:
        raise ConfigError("tokenizer: sample_prompts are written with it; give it as tokenizer=")
    limits = Limits(positions or math.inf, model.get_input_embeddings().num_embeddings)
    check(cfg, Known(cfg.model, Outline(model, shapes), limits, tokenizer, found), starting_ranks(cfg, found))
    make_ready(model, cfg.model)
    return Federation(model, cfg.model, shapes, found, tokenizer)


def _data(cfg: Config, tokenizer: Any, data: Any) -> FederatedData:
    if isinstance(data, FederatedData):
        return data
    if _is_frame(data):  # to iterate over it would give the names of its columns
        names = list(data.columns)
        if twice := [name for place, name in enumerate(names) if name in names[:place]]:
            raise ConfigError(f"data: the column {twice[0]!r} of the frame comes twice; rename one")
        data = data.to_dict("records")
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise ConfigError(f"data: expected {{client: texts}}, rows as of a JSONL file, or FederatedData, got {type(data).__name__}; a path is cfg.data")
    return split_corpus(cfg, tokenizer, _mapping(cfg, data) if isinstance(data, Mapping) else rows_in_memory(data, cfg))


def _is_frame(data: Any) -> bool:
    """A DataFrame of pandas, or of a class made from it."""
    return hasattr(data, "columns") and any(kind.__module__.partition(".")[0] == "pandas" for kind in type(data).__mro__)


def _mapping(cfg: Config, data: Mapping[Any, Any]) -> Corpus:
    """{client: texts} as documents."""
    if cfg.prompt_field or cfg.messages_field:
        raise ConfigError("data: prompts and conversations are given as rows, [{'client': ..., 'messages': [...]}, ...]")
    corpus = Corpus(IN_MEMORY)
    for name, texts in data.items():
        if not isinstance(name, str):
            raise ConfigError(f"data: expected the name of a client, a text, got {name!r:.60}")
        if _is_frame(texts):
            raise ConfigError(f"data: expected texts in a list for each client, got a frame for {name!r:.60}; give its column, frame['text']")
        if isinstance(texts, (str, bytes, Mapping)) or not isinstance(texts, Iterable):
            raise ConfigError(f"data: expected texts in a list for each client, got {type(texts).__name__} for {name!r:.60}")
        texts = list(texts)
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise ConfigError(f"data: expected texts in a list for each client, got {odd[0]!r:.40} among those of {name!r:.60}")
        corpus.add(name, [text for text in texts if text.strip()])
    return corpus
