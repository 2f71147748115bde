"""The model card of an export: README.md as the hub has it. It says what was trained, on how much, with what result, and names no path of this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from hetlora.config import Config, ConfigError
from hetlora.report.text import change_text, number, perplexity_of, privacy_text, rank_text
from hetlora.report.verdict import evaluations, group_rows
from hetlora.run_folder import Run, mean_rank, read_config, read_run, write_atomic

CARD = "README.md"
_PATHS = ("model", "data", "init_adapter", "ranks", "output")
_PACKAGES = ("hetlora", "torch", "transformers", "peft", "safetensors", "python")


def write_card(run_dir: Path, out: Path, ranks: str, scale: float, client: str | None = None, merged: str = "", part: bool = False) -> None:
    """Write README.md into the export `out`.

    ranks, scale: of what was exported.   client: whose adapter it is, None for the global one.   merged: type of the merged weights, '' for an adapter.
    part: these ranks were asked for, and may be fewer rows than the global adapter has.
    """
    write_atomic(out / CARD, card(read_config(run_dir), _run(run_dir), ranks, scale, client, merged, part))


def _run(folder: Path) -> Run | str:
    """The run's log, or why there is none to speak of."""
    try:
        return read_run(folder)
    except ConfigError as error:
        return str(error).replace(str(folder), "the run").replace(os.path.abspath(folder), "the run")


def card(cfg: Config, run: Run | str, ranks: str, scale: float, client: str | None, merged: str, part: bool = False) -> str:
    base = public_name(cfg.model)
    what = f"{'Merged model' if merged else 'LoRA adapter'} from federated fine-tuning of {base}"
    head = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "text-generation", "tags": ["federated-learning", "hetlora", "lora"]}
    if base == cfg.model and cfg.model != "demo" and not os.path.exists(cfg.model):  # a folder here is no name on the hub
        head["base_model"] = cfg.model
    of_client = "" if client is None else " It is the adapter of one client, not the global one."
    lines = [
        "---",
        *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items()),
        "---",
        f"# {what}",
        "",
        f"Made with hetlora.{of_client} {_use(merged)}",
        "",
        "## Method",
        "",
        f"- Clients train {cfg.training_kind.text}.",
        *([] if cfg.training_kind.merge else [f"- The server merges by this rule: {cfg.merge_kind.text}."]),
        f"- Weights of the clients: {cfg.weights}. Rounds: {_rounds(cfg, run)}. Clients in a round: {_clients_in_a_round(cfg, run)}.",
        f"- Rank of this export: {ranks}." + ("" if cfg.training_kind.no_ranks else f" Scale s = {scale:g} in dW = s B A."),
        *([f"- Type of the weights: {merged}."] if merged else []),
        "",
        *_privacy(cfg, run, client),
        *(_figures(run, _measured(cfg, client, merged, part)) if isinstance(run, Run) else ["## Figures", "", f"Not known: {run}."]),
        "",
        "## Command",
        "",
        "Files and folders are named without their place.",
        "",
        "```bash",
        command(cfg),
        "```",
        "",
        *([] if isinstance(run, str) else _versions(run)),
    ]
    return "\n".join(lines) + "\n"


def _use(merged: str) -> str:
    return "It loads with `AutoModelForCausalLM.from_pretrained`." if merged else "It loads with `PeftModel.from_pretrained` on its base model."


def _rounds(cfg: Config, run: Run | str) -> str:
    if isinstance(run, str):
        return f"{cfg.rounds} planned"
    done = run.records[-1]["round"]
    kept = "" if run.best_round is None else f", of which round {run.best_round} is kept"
    return f"{done}{'' if done == cfg.rounds else f' of {cfg.rounds}'}{kept}{'' if run.complete else ' (the run is not complete)'}"


def _clients_in_a_round(cfg: Config, run: Run | str) -> int:
    return cfg.clients_per_round if isinstance(run, str) or not run.start_ranks else min(cfg.clients_per_round, len(run.start_ranks))


