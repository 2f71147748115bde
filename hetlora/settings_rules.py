"""Rules between settings: which go together, and what is said of those that do not. `Config` calls `check` with itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hetlora.errors import ConfigError
from hetlora.kinds import PRIVATE, SECURE, own_settings
from hetlora.ranks import FROM_DATA
from hetlora.text_files import shortened

_OF_ONE_VALUE = {
    **dict.fromkeys(("weight_cap", "weight_scope"), ("weights", ("sparsity",))),
    "momentum": ("optimizer", ("sgd",)),
    **dict.fromkeys(("server_lr", "server_momentum"), ("server_optimizer", ("fedavgm", "fedadam"))),
    **dict.fromkeys(("server_beta2", "server_tau"), ("server_optimizer", ("fedadam",))),
}
"""{setting: (another setting, the values of it with which this one is read)}, besides those of the kinds of run."""

SLOWEST_MOMENT = 0.95
"""`hetlora_kernels.optim.SLOWEST`: settings are checked without torch."""


def check(cfg: Any) -> None:
    """`ConfigError` for settings that do not go together: one that would be ignored, or that a kind of run cannot use."""
    if zero := [name for name, value in cfg.model_dump().items() if isinstance(value, str) and "\0" in value]:
        raise ConfigError(f"{', '.join(zero)}: expected text without a zero byte")
    _ = cfg.rank_rule
    _check_secure(cfg)
    for refuses in (cfg.training_kind.refuses, cfg.merge_kind.refuses, PRIVATE if cfg.dp_clipping_norm else ()):
        for refusal in refuses:
            refused = [name for name in refusal.settings if (getattr(cfg, name) in refusal.values if refusal.values else not _at_default(cfg, name))]
            if refused:
                raise ConfigError(f"{_shown(cfg, refused)}: {refusal.why}")
    in_force = {**cfg.model_dump(include={"weights", "optimizer", "server_optimizer"}), "train": cfg.training_kind.name, "merge": cfg.merge_kind.name}
    for setting, (chooser, needed) in {**own_settings(), **_OF_ONE_VALUE}.items():
        if in_force[chooser] not in needed and not _at_default(cfg, setting):
            values = " or ".join(map(repr, needed))
            raise ConfigError(f"{_shown(cfg, [setting])}: only for {chooser} = {values}, got {chooser} = {in_force[chooser]!r}; leave it out")
    if cfg.local_epochs and not _at_default(cfg, "local_steps"):
        raise ConfigError(f"{_shown(cfg, ['local_steps'])}: local_epochs = {cfg.local_epochs} counts passes in place of steps; leave one of them out")
    if not (cfg.rouge_examples or cfg.sample_prompts) and not _at_default(cfg, "rouge_tokens"):
        raise ConfigError(f"{_shown(cfg, ['rouge_tokens'])}: of answers, and none are asked for; set rouge_examples or sample_prompts, or leave it out")
    if not cfg.data.startswith("hub:") and not _at_default(cfg, "split"):
        raise ConfigError(f"{_shown(cfg, ['split'])}: of a hub data set, and data = {shortened(repr(cfg.data))} is none; leave it out")
    if cfg.dropout and not 0 < round(65536 * cfg.dropout) < 65536:
        raise ConfigError(f"dropout: expected 0, or a probability from 1/65536 to 65535/65536, got {cfg.dropout}")
    if cfg.scale_rule == "rslora" and cfg.prune_scope == "module":
        raise ConfigError("scale_rule = 'rslora': a client has one scale, and prune_scope = 'module' gives its modules ranks of their own; leave one out")
    if cfg.warmup_rounds >= cfg.rounds:
        raise ConfigError(f"warmup_rounds: expected fewer than rounds = {cfg.rounds}, got {cfg.warmup_rounds}")
    if cfg.clients_at_once and not cfg.cobatch:
        raise ConfigError(f"{_shown(cfg, ['clients_at_once'])}: only for cobatch = True, without which clients train one at a time; leave it out")
    if cfg.cuda_graph and not cfg.cobatch:
        raise ConfigError("cuda_graph = True: only for cobatch = True, as it records the step of a cohort; leave it out")
    if cfg.cuda_graph and cfg.padding_free == "on":
        raise ConfigError("cuda_graph = True: a recorded step has one shape, which padding makes; leave padding_free = 'on' out")
    if cfg.cuda_graph and cfg.gradient_checkpointing:
        raise ConfigError("cuda_graph = True: gradient_checkpointing sets the state of torch's generator, which a recorded step cannot; leave one out")
    _check_moments(cfg)
    _check_privacy(cfg)
    _check_examples(cfg)


def _check_moments(cfg: Any) -> None:
    if cfg.moments_dtype == "same":
        return
    if cfg.adapter_dtype != "float32":
        raise ConfigError(f"{_shown(cfg, ['moments_dtype'])}: beside adapters in float32, and adapter_dtype = {cfg.adapter_dtype!r}; leave one of them out")
    if cfg.optimizer == "sgd" and not 0 < cfg.momentum <= SLOWEST_MOMENT:
        raise ConfigError(
            f"{_shown(cfg, ['moments_dtype'])}: of SGD's momentum, above 0 and at most {SLOWEST_MOMENT}, as rounding would hold a slower one still, "
            f"and momentum = {cfg.momentum}; leave one of them out"
        )


def _check_privacy(cfg: Any) -> None:
    """Settings of differential privacy, and what else lets one client's text reach the bank past its clipped update."""
    if not cfg.dp_clipping_norm:
        if alone := [name for name in type(cfg).model_fields if name.startswith("dp_") and not _at_default(cfg, name)]:
            raise ConfigError(f"{_shown(cfg, alone)}: only with a clip, which bounds what one client can do; set dp_clipping_norm, or leave it out")
        return
    if why := cfg.merge_kind.unbounded:
        raise ConfigError(
            f"dp_clipping_norm = {cfg.dp_clipping_norm}: merge = {cfg.merge_kind.name!r} {why}; use --method fold, ffa-lora or rolora, or --method delta"
            " with gamma = 1, each with weights = 'uniform'"
        )
    if cfg.training_kind.prunes and cfg.gamma < 1:
        raise ConfigError(f"gamma = {cfg.gamma}: under dp_clipping_norm ranks may not follow from the clients' text, as pruned ones do; use gamma = 1")
    if cfg.dp_noise_multiplier and cfg.cobatch:
        raise ConfigError("cobatch = True: clients that train in one batch change how each other's sums round, which no clip bounds; use cobatch = False")
    if isinstance(cfg.rank_rule, FROM_DATA):
        raise ConfigError(f"ranks = {cfg.ranks!r}: under dp_clipping_norm ranks may not follow from the data; use 'dealt:MIN:MAX', a list or a file")


