"""The processes of one run, connected by torch.distributed: gloo for what they say, NCCL for tensors on GPUs."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hetlora.config import ConfigError
from hetlora.evaluate import Whole
from hetlora.processes import Place, deal

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=2)
"""How long a process waits for the others before it takes them for lost: longer than the shares of a round differ."""


class Lost(ConfigError):
    """Another process of the run has ended, or does not answer."""


class Told(ConfigError):
    """A fault of one process of the run, which all of them have been told."""


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Lost(f"another process of the run has ended or does not answer ({' '.join(str(error).split())[:120]})") from None


class Group:
    """The processes of the run, connected.   at: this one's place."""

    def __init__(self, at: Place) -> None:
        with _answered():
            dist.init_process_group("gloo", timeout=PATIENCE)
        self.at = at
        self._tensors: Any = None

    def connect(self, device: torch.device) -> None:
        """Tensors on GPUs have a group of their own, which needs every process to have chosen its GPU."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
            with _answered():
                self._tensors = dist.new_group(backend="nccl", timeout=PATIENCE)

    def ordered(self, order: Any = None) -> Any:
        """What process 0 says to all."""
        content = [order]
        with _answered():
            dist.broadcast_object_list(content, 0)
        return content[0]

    def all(self, own: T) -> list[T]:
        """What every process says, by their numbers, for every process."""
        found: list[Any] = [None] * self.at.count
        with _answered():
            dist.all_gather_object(found, own)
        return found

    def agreed(self, own: T, fault: str = "") -> list[T]:
        """What every process says, for every process; `Told` in all of them where one has a `fault` instead."""
        said = self.all((fault, own))
        for number, (text, _) in enumerate(said):
            if text:
                raise Told(f"process {number}: {text}" if number else text)
        return [part for _, part in said]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of all processes that a `ConfigError` of one ends for all (`Told`), also in the middle of what they say to each other by `agreed`."""
        try:
            yield
        except (Lost, Told):
            raise
        except ConfigError as error:
            self.agreed(None, str(error) or type(error).__name__)
        self.agreed(None)

    def copied(self, tensors: Sequence[Tensor]) -> None:
        """Process 0's values, into everybody's."""
        with _answered():
            for tensor in tensors:
                if tensor.numel():
                    sent = tensor.detach().contiguous()  # gloo takes a tensor's memory as it lies, whatever its strides: those of an SVD's factors differ
                    dist.broadcast(sent, 0, group=self._tensors)
                    if self.at.number and not tensor.is_contiguous():
                        tensor.detach().copy_(sent)

    def send(self, tensors: Sequence[Tensor]) -> None:
        """To process 0."""
        with _answered():
            for tensor in tensors:
                if tensor.numel():
                    dist.send(tensor.detach().contiguous(), 0, group=self._tensors)

    def receive(self, tensors: Sequence[Tensor], number: int) -> None:
        """What process `number` sends, into `tensors`."""
        with _answered():
            for tensor in tensors:
                if tensor.numel():
                    dist.recv(tensor.detach(), number, group=self._tensors)


class Shared(Whole):
    """Parts of an evaluation, dealt out to the processes of `group`: all of them call `gathered`, and get everything."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def mine(self, costs: Sequence[float]) -> list[int]:
        return deal(costs, self.group.at.count)[self.group.at.number]

    def gathered(self, own: dict[int, Any]) -> list[Any]:
        found = {position: value for part in self.group.agreed(own) for position, value in part.items()}
        return [found[position] for position in sorted(found)]
