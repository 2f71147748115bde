"""Rounds with secure aggregation in one process: the server opens sums alone, whoever drops out, sends nonsense or sees a round again."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import base64
import json
import re

import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from secure_runs import COARSE, SECURE, SIZES, Watching, deployed
from test_privacy import listed
from tiny import lines, tiny_config, tiny_federation, tiny_state

from hetlora import course, run_folder, secure_sum
from hetlora.config import Config, ConfigError
from hetlora.flower import Waiting, secure, secure_client
from hetlora.loop import simulate
from hetlora.server import fresh_bank

pytestmark = pytest.mark.usefixtures("no_waiting")


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
    monkeypatch.setattr(secure, "neighbours", lambda *_: [{place, (place + 1) % 6, (place - 1) % 6} for place in range(6)])

    def lose(node, message, reply):
        return None if node in gone and message.metadata.message_type == "train.masked" else reply

    _, said, grid = deployed(
        tiny_config(tmp_path / "run", **{**SECURE, "ranks": "fixed:4", "clients_per_round": 6, "secure_shares": 3}), lose, sizes=[3, 5, 2, 7, 4, 6]
    )
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
    with pytest.raises(ConfigError, match=r"2 of 3 clients were connected within 0 s \(client0, client4\); start more nodes"):
        deployed(cfg, through=Leaving)
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