def _privacy(cfg: Config, run: Run | str, client: str | None) -> list[str]:
    """What differential privacy covers here, and what not; [] for a run without it."""
    if not cfg.dp_clipping_norm:
        return []
    spent = None if isinstance(run, str) else run.records[-1].get("privacy")
    found = f"{privacy_text(spent)}, by the run's last round" if spent else "epsilon is not on record"
    covered = (
        f"It covers the weights of the global adapter alone: {found}."
        if client is None
        else "It does not cover this export: a client's own adapter is its upload, without noise."
    )
    return [
        "## Differential privacy of clients",
        "",
        f"- Updates were clipped to {cfg.dp_clipping_norm:g}; the noise has {cfg.dp_noise_multiplier:g} times that as its deviation. {covered}",
        "- The figures of this card are without noise. Take them out before you publish it as private.",
        "- The run folder is not private: its logs, summary, report and clients' adapters are without noise. Publish no part of it.",
        "",
    ]


def _measured(cfg: Config, client: str | None, merged: str, part: bool) -> str:
    """What the figures are of, where that is not quite what was exported."""
    other = ["one client's own adapter"] if client is not None else ["the rank rows that were asked for"] if part else []
    other += [f"rounded to {merged}"] if merged and merged != cfg.dtype else []
    other += [f"on the base's own weights, where the run had them in {cfg.quantize}"] if merged and cfg.quantize != "none" else []
    model = "model" if cfg.merge_kind.no_adapter else "adapter with all its rows"
    said = f"Measured by the run, on its global {model} in {cfg.dtype}."
    return f"{said} This export is {', '.join(other)}: what it reaches was not measured." if other else said


def _figures(run: Run, measured: str) -> list[str]:
    """Data in numbers, ranks, and perplexities; no name of a client.   measured: what they are of."""
    dealt = [mean_rank(rank) for rank in run.start_ranks.values()]
    lines = ["## Data", "", f"- Clients that trained or could: {len(dealt)}."]
    if run.summary and run.summary["clients"]:
        sequences = sorted(client["sequences"] for client in run.summary["clients"])
        lines.append(f"- Training sequences: {sum(sequences)}, {sequences[0]} to {sequences[-1]} a client, of at most {run.config.get('seq_len')} tokens.")
    lines.append(f"- Source: `{public_name(str(run.config.get('data')))}`.")
    if any(dealt):
        lines.append(f"- Ranks of the clients: {rank_text(min(dealt))} to {rank_text(max(dealt))}, mean {sum(dealt) / len(dealt):.1f}.")
    lines += ["", "## Perplexity on held-out text", "", measured, "", "| text | before | after | change |", "|---|---|---|---|"]
    found = evaluations(run)
    for part, title in (("client_text", "clients' own"), ("held_out_clients", "clients that never train")):
        values = [value for value in (perplexity_of(evaluation, part) for evaluation in found) if value is not None]
        if values:
            lines.append(f"| {title} | {number(values[0])} | {number(values[-1])} | {change_text(values[0], values[-1])} |")
    rows: list[dict[str, Any]] = group_rows(run.summary["clients"]) if run.summary and any(dealt) else []
    lines += [
        f"| clients of rank {row['rank']} ({row['clients']}, each with what it receives; {row['worse']} got worse) | {number(row['before'])} | "
        f"{number(row['after'])} | {change_text(row['before'], row['after'])} |"
        for row in rows
        if row["before"] is not None
    ]
    return [*lines, "", "One run with one seed; how much seeds differ is not known from it."]


def _versions(run: Run) -> list[str]:
    named = ", ".join(f"{name} {run.versions[name]}" for name in _PACKAGES if name in run.versions)
    return ["## Versions", "", f"{named or 'not on record'}."]


def public_name(value: str) -> str:
    """A setting that may name a file or folder, without where that lies: 'hub:ORG/NAME' and ORG/NAME stay, a local path becomes its last part."""
    local = value.startswith((".", "/", "~", "\\")) or value.count("/") > 1 or "\\" in value or os.path.exists(os.path.expanduser(value))
    if value.startswith("hub:") or not local:
        return value
    return re.split(r"[/\\]", os.path.abspath(os.path.expanduser(value)))[-1] or "data"


def command(cfg: Config) -> str:
    """The `hetlora run` that has these settings: those away from their defaults, in any order of giving them."""
    words = ["hetlora", "run"]
    for name, field in Config.model_fields.items():
        value = getattr(cfg, name)
        if name == "output" or value == field.default:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", public_name(str(value)) if name in _PATHS else str(value)]
    return shlex.join(words)
