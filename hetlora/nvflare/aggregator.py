"""The check of what clients send back, as NVFLARE's `ModelAggregator`."""

from __future__ import annotations

import threading

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator

from hetlora.config import Config, ConfigError
from hetlora.deployed.exchange import exchange
from hetlora.deployed.fleet import Round, Turn, read_reply
from hetlora.nvflare.models import REFUSED, content_of, words_of


class HetLoraAggregator(ModelAggregator):
    """Takes the models of a round's clients, one by one as they come, and refuses by name what is not what the client was asked for.

    cfg: the settings of the run.

    `begin(turn)` says who is asked. `accept_model` checks a client's records, types, shapes, bytes, its ranks against those granted, and that all values and
    norms are finite, with the code that checks Flower's replies; it returns whether the model passed. `aggregate_model` closes the round: `found` then has
    what passed and why the others did not, by the places of their names, whoever was first. The loop merges it with the merge of the settings.

    >>> from hetlora import Config
    >>> from hetlora.nvflare import HetLoraAggregator
    >>> HetLoraAggregator(Config()).found.replies
    {}
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        if cfg.secure_aggregation:
            raise ConfigError("secure_aggregation = True: of hetlora's Flower deployment, whose clients exchange keys; NVFLARE carries none here, leave it out")
        self.cfg, self.exchange = cfg, exchange(cfg)
        self.found = Round()
        self._turn: Turn | None = None
        self._waiting: dict[str, int] = {}
        self._lock = threading.Lock()  # NVFLARE hands over each client's model in a thread of its own
        self.missing = "no result"

    def begin(self, turn: Turn) -> None:
        """A new round, of the clients `turn.names`."""
        self.reset_stats()
        with self._lock:
            self._turn, self._waiting = turn, {name: k for k, name in enumerate(turn.names)}

    def reset_stats(self) -> None:
        with self._lock:
            self.found, self._turn, self._waiting = Round(), None, {}

    def accept_model(self, model: FLModel) -> bool:
        """Check it. Of any other client than those asked nothing counts, nor a second model of one."""
        name = str((model.meta or {}).get("client_name"))  # NVFLARE's server writes it, after the client's identity
        with self._lock:
            k = self._waiting.pop(name, None)
            if k is None or self._turn is None:
                return False
            try:
                if (why := words_of(model).get(REFUSED)) is not None:
                    raise ConfigError(f"its client failed: {why}")
                self.found.replies[k], self.found.uploads[k], self.found.bytes_up[k] = read_reply(self.cfg, self.exchange, self._turn, name, content_of(model))
            except (ConfigError, ValueError) as error:
                self.found.dropped[k] = " ".join(str(error).split())[:300]
                return False
            return True

    def aggregate_model(self) -> FLModel:
        """Close the round: who has not answered is left out. The model has the numbers of the round, and no parameters: the loop merges them."""
        with self._lock:
            self.found.dropped |= dict.fromkeys(self._waiting.values(), self.missing)
            self._waiting = {}
            return FLModel(metrics={"arrived": len(self.found.replies), "bytes_up": sum(self.found.bytes_up.values())})
