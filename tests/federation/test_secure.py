"""Secure aggregation in one process: the server's sums are those of the plain uploads to the fixed-point step, and it sees no upload by itself."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import base64
import itertools
import json
import re

import numpy as np
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flower_grid import Clock, LocalGrid
from flwr.app import Message
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from test_privacy import listed
from tiny import lines, same_bits, tiny_clients, tiny_config, tiny_federation, tiny_model, tiny_state, trained_bank, whole_bank

from hetlora import course, merge, run_folder, secure_sum
from hetlora.config import Config, ConfigError
from hetlora.deployed import members as members_module
from hetlora.deployed.local import modules_digest
from hetlora.flower import Base, HetLora, Waiting, client_app, secure, secure_client
from hetlora.flower import replies as replies_module
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.observer import Observer
from hetlora.server import fresh_bank

SIZES = [3, 5, 2, 7, 4]
SECURE = {"secure_aggregation": True, "clip_median": 0.0, "weights": "samples", "ranks": "2,4,8,4,2", "clients_per_round": 5, "rounds": 1}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(members_module, "POLL", 0.01)
    monkeypatch.setattr(replies_module, "time", Clock())


class Watching(LocalGrid):
    """Keeps every reply as the server gets it, by (node, kind), before `spoil` may lose or change it."""

    def __init__(self, app, run_config, nodes, spoil=None) -> None:
        self.heard: dict[tuple[int, str], Message] = {}

        def kept(node, message, reply):
            self.heard[node, message.metadata.message_type] = reply
            return spoil(node, message, reply) if spoil else reply

        super().__init__(app, run_config, nodes, kept)


def deployed(cfg: Config, spoil=None, waiting: Waiting | None = None):
    clients, model = tiny_clients(SIZES), tiny_model(getattr(torch, cfg.dtype))
    shapes = target_shapes(model, cfg.target_modules)
    app = client_app(lambda cfg: model, lambda cfg, node: clients[node.partition_id])
    grid = Watching(app, cfg.model_dump(), [{"partition-id": k} for k in range(len(SIZES))], spoil)
    said: list[str] = []
    observer = Observer()
    observer.message = said.append
    strategy = HetLora(cfg, Base("tiny", shapes, 0, modules_digest(shapes)), waiting or Waiting(min_clients=len(SIZES), join_timeout=0), observer)
    return strategy.start(grid), said, grid


@pytest.fixture
def added(monkeypatch):
    """{client's sequences: (vector, uploads, received)} of what the clients added to the sums of the last round."""
    found = {}
    made = secure_sum.contribution

    def kept(cfg, uploads, received, share, rows):
        vector = made(cfg, uploads, received, share, rows)
        found[round(share * max(SIZES))] = (vector, uploads, received)
        return vector

    monkeypatch.setattr("hetlora.deployed.local.contribution", kept)
    return found


@pytest.fixture
def totals(monkeypatch):
    """The sums as the server reads them, round by round."""
    found = []
    made = secure_sum.mean

    def kept(cfg, total, *rest):
        found.append(total)
        return made(cfg, total, *rest)

    monkeypatch.setattr("hetlora.flower.secure_server.mean", kept)
    return found


# ---------------------------------------------------------------- the sums

FINE, COARSE = {}, {"secure_range": 64.0, "secure_bits": 20}  # 8 and 4 bytes a number
MEANS = {
    "samples": {"weights": "samples"},
    "sparsity": {"weights": "sparsity"},
    "one weight": {"weights": "sparsity", "weight_scope": "client"},
    "owners": {"weights": "samples", "shared_rows": "owners"},
    "zero": {"weights": "uniform", "unowned_rows": "zero"},
    "delta": {"weights": "samples", "merge": "delta"},
    "momentum": {"weights": "uniform", "server_optimizer": "fedavgm"},
}


@pytest.mark.parametrize("point", [FINE, COARSE], ids=["8 bytes", "4 bytes"])
@pytest.mark.parametrize("settings", MEANS.values(), ids=MEANS)
def test_sums_and_merge_are_the_plain_ones_to_the_step(tmp_path, settings, point):
    """Clients of ranks 2, 4 and 8 of a bank of 9 rows. A sum is K h / 2 from the exact one; the merged rows are as far as that divided by a weight allows."""
    ranks, samples = [2, 4, 8], [3, 5, 2]
    own = {"ranks": "2,4,8", "clients_per_round": 3, "adapter_dtype": "float64", "secure_owners": 1}
    cfg = tiny_config(tmp_path / "run", **{**SECURE, **own, **point, **settings})
    federation = tiny_federation(SIZES[:3])
    state = tiny_state(federation, ranks, r_max=9, dtype=torch.float64)
    shapes, everywhere = federation.shapes, [dict.fromkeys(federation.shapes, rank) for rank in ranks]
    uploads, received = trained_bank(shapes, ranks, torch.float64, seed=1), state.bank.truncate(ranks)
    rows = secure_sum.summed_rows(cfg, shapes, everywhere)
    assert rows == [8] * len(shapes)
    total = sum(secure_sum.contribution(cfg, uploads.select([k]), received.select([k]), n / 5, rows) for k, n in enumerate(samples))

    h, scores = 2.0**-cfg.secure_bits, merge.client_scores(uploads, [n / 5 for n in samples], cfg)[0]
    pieces = iter((total.double() * h).split(secure_sum.lengths(shapes, rows)))
    size = max(float(factor.detach().abs().max()) for bank in (uploads, received) for factor in bank.parameters())
    slack = 2.0**-50 * 3 * float(scores.max()) * max(2 * size, 1)  # float64 sums of three, on either side
    least = float(scores.sum(0).min())
    for module, (name, (m, n)) in enumerate(shapes.items()):
        exact = [scores[:, module].sum()[None], torch.zeros(8, n, dtype=torch.float64), torch.zeros(8, m, dtype=torch.float64)]
        for k, rank in enumerate(ranks):
            for part, side in ((1, "a"), (2, "bt")):
                x = getattr(uploads, side)[name].detach()[uploads.layouts[name].rows(k)]
                if cfg.merge == "delta":
                    x = x - getattr(received, side)[name].detach()[received.layouts[name].rows(k)]
                exact[part][:rank] += scores[k, module] * x
        error = [float((next(pieces).view_as(part) - part).abs().max()) for part in exact]
        assert error[0] <= 3 * h / 2 + slack
        assert max(error[1:]) <= 3 * h / 2 * (1 + 2 * size) + slack, "a number by its own rounding, and by that of its weight"
        least = min(least, float(scores[2, module])) if cfg.shared_rows == "owners" else least

    one, _ = secure_sum.mean(cfg, total, state.bank, rows, everywhere, samples, 5)
    plain, masked = (tiny_state(federation, ranks, r_max=9, dtype=torch.float64) for _ in range(2))
    merge.aggregate(plain, uploads, received, samples, cfg.model_copy(update={"secure_aggregation": False}), federation.model)
    merge.aggregate(masked, one, None, samples, cfg, federation.model)
    bound = 3 * h / 2 * (1 + 4 * size) / (least - 3 * h / 2) + 2.0**-46 * size
    for mine, other in zip(masked.bank.parameters(), plain.bank.parameters(), strict=True):
        assert float((mine - other).detach().abs().max()) <= bound
    assert not same_bits(masked.bank, state.bank)


def test_where_nothing_rounds_a_masked_merge_has_the_bits_of_the_plain_one(tmp_path):
    ranks = [2, 4, 8, 8]
    own = {"weights": "uniform", "ranks": "2,4,8,8", "clients_per_round": 4, "adapter_dtype": "float64", "secure_owners": 2}
    cfg, federation = tiny_config(tmp_path / "run", **{**SECURE, **own}), tiny_federation(SIZES[:4])
    everywhere = [dict.fromkeys(federation.shapes, rank) for rank in ranks]
    uploads, rows = whole_bank(federation.shapes, ranks, 1), secure_sum.summed_rows(cfg, federation.shapes, everywhere)
    states = [tiny_state(federation, ranks, r_max=8, dtype=torch.float64) for _ in range(2)]
    for state in states:
        state.bank = whole_bank(federation.shapes, [8], 2)
    received = states[0].bank.truncate(ranks)
    total = sum(secure_sum.contribution(cfg, uploads.select([k]), received.select([k]), 1.0, rows) for k in range(4))
    one, _ = secure_sum.mean(cfg, total, states[0].bank, rows, everywhere, [1] * 4, 1)
    merge.aggregate(states[0], uploads, received, [1] * 4, cfg.model_copy(update={"secure_aggregation": False}), federation.model)
    merge.aggregate(states[1], one, None, [1] * 4, cfg, federation.model)
    assert same_bits(states[0].bank, states[1].bank)


@pytest.mark.parametrize("merge_name", ["factors", "delta"])
def test_how_much_may_be_rounding_is_told(tmp_path, merge_name):
    """The weights of equal clients are whole steps, so that nothing else rounds."""
    own = {"ranks": "4", "clients_per_round": 3, "adapter_dtype": "float64", "weights": "uniform", "secure_bits": 6, "secure_range": 64.0}
    cfg, federation = tiny_config(tmp_path / "run", **{**SECURE, **own, "merge": merge_name}), tiny_federation(SIZES[:3])
    state = tiny_state(federation, [4] * 3, r_max=4, dtype=torch.float64)
    uploads, received = trained_bank(federation.shapes, [4] * 3, torch.float64, seed=1), state.bank.truncate([4] * 3)
    ranks, rows = [dict.fromkeys(federation.shapes, 4)] * 3, [4] * len(federation.shapes)
    total = sum(secure_sum.contribution(cfg, uploads.select([k]), received.select([k]), 1.0, rows) for k in range(3))
    one, rounding = secure_sum.mean(cfg, total, state.bank, rows, ranks, [1] * 3, 1)
    bounds = []
    for side in ("a", "bt"):
        for name in federation.shapes:
            new, old, found = (getattr(bank, side)[name].detach() for bank in (uploads, state.bank, one))
            zero = old if merge_name == "delta" else torch.zeros_like(old)
            exact, mine = new.view(3, 4, -1).mean(0) - zero, found - zero
            bounds.append(min(1, 2.0**-7 * mine.numel() ** 0.5 / float(mine.norm())))
            assert float((mine - exact).norm() / mine.norm()) <= bounds[-1]
    assert rounding == pytest.approx(max(bounds), rel=1e-12) and rounding > 0.01


def test_a_coarse_step_is_named(tmp_path):
    for bits, coarse in ((40, False), (12, True)):
        cfg = tiny_config(tmp_path / str(bits), **{**SECURE, "weights": "sparsity", "secure_bits": bits, "secure_range": 64.0})
        _, said, _ = deployed(cfg)
        assert (lines(tmp_path / str(bits))[-1]["secure_rounding"] > 0.01) == coarse
        named = [line for line in said if re.match(r"round 1: up to 100 % of a module's merged rows may be rounding to the step 2\^-12; raise", line)]
        assert len(named) == coarse


def test_rows_that_a_sum_would_not_hide_are_known():
    shapes = {"one": (4, 4), "two": (4, 4)}
    ranks = [{"one": rank, "two": 2} for rank in (0, 2, 4, 8, 8)]
    of = {owners: Config(**{**SECURE, "ranks": "fixed:4", "secure_owners": owners}) for owners in (1, 2, 3, 5)}
    assert {owners: secure_sum.summed_rows(cfg, shapes, ranks) for owners, cfg in of.items()} == {1: [8, 2], 2: [8, 2], 3: [4, 2], 5: [0, 2]}
    assert secure_sum.summed_rows(of[3], shapes, ranks[:2]) == [0, 0]
    assert secure_sum.lone_rows(of[2], shapes, [8, 2], ranks) == secure_sum.lone_rows(of[3], shapes, [4, 2], ranks[:4]) == []
    assert secure_sum.lone_rows(of[2], shapes, [8, 2], ranks[:4]) == ["one"], "rows 4 to 7 are the fourth client's alone"
    assert secure_sum.lone_rows(of[3], shapes, [4, 2], ranks[3:4]) == ["one", "two"]
    assert secure_sum.lone_rows(of[1], shapes, [8, 2], ranks[:4]) == [], "allowed by name"


@pytest.mark.parametrize(("clients", "steps", "bits"), [(4, 2**29 - 1, 32), (4, 2**29, 64), (3, 2**52, 64), (2047, 2**52, 64), (5, 1, 32)])
def test_no_sum_wraps_around(clients, steps, bits):
    """All clients at the largest number that one may add, and at the least."""
    fraction = 20
    cfg = Config(**{**SECURE, "clients_per_round": clients, "ranks": "fixed:4", "secure_bits": fraction, "secure_range": steps / 2**fraction})
    point = secure_sum.fixed_point(cfg)
    assert (point.bits, point.most) == (bits, steps)
    for sign in (1, -1):
        own = secure.to_ring(point.encode(torch.tensor([sign * steps * point.step], dtype=torch.float64)), bits)
        total = np.zeros(1, dtype=own.dtype)
        for _ in range(clients):
            total += own
        assert secure.from_ring(total).tolist() == [sign * clients * steps]
        assert point.decode(secure.from_ring(total)).tolist() == [sign * clients * steps * point.step]
        with pytest.raises(ConfigError, match="secure_range: expected numbers of at most"):
            point.encode(torch.tensor([sign * (steps + 1) * point.step], dtype=torch.float64))
        with pytest.raises(ConfigError, match="out of the range"):
            point.decode(torch.tensor([sign * (clients * steps + 1)]))


# ---------------------------------------------------------------- the protocol


@pytest.mark.parametrize(
    "settings",
    [{"secure_owners": 1}, {"secure_owners": 2, "secure_shares": 3}, {}, COARSE | {"weights": "sparsity"}],
    ids=["8 rows", "4 rows, three shares", "4 rows", "4 bytes"],
)
def test_the_server_gets_the_sum_of_what_the_clients_add_and_the_merge_of_the_simulation(tmp_path, added, totals, settings):
    """The sum is exact in the ring. Rows that enough clients own are those of `hetlora run` to the step and the rounding of float32; others stay."""
    cfg = tiny_config(tmp_path / "run", **{**SECURE, **settings})
    result, said, _ = deployed(cfg)
    vectors = [vector for vector, _, _ in added.values()]
    assert len(vectors) == 5 and torch.equal(totals[0], sum(vectors)) and not any("left out" in line for line in said)
    plain = {name: value for name, value in cfg.model_dump().items() if not name.startswith("secure_")}
    ours = simulate(Config(**{**plain, "cobatch": False, "output": str(tmp_path / "here")}), federation=tiny_federation(SIZES), quiet=True)
    rows = 8 if cfg.secure_owners == 1 else 4
    assert [line for line in said if "stay as they are" in line] == (
        [] if rows == 8 else [f"round 1: rank rows from 4 on, which fewer than {cfg.secure_owners} of its clients own, stay as they are (secure_owners)"]
    )
    h, least = 2.0**-cfg.secure_bits, min(map(int, totals[0].split(secure_sum.lengths(ours.bank.shapes, [rows] * 8))[::3]))
    size = max(float(factor.detach().abs().max()) for _, uploads, received in added.values() for bank in (uploads, received) for factor in bank.parameters())
    bound = 5 * h / 2 * (1 + 4 * size) / (least * h - 5 * h / 2) + 8 * torch.finfo(torch.float32).eps * size
    start = fresh_bank(ours.bank.shapes, 8, cfg, torch.device("cpu")).adapter(0)
    for name, expected in ours.bank.adapter(0).items():
        theirs = torch.frombuffer(bytearray(result.arrays[name].data), dtype=torch.float32).view_as(expected)
        mine, other, old = (factor.detach() if "lora_A" in name else factor.detach().t() for factor in (theirs, expected, start[name]))
        assert float((mine[:rows] - other[:rows]).abs().max()) <= bound
        assert torch.equal(mine[rows:], old[rows:])
    assert not (tmp_path / "run" / "clients").exists(), "nobody has the clients' own adapters"


STAGES = {"keys": 4, "shares": 4, "masked": 4, "unmask": 5}
"""Clients in the sum, where one of five is lost at a stage."""


@pytest.mark.parametrize("settings", [{}, {"secure_shares": 3}], ids=["all", "three shares"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_drops_out_is_survived(tmp_path, added, totals, stage, settings):
    def lose(node, message, reply):
        return None if (node, message.metadata.message_type) == (12, f"train.{stage}") else reply

    def without(*_):  # three neighbours of five clients open with two
        return [{place, (place + 1) % 5, (place - 1) % 5} for place in range(5)]

    cfg = tiny_config(tmp_path / "run", **{**SECURE, **settings})
    if settings:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(secure, "neighbours", without)
            deployed(cfg, lose)
    else:
        deployed(cfg, lose)
    there = [vector for sequences, (vector, _, _) in added.items() if stage == "unmask" or sequences != SIZES[1]]
    assert len(there) == STAGES[stage] and torch.equal(totals[0], sum(there))
    record = lines(tmp_path / "run")[-1]
    assert len(record["clients"]) == STAGES[stage]
    assert [drop["name"] for drop in record["dropped"]] == ([] if stage == "unmask" else ["client1"])


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_the_round_is_given_up_and_the_bank_stays(tmp_path, stage):
    """Two of five are lost in round 2, and four shares open a mask. The run goes on with round 3."""

    def lose(node, message, reply):
        return None if node in (12, 13) and message.metadata.message_type == f"train.{stage}" and message.metadata.group_id == "2" else reply

    _, said, _ = deployed(tiny_config(tmp_path / "run", **{**SECURE, "rounds": 3}), lose)
    given_up = [line for line in said if line.startswith("round 2 is given up, ")]
    assert len(given_up) == 1 and " 4 " in given_up[0] and given_up[0].endswith("; the bank stays as it is")
    rounds = lines(tmp_path / "run")
    assert [len(record["clients"]) for record in rounds] == [0, 5, 0, 5]
    reasons = [drop["reason"] for drop in rounds[2]["dropped"]]
    assert reasons.count("its round is given up") == (5 if stage == "unmask" else 3) and len(reasons) == 5
    losses = [record["evaluation"]["client_text"]["loss"] for record in rounds]
    assert losses[0] != losses[1] == losses[2] != losses[3]


def test_a_round_that_would_show_one_clients_rows_is_given_up(tmp_path):
    """Rows 4 to 7 have three owners, of which two drop out; three shares open a mask."""

    def lose(node, message, reply):
        return None if node in (14, 15) and message.metadata.message_type == "train.masked" else reply

    cfg = tiny_config(tmp_path / "run", **{**SECURE, "ranks": "4,4,8,8,8", "secure_threshold": 3})
    _, said, grid = deployed(cfg, lose)
    assert any(
        re.match(r"round 1 is given up, after dropouts and pruning one client alone owns a row of .*q_proj, which the sum would show", line) for line in said
    )
    assert not any(kind == "train.unmask" for _, kind in grid.asked), "nobody was asked to open it"


@pytest.mark.parametrize("gone", [(13, 16), (13,)], ids=["two pieces", "one piece"])
def test_a_sum_that_falls_into_pieces_is_not_opened(tmp_path, monkeypatch, totals, gone):
    """Six clients on a ring, each masked with the two beside it. Without the third and the sixth no mask joins the first two to the fourth and fifth."""
    monkeypatch.setitem(globals(), "SIZES", [3, 5, 2, 7, 4, 6])
    monkeypatch.setattr(secure, "neighbours", lambda *_: [{place, (place + 1) % 6, (place - 1) % 6} for place in range(6)])

    def lose(node, message, reply):
        return None if node in gone and message.metadata.message_type == "train.masked" else reply

    _, said, grid = deployed(tiny_config(tmp_path / "run", **{**SECURE, "ranks": "fixed:4", "clients_per_round": 6, "secure_shares": 3}), lose)
    refused = [line for line in said if line.startswith("round 1 is given up, dropouts left no mask between the 2 clients around client0 and the 2 others")]
    pieces = gone == (13, 16)
    assert (len(refused), len(totals), ("train.unmask" in {kind for _, kind in grid.asked})) == ((1, 0, False) if pieces else (0, 1, True))


def odd_keys():
    """PEM of public keys that are none of Flower's key agreement: another curve, another scheme, an algorithm without a name, no key at all."""
    shape = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    made = [ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()]
    unknown = base64.b64encode(bytes.fromhex("300c300706052a03040506030100")).decode()  # of the algorithm 1.2.3.4.5.6
    pem = f"-----BEGIN PUBLIC KEY-----\n{unknown}\n-----END PUBLIC KEY-----\n".encode()
    return [*(own.public_key().public_bytes(*shape) for own in made), pem, b"x"]


@pytest.mark.parametrize("pair", ["public1", "public2", "twice", "another's"])
def test_a_key_that_cannot_be_used_costs_its_client_alone_the_round(tmp_path, pair):
    heard = {}

    def spoil(node, message, reply):
        if message.metadata.message_type == "train.keys":
            record = reply.content.config_records["secure"]
            heard[node] = record["public1"]
            if node == 13:
                record["public1" if pair == "twice" else pair if pair[0] == "p" else "public2"] = (
                    record["public2"] if pair == "twice" else heard[12] if pair == "another's" else odd_keys()[0]
                )
        return reply

    deployed(tiny_config(tmp_path / "run", **SECURE), spoil)
    record = lines(tmp_path / "run")[-1]
    assert [drop["name"] for drop in record["dropped"]] == ["client2"] and len(record["clients"]) == 4
    said = f"{pair}: expected a public key on the curve P-384" if pair[0] == "p" else "public1, public2: expected fresh keys"
    assert said in record["dropped"][0]["reason"]


@pytest.mark.parametrize("key", odd_keys(), ids=["curve", "scheme", "unknown", "none"])
def test_a_key_of_another_kind_is_refused_by_name(key):
    with pytest.raises(ConfigError, match="public2: expected a public key on the curve P-384 as PEM, got "):
        secure.read_public_key({"public2": key}, "public2")
    private = secure_client.private_key_to_bytes(secure_client.generate_key_pairs()[0])
    for use in (secure.pair_seed, lambda own, other: secure_client._for({"private2": own}, other)):
        with pytest.raises(ConfigError, match="secure aggregation: a key cannot be used"):
            use(private, key)


def test_a_private_key_of_no_known_kind_gives_the_round_up(tmp_path, monkeypatch):
    """A client shares something else in the place of its first private key and drops out."""
    unknown = base64.b64encode(bytes.fromhex("3010020100300706052a0304050604020101")).decode()
    pem = f"-----BEGIN PRIVATE KEY-----\n{unknown}\n-----END PRIVATE KEY-----\n".encode()
    made, keys = secure_client.create_shares, []

    def false(secret, threshold, shares):
        keys.extend([secret] if b"PRIVATE" in secret else [])
        return made(pem if b"PRIVATE" in secret and len(keys) == 2 else secret, threshold, shares)

    def lose(node, message, reply):
        return None if (node, message.metadata.message_type) == (12, "train.masked") else reply

    monkeypatch.setattr(secure_client, "create_shares", false)
    _, said, _ = deployed(tiny_config(tmp_path / "run", **SECURE), lose)
    assert any(line.startswith("round 1 is given up, the shares of client1 do not fit together") for line in said)


def test_a_round_waits_for_as_many_clients_as_it_takes(tmp_path):
    """Three of five leave for good after round 1. The run ends at round 1 and says so, so that it can be resumed when they are back."""

    class Leaving(Watching):
        def get_node_ids(self):
            if sum(kind == "train.unmask" for _, kind in self.asked) >= 5:
                for node in (12, 13, 14):
                    self.nodes.pop(node, None)
            return super().get_node_ids()

    cfg = tiny_config(tmp_path / "run", **{**SECURE, "rounds": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "Watching", Leaving)
        with pytest.raises(ConfigError, match=r"2 of 3 clients were connected within 0 s \(client0, client4\); start more nodes"):
            deployed(cfg)
    assert [len(record["clients"]) for record in lines(tmp_path / "run")] == [0, 5]
    deployed(cfg, waiting=Waiting(min_clients=5, join_timeout=0, resume=True))
    assert [len(record["clients"]) for record in lines(tmp_path / "run")] == [0, 5, 5, 5]


def test_rounds_that_are_given_up_do_not_count_for_patience(tmp_path):
    def lose(node, message, reply):
        return None if node in (12, 13) and message.metadata.message_type == "train.masked" else reply

    _, said, _ = deployed(tiny_config(tmp_path / "run", **{**SECURE, "rounds": 2, "patience": 1}), lose)
    rounds = lines(tmp_path / "run")
    assert [bool(record.get("given_up")) for record in rounds] == [False, True, True] and not any("patience" in line for line in said)
    loss = {"client_text": {"loss": 1.0}}
    history = [{"round": 0, "evaluation": loss}, {"round": 1, "evaluation": None}, {"round": 2, "evaluation": loss, "given_up": "few"}]
    assert course.stalled(history, 1) and not course.stalled(history, 2), "round 1 trained"
    history += [{"round": 3, "evaluation": loss, "given_up": "few"}]
    assert not course.stalled(history, 2)


def test_a_round_that_was_opened_is_not_opened_again(tmp_path, totals):
    """The server ends between round 2's sum and its checkpoint. One client fewer in the same round would show that client's upload by subtraction."""
    cfg, marks = tiny_config(tmp_path / "run", **{**SECURE, "rounds": 3}), []

    def die(node, message, reply):
        if message.metadata.message_type == "train.unmask":
            marks.append((int(message.metadata.group_id), json.loads((tmp_path / "run" / "opened.json").read_text())["round"]))
        if (message.metadata.message_type, message.metadata.group_id) == ("evaluate", "2"):
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        deployed(cfg, die)
    assert len(totals) == 2 and set(marks) == {(1, 1), (2, 2)}, "marked before anybody is asked"
    _, said, _ = deployed(cfg, waiting=Waiting(min_clients=5, join_timeout=0, resume=True))
    assert any(line.startswith("round 2 is given up, its sum may have been opened before the run was interrupted") for line in said)
    rounds = lines(tmp_path / "run")
    assert [len(record["clients"]) for record in rounds] == [0, 5, 0, 5] and len(totals) == 3
    losses = [record["evaluation"]["client_text"]["loss"] for record in rounds]
    assert losses[0] != losses[1] == losses[2] != losses[3]
    (tmp_path / "run" / "opened.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"opened.json: does not say which round was opened last"):
        run_folder.opened_round(tmp_path / "run")


def test_who_sent_shares_that_none_can_read_is_named(tmp_path):
    def spoil(node, message, reply):
        if (node, message.metadata.message_type) == (12, "train.shares"):
            record = reply.content.config_records["secure"]
            record["shares"] = [b"x"] * len(record["shares"])
        return reply

    _, said, _ = deployed(tiny_config(tmp_path / "run", **SECURE), spoil)
    assert sum("the share of client1 is not its own" in line for line in said) == 4


def test_a_round_in_which_all_refuse_ends_the_run_as_ever(tmp_path):
    with pytest.raises(ConfigError, match=r"round 1: no clients left, every update was refused .*secure_range: expected numbers of at most"):
        deployed(tiny_config(tmp_path / "run", **{**SECURE, "secure_range": 1e-3}))


def test_too_few_clients_are_named_before_the_first_round(tmp_path):
    cfg = tiny_config(tmp_path / "run", **{**SECURE, "secure_threshold": 5, "clients_per_round": 6})
    with pytest.raises(ConfigError, match="secure aggregation: there are 5 clients, expected 6 or more"):
        deployed(cfg.model_copy(update={"secure_threshold": 6}))


def test_the_server_sees_no_upload(tmp_path, added):
    """What one client sends is uniform, and is not its vector, even without the mask whose seed the server learns."""
    cfg = tiny_config(tmp_path / "run", **SECURE)
    seeds = []
    with pytest.MonkeyPatch.context() as patch:
        made = secure_client.create_shares

        def kept(secret, threshold, shares):
            seeds.extend([secret] if len(secret) == 32 else [])
            return made(secret, threshold, shares)

        patch.setattr(secure_client, "create_shares", kept)
        _, _, grid = deployed(cfg)
    point = secure_sum.fixed_point(cfg)
    for node, sequences in zip(range(11, 16), SIZES, strict=True):
        content = grid.heard[node, "train.masked"].content
        assert list(content.array_records["arrays"]) == ["masked"]
        data = content.array_records["arrays"]["masked"].data
        sent, plain = torch.frombuffer(bytearray(data), dtype=torch.int64), added[sequences][0]
        counts = torch.bincount(torch.frombuffer(bytearray(data), dtype=torch.uint8).int(), minlength=256).double()
        even = counts.sum() / 256
        chance = torch.special.gammaincc(torch.tensor(255 / 2, dtype=torch.float64), ((counts - even).square() / even).sum() / 2)
        assert 1e-9 < chance < 1 - 1e-9, "a uniform one is beyond these bounds twice in 10^9 runs"
        assert float((sent == plain).double().mean()) < 0.01  # two of 2^64 numbers agree by chance
        for seed in seeds:
            opened = secure.from_ring(secure.to_ring(sent, 64) - secure.mask(seed, len(sent), 64))
            assert float((opened == plain).double().mean()) < 0.01
            with pytest.raises(ConfigError, match="out of the range"):
                point.decode(opened)
        assert content.metric_records["metrics"]["tail_before"] == content.metric_records["metrics"]["tail_after"] == 0.0


def test_a_number_out_of_range_is_refused_by_its_client(tmp_path):
    cfg = tiny_config(tmp_path / "run", **{**SECURE, "secure_range": 0.9})  # the client with most sequences has the weight 1
    deployed(cfg)
    dropped = lines(tmp_path / "run")[-1]["dropped"]
    assert [drop["name"] for drop in dropped] == ["client3"]
    assert "secure_range: expected numbers of at most 0.9, and a weight, or a row times it, is above; raise" in dropped[0]["reason"]
    assert not re.search(r"\b1(\.|;| )", dropped[0]["reason"]), "the server is not told the number"


@pytest.mark.parametrize("change", ["type", "short", "ranks", "share", "garbage"])
def test_a_wrong_answer_is_named(tmp_path, change):
    """Before its vector is in the sum a client is left out; wrong shares and vectors cannot be told apart from others', and the round is given up."""

    def spoil(node, message, reply):
        kind = message.metadata.message_type
        if node != 12:
            return reply
        if kind == "train.masked":
            arrays, config = reply.content.array_records["arrays"], reply.content.config_records["config"]
            if change == "type":
                arrays["masked"].dtype = "int32"
            elif change == "short":
                arrays["masked"].data = arrays["masked"].data[:-8]
            elif change == "ranks":
                config["ranks"] = [9] * len(config["ranks"])
            elif change == "garbage":
                arrays["masked"].data = bytes(len(arrays["masked"].data))
        if kind == "train.unmask" and change == "share":
            record = reply.content.config_records["secure"]
            record["seeds"] = [seed[:4] + bytes(len(seed) - 4) for seed in record["seeds"]]
        return reply

    cfg = tiny_config(tmp_path / "run", **SECURE)
    if change in ("share", "garbage"):
        _, said, _ = deployed(cfg, spoil)
        assert any(re.match("round 1 is given up, .*(do not fit together|numbers or key shares were wrong)", line) for line in said)
    else:
        deployed(cfg, spoil)
        assert [drop["name"] for drop in lines(tmp_path / "run")[-1]["dropped"]] == ["client1"]


def test_a_false_share_gives_no_sum(tmp_path, totals):
    """One bit of a share makes another seed. Where sums nearly fill the ring, what such a mask leaves may pass for one, so that it must not come to that."""

    def spoil(node, message, reply):
        if node == 12 and message.metadata.message_type == secure.UNMASK:
            record = reply.content.config_records["secure"]
            record["seeds"] = [seed[:6] + bytes([seed[6] ^ 1]) + seed[7:] for seed in record["seeds"]]
        return reply

    _, said, _ = deployed(tiny_config(tmp_path / "run", **{**SECURE, "weights": "sparsity", "secure_range": 409.5, "secure_bits": 20}), spoil)
    assert any(re.match("round 1 is given up, the shares of client0 do not fit together", line) for line in said)
    assert totals == []


def test_what_it_costs_is_on_record(tmp_path):
    """8 bytes a number of every row that is summed and of a weight a module, beside keys and shares; a plain upload has 4 a number of the client's rows."""
    cfg = tiny_config(tmp_path / "run", **SECURE)
    deployed(cfg)
    bank = tiny_state(tiny_federation(SIZES), [2] * 5).bank
    numbers = secure_sum.length(bank.shapes, [4] * 8)
    assert numbers == bank.num_bytes(0) // 4 // 2 + len(bank.shapes), "three of the clients own four of the eight rows"
    for line in lines(tmp_path / "run")[-1]["clients"]:
        assert 0 < line["bytes_up"] - 8 * numbers < 5 * 2000, "keys and shares of five clients"
        assert set(line).isdisjoint({"norm", "weight", "clip"})


def test_all_that_travels_is_listed(tmp_path):
    """docs/privacy.md names every field of every answer of a round."""
    _, _, grid = deployed(tiny_config(tmp_path / "run", **SECURE))
    sent: dict[str, set[str]] = {}
    for (_, kind), reply in grid.heard.items():
        if kind.startswith("train"):
            for name, record in reply.content.items():
                sent.setdefault(name, set()).update(map(str, record))
    assert sent.pop("secure") | sent.pop("arrays") == listed("In a round with secure aggregation")
    assert set.union(*sent.values()) == listed("In a round")


# ---------------------------------------------------------------- what a client refuses


def talk(count: int = 4):
    """(settings, states, public keys) of clients that made their keys in round 1."""
    cfg = Config(**{**SECURE, "ranks": "fixed:4"})
    states = [secure.RecordDict() for _ in range(count)]
    found = [secure.record(secure_client.keys(cfg, asked(), state)) for state in states]
    return cfg, states, [(own["public1"], own["public2"]) for own in found]


def asked(**values):
    return secure.with_record(secure.RecordDict(), number=1, **values)


def keys_for(place: int, public, clients: int = 4):
    return asked(clients=clients, place=place, places=list(range(len(public))), public1=[one for one, _ in public], public2=[two for _, two in public])


def shared():
    cfg, states, public = talk()
    sent = [secure.record(secure_client.shares(cfg, keys_for(k, public), state))["shares"] for k, state in enumerate(states)]
    sources = [[other for other in range(4) if other != k] for k in range(4)]
    return cfg, states, [asked(sources=own, shares=[sent[other][sources[other].index(k)] for other in own]) for k, own in enumerate(sources)]


def test_a_client_refuses_keys_that_are_not_those_of_the_round():
    cfg, states, public = talk()
    for given, reason in (
        (keys_for(0, [public[1], *public[1:]]), "some public keys are the same"),
        (keys_for(1, public[::-1]), "has other public keys of this client"),
        (keys_for(0, public[:2]), "2 clients to share with, expected 3 to 4"),
        (keys_for(0, public, clients=2), "there are 2 clients, expected 3 or more"),
    ):
        with pytest.raises(ConfigError, match=reason):
            secure_client.shares(cfg, given, states[0])
    with pytest.raises(ConfigError, match="expected the stage 'keys' of round 1 before, got 'nothing'"):
        secure_client.shares(cfg, keys_for(0, public), secure.RecordDict())
    with pytest.raises(ConfigError, match="the run's settings have none"):
        secure_client.keys(Config(), asked(), secure.RecordDict())


def test_a_client_refuses_shares_that_are_not_for_it():
    _, states, orders = shared()
    sent = orders[0].config_records["secure"]["shares"]
    with pytest.raises(ConfigError, match="a share of 1 for 0 came as one of 0 for 1"):
        secure_client.open_shares(asked(sources=[0, 2, 3], shares=sent), states[1])
    with pytest.raises(ConfigError, match="the share of the client at place 0 is not its own"):
        secure_client.open_shares(asked(sources=[0, 1, 3], shares=sent), states[2])
    with pytest.raises(ConfigError, match="shares of 1 neighbours, expected 2 or more"):
        secure_client.open_shares(asked(sources=[1], shares=orders[0].config_records["secure"]["shares"][:1]), states[0])
    secure_client.open_shares(orders[0], states[0])
    with pytest.raises(ConfigError, match="expected the stage 'shares' of round 1 before, got 'opened'"):
        secure_client.open_shares(orders[0], states[0])


def test_a_client_gives_no_two_secrets_of_one_client_and_answers_once():
    cfg, states, orders = shared()
    secure_client.open_shares(orders[0], states[0])
    with pytest.raises(ConfigError, match="expected the stage 'masked' of round 1 before, got 'opened'"):
        secure_client.unmask(cfg, asked(active=[0, 1, 2, 3], gone=[]), states[0])
    secure_client.masked(orders[0], states[0], cfg, torch.arange(5))
    for active, gone in (([0, 1, 2], [2, 3]), ([0, 1], [2, 3]), ([1, 2, 3], [0]), ([0, 1, 2, 3, 4], [])):
        with pytest.raises(ConfigError, match="clients are asked for, expected 3 or more, apart"):
            secure_client.unmask(cfg, asked(active=active, gone=gone), states[0])
    found = secure.record(secure_client.unmask(cfg, asked(active=[0, 1, 2], gone=[3]), states[0]))
    assert (len(found["seeds"]), len(found["keys"])) == (3, 1)
    with pytest.raises(ConfigError, match="expected the stage 'masked' of round 1 before, got 'nothing'"):
        secure_client.unmask(cfg, asked(active=[0, 1, 2], gone=[3]), states[0])


def test_a_client_gives_no_plain_upload(tmp_path):
    cfg = tiny_config(tmp_path / "run", **SECURE)
    _, _, grid = deployed(cfg)
    order = Message(secure.RecordDict(), 11, "train")
    order.metadata.__dict__["_message_id"] = "plain"
    reply = next(iter(grid.send_and_receive([order])))
    assert "asks for a plain upload, and the run's settings have secure_aggregation" in reply.error.reason


# ---------------------------------------------------------------- masks


def test_a_mask_takes_all_of_its_seed():
    """Flower's takes the xor of its words, 32 bits, and of a pair's key, which is text, 28: why masks are not Flower's here."""
    seed = bytes(range(32))
    turned = seed[4:] + seed[:4]
    assert np.array_equal(pseudo_rand_gen(seed, 2**32, [(9,)])[0], pseudo_rand_gen(turned, 2**32, [(9,)])[0])
    assert not np.array_equal(secure.mask(seed, 9, 64), secure.mask(turned, 9, 64))
    for one, two in itertools.combinations([bytes(32), *(bytes([0] * i + [1 << i % 8] + [0] * (31 - i)) for i in range(32))], 2):
        assert not np.array_equal(secure.mask(one, 9, 32), secure.mask(two, 9, 32))
    assert secure.mask(bytes(32), 2, 64).tobytes().hex() == "dc95c078a2408989ad48a21492842087"  # AES-256 of zeros under zeros: FIPS 197's cipher
    with pytest.raises(ConfigError, match="expected a seed of 32 bytes, got 31"):
        secure.mask(bytes(31), 9, 64)


@pytest.mark.parametrize(("clients", "shares"), [(3, 3), (5, 3), (9, 5), (40, 7)])
def test_neighbours_are_as_many_for_all_and_each_others(clients, shares):
    near = secure.neighbours(clients, shares)
    assert all(place in own and len(own) == shares for place, own in enumerate(near))
    assert all(place in near[other] for place, own in enumerate(near) for other in own)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"merge": "svd"}, "merge = 'svd' is made of each client's upload by itself"),
        ({"merge": "median", "weights": "uniform"}, "merge = 'median' is made of each client's upload by itself"),
        ({"train": "fold", "gamma": 0.99}, "merge = 'bank' multiplies each client's B with rows of A of its own"),
        ({"clip_median": 3.0}, "clip_median = 3.0: compares each client's update with the round's median"),
        ({"clip_update": 1.0}, "clip_update = 1.0: looks at each client's upload by itself"),
        ({"weights": "sparsity", "weight_cap": 2.0}, "weight_cap = 2.0: looks at each client's upload by itself"),
        ({"diagnostics": True}, "diagnostics = True: compares the bank with the uploads"),
        ({"merge": "delta", "gamma": 1.0, "weights": "uniform", "dp_clipping_norm": 1.0}, "dp_clipping_norm = 1.0: the server clips each client's update"),
        ({"clients_per_round": 2}, "clients_per_round = 2: a sum hides nobody from the others below three clients"),
        ({"shared_rows": "owners", "weights": "sparsity"}, "shared_rows = 'owners': divides by the weight of each row's owners"),
        ({"unowned_rows": "zero"}, "unowned_rows = 'zero': would set rows to zero that clients own and secure_owners = 3 leaves out of the sum"),
        ({"secure_owners": 6}, "secure_owners = 6: expected at most clients_per_round = 5"),
        ({"secure_shares": 4}, "secure_shares: expected 0, or an odd number from 3 on, got 4"),
        ({"secure_threshold": 2}, "secure_threshold: expected 0, or more than half of 5 shares and at most all, got 2"),
        ({"secure_shares": 3, "secure_threshold": 4}, "secure_threshold: expected 0, or more than half of 3 shares and at most all, got 4"),
        ({"secure_shares": 7, "secure_threshold": 6}, "secure_threshold: expected 0, or more than half of 5 shares and at most all, got 6"),
        ({"secure_bits": 52}, "steps; expected 1 to 2^52"),
        ({"clients_per_round": 8192}, "and with clients_per_round = 8192 less than 2^63 in the sum"),
        ({"secure_aggregation": False, "secure_shares": 3}, "secure_shares = 3: of masked sums; set secure_aggregation, or leave it out"),
    ],
)
def test_what_needs_single_uploads_is_refused_by_name(tmp_path, settings, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        tiny_config(tmp_path / "run", **{**SECURE, **settings})


def test_a_simulation_has_no_server_to_hide_from(tmp_path):
    with pytest.raises(ConfigError, match="secure_aggregation = True: hides uploads from a server that is another process"):
        simulate(tiny_config(tmp_path / "run", **SECURE), federation=tiny_federation(SIZES), quiet=True)


def test_the_report_says_why_no_weight_is_shown(tmp_path):
    from hetlora.report.page import write_report

    cfg = tiny_config(tmp_path / "run", **SECURE)
    deployed(cfg)
    assert "secure aggregation hides" in write_report(cfg.output).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["secure_aggregation"] is True
