"""Say once who owns rows of a batch and does not train: factors that are frozen, or that a backward pass went by."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

Factor = tuple[str, str, nn.Parameter]  # who it belongs to, its layer, the factor

_looked_at: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def all_known(model: nn.Module, owners: Iterable[str]) -> bool:
    """Whether nothing is left to find out about these owners."""
    return _looked_at.get(model, set()).issuperset(owners)


class Training:
    """One `client_segments` block as the owners of its rows see it. Each is looked at until a backward pass was seen: it is known to train then, or told."""

    def __init__(self, model: nn.Module, factors: Iterable[Factor]) -> None:
        self.known = _looked_at.setdefault(model, set())
        listed = list(factors)
        owners = dict.fromkeys(who for who, _, _ in listed)
        trained = {who for who, _, factor in listed if factor.requires_grad}
        for who in owners:
            if trained and who not in trained and who not in self.known:
                self.known.add(who)
                warnings.warn(
                    f"client_segments: {who} owns rows and is not trained, its factors require no gradient; model.base_model.set_adapter([names]) trains all",
                    stacklevel=4,
                )
        ours = [each for each in listed if each[0] in trained - self.known and each[2].requires_grad]  # A may be frozen, and B trained
        self.factors = [(who, layer, factor, factor.grad, _version(factor.grad)) for who, layer, factor in ours]
        new = any(who in trained - self.known for who in owners)
        self.others = [(p, p.grad, _version(p.grad)) for p in model.parameters() if p.requires_grad] if new else []

    def tell(self, ran: set[str]) -> None:
        """The block is over. ran: layers that computed in it. Layers inside a compiled graph are not in `ran`. They are counted where their factor got a
        gradient."""
        found = [(who, layer, _changed(factor, grad, version)) for who, layer, factor, grad, version in self.factors]
        factors = [(who, layer, changed) for who, layer, changed in found if changed or layer in ran]
        if not any(changed for _, _, changed in factors) and not any(_changed(*other) for other in self.others):
            return  # no backward pass yet
        for who in dict.fromkeys(who for who, _, _ in factors):
            self.known.add(who)
            silent = list(dict.fromkeys(layer for owner, layer, changed in factors if owner == who and not changed))
            if silent:
                warnings.warn(
                    f"client_segments: {who} owns rows and got no gradient in {len(silent)} layers ({silent[0]}, ...): their outputs are not used, or "
                    "reentrant checkpointing had inputs that require none (model.enable_input_require_grads())",
                    stacklevel=4,
                )


def _version(grad: Any) -> int:
    return -1 if grad is None else grad._version


def _changed(factor: nn.Parameter, grad: Any, version: int) -> bool:
    return factor.grad is not None and (factor.grad is not grad or factor.grad._version != version)
