"""One run in several processes, on one machine or many: each trains a share of a round's clients on a device of its own, and evaluates a share of the text.

Process 0 leads: it alone reads the settings, samples, merges, speaks and writes. The others load the same model and data, follow its orders and keep nothing.
Uploads come to it whole and are merged in client order, so every merge is the one of a run in one process. torchrun starts the processes and ends all of
them with the first that fails; what they say to each other goes through torch.distributed: gloo, and NCCL for tensors on GPUs.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hetlora import checkpoint, signals
from hetlora.config import Config, ConfigError
from hetlora.data import Federation
from hetlora.federation import prepare
from hetlora.fleet import LocalFleet, Progress
from hetlora.group import Group, Lost, Shared, Told
from hetlora.loop import run_rounds
from hetlora.models import resolve_device
from hetlora.observer import Observer
from hetlora.processes import Place, place
from hetlora.ranks import StartingRanks
from hetlora.result import Result
from hetlora.run_folder import is_run
from hetlora.server import ServerState
from hetlora.shares import empty_bank, shared_out, train_share
from hetlora.sources import read_prompts
from hetlora.training import Trained

Load = Callable[[Config, Observer], Federation]
_TABLES = tuple(f.name for f in fields(ServerState) if f.name not in ("bank", "moments"))


# ---------------------------------------------------------------- what a process is and has


def _device(cfg: Config, at: Place) -> torch.device:
    """This process's own: cuda:LOCAL_RANK, or the CPU. `ConfigError` where the machine has too few GPUs, or the settings name one for all."""
    kind = resolve_device(cfg.device)
    if kind.type == "cpu":
        return kind
    if kind != torch.device("cuda"):
        raise ConfigError(f"device = {cfg.device!r}: {at.count} processes take a device each; use 'auto', 'cpu' or 'cuda'")
    if at.count_here > torch.cuda.device_count():
        raise ConfigError(f"device = {cfg.device!r}: {at.count_here} processes here, and {torch.cuda.device_count()} GPUs; start one for each, or use 'cpu'")
    return torch.device("cuda", at.number_here)


def _loaded(cfg: Config, at: Place, load: Load, observer: Observer) -> LocalFleet:
    return LocalFleet(load(cfg.model_copy(update={"device": str(_device(cfg, at))}), observer))


