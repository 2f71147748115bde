"""Kinds of training and of merge, one row of data each. Whatever depends on the kind of a run asks its row: settings and their checks, the round,
checkpoints, traffic, export and comparisons.

To add a merge: its row in `MERGES`, its function, its test, its line in the docs. To add a kind of training: the same with `TRAININGS`.
Torch is not loaded here, so that settings are checked at once. A row names its function as 'module:name'; `load` finds it when the round needs it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Refusal:
    """Settings that a kind cannot use. Away from their defaults they are refused; with `values` given, at one of these only.

    why: the reason, and what to do.   idle: they say nothing about this kind, so that a comparison may leave them out for it.
    """

    settings: tuple[str, ...]
    why: str
    values: tuple[object, ...] = ()
    idle: bool = True


@dataclass(frozen=True)
class MergeKind:
    """How the uploads of a round become what the next round starts from.

    name: value of the setting `merge`.   text: what it does, in the help.
    function: of `(merge.MergeCall) -> merge.Merged`.
    base: weights of the base model that the merge changes. They are in every checkpoint, and the model in memory then serves no other run.
    keeps_bank: the next round starts from the merged bank, and clients download their rows of it. Otherwise it starts from a fresh bank, which
        everybody draws from the run's seed, so that a client downloads only what the function called `follow_bytes` in the rounds since it was here last.
    no_adapter: why no adapter of the run holds what it learned, and what does; '' where the bank does.
    no_pruning: which clients cannot prune although they have rows to; '' where all can.
    unbounded: why one client's influence on the next bank has no proven bound, so that there is no differential privacy; '' where it has: the merge is a
        function of the old bank and of the sum of the clients' updates alone (`privacy.private_upload`).
    needs_uploads: why the server must have each client's upload by itself, so that there is no secure aggregation; '' where sums over the clients do
        (`secure_sum`).
    steps: what the server's optimiser follows from round to round, number by number: 'factors' of the bank and weights of the base, after the merge; the
        'product' B A, where the merge makes all rows anew and row j is not what it was; the 'model' W + s B A, where bank and base change together. The
        last two are steps that the merge takes by itself.
    changes: what is merged are the changes of the rows, and the old rows are added to their mean. Else the rows themselves are merged.
    settings: read by this merge alone, refused with every other.   refuses: settings of others that it cannot use.
    """

    name: str
    text: str
    function: str
    changes: bool = False
    base: Literal["none", "targets", "all"] = "none"
    keeps_bank: bool = True
    no_adapter: str = ""
    no_pruning: str = ""
    unbounded: str = "is no function of the sum of the clients' updates alone, so that one client's influence on it has no proven bound"
    needs_uploads: str = "is made of each client's upload by itself, and the server would see sums alone"
    steps: Literal["factors", "product", "model"] = "factors"
    settings: tuple[str, ...] = ()
    refuses: tuple[Refusal, ...] = ()

    def load(self) -> Callable[..., Any]:
        return pkgutil.resolve_name(self.function)


@dataclass(frozen=True)
class TrainingKind:
    """What clients train in a round, what they download for it and what they send.

    name: value of the setting `train`.   text: what it does, in the help.
    function: of `(training.Work) -> training.Trained`; it also counts the bytes that travel.
    merge: the merge that goes with it, where that is no choice; None: the setting `merge` says.
    no_ranks: what a run shows in place of ranks, where clients have none (all are 0 then); '' where they have.
    saves: which adapters the run folder keeps: the 'global' one, and those of 'clients'.
    receives: function of `(ServerState, Config, model, client names)`: a context in which `model` with the leading rows of a bank is what a client computes
        with before it trains, and what its own held-out text is evaluated under; it yields (bank of one client, ranks of each client).
    factors: which factors clients train and send, 'a', 'b' or 'ab', round by round, by turns; the others are frozen. What is frozen travels down only where
        it changed since the client was here last.
    all_rows: a client receives every row of the bank, whatever its rank; otherwise as many leading rows as its rank.
    own_text: what the perplexity of a client in summaries and reports is that of.
    common: function of `(ServerState, Config, sampled names, round, uploads)` to `privacy.Common`: the rows in which the clients' updates are summed.
    one_process: why the clients of a round cannot be shared by several processes; '' where they can.
    settings: read by this kind alone, refused with every other.   refuses: settings of others that it cannot use.
    """

    name: str
    text: str
    function: str
    merge: str | None = None
    no_ranks: str = ""
    saves: tuple[Literal["global", "clients"], ...] = ("global", "clients")
    receives: str = "hetlora.training:leading_rows"
    factors: tuple[str, ...] = ("ab",)
    all_rows: bool = False
    own_text: str = "the global adapter at the client's rank"
    common: str = "hetlora.privacy:common_rows"
    one_process: str = ""
    settings: tuple[str, ...] = ()
    refuses: tuple[Refusal, ...] = ()

    def load(self) -> Callable[..., Any]:
        return pkgutil.resolve_name(self.function)

    def load_receives(self) -> Callable[..., Any]:
        return pkgutil.resolve_name(self.receives)

    def load_common(self) -> Callable[..., Any]:
        return pkgutil.resolve_name(self.common)

    def trains(self, number: int) -> str:
        """The factors that clients train in a round, counted from 1."""
        return self.factors[(number - 1) % len(self.factors)]

    def changed(self, since: int, number: int) -> str:
        """The factors that a client lacks in round `number`, which has those of before round `since`, 0 for nothing but the common draw of A."""
        rounds = range(since, min(number, since + len(self.factors) + 1))  # more have no other factors
        return "".join(sorted(set("".join(self.trains(max(past, 1)) for past in rounds))))

    @property
    def prunes(self) -> bool:
        return "gamma" not in self.unused

    @property
    def unused(self) -> tuple[str, ...]:
        """Settings that say nothing about this kind of training."""
        return tuple(name for refusal in self.refuses if refusal.idle and not refusal.values for name in refusal.settings)


_OF_ADAPTERS = (
    *("adapter_dtype", "moments_dtype", "target_modules", "quantize", "init_adapter", "scale", "scale_rule", "dropout", "ranks"),
    *("gamma", "prune_lambda", "prune_scope"),
    *("weight_scope", "weight_cap", "clip_update", "clip_median", "shared_rows", "unowned_rows", "merge"),
)

_NO_PRUNING = ("gamma", "prune_lambda", "prune_scope")
_ONE_FACTOR = Refusal(_NO_PRUNING, "of self-pruning, which multiplies norms of trained A and B, and this trains one of them at a time; leave it out")
_OWN_MERGE = Refusal(("merge",), "of other merges, and this kind of training has its own; leave it out")

TRAININGS = {
    kind.name: kind
    for kind in (
        TrainingKind("adapters", "adapters on the frozen base", "hetlora.training:train_adapters"),
        TrainingKind(
            "b-only",
            "B alone, over the frozen A that everybody draws from the seed (FFA-LoRA)",
            "hetlora.training:train_adapters",
            merge="one-factor",
            factors=("b",),
            refuses=(_ONE_FACTOR, _OWN_MERGE),
        ),
        TrainingKind(
            "alternating",
            "B in odd rounds and A in even ones, the other frozen (RoLoRA)",
            "hetlora.training:train_adapters",
            merge="one-factor",
            factors=("b", "a"),
            refuses=(_ONE_FACTOR, _OWN_MERGE),
        ),
        TrainingKind(
            "fold",
            "B alone, over fresh rows of A, on the base with the whole bank folded in",
            "hetlora.fold:train_fold",
            merge="bank",
            receives="hetlora.fold:received",
            common="hetlora.fold:common_rows",
            all_rows=True,
            own_text="the global adapter with all its rows, as a client downloads it",
            settings=("download",),
            refuses=(
                Refusal(_NO_PRUNING, "of self-pruning, and train = 'fold' has no rows that last to prune; leave it out"),
                Refusal(("merge", "shared_rows", "unowned_rows"), "of other merges, and train = 'fold' has its own; leave it out"),
                Refusal(
                    ("scale_rule",),
                    "train = 'fold' draws A smaller by the root of a client's rows, which is that rule already, up to one constant for all; use scale",
                ),
            ),
        ),
        TrainingKind(
            "chosen-rows",
            "A and B of as many rows of the bank as a client's rank, drawn anew each round, beside the frozen others (Fed-PLoRA)",
            "hetlora.chosen:train_chosen",
            merge="chosen",
            receives="hetlora.chosen:received",
            all_rows=True,
            own_text="the global adapter with all its rows, as a client downloads it",
            refuses=(
                Refusal(_NO_PRUNING, "of self-pruning, which drops trailing rows, and train = 'chosen-rows' has none; leave it out"),
                _OWN_MERGE,
                Refusal(("weight_decay",), "reaches rows that train = 'chosen-rows' keeps as they are; leave it out", idle=False),
                Refusal(("max_tokens_per_step",), "'auto' (0) does not count the rows that train = 'chosen-rows' holds and keeps; give a number", (0,)),
                Refusal(("cuda_graph",), "records steps in which all rows move, and train = 'chosen-rows' keeps most as they are; leave it out", (True,)),
            ),
        ),
        TrainingKind(
            "full",
            "all weights by FedAvg (a baseline; no adapters)",
            "hetlora.full_finetuning:train_full",
            merge="models",
            no_ranks="none, full fine-tuning",
            saves=(),
            own_text="the global model",
            one_process="the mean of whole models is made in one process, as they arrive",
            refuses=(
                Refusal(("dtype",), "train = 'full' steps the weights themselves, whose small changes float16 cannot hold; use another dtype", ("float16",)),
                Refusal(_OF_ADAPTERS, "of adapters, and train = 'full' trains none; leave it out"),
                Refusal(("cuda_graph", "clients_at_once"), "of the step of a cohort, and train = 'full' trains one client at a time; leave it out"),
                Refusal(("weights",), "norms of adapters, and train = 'full' trains none; use 'samples' or 'uniform' (method fedavg-full does)", ("sparsity",)),
            ),
        ),
    )
}

_UNWEIGHTED = Refusal(
    ("weights",), "this merge counts all clients the same, as weights are what an attacker inflates; use weights = 'uniform'", ("sparsity", "samples")
)

_FOLDS = Refusal(("quantize",), "this merge folds updates into the base weights, which a quantised base cannot take; use quantize = 'none'")

_STARTS_FRESH = Refusal(("init_adapter",), "this merge starts every round from a fresh bank; merge the adapter into the model and give that as model")

MERGES = {
    kind.name: kind
    for kind in (
        MergeKind("factors", "average the factors (as published)", "hetlora.merge:merge_factors", needs_uploads="", settings=("shared_rows", "unowned_rows")),
        MergeKind(
            "delta",
            "average the factors' changes; a row that a client does not own counts as unchanged",
            "hetlora.merge:merge_delta",
            changes=True,
            unbounded="",
            needs_uploads="",
        ),
        MergeKind("svd", "truncate the SVD of the exact sum (FlexLoRA)", "hetlora.products:merge_svd", steps="product"),
        MergeKind(
            "owners-svd",
            "truncate the SVD of the sum of each rank row's mean product over its owners (raFLoRA)",
            "hetlora.products:merge_owners_svd",
            steps="product",
        ),
        MergeKind(
            "energy",
            "truncate the SVD of the exact sum, in each module at the rank that holds a share of its energy (FLoRIST)",
            "hetlora.products:merge_energy",
            no_pruning="those whose last rows merge = 'energy' cut never do, as zeros have no norm to fall",
            settings=("energy",),
            steps="product",
        ),
        MergeKind(
            "trimmed",
            "mean of each rank row's owners without the extremes",
            "hetlora.robust:merge_trimmed",
            settings=("trim",),
            refuses=(_UNWEIGHTED,),
        ),
        MergeKind("median", "median of each rank row's owners", "hetlora.robust:merge_median", refuses=(_UNWEIGHTED,)),
        MergeKind(
            "stack",
            "fold the exact sum into the base (for comparisons)",
            "hetlora.products:merge_stack",
            base="targets",
            keeps_bank=False,
            no_adapter="with merge 'stack' the run folded its updates into the base model, no adapter holds them; export the whole model with --merged DIR",
            refuses=(_FOLDS, _STARTS_FRESH),
        ),
        MergeKind(
            "energy-stack",
            "fold what merge 'energy' keeps of the exact sum into the base, whatever its rank (FLoRIST on the base)",
            "hetlora.products:merge_energy_stack",
            base="targets",
            keeps_bank=False,
            no_adapter="with merge 'energy-stack' the run folded its updates into the base, no adapter holds them; export the whole model with --merged DIR",
            settings=("energy",),
            refuses=(_FOLDS, _STARTS_FRESH),
        ),
        MergeKind(
            "residual",
            "average the factors, put what that leaves of the exact sum into the base (FedEx-LoRA)",
            "hetlora.products:merge_residual",
            base="targets",
            no_adapter="with merge 'residual' the run folded a part into the base model, no adapter holds it; export the whole model with --merged DIR",
            settings=("shared_rows", "unowned_rows"),
            steps="model",
            refuses=(_FOLDS,),
        ),
        MergeKind(
            "one-factor",
            "average the factor that was trained, keep the other",
            "hetlora.merge:merge_one_factor",
            unbounded="",
            settings=("shared_rows", "unowned_rows"),
        ),
        MergeKind(
            "bank",
            "the bank of rank R nearest to the old one and the exact sum together",
            "hetlora.fold:merge_bank",
            unbounded="",
            needs_uploads="multiplies each client's B with rows of A of its own, and the server would see sums alone",
            steps="product",
        ),
        MergeKind("chosen", "the mean of each row over the clients that chose it", "hetlora.chosen:merge_chosen"),
        MergeKind(
            "models",
            "the mean of the clients' models becomes the base",
            "hetlora.full_finetuning:merge_models",
            base="all",
            keeps_bank=False,
            no_adapter="with train 'full' the run has no adapter; export the whole model with --merged DIR",
        ),
    )
}

PRIVATE = (
    Refusal(
        ("weights",),
        "under dp_clipping_norm every client counts the same, as the weight of a norm or of a number of sequences follows from the clients' text and the share "
        "of one client has no bound; use weights = 'uniform'",
        ("sparsity", "samples"),
    ),
    Refusal(("clip_median",), "measures clients by the median of all, so that one moves the others; dp_clipping_norm takes its place, leave it out"),
    Refusal(("clip_update",), "the clip of dp_clipping_norm takes its place; leave it out"),
    Refusal(("shared_rows", "unowned_rows"), "of merges that replace rows, and under dp_clipping_norm changes are added to them; leave it out"),
    Refusal(("keep_best", "patience"), "looks at the clients' held-out text, which no noise covers; leave it out"),
)
"""Settings that a run with differential privacy (`dp_clipping_norm`) cannot use."""

_SEES_NONE = "looks at each client's upload by itself, and under secure_aggregation the server sees sums alone"
SECURE = (
    Refusal(("clip_update", "weight_cap"), f"{_SEES_NONE}; leave it out"),
    Refusal(("diagnostics",), f"compares the bank with the uploads, and {_SEES_NONE.split(', and ')[1]}; leave it out"),
    Refusal(("dp_clipping_norm",), f"the server clips each client's update, and {_SEES_NONE.split(', and ')[1]}; leave one out"),
)
"""Settings that a run with secure aggregation cannot use."""

MERGE_CHOICES = tuple(name for name in MERGES if name not in {kind.merge for kind in TRAININGS.values()})
"""Values of the setting `merge`: all merges but those that belong to a kind of training."""


def merge_kind(train: str, merge: str) -> MergeKind:
    """The merge of a run with these two settings."""
    return MERGES[TRAININGS[train].merge or merge]


def own_settings() -> dict[str, tuple[str, tuple[str, ...]]]:
    """{setting: (the setting that names its kinds, those kinds)} of the settings that some kinds alone read."""
    rows: tuple[tuple[str, dict[str, Any]], ...] = (("train", TRAININGS), ("merge", MERGES))
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for chooser, kinds in rows:
        for kind in kinds.values():
            for setting in kind.settings:
                found[setting] = (chooser, (*found.get(setting, (chooser, ()))[1], kind.name))
    return found
