"""The calls of a model inside a `client_segments` block: what goes in names the sequences, and a `Follower` is on where layers are still to be learnt."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from hetlora_kernels.peft.batch import Batch
from hetlora_kernels.peft.follow import Follower
from hetlora_kernels.peft.owners import LOST, Owners

_TEXT = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_OTHER_SENSES = ("pixel", "image", "video", "audio", "feature")


class ModelCalls:
    """Hooks on the modules that a block's code may call as the model: the model itself, and the transformers models inside it (for `generate`)."""

    def __init__(
        self, model: nn.Module, modules: Sequence[nn.Module], batch: Batch, layers: Mapping[str, nn.Module], current: Callable[[], Batch | None]
    ) -> None:
        """modules: all of the model's.   layers: the adapted ones by name.   current: the batch of the innermost block, which alone follows."""
        self.current = current
        self.batch, self.layers, self.depth = batch, layers, 0
        batch.set_call(batch.size, model.training)
        self.mode: Follower | None = None
        self.root: nn.Module | None = None  # of the outermost call
        self.frame: FrameType | None = None  # of the same
        self.ending: Any = None  # its hook at the end
        self.modules = modules
        self.roots = [module for module in modules if module is model or hasattr(type(module), "main_input_name")]
        self.handles: list[Any] = []

    def __enter__(self) -> ModelCalls:
        for root in self.roots:
            self.handles.append(root.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self._stop()
        self._unhook()

    def _before(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self.current() is not self.batch:
            return
        self.batch.check_thread()
        if self.depth and not self._running():  # an interrupt ended the last call, past the hooks
            self._stop()
        if self.depth:
            self.depth += root is self.root
            return
        self.depth, self.root, self.frame = 1, root, sys._getframe(1)
        self._unhook()
        # Only now, and until the call ends: a graph is guarded by the numbers of such hooks, which no other block has.
        self.ending = root.register_forward_hook(self._after, always_call=True)
        batch = self.batch
        given = _named(root, args, kwargs)
        main = _main(given)
        size = batch.size if main is None else main.shape[0]
        batch.set_call(size, root.training)
        batch.fits = main is not None and batch.sequences(size) is not None and not self._either_way(main)
        batch.called.add((size, root.training))
        batch.calls.clear()
        batch.unfollowed = False
        if batch.fits and size > 1 and not self._compiled():
            if batch.to_follow():
                self.follow(given, size)
            else:
                batch.unfollowed = True

    def _either_way(self, main: Tensor) -> bool:
        """Whether the model may take sequence-first inputs, as torch's own layers do by default, and this one's shape does not tell."""
        square = main.dim() > 1 and main.shape[0] == main.shape[1] and main.shape[0] > 1
        return square and any(getattr(module, "batch_first", None) is False for module in self.modules)

    def _compiled(self) -> bool:
        """Whether a part of the model is compiled: a graph does not see the follower."""
        return any(module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule" for module in self.modules)

    def follow(self, given: Mapping[str, Any], size: int) -> None:
        batch = self.batch
        follower = batch.follower = batch.kept_follower = batch.kept_follower or Follower(_weights(self.layers, self.modules), _held(self.modules))
        follower.numbers = False
        owners = batch.sequences(size)
        assert owners is not None
        text = any(isinstance(given.get(name), Tensor) for name in _TEXT[:2])
        for name, value in given.items():
            if "past" in name or "cache" in name:
                continue
            if name == "position_ids" and batch.positions is not None:  # that rows hold several sequences is nobody's data, and a mask is made of it
                follower.set(value, None, True)
                continue
            sure = not (text and any(word in name for word in _OTHER_SENSES))
            for tensor in _inside([value]):
                if tensor.dim() and tensor.shape[0] == size:
                    table = owners.to(tensor.device).reshape([size] + [1] * (tensor.dim() - 1))
                    follower.set(tensor, Owners(table, sure=sure))
                elif tensor.is_floating_point() and tensor.dim() > 1 and tensor.shape[0] != 1:
                    follower.set(tensor, LOST)
                else:
                    follower.set(tensor, None, True)
        self.mode = follower
        follower.__enter__()

    def _after(self, root: nn.Module, args: Any, out: Any) -> None:
        if torch.compiler.is_compiling() or self.current() is not self.batch or self.batch.elsewhere():
            return
        self.depth -= 1
        if self.depth == 0:
            self._stop()
            if out is not None:  # else this may be an error, where torch goes through the hooks themselves
                self._unhook()

    def _unhook(self) -> None:
        if self.ending is not None:
            self.ending.remove()
            self.ending = None

    def _running(self) -> bool:
        """Whether the outermost call that was begun is still on the stack."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def _stop(self) -> None:
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = self.batch.follower = None
            self.batch.missed()
        self.batch.unfollowed = False
        self.depth, self.root, self.frame = 0, None, None


def _weights(layers: Mapping[str, nn.Module], modules: Sequence[nn.Module]) -> dict[int, str]:
    """{id of the weight: name} of the adapted layers whose weight no other module has (as an embedding that is tied to the head)."""
    holders = Counter(id(weight) for module in modules for weight in module._parameters.values() if weight is not None)
    weights = {id(getattr(getattr(layer, "base_layer", layer), "weight", None)): name for name, layer in layers.items()}
    return {key: name for key, name in weights.items() if holders[key] == 1}


def _held(modules: Sequence[nn.Module]) -> frozenset[int]:
    """ids of the modules' own parameters and buffers."""
    return frozenset(id(tensor) for module in modules for own in (module._parameters, module._buffers) for tensor in own.values() if tensor is not None)


def _named(root: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    names = [name for name in inspect.signature(type(root).forward).parameters if name != "self"]
    positional = {names[at] if at < len(names) else f"argument {at}": value for at, value in enumerate(args)}
    return {**positional, **kwargs}


def _inside(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among `values`, also in lists, tuples and dicts (as the outputs of transformers are)."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            found += _inside(value.values())
        elif isinstance(value, (tuple, list)):
            found += _inside(value)
    return found


def _main(given: Mapping[str, Any]) -> Tensor | None:
    """The argument whose first dimension counts the sequences."""
    named = [given[name] for name in _TEXT if isinstance(given.get(name), Tensor)]
    return next((tensor for tensor in (*named, *_inside(given.values())) if tensor.dim()), None)


Holder = tuple[Any, str, Any]  # an object, its attribute, what that is inside the block


@contextmanager
def holding(holders: Sequence[Holder]) -> Iterator[None]:
    """Set attributes for the time of a block."""
    before = [getattr(holder, name) for holder, name, _ in holders]
    try:
        for holder, name, value in holders:
            setattr(holder, name, value)
        yield
    finally:
        for (holder, name, _), value in zip(holders, before, strict=True):
            setattr(holder, name, value)


def checkpointing(modules: Iterable[nn.Module], batch: Batch, holders: Callable[[nn.Module], Sequence[Holder]]) -> AbstractContextManager[None]:
    """transformers' checkpointed modules compute again in the backward pass as members of the batch they were first computed in, also after its block."""
    name = "_gradient_checkpointing_func"
    return holding([(module, name, _bound(module, module.__dict__[name], batch, holders)) for module in modules if name in module.__dict__])


def _bound(module: nn.Module, checkpoint: Callable[..., Any], batch: Batch, holders: Callable[[nn.Module], Sequence[Holder]]) -> Callable[..., Any]:
    def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        entries: list[Any] | None = None
        first = True
        size, training = batch.size, batch.training

        def run(*given: Any) -> Any:
            nonlocal entries, first
            if first:
                first = False
                if batch.follower is not None:
                    entries = [(batch.follower.entry(value), batch.follower.constant(value)) for value in given]
                return function(*given)
            with holding(holders(module)), batch.as_called(size, training):
                if entries is None or batch.kept_follower is None:
                    return function(*given)
                with holding([(batch, "follower", batch.kept_follower)]), batch.kept_follower as follower:
                    for value, entry in zip(given, entries, strict=True):
                        if isinstance(value, Tensor):
                            follower.set(value, *entry)
                    return function(*given)

        return checkpoint(run, *args, **kwargs)

    return checkpointed
