"""A run folder as one self-contained HTML page and its PNGs. Works on runs that were stopped, and says that they were."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hetlora.config import Config, ConfigError
from hetlora.kinds import MERGES, TRAININGS
from hetlora.ranks import Device, device_text
from hetlora.report.drawing import Picture
from hetlora.report.pictures import draw_all
from hetlora.report.text import change_text, number, perplexity_of, privacy_text, rank_text, size_text
from hetlora.report.verdict import evaluations, got_worse, group_rows, run_sentence
from hetlora.run_folder import DIAGNOSTICS, PICTURES, REPORT, Run, read_run, write_atomic

_UNBROKEN = 28  # letters of a name that is not broken
_GENERATOR = '<meta name="generator" content="hetlora">'


def write_report(run_dir: str | Path, out_dir: str | Path | None = None) -> Path:
    """Write report.html (pictures embedded, nothing external) and the PNGs of `run_dir` to `out_dir`; returns the page's path.

    out_dir: default the run folder. An earlier report there is replaced; any other file of these names is not: ConfigError.
    Raises ConfigError also when there is no run, or no round on record, in `run_dir`.
    """
    run = read_run(run_dir)
    out = run.folder if out_dir is None else Path(out_dir)
    page = out / REPORT
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is not a folder; give a folder for the report")
    _refuse_foreign(out, page, own=out.resolve() == run.folder.resolve())
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(run)
    for name, picture in pictures.items():
        write_atomic(out / name, picture.png)
    write_atomic(page, _render(run, pictures))
    return page


def _refuse_foreign(out: Path, page: Path, own: bool) -> None:
    there = [name for name in (page.name, *PICTURES, DIAGNOSTICS) if (out / name).exists()]
    if own or not there:
        return
    if page.is_file() and _GENERATOR in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        return
    raise ConfigError(f"{out / there[0]}: exists and is not a hetlora report; give another folder, nothing is overwritten")


def _client_rows(run: Run) -> list[dict[str, Any]]:
    """Rows of the page's client table; without a summary, from the rounds on record (no perplexities then)."""
    if run.summary is not None:
        return [dict(client) for client in run.summary["clients"]]
    rows: dict[str, dict[str, Any]] = {
        name: {"name": name, "rank_start": rank, "rank_end": rank, "sequences": 0, "rounds": 0} for name, rank in run.start_ranks.items()
    }
    for record in run.trained:
        for client in record.get("clients") or []:
            row = rows[client["name"]]
            row["rank_end"] = client["rank"]
            row["sequences"] += client.get("sequences", 0)
            row["rounds"] += 1
    return list(rows.values())


