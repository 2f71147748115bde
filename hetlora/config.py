"""The configuration of a federation: one model, the same names on the command line, in a file and in Python."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hetlora import settings_rules
from hetlora.errors import ConfigError, nearest
from hetlora.kinds import MERGE_CHOICES, MERGES, TRAININGS, MergeKind, TrainingKind, merge_kind
from hetlora.ranks import RankRule, parse_ranks
from hetlora.settings_file import read_settings
from hetlora.text_files import shortened

__all__ = ["Config", "ConfigError"]

if TYPE_CHECKING:
    Train: TypeAlias = str
    Merge: TypeAlias = str
else:
    Train, Merge = Literal[tuple(TRAININGS)], Literal[MERGE_CHOICES]


def _setting(default: Any, group: str, text: str, **limits: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"group": group}, **limits)


def _choices(kinds: Iterable[TrainingKind | MergeKind]) -> str:
    return "; ".join(f"'{kind.name}': {kind.text}" for kind in kinds) + "."


class Config(BaseModel):
    """Settings of one federated run. Units are in the descriptions; every default but that of `clip_median` is what the paper uses where it says so.

    Raises `ConfigError` naming the setting, what was expected and what came.

    >>> import hetlora
    >>> cfg = hetlora.Config(data="stdlib:email,json", ranks="powerlaw:5:50", rounds=3)
    >>> cfg.rounds, cfg.gamma, cfg.merge
    (3, 0.99, 'factors')
    >>> hetlora.Config.create("my settings", round=3)
    Traceback (most recent call last):
        ...
    hetlora.errors.ConfigError: my settings: unknown setting 'round' (did you mean 'rounds'?)
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, frozen=True, allow_inf_nan=False)

    # model
    model: str = _setting(
        "demo", "model", "Causal language model: a local folder, a hub id, or 'demo' (a small byte-level decoder made on this machine).", min_length=1
    )
    trust_remote_code: bool = _setting(False, "model", "Run the Python code that a model or its tokenizer brings along. Read it first.")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = _setting(
        "float32", "model", "Data type of the frozen base model. 'float16' for GPUs without bfloat16; its losses are scaled."
    )
    adapter_dtype: Literal["float32", "bfloat16", "float64"] = _setting("float32", "model", "Data type of the adapters and their optimiser.")
    device: str = _setting("auto", "model", "Torch device: 'auto', 'cpu', 'cuda', 'cuda:1', ...", min_length=1)
    target_modules: str = _setting(
        "attention",
        "model",
        "Modules that carry adapters: 'attention' (all linear layers of self-attention, as in the paper), 'all-linear', 'peft' (PEFT's default for "
        "the architecture), a comma-separated list of name suffixes, or a regular expression over full module names.",
        min_length=1,
    )
    quantize: Literal["none", "8bit", "4bit"] = _setting("none", "model", "Load the frozen base through bitsandbytes in 8 or 4 bits.")
    train: Train = _setting("adapters", "model", "What clients train: " + _choices(TRAININGS.values()))
    init_adapter: str = _setting("", "model", "Folder of a LoRA in PEFT's format that the global adapter starts from; '' = A drawn, B = 0.")
    scale: float = _setting(2.0, "model", "s in dW = s * B A, the same for every rank; alpha, with scale_rule = 'rslora'.", gt=0)
    scale_rule: Literal["constant", "rslora"] = _setting(
        "constant", "model", "'constant': s = scale for every rank; 'rslora': a client of rank r trains with s = scale / sqrt(r), so that steps have one size."
    )
    dropout: float = _setting(0.0, "model", "Probability of dropping an input element in front of A while training.", ge=0, lt=1)

    # data
    data: str = _setting(
        "stdlib",
        "data",
        "Folder (each sub-folder, or else each file, is a client), a .jsonl, .csv or .parquet file, 'hub:ORG/NAME', 'stdlib' (packages of Python's "
        "library) or 'unicode' (names of letters, by script); ':NAME,NAME' takes some packages or scripts, ':-NAME,NAME' all others.",
        min_length=1,
    )
    text_field: str = _setting("text", "data", "JSONL key or column that holds the text.", min_length=1)
    prompt_field: str = _setting(
        "", "data", "JSONL key or column of a prompt: each row is then one example, prompt and then the text as its response; '' = running text."
    )
    messages_field: str = _setting("", "data", "JSONL key or column of a conversation: a list of {role, content}, as 'messages' in chat data sets; '' = none.")
    template: str = _setting(
        "",
        "data",
        "Chat template of conversations, and of prompts if given: 'tokenizer' (its own), 'chatml', or a file in jinja2; '' = as the data is.",
    )
    system_prompt: str = _setting("", "data", "System message of conversations that have none.")
    loss_on: Literal["auto", "all", "response"] = _setting(
        "auto", "data", "Tokens that are predicted: all, or those of responses alone; 'auto' = 'response' where a chat template is in force, else 'all'."
    )
    truncate: Literal["end", "turns"] = _setting(
        "end", "data", "A conversation longer than seq_len: cut at its end, or without its oldest exchanges until it fits (then cut)."
    )
    pack: bool = _setting(False, "data", "Join a client's training examples into sequences of up to seq_len tokens.")
    client_field: str = _setting("client", "data", "JSONL key or column that names the client.", min_length=1)
    split: str = _setting("train", "data", "Split of a hub data set.", min_length=1)
    seq_len: int = _setting(256, "data", "Tokens per sequence.", ge=2, le=2**24)
    max_tokens_per_client: int = _setting(0, "data", "Use at most this many tokens of each client; 0 = all.", ge=0)
    test_fraction: float = _setting(0.2, "data", "Share of each client's own text kept for evaluation.", gt=0, lt=1)
    held_out_clients: int = _setting(0, "data", "Clients that never train and only evaluate the global adapter.", ge=0)
    skip_empty: bool = _setting(False, "data", "Leave out clients with too little text instead of stopping.")
    skip_bad_rows: bool = _setting(False, "data", "Leave out rows of a file or hub data set that cannot be used instead of stopping.")

    # federation
    rounds: int = _setting(20, "federation", "Rounds.", ge=1, le=1_000_000)
    clients_per_round: int = _setting(8, "federation", "Clients sampled per round, uniformly without replacement.", ge=1)
    ranks: str = _setting(
        "powerlaw:5:50",
        "federation",
        "Ranks of the clients: 'powerlaw:MIN:MAX[:A]', 'dealt:MIN:MAX[:A]' (its quantiles, dealt out by the seed), 'sized:MIN:MAX[:A]' (its quantiles, by "
        "the amount of training text), 'fixed:R', a comma-separated list (one per client, by name order), a JSON or CSV file client -> rank, "
        "'column:FIELD:MIN:MAX' (a numeric capability in the data, mapped linearly), or 'capability:MIN:MAX[:SECONDS]' (by the memory and the speed that "
        "devices measure, in a Flower deployment).",
    )
    gamma: float = _setting(0.99, "federation", "Rank decay: a pruning client keeps max(r_min, floor(gamma * r)) rows; 1 = no pruning.", gt=0, le=1)
    prune_lambda: float = _setting(
        1e-3,
        "federation",
        "Weight of the pruning regulariser ||B[:, q:]|| * ||A[q:, :]||. At the default pruning is rare: in this project's studies nobody pruned.",
        ge=0,
    )
    prune_scope: Literal["client", "module"] = _setting("client", "federation", "One rank per client (tail summed over modules), or one per client and module.")
    weights: Literal["sparsity", "uniform", "samples"] = _setting("sparsity", "federation", "Aggregation weights: ||B_k A_k||, equal, or number of sequences.")
    weight_scope: Literal["module", "client"] = _setting("module", "federation", "Scope of ||B_k A_k||: one weight per client and module, or one per client.")
    weight_cap: float = _setting(0.0, "federation", "Cap ||B_k A_k|| at this multiple of the round's median; 0 = no cap.", ge=0)
    clip_update: float = _setting(0.0, "federation", "Scale a client's update (upload - download) to at most this Frobenius norm; 0 = no clip.", ge=0)
    clip_median: float = _setting(
        3.0,
        "federation",
        "Scale a client's update to at most this multiple of the round's median, per root of the rank; 0 = no clip. Ordinary updates keep their bits.",
        ge=0,
    )
    shared_rows: Literal["none", "owners"] = _setting(
        "none", "federation", "A row that only some uploads own: zero-padded as published, or divided by its owners' weight."
    )
    unowned_rows: Literal["keep", "zero"] = _setting("keep", "federation", "A row that no upload owns keeps its old value or becomes zero.")
    download: Literal["8bit", "4bit", "exact"] = _setting(
        "8bit", "federation", "With train = 'fold': how the rows of the bank travel, quantised with one scale a row or in the adapters' own type."
    )
    trim: float = _setting(0.3, "federation", "Share of a rank row's owners that merge = 'trimmed' leaves out at either end.", ge=0, lt=0.5)
    energy: float = _setting(
        0.9,
        "federation",
        "With merge = 'energy' or 'energy-stack': share of the sum of squared singular values that the rows kept of a module hold at least; 1 = all rows.",
        gt=0,
        le=1,
    )
    merge: Merge = _setting("factors", "federation", "What the server does with the uploads: " + _choices(MERGES[name] for name in MERGE_CHOICES))
    server_optimizer: Literal["none", "fedavgm", "fedadam"] = _setting(
        "none", "federation", "What the server takes a round's change for: the change itself, or a gradient for momentum ('fedavgm') or Adam ('fedadam')."
    )
    server_lr: float = _setting(0.0, "federation", "Learning rate of the server's optimiser; 0 = 1 for 'fedavgm', 0.01 for 'fedadam'.", ge=0)
    server_momentum: float = _setting(0.9, "federation", "Momentum of 'fedavgm', beta1 of 'fedadam'.", ge=0, lt=1)
    server_beta2: float = _setting(0.99, "federation", "Decay of the squared changes, with 'fedadam'.", ge=0, lt=1)
    server_tau: float = _setting(1e-3, "federation", "What 'fedadam' adds to the root of the squared changes.", ge=1e-15)

    # privacy
    dp_clipping_norm: float = _setting(
        0.0, "privacy", "C: scale each client's whole update to at most this Frobenius norm, for differential privacy of clients; 0 = none.", ge=0
    )
    dp_noise_multiplier: float = _setting(0.0, "privacy", "sigma: Gaussian noise of deviation sigma C on the sum of the clipped updates.", ge=0)
    dp_delta: float = _setting(1e-5, "privacy", "delta, for which epsilon is computed; below 1 over the number of clients.", gt=0, lt=1)
    dp_sampling: Literal["fixed", "poisson"] = _setting(
        "fixed", "privacy", "'fixed': clients_per_round clients, from which epsilon gains nothing; 'poisson': each client by its own coin, and it does."
    )
    dp_secret: str = _setting("", "privacy", "File of secret bytes that noise and coins are drawn from; '' = the run's seed, which is for simulation alone.")

    secure_aggregation: bool = _setting(
        False, "privacy", "In a Flower deployment: clients mask their uploads so that the server sees sums alone (SecAgg+). For merge = 'factors' and 'delta'."
    )
    secure_range: float = _setting(1024.0, "privacy", "The largest weight, or number of a row times it, that a client may add to a masked sum.", gt=0)
    secure_bits: int = _setting(
        40, "privacy", "The step of masked numbers is 2 to minus this. A number takes 4 bytes where these hold a sum, else 8.", ge=1, le=52
    )
    secure_owners: int = _setting(
        3,
        "privacy",
        "Rank rows that fewer clients of a round own stay as they are; 1 = none do, and the server sees rows that one client alone owns.",
        ge=1,
    )
    secure_shares: int = _setting(
        0, "privacy", "Key shares that each client gives to clients of its round, itself among them: an odd number; 0 = one to all of them.", ge=0
    )
    secure_threshold: int = _setting(
        0, "privacy", "Shares that open a mask, more than half; 0 = two thirds, rounded up. With fewer the round is given up.", ge=0
    )

    # local training
    local_steps: int = _setting(5, "training", "Optimiser steps per client and round (a client without that much data repeats it).", ge=1, le=100_000)
    local_epochs: int = _setting(0, "training", "Passes over the client's own data per round instead of local_steps; 0 = use local_steps.", ge=0, le=10_000)
    batch_size: int = _setting(8, "training", "Sequences per client and step.", ge=1, le=1_000_000)
    lr: float = _setting(3e-3, "training", "Learning rate.", gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = _setting("constant", "training", "Learning rate over the rounds.")
    warmup_rounds: int = _setting(0, "training", "Rounds in which the learning rate rises to lr in equal steps, before lr_schedule begins.", ge=0)
    optimizer: Literal["adamw", "sgd"] = _setting("adamw", "training", "Local optimiser; its state starts fresh each round.")
    weight_decay: float = _setting(0.0, "training", "Decoupled weight decay (adamw) or L2 (sgd).", ge=0)
    momentum: float = _setting(0.0, "training", "Momentum (sgd).", ge=0, lt=1)
    moments_dtype: Literal["same", "bfloat16"] = _setting(
        "same",
        "training",
        "Data type of AdamW's first moment and of SGD's momentum: that of the adapters, or 'bfloat16' beside adapters in float32, which takes less memory. "
        "AdamW's second moment keeps the adapters'.",
    )
    clip_norm: float = _setting(1.0, "training", "Clip each client's gradient norm; 0 = no clip.", ge=0)
    max_tokens_per_step: int = _setting(
        16384,
        "training",
        "Largest forward/backward in tokens; larger batches are split, with the same result but for rounding. 'auto' (0): as the memory that is free allows, "
        "by a model of it.",
        ge=0,
    )
    padding_free: Literal["auto", "on", "off"] = _setting(
        "off",
        "training",
        "Sequences of a step share rows instead of being padded, where a probe of the model shows that it keeps them apart: 'auto' (else sorted by length), "
        "'on' (else an error), 'off' (each padded to its batch's longest). Changes rounding alone.",
    )
    gradient_checkpointing: bool = _setting(
        False, "training", "Keep the inputs of the model's layers alone and compute each layer again in the backward pass: less memory, a third more time."
    )
    cobatch: bool = _setting(True, "training", "Train all sampled clients in one batch; false = one client at a time.")
    clients_at_once: int = _setting(
        0,
        "training",
        "With cobatch: train a round's clients in groups of at most this many, whose adapters, gradients and moments alone are on the device; those of the "
        "others wait in host memory. 0 = all in one, or, with max_tokens_per_step = 'auto', as the memory that is free allows.",
        ge=0,
    )
    cuda_graph: bool = _setting(
        False, "training", "With cobatch, on a GPU: record a step in one CUDA graph and replay it for further ones of the same clients; pads to the longest."
    )

    # run
    seed: int = _setting(0, "run", "Seed of everything drawn in the run.", ge=0)
    eval_every: int = _setting(1, "run", "Evaluate every this many rounds (and after the last).", ge=1)
    keep_best: bool = _setting(False, "run", "End with the global adapter (or model) of the round with the lowest held-out loss, instead of the last round's.")
    patience: int = _setting(0, "run", "Stop after this many evaluations in a row that brought no lower held-out loss; 0 = never.", ge=0)
    eval_tokens: int = _setting(65536, "run", "Evaluate on at most this many tokens of each held-out set; 0 = all.", ge=0)
    rouge_examples: int = _setting(
        0,
        "run",
        "Answer this many held-out prompts (prompt_field, messages_field) before the first and after the last round, scored by ROUGE-L; 0 = none.",
        ge=0,
    )
    sample_prompts: str = _setting("", "run", "File of prompts, one a line: answers to them before the first and after the last round are in the report.")
    rouge_tokens: int = _setting(64, "run", "Tokens of an answer that ROUGE-L scores or a report shows, at most.", ge=1, le=2**20)
    evaluate: Literal["global", "all"] = _setting(
        "global", "run", "'all' also evaluates, each time, every client's own held-out and training text under the rank rows it receives."
    )
    diagnostics: bool = _setting(False, "run", "Record each round the energy of every rank row, the effective rank and the error of averaging A and B apart.")
    output: str = _setting("runs/hetlora", "run", "Folder of the run; it must not exist unless --resume is given.", min_length=1)
    save_clients: bool = _setting(True, "run", "Keep each client's last trained adapter in the run folder.")

    def __init__(self, **values: Any) -> None:
        """Raises `ConfigError`: every fault in one line."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("Config: " + "; ".join(self._faults(error))) from None

    @classmethod
    def _faults(cls, error: ValidationError) -> list[str]:
        faults = []
        for fault in error.errors():
            name = ".".join(str(p) for p in fault["loc"]) or "settings"
            if fault["type"] == "value_error":  # of `check`, which says all
                faults.append(str(fault["ctx"]["error"]))
            elif fault["type"] == "extra_forbidden":
                hint = nearest(name, cls.model_fields, otherwise=" ('hetlora run --help' lists them)")
                faults.append(f"unknown setting '{name}'{hint}")
            else:
                faults.append(f"{name}: {fault['msg'].lower()}, got {shortened(repr(fault['input']))}")
        return faults

    def _given(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, field in type(self).model_fields.items() if (value := getattr(self, name)) != field.default]

    def __repr__(self) -> str:
        """The settings that are not at their defaults."""
        return f"Config({', '.join(f'{name}={value!r}' for name, value in self._given())})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """For notebooks: a table of the settings that are not at their defaults."""
        return (
            "<table><caption>hetlora.Config; all else at its default</caption>"
            + "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in self._given())
            + "</table>"
        )

    @model_validator(mode="before")
    @classmethod
    def _lists_to_text(cls, values: Any) -> Any:
        """In files and Python, `ranks` and `target_modules` may be lists."""
        if isinstance(values, dict):
            values = dict(values)
            for key in ("ranks", "target_modules"):
                if isinstance(values.get(key), (list, tuple)):
                    values[key] = ",".join(str(v) for v in values[key])
            if values.get("max_tokens_per_step") == "auto":
                values["max_tokens_per_step"] = 0
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        self.check()
        return self

    def check(self) -> None:
        """`ConfigError` for settings that do not go together: one that would be ignored, or that a kind of run cannot use.

        `Config(...)` and `Config.create` call it; `model_copy` does not.
        """
        settings_rules.check(self)

    @property
    def chats(self) -> bool:
        """Whether a chat template writes the examples."""
        return bool(self.messages_field or self.template)

    @property
    def response_only(self) -> bool:
        """Whether responses alone are predicted."""
        return self.loss_on == "response" or (self.loss_on == "auto" and self.chats)

    def scale_at(self, rank: int) -> float:
        """s in dW = s B A of an adapter of this rank: of a client that trains it, or of the server's bank."""
        return self.scale if self.scale_rule == "constant" else self.scale / math.sqrt(max(rank, 1))

    @property
    def rank_rule(self) -> RankRule:
        """The setting `ranks`, parsed; `ConfigError` naming what is wrong with it."""
        return parse_ranks(self.ranks)

    @property
    def training_kind(self) -> TrainingKind:
        return TRAININGS[self.train]

    @property
    def merge_kind(self) -> MergeKind:
        return merge_kind(self.train, self.merge)

    @property
    def saves(self) -> tuple[str, ...]:
        """Which adapters the run folder keeps, 'global' and 'clients'; none where what is learned goes into the base, on which an adapter would be no use.

        With secure aggregation nobody has the clients' own.
        """
        kept = () if self.merge_kind.no_adapter else self.training_kind.saves
        return tuple(what for what in kept if what == "global") if self.secure_aggregation else kept

    @classmethod
    def create(cls, source: str = "settings", **values: Any) -> Config:
        """Validate `values`; every fault becomes one `ConfigError` line that names `source` and the setting."""
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {str(error).removeprefix('Config: ')}") from None

    @classmethod
    def read(cls, path: str | Path) -> dict[str, Any]:
        """Settings of a YAML, TOML or JSON file (UTF-8, at most 256 KiB) as a dict, not yet validated.

        Raises `ConfigError` naming the file: it cannot be read or parsed, a name comes twice, a name is no text.
        """
        return read_settings(path)

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Config:
        """Read a config file and apply `overrides` on top."""
        return cls.create(f"config file {path}", **{**cls.read(path), **overrides})

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=2) + "\n"


def setting_group(name: str) -> str:
    """The group of settings that `name` belongs to: 'model', 'data', 'federation', 'privacy', 'training' or 'run'."""
    extra = Config.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])
