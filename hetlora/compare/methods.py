"""What `hetlora compare` runs: the plan of a comparison, and its methods, which are names for combinations of the settings of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hetlora.config import Config, ConfigError, setting_group
from hetlora.errors import nearest
from hetlora.kinds import TRAININGS, own_settings
from hetlora.ranks import StartingRanks

_OF_ANY_METHOD = ("server_optimizer", "server_lr", "server_momentum", "server_beta2", "server_tau")
OWNED = (*("train", "merge", "weights", "weight_scope", "weight_cap", "prune_scope"), *_OF_ANY_METHOD, *own_settings())
"""Settings that say which method a run is: a comparison takes them from its methods, never from its common settings.

A run by itself has those of the server's optimiser beside any method, as options of it.
"""

ALONE = {
    "init_adapter": "some methods have no bank that could start from an adapter; merge it into the model and give that as --model",
    "keep_best": "all methods are compared after their last round, and the tables have the best one beside it",
    "patience": "all methods run the same rounds",
}
"""Settings of `hetlora run` that a comparison cannot have, and why."""

_OF_ONE_RUN = ("train", "adapter_dtype", "scale", "scale_rule", "dropout")
SHARED = tuple(name for name in Config.model_fields if setting_group(name) == "data" or (setting_group(name) == "model" and name not in _OF_ONE_RUN))
"""Settings that say which model and data are loaded. All runs of a comparison share these, so no variant and no search has its own."""


class ComparisonPlan(BaseModel):
    """What is compared, besides the common settings of the runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    methods: str = Field(
        "main", description="Methods (listed below), groups of them (main, field, ablations, all) and variants 'NAME+setting=value', comma-separated."
    )
    seeds: int = Field(3, description="Runs per method, with the seeds SEED, SEED + 1, ...", ge=1)
    target: float = Field(
        0.9, description="Count the rounds until the global adapter reaches this perplexity; below 1: this share of the perplexity before training.", gt=0
    )
    search: str = Field("", description="'SETTING=V1,V2,...': each method first takes the value with the lowest final perplexity in a run of its own.")
    search_data: str = Field("", description="Data of the search; default: that of the comparison, with another seed.")
    search_rounds: int = Field(0, description="Rounds of a search run; 0 = as many as in the comparison.", ge=0)
    search_beyond: int = Field(
        1, description="Values that the search adds, one after the other, beyond the least or the largest one while that one wins.", ge=0, le=8
    )
    against: str = Field("", description="Method that the others are compared with, seed by seed; default: homlora-min where it is run, else the first.")


