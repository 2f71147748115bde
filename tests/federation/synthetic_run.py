"""A run folder made up for the tests of what reads one: report, export, command line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import hetlora_kernels as hk
from hetlora import checkpoint
from hetlora.config import Config

ROW_BYTES = 4096


def client_names(count: int) -> list[str]:
    words = ["asyncio", "ctypes", "email", "html", "importlib", "json", "logging", "tkinter", "unittest", "xml"]
    return [words[i] if i < len(words) else f"client{i:03d}" for i in range(count)]


def evaluation(perplexity: float, held_out: bool = True) -> dict[str, Any]:
    part = {"loss": 2.0, "perplexity": perplexity, "tokens": 65536}
    return {"client_text": part, "held_out_clients": {**part, "perplexity": 1.1 * perplexity} if held_out else None}


def write_run(
    folder: Path, clients: int = 6, rounds: int = 4, names: list[str] | None = None, done: int | None = None, held_out: bool = True, **settings: Any
) -> list[str]:
    """Write config, versions, rounds.jsonl and (where `done` is None) summary.json; returns the clients' names."""
    rng = random.Random(0)
    names = names or client_names(clients)
    settings = {"rounds": rounds, "clients_per_round": min(8, len(names)), "gamma": 0.8, "output": str(folder), **settings}
    cfg = Config.create(**settings)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(cfg.to_json(), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps({"hetlora": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "platform": "Linux", "device": "cpu"}))
    start = {name: round(5 + 45 * rng.random() ** 10) for name in names}
    ranks, work, perplexity = dict(start), {name: [0, 0] for name in names}, 7.4
    lines = [{"round": 0, "clients": [], "dropped": [], "bytes_down": 0, "bytes_up": 0, "bytes_down_homlora": 0, "bytes_up_homlora": 0}]
    lines[0] |= {"mean_rank": sum(ranks.values()) / len(ranks), "evaluation": evaluation(perplexity, held_out)}
    for number in range(1, (rounds if done is None else done) + 1):
        chosen, records = sorted(rng.sample(names, cfg.clients_per_round)), []
        weights = [rng.random() + 0.05 for _ in chosen]
        for name, weight in zip(chosen, weights, strict=True):
            before = ranks[name]
            if before > 5 and number > 1 and rng.random() < 0.4:
                ranks[name] = max(5, int(0.8 * before))
            work[name] = [work[name][0] + 40, work[name][1] + 1]
            records.append(
                {
                    "name": name,
                    "rank_before": before,
                    "rank": ranks[name],
                    "steps": 5,
                    "sequences": 40,
                    "tokens": 10240,
                    "loss_first": 2.1,
                    "loss_last": 1.9,
                    "tail_before": 0.1,
                    "tail_after": 0.09,
                    "norm": 1.2,
                    "weight": weight / sum(weights),
                    "bytes_down": before * ROW_BYTES,
                    "bytes_up": ranks[name] * ROW_BYTES,
                }
            )
        perplexity *= 0.97 + 0.02 * rng.random()
        line = {"round": number, "seconds": 4.1, "lr": 0.003, "clients": records, "dropped": []}
        line |= {f"bytes_{way}": sum(r[f"bytes_{way}"] for r in records) for way in ("down", "up")}
        line |= {f"bytes_{way}_homlora": len(chosen) * 50 * ROW_BYTES for way in ("down", "up")}
        line |= {"mean_rank": sum(ranks.values()) / len(ranks), "evaluation": evaluation(perplexity, held_out)}
        lines.append(line)
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done is None:
        (folder / "summary.json").write_text(json.dumps(_summary(lines, start, ranks, work, held_out)))
    else:
        write_checkpoint(folder, ranks)
    return names


def write_checkpoint(folder: Path, ranks: dict[str, Any]) -> None:
    """A checkpoint of these ranks alone."""
    checkpoint.save_checkpoint(folder, {"ranks": ranks}, hk.AdapterBank({"layer": (2, 2)}, [1]), {})


def _summary(lines: list[dict[str, Any]], start: dict[str, int], ranks: dict[str, int], work: dict[str, list[int]], held_out: bool) -> dict[str, Any]:
    rows = [
        {
            "name": name,
            "rank_start": start[name],
            "rank_end": ranks[name],
            "sequences": work[name][0],
            "rounds": work[name][1],
            "perplexity_before": 7.0 + i % 7,
            "perplexity_after": 6.0 + i % 5,
        }
        for i, name in enumerate(sorted(start))
    ]
    sums = {key: sum(line[key] for line in lines) for key in ("bytes_down", "bytes_up", "bytes_down_homlora", "bytes_up_homlora")}
    rest = {"seconds": 4.1 * (len(lines) - 1), "rounds": len(lines) - 1, "homlora_rank": 50, "notes": ["asyncio has little text"]}
    return {"clients": rows, "evaluation_before": lines[0]["evaluation"], "evaluation_after": lines[-1]["evaluation"], **sums, **rest}
