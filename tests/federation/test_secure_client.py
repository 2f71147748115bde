"""What a client with secure aggregation refuses to a server that asks for more than the sum."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")


import torch
from flwr.app import Message
from secure_runs import SECURE, deployed
from tiny import tiny_config

from hetlora.config import Config, ConfigError
from hetlora.flower import secure, secure_client

pytestmark = pytest.mark.usefixtures("no_waiting")


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
