"""The client's side: a Flower `ClientApp` whose work is that of `hetlora.deployed.local`."""

from __future__ import annotations

from functools import partial
from logging import INFO, WARNING

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.supercore import log

from hetlora.config import ConfigError
from hetlora.deployed.local import Client, Kind, LoadData, LoadModel, Masking, base_model, own_text
from hetlora.deployed.settings import client_settings
from hetlora.flower import secure, secure_client
from hetlora.flower.records import record_dict

REFUSED = 400  # code of an error that this client states itself


def client_app(model: LoadModel = base_model, data: LoadData = own_text) -> ClientApp:
    """A `ClientApp` for `hetlora.flower.server_app`.

    model: of the settings, the base model, frozen and in eval mode.   data: of the settings and the node, this client's sequences. The defaults load what
        the settings `model` and `data` name; give your own to train on the tokens of your own loader.

    Flower starts a process for every message in a deployment. Within a process, as in Flower's simulation, the model is loaded once.

    A request that cannot be done is answered with one line that says why.

    >>> import torch
    >>> from hetlora.data import ClientData
    >>> from hetlora.flower import client_app
    >>> def my_data(cfg, node):
    ...     return ClientData(node.client, train=[torch.arange(9)], test=[torch.arange(5)])
    >>> client_app(data=my_data)
    <flwr.clientapp.client_app.ClientApp object at 0x...>
    """
    app = ClientApp()
    client = Client(model, data, lambda line: log(INFO, "%s", line))

    def answer(message: Message, context: Context, kind: Kind) -> Message:
        try:
            return Message(record_dict(client.answer(kind, message.content, context.run_config, context.node_config)), reply_to=message)
        except (ConfigError, OSError) as error:
            return _refused(message, error)

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        return answer(message, context, "introduce")

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, "train")

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, "evaluate")

    @app.train("masked")
    def masked(message: Message, context: Context) -> Message:
        content, state = message.content, context.state
        try:
            secure_client.open_shares(content, state)
            values = secure.record(content)
            samples, most, rows = secure.read_whole(values, "samples"), secure.read_whole(values, "most"), secure.read_wholes(values, "rows")
            asked = Masking(samples, most, rows, partial(secure_client.masked, content, state))
            return Message(record_dict(client.masked(content, context.run_config, context.node_config, asked)), reply_to=message)
        except (ConfigError, OSError) as error:
            return _refused(message, error)

    for action, stage in secure_client.STAGES.items():
        app.train(action)(partial(_stage, stage))
    return app


def _stage(work: secure_client.Stage, message: Message, context: Context) -> Message:
    """A stage of secure aggregation that takes neither the model nor text."""
    try:
        cfg, _ = client_settings(context.run_config, context.node_config)
        return Message(work(cfg, message.content, context.state), reply_to=message)
    except ConfigError as error:
        return _refused(message, error)


def _refused(message: Message, error: Exception) -> Message:
    reason = " ".join(str(error).split())
    log(WARNING, "refused: %s", reason)
    return Message(Error(REFUSED, reason), reply_to=message)
