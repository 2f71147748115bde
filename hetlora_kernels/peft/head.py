"""The head of a language model, apart from the model: `hidden_states` runs a model without the logits that its head would make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


class Head(NamedTuple):
    """How hidden states h [..., d] become logits [..., V]: z = scale (h W^T + b), and with a softcap c > 0, c tanh(z / c).

    weight: W [V, d].   bias: b [V] or None.   scale: of Granite's and Cohere's logits.   softcap: of Gemma's; 0 = none.

    >>> import torch
    >>> from hetlora_kernels.peft import Head
    >>> Head(torch.eye(2), scale=0.5).logits(torch.tensor([[2.0, 4.0]]))
    tensor([[1., 2.]])
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, states: Tensor) -> Tensor:
        """z [..., V] of states [..., d]. Scale and softcap are applied in float32 (float64 for float64), the product has the states' type."""
        logits = torch.nn.functional.linear(states, self.weight, self.bias)
        return _squashed(logits, self.scale, self.softcap)


class HeadError(ValueError):
    """A model's logits are more than a head with a known scale and softcap makes: its losses are to be made from its logits.

    >>> import torch
    >>> from hetlora_kernels.peft import HeadError, hidden_states
    >>> try:
    ...     with hidden_states(torch.nn.Linear(2, 2)):
    ...         pass
    ... except HeadError as error:
    ...     print(error)
    hidden_states: Linear has no output embeddings (get_output_embeddings); take the logits
    """


class Hidden:
    """What `hidden_states` gives: `states` [batch, seq, d] and `head`, of the model's latest call in its block. RuntimeError before the first.

    >>> from hetlora_kernels.peft import Hidden
    >>> Hidden().states
    Traceback (most recent call last):
    RuntimeError: hidden_states: call the model inside the block first
    """

    def __init__(self) -> None:
        self._calls: list[Tensor] = []
        self._head: Head | None = None

    @property
    def states(self) -> Tensor:
        """The head's input."""
        self._check()
        return self._calls[0]

    @property
    def head(self) -> Head:
        """What the model does with it."""
        self._check()
        assert self._head is not None
        return self._head

    def _check(self) -> None:
        if self._head is None:
            raise RuntimeError("hidden_states: call the model inside the block first")


_PROBE = 5  # numbers that stand for the words
_known: WeakKeyDictionary[nn.Module, tuple[Any, tuple[float, float]]] = WeakKeyDictionary()  # model -> (its config's numbers, what its logits showed)


@contextmanager
def hidden_states(model: nn.Module) -> Iterator[Hidden]:
    """Inside the block `model(...)`, a causal language model of transformers, makes no logits: its output's `logits` mean nothing. It yields `Hidden`.

    The head is `model.get_output_embeddings()`, a plain Linear. In its place a few numbers pass through what the model does with its logits, so that scale and
    softcap are seen, not believed. Raises `HeadError`, which says why, where logits are more than that: a head with adapters, hooks or another class, one
    called twice or never, other arithmetic after it. Take the logits then. Not for several threads at once on one model.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hetlora_kernels.peft import client_losses, hidden_states
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    >>> batch = torch.randint(0, 50, (2, 6))
    >>> with hidden_states(model) as hidden:
    ...     _ = model(input_ids=batch)
    >>> client_losses(hidden.states, batch, ids=[0, 1], num_clients=2, head=hidden.head).shape
    torch.Size([2])
    """
    linear = _head_of(model)
    found = Hidden()

    def stand_in(states: Tensor) -> Tensor:
        found._calls.append(states)
        return _probe(states).expand(*states.shape[:-1], _PROBE)

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        calls = len(found._calls)
        if calls != 1:
            raise HeadError(f"hidden_states: {type(model).__name__} calls its head {calls} times; take the logits")
        numbers = _numbers_of(model)
        if _known.get(model, (None,))[0] != numbers:
            logits = output.logits if hasattr(output, "logits") else output[0]
            _known[model] = numbers, _seen(model, numbers, found._calls[0], logits)
        found._head = Head(linear.weight, linear.bias, *_known[model][1])

    def begin(module: nn.Module, arguments: Any) -> None:
        found._calls.clear()
        found._head = None  # until this call is at its end

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(look)]
    linear.forward = stand_in  # type: ignore[method-assign,assignment]
    try:
        yield found
    except Exception as error:
        if found._calls and found._head is None and not isinstance(error, HeadError):  # between the head and the model's end
            raise HeadError(f"hidden_states: {type(model).__name__} does more with its logits than a known scale and softcap; take the logits") from error
        raise
    finally:
        del linear.forward
        for hook in hooks:
            hook.remove()


def _head_of(model: nn.Module) -> nn.Linear:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    name = type(model).__name__
    if head is None:
        raise HeadError(f"hidden_states: {name} has no output embeddings (get_output_embeddings); take the logits")
    if type(head) is not nn.Linear or "forward" in vars(head) or type(head.weight) is not nn.Parameter:
        kind = type(head).__name__
        raise HeadError(f"hidden_states: the head of {name} is no plain Linear but {kind} or patched, as by an adapter of its own; take the logits")
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        raise HeadError(f"hidden_states: the head of {name} has hooks, which would not see its logits; take the logits")
    words = getattr(_text_config(model), "vocab_size", None)
    if words != len(head.weight):
        raise HeadError(f"hidden_states: the head of {name} has {len(head.weight)} rows for {words} words, logits may be cut; take the logits")
    return head


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _probe(like: Tensor) -> Tensor:
    """-125, -8, 1, 64, 343 in the states' type, made on their device: a softcap and a scale change some of them by more than bfloat16 rounds."""
    return (torch.arange(_PROBE, dtype=like.dtype, device=like.device) * 3 - 5) ** 3


def _squashed(logits: Tensor, scale: float, softcap: float) -> Tensor:
    if scale == 1 and not softcap:
        return logits
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32) * scale
    return (logits / softcap).tanh() * softcap if softcap else logits


def _numbers_of(model: nn.Module) -> tuple[list[float], list[float]]:
    """(scales, softcaps) that the model's logits may have, by its config."""
    config = _text_config(model)
    scales = [1.0, *_numbers(config, "logit_scale", "lm_head_multiplier"), *(1 / value for value in _numbers(config, "logits_scaling"))]
    return scales, [0.0, *_numbers(config, "final_logit_softcapping")]


def _seen(model: nn.Module, numbers: tuple[list[float], list[float]], states: Tensor, logits: Any) -> tuple[float, float]:
    """The one (scale, softcap) that turns the probe into `logits`. Where two do, within the rounding of the model's type, they cannot be told apart."""
    probe, fitting = _probe(states), []
    if isinstance(logits, Tensor) and logits.shape == (*states.shape[:-1], _PROBE):
        rounding = 8 * max(torch.finfo(dtype).eps for dtype in (states.dtype, logits.dtype))  # a few operations in the model's type
        for scale, softcap in dict.fromkeys(product(*numbers)):
            expected = _squashed(probe, scale, softcap).double()
            if bool(((logits.double() - expected).abs() <= rounding * expected.abs()).all()):
                fitting.append((scale, softcap))
    if len(fitting) == 1:
        return fitting[0]
    raise HeadError(f"hidden_states: {type(model).__name__} does more with its logits than a known scale and softcap; take the logits")


def _numbers(config: Any, *names: str) -> list[float]:
    values = (getattr(config, name, None) for name in names)
    return [float(value) for value in values if isinstance(value, (int, float)) and not isinstance(value, bool) and value]
