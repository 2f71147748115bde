"""200 replies as a broken or hostile node sends them, through Flower's records: taken bit for bit, or refused by name, and the bank is untouched."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import random
from collections.abc import Callable

import flower_grid  # noqa: F401  (names the task, as Flower does in the process of an app)
import torch
from flwr.app import Array, Message, MessageType, RecordDict
from test_fuzz_uploads import SHAPES, repeat
from tiny import tiny_config, trained_bank

from hetlora import server
from hetlora.client import LocalResult
from hetlora.deployed import messages
from hetlora.deployed.exchange import Reply
from hetlora.errors import ConfigError
from hetlora.flower import Base, HetLora
from hetlora.flower.records import record_dict
from hetlora.flower.strategy import Turn
from hetlora.fold import drawn
from hetlora.server import ServerState
from hetlora.training import Trained

CHANGED_ARRAYS: dict[str, Callable] = {
    "nothing": lambda draw, arrays, key, a: None,
    "bits of a number": lambda draw, arrays, key, a: arrays.__setitem__(key, a(data=flipped(draw, arrays[key].data))),
    "nan": lambda draw, arrays, key, a: arrays.__setitem__(key, a(data=b"\xff" * 4 + arrays[key].data[4:])),
    "short": lambda draw, arrays, key, a: arrays.__setitem__(key, a(data=arrays[key].data[: -draw.choice([1, 4, 8])])),
    "empty": lambda draw, arrays, key, a: arrays.__setitem__(key, a(data=b"")),
    "long": lambda draw, arrays, key, a: arrays.__setitem__(key, a(data=arrays[key].data * draw.choice([2, 100]))),
    "type": lambda draw, arrays, key, a: arrays.__setitem__(
        key, a(dtype=draw.choice(["float64", "int32", "float8_e4m3fn", "complex64", "", "x" * 999, "object"]))
    ),
    "shape": lambda draw, arrays, key, a: arrays.__setitem__(key, a(shape=draw.choice([(), (0,), (-1,), (2**40,), (1, *arrays[key].shape), (2**62, 2**62)]))),
    "kind": lambda draw, arrays, key, a: arrays.__setitem__(key, a(stype=draw.choice(["numpy.ndarray", "", "pickle", "x" * 999]))),
    "key": lambda draw, arrays, key, a: arrays.__setitem__(draw.choice(["", "rows 0:1", "x" * 999]), arrays.pop(key)),
    "one more": lambda draw, arrays, key, a: arrays.__setitem__("more", arrays[key]),
}
CHANGED_NUMBERS: dict[str, Callable] = {
    "ranks": lambda draw, config, metrics: config.__setitem__(
        "ranks", draw.choice([[], [0, 0], [-1, 2], [2**31, 1], [2**62, 2**62], [2], [2, 2, 2], [1.5, 2.0], "2", [True, False], [3, 2], b"2"])
    ),
    "no ranks": lambda draw, config, metrics: config.pop("ranks"),
    "metric": lambda draw, config, metrics: metrics.__setitem__(
        draw.choice(["steps", "sequences", "tokens"]), draw.choice([0, -1, 2**63, 1.5, float("nan"), [1], 2**53])
    ),
    "tail": lambda draw, config, metrics: metrics.__setitem__(draw.choice(["tail_before", "tail_after"]), draw.choice([float("nan"), float("inf"), [1.0]])),
    "no metric": lambda draw, config, metrics: metrics.pop(draw.choice(list(metrics))),
}


def flipped(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 9)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def out_of_a_message(draw: random.Random) -> None:
    cfg = tiny_config("unused", gamma=0.99, train=draw.choice(["adapters", "fold"]), adapter_dtype=draw.choice(["float32", "bfloat16"]))
    names, ranks = ["a", "b"], [draw.randrange(1, 5), draw.randrange(1, 5)]
    state = ServerState(
        trained_bank(SHAPES, [4], getattr(torch, cfg.adapter_dtype)), {n: dict.fromkeys(SHAPES, r) for n, r in zip(names, ranks, strict=True)}, 1, 4
    )
    strategy = HetLora(cfg, Base("tiny", SHAPES, 0, ""))
    strategy._node, strategy._turn = {"a": 11, "b": 12}.__getitem__, Turn(state, names, 1, 0.1)
    before, replies, sent, changed = {key: value.clone() for key, value in state.bank.state_dict().items()}, [], {}, draw.randrange(2)
    what = draw.choice([*CHANGED_ARRAYS, *CHANGED_NUMBERS])
    for k, (name, order) in enumerate(zip(names, strategy.configure_train(1, None, None, None), strict=True)):  # type: ignore[arg-type]
        received = strategy.exchange.receive(cfg, order.content.array_records["arrays"], messages.order(order.content), SHAPES)[1]
        if cfg.train == "fold":
            upload = drawn(cfg, state, [name], 1)
            for rows in upload.bt.values():
                rows.data.normal_()
        else:
            upload = received.bank
        trained = Trained([], {}, [], [], upload, None, [], [], 0)
        reply = Reply(list(state.ranks[name].values()), LocalResult(1, 2, 3, 0.5, 0.25), (1.0, 1.0))
        content = record_dict(messages.reply_message(reply, strategy.exchange.up(trained)))
        arrays, (config,), (metrics,) = content.array_records["arrays"], content.config_records.values(), content.metric_records.values()
        if k == changed:
            (key,) = arrays

            def another(array=arrays[key], **given):
                return Array(**{"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data, **given})

            try:
                if what in CHANGED_ARRAYS:
                    CHANGED_ARRAYS[what](draw, arrays, key, another)
                else:
                    CHANGED_NUMBERS[what](draw, config, metrics)
            except (TypeError, ValueError):
                return  # Flower's own records do not take it
            content = RecordDict({"arrays": arrays, "config": config, "metrics": metrics})
        sent[name] = arrays
        replies.append(Message(content, reply_to=order))
        assert replies[-1].metadata.message_type == MessageType.TRAIN
    strategy.aggregate_train(1, replies)
    found = strategy._round
    assert set(found.replies) | set(found.dropped) == {0, 1} and 1 - changed in found.replies
    assert all(torch.equal(value, before[key]) for key, value in state.bank.state_dict().items())
    if changed in found.dropped:
        assert what != "nothing", found.dropped
        assert found.dropped[changed].isprintable() and len(found.dropped[changed]) <= 300
        return
    assert what in ("nothing", "bits of a number") or (what == "ranks" and found.replies[changed].ranks == list(state.ranks[names[changed]].values())), what
    assert not server.refused(found.uploads[changed])
    again = strategy.exchange.up(Trained([], {}, [], [], found.uploads[changed], None, [], [], 0))
    assert {key: array.data for key, array in again.items()} == {key: array.data for key, array in sent[names[changed]].items()}


@pytest.mark.slow
def test_out_of_a_message():
    repeat(out_of_a_message, 200)


@pytest.mark.parametrize(("loss", "tokens"), [(-1.0, 5), (-1e308, 5), (3.0, 0), (float("nan"), 5), (float("inf"), 5)])
@pytest.mark.parametrize("name", ["whole", "own", "train"])
def test_losses_that_cannot_be_are_refused(name, loss, tokens):
    record = record_dict(messages.evaluated_message(messages.Evaluated((6.0, 3), (6.0, 3), (0.0, 0))))
    assert messages.evaluated(record).train == (0.0, 0)
    metrics = record.metric_records["metrics"]
    metrics[f"{name}_loss"], metrics[f"{name}_tokens"] = loss, tokens
    with pytest.raises(ConfigError, match=f"^{name}_loss: expected a"):
        messages.evaluated(record)