def _key_figures(run: Run) -> list[tuple[str, str, str]]:
    """(title, value, remark) of what one wants to know first."""
    rounds = run.config.get("rounds")
    figures = [("Rounds", f"{run.records[-1]['round']}" + (f" of {rounds}" if run.records[-1]["round"] != rounds else ""), f"{len(run.start_ranks)} clients")]
    evaluated = evaluations(run)
    for part, title in (("client_text", "Perplexity, clients' held-out text"), ("held_out_clients", "Perplexity, held-out clients")):
        values = [value for value in (perplexity_of(evaluation, part) for evaluation in evaluated) if value is not None]
        if values:
            tokens = next(e[part].get("tokens") for e in evaluated if e.get(part))
            shown = f"{number(values[0])} → {number(values[-1])} ({change_text(values[0], values[-1])})"
            figures.append((title, shown, f"global adapter, {tokens:,} tokens" if tokens else "global adapter"))
    answered = [evaluation["rouge_l"] for evaluation in evaluated if evaluation.get("rouge_l")]
    if answered:
        scores = " → ".join(number(100 * found["f1"]) for found in (answered[0], answered[-1]))
        figures.append(("ROUGE-L of answers (F1, %)", scores, f"global adapter, {answered[0]['examples']} held-out prompts"))
    for way in ("down", "up"):
        ours, full = (sum(record.get(key, 0) for record in run.records) for key in (f"bytes_{way}", f"bytes_{way}_homlora"))
        remark = f"{100 * ours / full:.1f} % of HomLoRA at the largest rank ({size_text(full)})" if full else ""
        figures.append((f"Adapter bytes {way}", size_text(ours), remark))
    if spent := run.records[-1].get("privacy"):
        figures.append(("Differential privacy", privacy_text(spent), "of each client, for the global adapter alone"))
    seconds = sum(record.get("seconds") or 0 for record in run.records)
    figures.append(("Time", f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s", "sum over the rounds on record"))
    return figures


def _method(run: Run) -> str:
    """What clients trained and how the server merged, as a sentence or two; '' where the settings do not say it."""
    training, merge = TRAININGS.get(str(run.config.get("train"))), MERGES.get(str(run.config.get("merge")))
    if training is None or merge is None:
        return ""
    return f"Clients trained {training.text}." + ("" if training.merge else f" The server merged by this rule: {merge.text}.")


def _samples(run: Run) -> list[tuple[str, str, str | None]]:
    """(prompt, answer before the first round, after the last; None where that has not been) of the run's sample prompts."""
    shown = [evaluation["samples"] for evaluation in evaluations(run) if evaluation.get("samples")]
    if not shown:
        return []
    after = [own["answer"] for own in shown[-1]] if len(shown) > 1 else [None] * len(shown[0])
    return [(own["prompt"], own["answer"], answer) for own, answer in zip(shown[0], after, strict=False)]


def _settings(run: Run) -> list[dict[str, Any]]:
    rows = []
    for name, value in run.config.items():
        known = Config.model_fields.get(name)
        rows.append(
            {
                "name": name,
                "value": value,
                "text": known.description if known else "",
                "group": known.json_schema_extra["group"] if known and isinstance(known.json_schema_extra, dict) else "other",
                "changed": known is not None and value != known.default,
            }
        )
    return rows


def environment() -> Environment:
    """jinja2 with the package's templates, the filters `number`, `rank`, `size`, `device`, `whole` and `words`; the functions `change`, `worse`, `unbroken`.

    whole: a unit stays on the line of its number. words: a command breaks between its words alone, for a browser also breaks behind a hyphen.
    unbroken(text): the class of a cell whose text stays on one line, where it is short enough for a telephone.
    """
    made = Environment(loader=PackageLoader("hetlora", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(number=number, rank=rank_text, size=size_text, device=lambda found: device_text(Device(found["rank"], found["seconds"])))
    made.filters["whole"] = lambda text: text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")
    made.filters["words"] = lambda command: Markup(" ").join(Markup('<span class="word">{}</span>').format(word) for word in command.split(" "))
    made.globals.update(change=change_text, worse=got_worse, unbroken=lambda text: Markup(' class="unbroken"') if len(text) <= _UNBROKEN else "")
    return made


_MEDIA = {
    "narrow dark": "(max-width: 40rem) and (prefers-color-scheme: dark)",
    "narrow": "(max-width: 40rem)",
    "dark": "(prefers-color-scheme: dark)",
}
"""Which drawing of a picture a browser takes: the first that fits."""


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def picture_data(pictures: dict[str, Picture]) -> list[dict[str, Any]]:
    """What a page needs to embed its pictures. `sources`: (media query, data) of the drawings for telephones and dark pages."""
    return [
        {
            "name": name,
            "title": p.title,
            "caption": p.caption,
            "alt": p.alt,
            "data": _embedded(p.png),
            "sources": [(query, _embedded(p.others[kind])) for kind, query in _MEDIA.items() if kind in p.others],
        }
        for name, p in pictures.items()
    ]


def _render(run: Run, pictures: dict[str, Picture]) -> str:
    clients = _client_rows(run)
    notes = list((run.summary or {}).get("notes") or [])
    notes += sorted({note for picture in pictures.values() for note in picture.notes})
    return (
        environment()
        .get_template("report/page.html.j2")
        .render(
            run=run,
            clients=clients,
            groups=group_rows(clients),
            sentence=run_sentence(run),
            method=_method(run),
            has_perplexity=any(client.get("perplexity_after") is not None for client in clients),
            dropped=[(record["round"], drop) for record in run.records for drop in record.get("dropped") or []],
            own_text=TRAININGS.get(str(run.config.get("train")), TRAININGS["adapters"]).own_text,  # the config may be lost or damaged
            figures=_key_figures(run),
            pictures=picture_data(pictures),
            samples=_samples(run),
            settings=_settings(run),
            notes=notes,
            isfinite=math.isfinite,
        )
    )
