"""The federation: `simulate` runs the rounds of HETLORA on this machine, with a run folder that can be continued at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hetlora import checkpoint, course, in_memory, init_adapter, privacy, run_folder, server
from hetlora.ahead import check_graph
from hetlora.config import Config, ConfigError
from hetlora.data import Federation
from hetlora.federation import prepare
from hetlora.fleet import Fleet, LocalFleet
from hetlora.lock import FolderLock
from hetlora.loggers import Observers, check_told
from hetlora.merge import aggregate
from hetlora.models import no_mask_advised
from hetlora.observer import Observer
from hetlora.packing import batching_of
from hetlora.ranks import Dealt, PowerLaw, check_width, kept_rank, mean_rank
from hetlora.report.terminal import ConsoleObserver, make_console
from hetlora.result import Result, client_line, rank_shown, upload_line
from hetlora.run_state import Run, note_best, ranks_on_record, restore, return_to_best, save
from hetlora.training import Trained

TOTALS = ("bytes_down", "bytes_up", "bytes_down_homlora", "bytes_up_homlora", "trained_parameters")
"""What a round counts and a run adds up."""


def simulate(
    cfg: Config,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    federation: Federation | None = None,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    quiet: bool = False,
    on_round_end: Callable[[dict[str, Any]], object] | None = None,
    loggers: Sequence[Observer] = (),
) -> Result:
    """Run (or continue) a federation and write its run folder `cfg.output`.

    cfg: the settings.   resume: continue the run in cfg.output from its newest checkpoint, to the same bits as without the interruption (on the
    same device and versions; the number of threads is set to the run's, other differences are reported). With another cfg.rounds than the run was made
    with it becomes the run that would have had them from the start.
    observer: receives progress; left out, it is shown on stderr or in the notebook, unless quiet.
    model, tokenizer, data: objects in place of what cfg.model and cfg.data name. data: {client: texts}, or rows as of a JSONL file (dicts; a `datasets.Dataset`
    or a frame of pandas does), or `data.FederatedData`. The model is frozen and put in eval mode; its type and device are the run's.
    federation: model and data loaded before by `prepare`, to share them between runs.
    on_round_end: called with each round's record (a line of rounds.jsonl).   loggers: further observers, such as those of `hetlora.loggers`.

    Raises `ConfigError` for settings, data or a folder that cannot be used; nothing that exists is overwritten.

    >>> import tempfile
    >>> import hetlora
    >>> from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
    >>> folder = tempfile.mkdtemp()
    >>> sizes = LlamaConfig(vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> LlamaForCausalLM(sizes).save_pretrained(folder + "/model")
    >>> files = ByT5Tokenizer().save_pretrained(folder + "/model")
    >>> cfg = hetlora.Config(model=folder + "/model", data="unicode:GREEK,HEBREW", ranks="4,8", rounds=1, seq_len=32, device="cpu", output=folder + "/run")
    >>> result = hetlora.simulate(cfg, quiet=True)
    >>> result.ranks, result.bank.ranks, len(result.history)
    ({'GREEK': 4, 'HEBREW': 8}, (8,), 2)
    """
    if not isinstance(cfg, Config):
        raise ConfigError(f"cfg: expected a hetlora.Config, got {type(cfg).__name__}; write hetlora.Config(rounds=20, ...)")
    check_told(observer, loggers, on_round_end)
    shown = nullcontext(observer or Observer()) if observer or quiet else ConsoleObserver(make_console(stderr=True))
    given = model is not None or tokenizer is not None or data is not None
    if given and federation:
        raise ConfigError("federation: holds a model, a tokenizer and data already; leave out model, tokenizer and data")
    cfg = in_memory.settings_of(cfg, model, tokenizer, data) if given else cfg
    folder = Path(cfg.output)

    def fleet() -> LocalFleet:
        ready = in_memory.federation_of(cfg, model, tokenizer, data, told, resume) if given else federation or prepare(cfg, told, resume=resume)
        if ready.folded_by not in (None, folder):
            raise ConfigError(f"federation: its base model holds the folded updates of {ready.folded_by}; load it again with prepare()")
        return LocalFleet(ready)

    with shown as first, no_mask_advised():
        told = Observers([first, *loggers], on_round_end)
        try:
            return run_rounds(cfg, fleet, resume=resume, observer=told)
        except BaseException as error:
            told.stopped(error)
            raise


def run_rounds(cfg: Config, fleet: Callable[[], Fleet], *, resume: bool = False, observer: Observer | None = None) -> Result:
    """`simulate` for clients that are wherever `fleet` has them. It is called when the folder and the settings are known to be in order."""
    observer = observer or Observer()
    cfg.check()
    folder = Path(cfg.output)
    with FolderLock() as lock:
        try:
            return _rounds(cfg, folder, lock, resume, observer, fleet)
        except run_folder.WriteError as error:
            if not run_folder.is_run(folder):
                raise  # it says to give the command again
            go_on = f"make room there, then continue with hetlora run --resume --output {folder}"
            raise run_folder.WriteError(error.path, error.error, go_on) from None


def _rounds(cfg: Config, folder: Path, lock: FolderLock, resume: bool, observer: Observer, make: Callable[[], Fleet]) -> Result:
    said: list[str] = []
    if resume:
        said = _check_resumable(cfg, folder, lock)
    else:
        run_folder.refuse_existing(folder, checkpoint.RESUME_INSTEAD)
        run_folder.refuse_unwritable(folder)
    begun = resume and (folder / run_folder.CHECKPOINT).is_file()
    start = init_adapter.read(cfg) if cfg.init_adapter and not begun else None
    fleet = make()
    check_graph(cfg, fleet.device)
    state = _initial_state(cfg, fleet)
    said += privacy.begin(cfg, len(fleet.names)) + course.idle_patience(cfg)
    if start:
        said.append(init_adapter.fill(state.bank, start, cfg))
    if not resume:
        checkpoint.create_run(cfg, fleet.device, lock, fleet.where)
    run = Run(cfg, fleet, state, folder, observer)
    said += fleet.sized(cfg, state)[1]
    for line in [*([lock.note] if lock.note else []), *said, *(checkpoint.match_versions(folder, fleet.device) if resume else ())]:
        observer.message(line)
    observer.start(cfg, _describe(run))
    if cfg.clients_per_round > len(fleet.names):
        observer.message(f"clients_per_round = {cfg.clients_per_round}: there are {len(fleet.names)} clients, all of them take part in every round")
    if resume:
        run.history = restore(run)
        if not (folder / run_folder.SUMMARY).is_file():
            checkpoint.note_continued(folder, state.round, cfg.rounds)
    if not run.history:
        _before_training(run)
    for number in range(state.round + 1, cfg.rounds + 1):
        if course.stalled(run.history, cfg.patience):
            break
        _round(run, number)
    return _finish(run)


def _check_resumable(cfg: Config, folder: Path, lock: FolderLock) -> list[str]:
    """Lock the folder, and make sure before hours of loading that its files are whole and belong to `cfg`; returns what differs in the last bits only."""
    run_folder.require_run(folder)
    lock.take(folder)
    run_folder.clean_leftovers(folder)
    said = run_folder.check_same_config(folder, cfg, run_folder.LENGTH)
    checkpoint.saved_versions(folder)
    recorded = checkpoint.load_state(folder)
    if recorded:
        said = run_folder.check_recorded_config(folder, recorded, cfg, run_folder.LENGTH)
        course.check_length(cfg, recorded["settings"]["rounds"], recorded["round"])
    return said


def _initial_state(cfg: Config, fleet: Fleet) -> server.ServerState:
    starting = fleet.starting_ranks(cfg)
    check_width(starting, fleet.shapes)
    ranks = {name: dict.fromkeys(fleet.shapes, rank) for name, rank in starting.ranks.items()}
    bank = server.fresh_bank(fleet.shapes, starting.r_max, cfg, fleet.device)
    return server.ServerState(bank, ranks, starting.r_min, starting.r_max, ranks_start=starting.ranks)


def _describe(run: Run) -> dict[str, Any]:
    return {
        "model": run.fleet.model_name,
        "modules": len(run.fleet.shapes),
        **run.fleet.describe(),
        **_ranks_described(run.cfg, run.state),
        **_batches_described(run),
        "device": str(run.fleet.device),
        "run_dir": str(run.folder),
    }


def _ranks_described(cfg: Config, state: server.ServerState) -> dict[str, str]:
    """What the settings of ranks and pruning mean for this run: the ranks dealt, who has rows to prune, what the bytes are compared with."""
    kind = cfg.training_kind
    if kind.no_ranks:
        return {"ranks": kind.no_ranks}
    dealt = sorted(state.ranks_start.values())
    least = f"{dealt.count(dealt[0])} of {len(dealt)} clients have the least" if dealt[0] < dealt[-1] else f"the same for all{_otherwise(cfg, len(dealt))}"
    said = {"ranks": f"{dealt[0]}..{dealt[-1]}, mean {_mean_rank(state):.1f}; {least}; the server's bank has {state.r_max} rows"}
    if kind.prunes:
        able = sum(kept_rank(rank, cfg.gamma, state.r_min) < rank for rank in dealt)
        said["pruning"] = f"{able} of {len(dealt)} clients have rows to prune, by gamma = {cfg.gamma:g} and lambda = {cfg.prune_lambda:g}"
        if able and cfg.merge_kind.no_pruning:
            said["pruning"] += f"; {cfg.merge_kind.no_pruning}"
    return said | {"bytes": f"compared with HomLoRA at rank {state.homlora_rank}, the largest that a client has"}


def _otherwise(cfg: Config, count: int) -> str:
    """What would give so many clients different ranks, where a draw of the power law gave them one."""
    rule = cfg.rank_rule
    if not isinstance(rule, PowerLaw):
        return ""
    ranks = Dealt(rule.low, rule.high, rule.exponent).quantiles(count)
    return "" if ranks[0] == ranks[-1] else f", as the draw fell (--ranks {cfg.ranks.replace('powerlaw', 'dealt', 1)} would give {ranks[0]}..{ranks[-1]})"


def _batches_described(run: Run) -> dict[str, str]:
    """How sequences become batches, and why, where the settings leave it to the model. A deployed node finds it out for its own."""
    if run.cfg.padding_free == "off":
        return {}
    return {"batches": str(batching_of(run.fleet.model, run.cfg)) if run.fleet.model is not None else "as each node's probe of its model says"}


def _mean_rank(state: server.ServerState) -> float:
    return sum(mean_rank(rank) for rank in state.ranks.values()) / len(state.ranks)


def _before_training(run: Run) -> None:
    """Round 0: what the run starts from on everybody's held-out text."""
    start = _Clock()
    state = run.state
    state.perplexity_before = {name: result["perplexity"] for name, result in run.fleet.own_text(run.cfg, state, run.observer.evaluate).items()}
    record = {
        "round": 0,
        "lr": 0.0,
        "clients": [],
        "dropped": [],
        **dict.fromkeys(TOTALS, 0),
        "mean_rank": _mean_rank(state),
        "evaluation": run.fleet.evaluate(run.cfg, state, run.observer.evaluate),
    }
    _close_round(run, record, start)


class _Clock:
    """Wall time and CPU time of the process since it was made; the second says what the work cost on a machine that others use too."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": round(time.perf_counter() - self._wall, 3), "cpu_seconds": round(time.process_time() - self._cpu, 3)}


def _close_round(run: Run, record: dict[str, Any], start: _Clock) -> None:
    """Log first, then checkpoint: after a kill in between, the line is dropped and the round repeated."""
    record |= privacy.spent(run.cfg, [*run.history, record], len(run.fleet.names)) | start.read()
    run_folder.append_round(run.folder, record)
    run.history.append(record)
    save(run)
    note_best(run, run.history)
    run.observer.round_end(record)


def _sampled(run: Run, number: int) -> list[str]:
    """Names of the round's clients. With dp_sampling = 'poisson' there may be none, and that shows in nothing but the log: the noise is the same."""
    cfg, there = run.cfg, run.fleet.present()
    if cfg.dp_sampling == "poisson":
        clients = len(run.state.ranks)
        return server.toss(there, privacy.expected_clients(cfg, clients) / clients, privacy.noise_seed(cfg), number)
    return server.sample(there, cfg.clients_per_round, cfg.seed, number)


def _train(run: Run, number: int, lr: float) -> tuple[list[str], Trained]:
    """Sample, and let the sampled clients train; changes nothing but what it returns."""
    cfg = run.cfg
    names = _sampled(run, number)
    run.observer.round_start(number, cfg.rounds, names)
    if not names:
        return names, Trained([], {}, [], [], None, None, [], [], 0)
    trained = run.fleet.train(cfg, run.state, names, number, lr, run.observer.local_step)
    for k, reason in trained.dropped.items():
        run.observer.message(f"round {number}: {names[k]} is left out, {reason}")
    if trained.given_up:
        run.observer.message(f"round {number} is given up, {trained.given_up}; the bank stays as it is")
    elif not trained.arrived and not cfg.dp_clipping_norm:
        raise ConfigError(
            f"round {number}: no clients left, every update was refused ({names[0]}: {trained.dropped[0]}); lower --lr or set --clip-norm; "
            f"the run in {run.folder} stands at round {run.state.round}"
        )
    return names, trained


def _round(run: Run, number: int) -> None:
    """One round of HETLORA (arXiv 2401.06432, section 3): train, merge, evaluate, checkpoint."""
    start = _Clock()
    cfg, state = run.cfg, run.state
    lr = course.learning_rate(cfg, number)
    names, trained = _train(run, number, lr)
    arrived, homlora = trained.arrived, state.bank.num_bytes(0) * state.homlora_rank // max(state.r_max, 1)
    moved = {
        "bytes_down": sum(trained.bytes_down),
        "bytes_up": sum(trained.bytes_up),
        "bytes_down_homlora": homlora * len(names),
        "bytes_up_homlora": homlora * len(arrived),
        "trained_parameters": trained.parameters,
    }
    lines = [client_line(cfg, names[k], state.ranks[names[k]], trained, k) for k in arrived]
    state.seen |= dict.fromkeys(names, number)  # those whose upload was refused have downloaded too
    samples = [run.fleet.sequences(names[k]) for k in arrived]
    merged = aggregate(state, trained.uploads, trained.received, samples, cfg, run.fleet.model, trained.weighed, trained.rows, names)
    for i, k in enumerate(arrived):
        lines[i] |= upload_line(merged, trained, i, k)
        if "clip" in lines[i] and not cfg.dp_clipping_norm:
            scaled = f"scaled by {lines[i]['clip']:.3g}, to the limit of --clip-median or --clip-update"
            run.observer.message(f"round {number}: the update of {names[k]} is {scaled}")
        state.ranks[names[k]] = trained.ranks[k]
        state.rounds_trained[names[k]] = state.rounds_trained.get(names[k], 0) + 1
        if cfg.save_clients and "clients" in cfg.saves:
            checkpoint.write_adapter(run_folder.client_folder(run.folder, names[k]), trained.adapter(i), cfg.scale_at(state.r_max), run.fleet.model_name)
    state.round = number
    evaluated = number % cfg.eval_every == 0 or number == cfg.rounds
    record = {
        "round": number,
        "lr": lr,
        "clients": lines,
        "dropped": [{"name": names[k], "reason": reason} for k, reason in trained.dropped.items()],
        **({"given_up": trained.given_up} if trained.given_up else {}),
        **({} if trained.rounding is None else {"secure_rounding": trained.rounding}),
        **moved,
        "mean_rank": _mean_rank(state),
        "evaluation": run.fleet.evaluate(cfg, state, run.observer.evaluate) if evaluated else None,
        **({"diagnostics": merged.diagnostics} if cfg.diagnostics else {}),
    }
    _close_round(run, record, start)


def _finish(run: Run) -> Result:
    """Every client's own text under its share of the final bank, the totals, and summary.json."""
    cfg, state, history = run.cfg, run.state, run.history
    done, notes = state.round, [f"round {r['round']}: {d['name']} left out, {d['reason']}" for r in history for d in r["dropped"]]
    if done < cfg.rounds:
        notes.append(f"stopped after round {done} of {cfg.rounds}: {cfg.patience} evaluations in a row brought no lower held-out loss (patience)")
        run.observer.message(notes[-1])
    kept = return_to_best(run)
    after = run.fleet.own_text(cfg, state, run.observer.evaluate)
    totals = {key: sum(record[key] for record in history) for key in (*TOTALS, "seconds", "cpu_seconds")}
    summary = {
        "clients": [
            {
                "name": name,
                "rank_start": state.ranks_start[name],
                "rank_end": rank_shown(state.ranks[name], cfg.prune_scope),
                "sequences": run.fleet.sequences(name),
                **({"device": asdict(device)} if (device := run.fleet.measured(name)) else {}),
                "rounds": state.rounds_trained.get(name, 0),
                "perplexity_before": state.perplexity_before.get(name),
                "perplexity_after": after[name]["perplexity"] if name in after else None,
            }
            for name in run.fleet.names
        ],
        "evaluation_before": history[0]["evaluation"],
        "evaluation_after": kept["evaluation"] | (run.fleet.answers(cfg, state, run.observer.evaluate) if 0 < kept["round"] < cfg.rounds else {}),
        **totals,
        "parameters": run.fleet.describe()["parameters"],
        "rounds": done,
        **({"best_round": kept["round"]} if cfg.keep_best else {}),
        "homlora_rank": state.homlora_rank,
        **privacy.spent(cfg, history, len(run.fleet.names)),
        "notes": notes,
    }
    run_folder.write_atomic(run.folder / run_folder.SUMMARY, json.dumps(summary, indent=2) + "\n")
    run.observer.finish(summary)
    return Result(history, summary, state.bank, ranks_on_record(run), run.folder)
