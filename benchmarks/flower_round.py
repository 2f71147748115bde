"""`python -m benchmarks.flower_round CASE`: the round of `benchmarks.rounds` by Flower's simulation, whose clients are stock PEFT in Ray's processes.

A process of its own for each case, as Ray's and Flower's own threads would stay. There are as many clients at a time as threads, with one each, which is how
Flower shares a machine. A client gets its rows of the server's adapter, trains them as `rounds.train_peft` does, and returns them; the server averages. The
first round is not counted: in it Ray's processes load the model. Prints one JSON object: seconds of each round, and the losses of the last.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from . import rounds

client_app = ClientApp()
_loaded: dict[str, tuple[rounds.Federation, Any]] = {}  # of this process: it serves one client after another


def _federation(case: str) -> tuple[rounds.Federation, Any]:
    if case not in _loaded:
        clients, tokens, quick = json.loads(case)
        torch.set_num_threads(1)
        of = rounds.Federation(rounds.Case(clients, tokens), quick, torch.device("cpu"))
        _loaded[case] = (of, rounds.with_adapters(of, of.case.ranks))
    return _loaded[case]


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's steps."""
    of, model = _federation(str(message.content.config_records["order"]["case"]))
    k = int(message.content.config_records["order"]["client"])  # type: ignore[arg-type]
    received = message.content.array_records["rows"].to_torch_state_dict()
    start = {name: (received[f"{name}.a"], received[f"{name}.b"]) for name in of.shapes}
    first, last = rounds.train_peft(model, str(k), start, of.steps(k), of.device)
    rows = _arrays(rounds.factors_of(model, str(k)))
    return Message(RecordDict({"rows": rows, "losses": MetricRecord({"client": k, "first": first, "last": last})}), reply_to=message)


def _arrays(factors: rounds.Factors) -> ArrayRecord:
    named = {f"{name}.{side}": t.detach().contiguous() for name, pair in factors.items() for side, t in zip("ab", pair, strict=True)}
    return ArrayRecord(named)


def server(case: str, turns: int, found: dict[str, Any]) -> ServerApp:
    """An app that leads `turns` rounds after the first, and leaves their seconds and losses in `found`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        clients, tokens, quick = json.loads(case)
        of = rounds.Federation(rounds.Case(clients, tokens), quick, torch.device("cpu"))
        start = rounds.start_of(of)
        while len(nodes := sorted(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        for turn in range(1 + turns):
            begin = time.perf_counter()
            messages = []
            for k, (node, rank) in enumerate(zip(nodes, of.case.ranks, strict=True)):
                rows = _arrays({name: (a[:rank], b[:, :rank]) for name, (a, b) in start.items()})
                order = ConfigRecord({"case": case, "client": k})
                messages.append(Message(RecordDict({"rows": rows, "order": order}), node, MessageType.TRAIN, group_id=str(turn)))
            replies = list(grid.send_and_receive(messages))
            if failed := next((reply for reply in replies if reply.has_error()), None):
                raise RuntimeError(failed.error.reason)
            by_client = sorted(replies, key=lambda reply: reply.content.metric_records["losses"]["client"])
            uploads = []
            for reply in by_client:
                state = reply.content.array_records["rows"].to_torch_state_dict()
                uploads.append({name: (state[f"{name}.a"], state[f"{name}.b"]) for name in of.shapes})
            rounds.mean_by_norm(uploads, rounds.RANKS[1])
            if turn:
                found["seconds"].append(time.perf_counter() - begin)
        found["losses"] = [[reply.content.metric_records["losses"][name] for name in ("first", "last")] for reply in by_client]

    return app


def main() -> int:
    given = json.loads(sys.argv[1])
    case, threads = json.dumps([given["clients"], given["tokens"], given["quick"]]), given["threads"]
    found: dict[str, Any] = {"seconds": [], "losses": []}
    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": threads, "include_dashboard": False, "logging_level": "error"}}
    run_simulation(server(case, given["turns"], found), client_app, given["clients"], backend_config=resources)
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    # Ray's processes import the app by name.
    sys.exit(importlib.import_module(f"{__package__}.flower_round").main())