def _check_secure(cfg: Any) -> None:
    """Settings of secure aggregation, and those that need each client's upload by itself."""
    if not cfg.secure_aggregation:
        if alone := [name for name in type(cfg).model_fields if name.startswith("secure_") and not _at_default(cfg, name)]:
            raise ConfigError(f"{_shown(cfg, alone)}: of masked sums; set secure_aggregation, or leave it out")
        return
    if why := cfg.merge_kind.needs_uploads:
        raise ConfigError(f"secure_aggregation = True: merge = {cfg.merge_kind.name!r} {why}; use merge = 'factors' (method = 'hetlora') or 'delta'")
    for refusal in SECURE:
        if refused := [name for name in refusal.settings if not _at_default(cfg, name)]:
            raise ConfigError(f"{_shown(cfg, refused)}: {refusal.why}")
    if cfg.clip_median:
        raise ConfigError(
            f"clip_median = {cfg.clip_median}: compares each client's update with the round's median, and under secure_aggregation the server sees sums alone; "
            "use clip_median = 0, which gives that defence up"
        )
    if cfg.clients_per_round < 3:
        raise ConfigError(f"clients_per_round = {cfg.clients_per_round}: a sum hides nobody from the others below three clients; give 3 or more")
    if cfg.secure_owners > cfg.clients_per_round:
        raise ConfigError(f"secure_owners = {cfg.secure_owners}: expected at most clients_per_round = {cfg.clients_per_round}, or no row is summed")
    if cfg.unowned_rows == "zero" and cfg.secure_owners > 1:
        raise ConfigError(
            f"unowned_rows = 'zero': would set rows to zero that clients own and secure_owners = {cfg.secure_owners} leaves out of the sum; "
            "use unowned_rows = 'keep', or secure_owners = 1"
        )
    if cfg.shared_rows == "owners" and cfg.weights == "sparsity":
        raise ConfigError(
            "shared_rows = 'owners': divides by the weight of each row's owners, which would tell the server one client's norm; use weights = 'samples' or "
            "'uniform', or shared_rows = 'none'"
        )
    if cfg.secure_shares and (cfg.secure_shares < 3 or cfg.secure_shares % 2 == 0):
        raise ConfigError(f"secure_shares: expected 0, or an odd number from 3 on, got {cfg.secure_shares}")
    shares = min(cfg.secure_shares or cfg.clients_per_round, cfg.clients_per_round)
    if cfg.secure_threshold and not shares < 2 * cfg.secure_threshold <= 2 * shares:
        raise ConfigError(f"secure_threshold: expected 0, or more than half of {shares} shares and at most all, got {cfg.secure_threshold}")
    steps = cfg.secure_range * 2**cfg.secure_bits
    if not 1 <= steps <= 2**52 or 2 * cfg.clients_per_round * steps >= 2**64:
        raise ConfigError(
            f"{_shown(cfg, ['secure_range', 'secure_bits'])}: {steps:.3g} steps; expected 1 to 2^52, which float64 counts, and with clients_per_round = "
            f"{cfg.clients_per_round} less than 2^63 in the sum; lower one of them"
        )


def _check_examples(cfg: Any) -> None:
    """Settings of prompts, conversations and answers."""
    rows = cfg.prompt_field or cfg.messages_field
    if cfg.messages_field:
        if other := [name for name in ("prompt_field", "text_field") if not _at_default(cfg, name)]:
            raise ConfigError(f"{_shown(cfg, other)}: with messages_field the conversation holds all text; leave it out")
    elif cfg.truncate != "end":
        raise ConfigError(f"{_shown(cfg, ['truncate'])}: only conversations have exchanges to leave out; set messages_field, or leave it out")
    if alone := [name for name in ("template", "loss_on", "pack") if not rows and not _at_default(cfg, name)]:
        raise ConfigError(f"{_shown(cfg, alone)}: of examples, and the data is running text; set prompt_field or messages_field, or leave it out")
    if cfg.system_prompt and not cfg.chats:
        raise ConfigError("system_prompt: written by a chat template, and none is in force; set messages_field or template, or leave it out")
    if cfg.rouge_examples and not rows:
        raise ConfigError("rouge_examples: answers prompts, and prompt_field names none, nor messages_field; set one, or leave it out")


def _at_default(cfg: Any, name: str) -> bool:
    return bool(getattr(cfg, name) == type(cfg).model_fields[name].default)


def _shown(cfg: Any, names: Iterable[str]) -> str:
    return ", ".join(f"{name} = {getattr(cfg, name)!r}" for name in names)