_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _identity(local: LocalFleet, cfg: Config) -> dict[str, Any]:
    """What all processes must have the same. Weights count by the sum of their bits, which has no order."""
    bits = [p.detach().contiguous().view(_WHOLE_NUMBERS[p.element_size()]).sum(dtype=torch.int64) for p in local.model.parameters()]
    weights = torch.stack([own.cpu() for own in bits]).tolist()
    return {
        "data": local.fingerprint(),
        "sample prompts": read_prompts(cfg),
        "modules": list(local.shapes.items()),  # their order is that of sums and of draws
        "weights": weights,
        "settings of the model": _model_settings(local.model),
        "end and padding tokens": [getattr(local.federation.tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")],
    }


def _model_settings(model: torch.nn.Module) -> list[dict[str, Any]]:
    """What computes besides the weights: the model's configuration and how it writes text, without where it lies and who wrote it."""
    found: list[Any] = [getattr(model, name, None) for name in ("config", "generation_config")]
    said = [own.to_dict() if hasattr(own, "to_dict") else {} for own in found]
    return [{name: value for name, value in own.items() if name not in ("_name_or_path", "transformers_version")} for own in said]


def _check_same(found: Sequence[dict[str, Any]]) -> list[str]:
    """`ConfigError` where a process could not load its part, or has another one than process 0; returns what else differs, as lines for the user."""
    first, lines = found[0], []
    for number, other in enumerate(found):
        who = f"process {number} on {other['host']}"
        if other["error"]:
            raise ConfigError(f"{who}: {other['error']}")
        if wrong := [name for name, value in first["same"].items() if other["same"].get(name) != value]:
            raise ConfigError(f"{who}: its {wrong[0]} are not those of process 0; give every machine the same files and packages")
        versions = other["versions"]
        if differ := [f"{name} is {versions.get(name)}, not {value}" for name, value in first["versions"].items() if versions.get(name) != value]:
            lines.append(f"{who}: {'; '.join(differ)}; results may differ in the last bits from those of equal machines")
    return lines


def _report(local: LocalFleet | None, same: dict[str, Any], error: str = "") -> dict[str, Any]:
    own = {} if local is None else {name: value for name, value in checkpoint.versions(local.device).items() if name != "threads"}
    own["device"] = own.get("device", "").partition(" ")[2]  # the kind of GPU, not its number
    return {"host": socket.gethostname(), "error": error, "versions": own, "same": same}


# ---------------------------------------------------------------- process 0


class SpreadFleet:
    """The clients of a run, simulated by the processes of `group`, as `hetlora.fleet.Fleet`: process 0's side."""

    def __init__(self, local: LocalFleet, group: Group) -> None:
        self.local, self.group = local, group
        self.names, self.model_name, self.shapes = local.names, local.model_name, local.shapes
        self.device, self.model = local.device, local.model
        self.where = f"simulated in {group.at.count} processes; bytes of a federation are counted, not sent"

    def sized(self, cfg: Config, state: ServerState) -> tuple[Config, list[str]]:
        return cfg, []  # `lead` takes numbers alone

    def describe(self) -> dict[str, Any]:
        return self.local.describe()

    def fingerprint(self) -> str:
        return self.local.fingerprint()

    def starting_ranks(self, cfg: Config) -> StartingRanks:
        return self.local.starting_ranks(cfg)

    def base_weights(self, cfg: Config) -> dict[str, torch.nn.Parameter]:
        return self.local.base_weights(cfg)

    def present(self) -> list[str]:
        return self.local.present()

    def sequences(self, name: str) -> int:
        return self.local.sequences(name)

    def measured(self, name: str) -> None:
        """Nothing, as in one process."""

    def _order(self, what: str, cfg: Config, state: ServerState, *arguments: Any) -> None:
        tables = {name: getattr(state, name) for name in _TABLES}
        ranks = {name: layout.ranks for name, layout in state.bank.layouts.items()}
        self.group.ordered((what, tables, ranks, torch.get_num_threads(), arguments))
        self.group.copied([*state.bank.parameters(), *self.local.base_weights(cfg).values()])

    def _together(self, what: str, cfg: Config, state: ServerState, progress: Progress) -> Any:
        self._order(what, cfg, state)
        with self.group.together():
            return getattr(self.local, what)(cfg, state, progress)

    def train(self, cfg: Config, state: ServerState, names: Sequence[str], number: int, lr: float, progress: Progress) -> Trained:
        shares = shared_out(self.local, cfg, state, names, number, lr, self.group.at.count)
        self._order("train", cfg, state, shares)
        trained = train_share(self.local, self.group, cfg, state, shares, progress)
        assert trained is not None
        return trained

    def evaluate(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, Any]:
        return self._together("evaluate", cfg, state, progress)

    def answers(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, Any]:
        return self._together("answers", cfg, state, progress)

    def own_text(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, dict[str, Any]]:
        return self._together("own_text", cfg, state, progress)


def lead(cfg: Config, *, resume: bool = False, observer: Observer | None = None, load: Load | None = None) -> Result:
    """`simulate` as process 0 of several. Its clients' text and its model are loaded first; faults are said before the others have begun."""
    observer, at = observer or Observer(), place()
    if reason := cfg.training_kind.one_process:
        raise ConfigError(f"train = {cfg.train!r}: {reason}; start it without torchrun")
    if not cfg.max_tokens_per_step:
        raise ConfigError("max_tokens_per_step = 'auto': several processes cut batches in the same places, and their free memory differs; give a number")
    groups: list[Group] = []

    def fleet() -> SpreadFleet:
        local = _loaded(cfg, at, load or partial(prepare, resume=resume), observer)
        group = Group(at)
        groups.append(group)
        group.ordered({**cfg.model_dump(), "device": local.device.type})
        reports = group.all(_report(local, _identity(local, cfg)))
        machines = len({own["host"] for own in reports})
        observer.message(f"processes: {at.count} on {machines} machine{'s' * (machines > 1)}, {local.device.type}; they share the clients of a round")
        for line in _check_same(reports):
            observer.message(line)
        group.connect(local.device)
        local.split = Shared(group)
        idle = at.count - min(cfg.clients_per_round, len(local.names))
        if idle > 0:
            observer.message(f"clients_per_round = {cfg.clients_per_round}: {idle} of {at.count} processes have no client to train in a round")
        return SpreadFleet(local, group)

    try:
        result = run_rounds(cfg, fleet, resume=resume, observer=observer)
        groups[0].ordered(None)
    except (Lost, Told) as error:
        how = f"; continue with --resume --output {cfg.output}" if is_run(Path(cfg.output)) else ""
        raise type(error)(f"{error}{how}") from None
    dist.destroy_process_group()
    return result


# ---------------------------------------------------------------- the others


def follow(load: Load = prepare) -> int:
    """What every other process does from its start to its end; returns its exit status. It says nothing: process 0 speaks for all."""
    signals.end_at_once()
    warnings.simplefilter("ignore")
    at = place()
    try:
        group = Group(at)
        local, same, error, settings = None, {}, "", group.ordered()
        try:
            cfg = Config.create("process 0", **settings)
            local = _loaded(cfg, at, load, Observer())
            same = _identity(local, cfg)
        except ConfigError as fault:
            error = str(fault)
        group.all(_report(local, same, error))
        if local is None or error:
            return 2
        group.connect(local.device)
        local.split = Shared(group)
        while (order := group.ordered()) is not None:
            _obey(local, group, cfg, *order)
    except Lost:
        return 1
    except ConfigError:
        return 2  # process 0 says it
    dist.destroy_process_group()
    return 0


def _obey(
    local: LocalFleet, group: Group, cfg: Config, what: str, tables: dict[str, Any], ranks: dict[str, Any], threads: int, arguments: tuple[Any, ...]
) -> None:
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    dtype: torch.dtype = getattr(torch, cfg.adapter_dtype)
    state = ServerState(empty_bank(local.shapes, ranks, dtype, local.device), **tables)
    group.copied([*state.bank.parameters(), *local.base_weights(cfg).values()])
    if what == "train":
        train_share(local, group, cfg, state, arguments[0], _unseen)
    else:
        with group.together():
            getattr(local, what)(cfg, state, _unseen)


def _unseen(done: int, total: int) -> None:
    """The progress of a process that says nothing."""
