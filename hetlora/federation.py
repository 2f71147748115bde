"""What a run works on: the base model in memory, everybody's data, and the ranks that the clients start with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hetlora import checkpoint, init_adapter
from hetlora.ahead import Known, check, check_vocabulary, outline
from hetlora.config import Config, ConfigError
from hetlora.data import FederatedData, Federation, load_data
from hetlora.demo_model import DemoModel, Progress, demo_folder
from hetlora.models import check_quantization, checkpoint_layers, load_model, load_tokenizer, read_limits, resolve_device, target_shapes
from hetlora.observer import Observer
from hetlora.ranks import Capability, RankFile, StartingRanks
from hetlora.sources import check_source, read_prompts
from hetlora.text_files import kind_of


def prepare(cfg: Config, observer: Observer | None = None, make_data: Callable[[Any], FederatedData] | None = None, resume: bool = False) -> Federation:
    """Load (or make) the model, and the data; `ConfigError` for anything that does not fit, as far as it can be known before the weights are loaded.

    make_data: of the tokenizer, in place of what `cfg.data` names.   resume: for the run in cfg.output, which goes on.
    """
    recorded = checkpoint.load_state(Path(cfg.output)) if resume else None
    known = look(cfg, observer, make_data, begun=bool(recorded))
    starting = starting_ranks(cfg, known.data)  # likewise ranks that do not fit the clients
    if recorded:
        checkpoint.check_start(Path(cfg.output), recorded, cfg, checkpoint.fingerprint(known.data), starting)
    check(cfg, known, starting)
    return load(cfg, known)


def look(cfg: Config, observer: Observer | None = None, make_data: Callable[[Any], FederatedData] | None = None, begun: bool = False) -> Known:
    """What `prepare` knows before the weights are loaded. Left to `check` is what one run is, where several share model and data.

    begun: the run goes on from a checkpoint.
    """
    observer = observer or Observer()
    if isinstance(cfg.rank_rule, RankFile):
        cfg.rank_rule.table()  # a file that cannot be read is told now, before the model is made or loaded
    if isinstance(cfg.rank_rule, Capability):
        raise cfg.rank_rule.unmeasured("a simulated client")
    read_prompts(cfg)
    if make_data is None:
        check_source(cfg)  # the demo's model is made in a minute
    resolve_device(cfg.device)
    check_quantization(cfg)
    path = resolve_model(cfg, progress=observer.pretrain)
    if not os.path.isdir(path):
        observer.message(f"model {path}: no folder of that name here; the hub is asked for it")
    limits, own = read_limits(cfg, path), outline(cfg, path)
    start = init_adapter.read(cfg) if cfg.init_adapter and not begun else None
    if start and own:
        init_adapter.check_modules(start, cfg, own.shapes)
    tokenizer = load_tokenizer(path, cfg.trust_remote_code)
    return Known(path, own, limits, tokenizer, make_data(tokenizer) if make_data else load_data(cfg, tokenizer), start)


def load(cfg: Config, known: Known) -> Federation:
    """The weights, last; `ConfigError` where they are not what the model's configuration says."""
    model = load_model(cfg, known.path)
    if cfg.gradient_checkpointing:
        checkpoint_layers(model)
    check_vocabulary(cfg, known.highest, model.get_input_embeddings().num_embeddings)
    return Federation(model, known.path, target_shapes(model, cfg.target_modules), known.data, known.tokenizer)


def resolve_model(cfg: Config, progress: Progress | None = None, demo: DemoModel | None = None) -> str:
    """Path or hub id of `cfg.model`; for 'demo' the folder of the demo model, pre-trained at the first call (about a minute) and then cached.

    Raises `ConfigError` when a local path does not exist or the cache folder cannot be written.
    """
    if cfg.model == "demo":
        return str(demo_folder(demo or DemoModel(), progress))
    path = os.path.expanduser(cfg.model)
    if os.path.isdir(path):
        for entry in sorted(Path(path).iterdir()):
            if entry.exists() and not entry.is_dir() and (kind := kind_of(entry)):
                raise ConfigError(f"model {cfg.model!r}: {entry} is {kind}; expected files alone")
        return path
    if cfg.model.startswith((".", "/", "~")) or cfg.model.count("/") > 1 or os.path.exists(path):
        raise ConfigError(f"model {cfg.model!r}: no such folder; give a folder with config.json and weights, a hub id (ORG/NAME) or 'demo'")
    return cfg.model


def base_weights(cfg: Config, model: torch.nn.Module, shapes: Iterable[str]) -> dict[str, torch.nn.Parameter]:
    """{parameter: weight} of the base that the rounds change, as the run's merge says: none, those of the target modules, or all.

    shapes: names of the target modules.
    """
    if cfg.merge_kind.base == "none":
        return {}
    if cfg.merge_kind.base == "all":
        return dict(model.named_parameters())
    return {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in shapes}


def starting_ranks(cfg: Config, data: FederatedData) -> StartingRanks:
    """Every client's rank before the first round; 0 where the kind of training has none, so that what remains of a bank is the base."""
    if cfg.secure_aggregation:
        raise ConfigError("secure_aggregation = True: hides uploads from a server that is another process, and a simulation has none; leave it out")
    if cfg.training_kind.no_ranks:
        return StartingRanks(0, 0, {client.name: 0 for client in data.clients})
    return cfg.rank_rule.assign(data.clients, cfg.seed)