def make_plan(source: str, **values: Any) -> ComparisonPlan:
    """`ComparisonPlan` of `values`; every fault becomes one `ConfigError` line that names `source`."""
    try:
        return ComparisonPlan(**values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg'].lower()}, got {f['input']!r}" for f in error.errors())
        raise ConfigError(f"{source}: {faults}") from None


Ranks = Literal["own", "min", "mean", "max"]


@dataclass(frozen=True)
class Method:
    """One method: `settings` on top of the common ones. `ranks`: of the clients: their own, or all the least, the (rounded) mean or the largest.

    `like`: the method whose searched setting an ablation takes over, so that it differs in one thing only.   `group`: of methods without `like`.
    """

    name: str
    text: str
    ranks: Ranks = "own"
    settings: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None
    group: Literal["main", "field"] = "main"


_FEDAVG = {"gamma": 1.0, "weights": "samples"}
_PLORA = {"train": "chosen-rows", "weights": "uniform"}
_FOLD = {"train": "fold", "weights": "samples"}


def _field(name: str, text: str, **settings: Any) -> Method:
    """A method of other papers: sample weights, and no pruning where its training could prune, unless `settings` say otherwise."""
    prunes = TRAININGS[settings.get("train", "adapters")].prunes
    return Method(name, text, settings={**({"gamma": 1.0} if prunes else {}), "weights": "samples", **settings}, group="field")


_LIST = (
    Method("hetlora", "HETLORA: truncation, self-pruning, sparsity weights"),
    Method("hetlora-gamma1", "HETLORA without pruning (gamma = 1)", settings={"gamma": 1.0}),
    Method("homlora-min", "every client at the least rank, FedAvg of A and of B", "min", _FEDAVG),
    Method("homlora-mean", "every client at the fleet's mean rank (as many bytes as with ranks of their own), FedAvg of A and of B", "mean", _FEDAVG),
    Method("homlora-max", "every client at the largest rank, FedAvg of A and of B", "max", _FEDAVG),
    Method("recon-svd", "exact sum of B A, then truncated SVD (FlexLoRA)", settings={**_FEDAVG, "merge": "svd"}),
    Method("flora", "exact sum of B A by stacking, folded into the base each round (FLoRA)", settings={**_FEDAVG, "merge": "stack"}),
    Method("fold", "fresh rows on the folded bank: all rows down in 8 bits, B alone trained and sent, exact sum", settings=_FOLD),
    Method("fedavg-full", "full fine-tuning, FedAvg of all weights", settings={"train": "full", "weights": "samples"}),
    _field("delta", "FedAvg of the factors' changes; rows that a client does not own count as unchanged", merge="delta"),
    _field("raflora", "each rank row's mean product over its owners, then truncated SVD (raFLoRA, RB-LoRA)", merge="owners-svd"),
    _field("florist", "exact sum of B A, then SVD to the rank of each module that holds 90 % of its energy (FLoRIST)", merge="energy"),
    _field(
        "florist-base",
        "exact sum of B A at the rank that holds 90 % of its energy, folded into the base each round, with fresh adapters (FLoRIST)",
        merge="energy-stack",
    ),
    _field("fed-plora", "r_k random rows of the bank are trained beside the frozen others, each is averaged over who chose it (Fed-PLoRA)", **_PLORA),
    _field("ffa-lora", "B alone is trained and sent, over one frozen A (FFA-LoRA)", train="b-only"),
    _field("rolora", "B in odd rounds, A in even ones, half the bytes (RoLoRA)", train="alternating"),
    _field("fedex-lora", "FedAvg of A and of B, the rest of the exact sum folded into the base each round (FedEx-LoRA)", merge="residual"),
    _field("rbla", "each rank row's mean over its owners, A and B apart (RBLA, FediLoRA)", shared_rows="owners"),
    Method("hetlora-uniform", "HETLORA with equal weights", settings={"weights": "uniform"}, like="hetlora"),
    Method("hetlora-samples", "HETLORA with sample-count weights", settings={"weights": "samples"}, like="hetlora"),
    Method("hetlora-owners", "HETLORA, rows divided by their owners' weight", settings={"shared_rows": "owners"}, like="hetlora"),
    Method("hetlora-client-weights", "HETLORA with one sparsity weight per client", settings={"weight_scope": "client"}, like="hetlora"),
    Method("hetlora-module-prune", "HETLORA pruning each module by itself", settings={"prune_scope": "module"}, like="hetlora"),
)
METHODS = {method.name: method for method in _LIST}
DEFAULT_METHOD = "fold"
"""What `hetlora run` does where no setting says otherwise. The study of docs/results.md decided it."""
GROUPS = {
    "main": [method.name for method in _LIST if method.like is None and method.group == "main"],
    "field": [method.name for method in _LIST if method.like is None and method.group == "field"],
    "ablations": [method.name for method in _LIST if method.like is not None],
    "all": [method.name for method in _LIST],
}


def parse_methods(text: str) -> list[Method]:
    """A comma-separated list of methods, groups ('main', 'field', 'ablations', 'all') and variants 'NAME+setting=value+setting=value', each once.

    A variant takes over its method's searched setting. Raises `ConfigError` naming what is unknown, and what there is.
    """
    found: dict[str, Method] = {}
    for name in (part.strip() for part in text.split(",")):
        base, *changes = name.split("+")
        if base not in METHODS and (changes or base not in GROUPS):
            known = f"{', '.join(METHODS)}; the groups {', '.join(GROUPS)}"
            raise ConfigError(f"methods: unknown {base!r}{nearest(base, [*METHODS, *GROUPS])}; there are {known}; and 'NAME+setting=value'")
        for own in GROUPS.get(base, [base]) if not changes else ():
            found[own] = METHODS[own]
        if changes:
            found[name] = _variant(METHODS[base], name, changes)
    return list(found.values())


def _variant(method: Method, name: str, changes: list[str]) -> Method:
    settings = dict(method.settings)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in Config.model_fields or key in ("output", "seed"):
            raise ConfigError(f"methods: {name!r}: expected 'setting=value' with a setting of `hetlora run` other than output and seed, got {change!r}")
        refuse_shared(f"methods: {name!r}", key, value)
        settings[key] = value
    return Method(name, f"{method.text}; {', '.join(changes)}", method.ranks, settings, method.like or method.name)


def refuse_shared(where: str, key: str, value: str) -> None:
    """`ConfigError` for a setting of one method that would need a model or data of its own, or that no comparison has."""
    if key in ALONE:
        raise ConfigError(f"{where}: {key}: {ALONE[key]}; leave it out")
    if key in SHARED or (key == "ranks" and value.strip().startswith("column:")):
        shown = "ranks = 'column:...' (read with the data)" if key == "ranks" else key
        raise ConfigError(f"{where}: all runs of a comparison share one model and its data, {shown} cannot differ; set it for all, or make a comparison each")


def refuse_private(source: str, given: Mapping[str, Any]) -> None:
    """`ConfigError` for differential privacy among the common settings, with the methods that have it: it wants equal weights, which are a method's own."""
    private = {name: value for name, value in given.items() if name.startswith("dp_") and value != Config.model_fields[name].default}
    if private:
        clip = {} if "dp_clipping_norm" in private else {"dp_clipping_norm": 0.5}
        named = "+".join(["fold", "weights=uniform", *(f"{name}={value}" for name, value in (clip | private).items())])
        raise ConfigError(
            f"{source}: {', '.join(private)}: goes with weights = 'uniform', which a comparison takes from its methods; give both to those methods"
            f"{', and a clip' if clip else ''}, as in --methods {named},fold --no-cobatch"
        )


def method_config(method: Method, common: Config, starting: StartingRanks, **values: Any) -> Config:
    """The settings of a run of `method`: the common ones, the method's own, and `values` (seed, output, ...) on top.

    starting: the clients' ranks in the common settings, for the methods in which all clients have one.
    """
    settings = _without_others(method, common.model_dump())
    if method.ranks != "own":
        one = {"min": starting.r_min, "mean": round(sum(starting.ranks.values()) / len(starting.ranks)), "max": starting.r_max}
        settings["ranks"] = f"fixed:{one[method.ranks]}"
    return Config.create(f"method {method.name}", **{**settings, **method.settings, **values})


def method_settings(name: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """`common` with the row of one method on top, for a run by itself.

    `ConfigError` for an unknown name, and for a method in which all clients have one rank: which one is asked of the user.
    """
    if name not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {name!r}{nearest(name, METHODS)}")
    method = METHODS[name]
    if method.ranks != "own":
        settings = ", ".join(f"{key} = {value!r}" for key, value in method.settings.items())
        raise ConfigError(f"method: {name!r} gives every client one rank; name it with ranks = 'fixed:R', beside {settings}, and leave method out")
    return {**_without_others(method, common), **method.settings}


def default_method(given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(`given` with the row of `DEFAULT_METHOD` under it, what was chosen in words); `given` as it is where one of its settings tells another method."""
    kind = TRAININGS[METHODS[DEFAULT_METHOD].settings["train"]]
    telling = [name for name in given if name in (*OWNED, *kind.unused) and name not in ("weights", *_OF_ANY_METHOD, *kind.settings)]
    if telling:
        return dict(given), f"as {', '.join(telling)} and the defaults of the other settings say (no --method given)"
    return {**METHODS[DEFAULT_METHOD].settings, **given}, f"{DEFAULT_METHOD}, the default; --method hetlora is the published one"


def left_out(name: str, given: Mapping[str, Any]) -> list[str]:
    """Names of the settings in `given` that a run of method `name` does not take over, where its value is another."""
    taken = method_settings(name, given)
    known = {key: value for key, value in given.items() if key in Config.model_fields}
    return [key for key, value in known.items() if taken.get(key, Config.model_fields[key].default) != value]


def _without_others(method: Method, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without those that say which method a run is, or that say nothing about this one."""
    train = method.settings.get("train", Config.model_fields["train"].default)
    unused = TRAININGS[train].unused if train in TRAININGS else ()  # an unknown kind is refused later
    return {name: value for name, value in settings.items() if name in _OF_ANY_METHOD or name not in (*OWNED, *unused)}
