"""A training step whose clients and shapes come again, recorded in one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hetlora_kernels.peft.attached import attachment
from hetlora_kernels.peft.context import client_segments
from hetlora_kernels.peft.experts import is_stack

Record = Callable[[Callable[[], Tensor], torch.device], tuple[Tensor, Callable[[], object]]]


class StepGraph:
    """A training step on an attached model, recorded once and then replayed: forward pass, backward pass and optimiser are one launch for the host.

    model: carries a bank on a CUDA device (`attach`).   ids: [batch], the client of each sequence, the same in every replay.
    step: the work, without arguments: it runs the model on the batch, calls backward and steps the optimiser. What changes from step to step it reads from
    tensors on the device, which the caller writes before each replay. It copies nothing from the host and reads nothing back. Its shapes never change.
    seeds, sequence_index: as in `client_segments`.   number: the first step's. Every replay has the dropout masks of its own number.

    Making one does the first step (`first` is its result) and records it; `replay(number)` does each further one and returns what the recorded step
    returned, whose memory the next replay overwrites. The factors, gradients and states that the step used must stay where they are. Call the
    optimiser's `stepped()` after a replay. `ValueError` for a model on another device, and for one whose rows have to be followed at every call,
    or whose experts lie in one parameter.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> from hetlora_kernels.peft import StepGraph, attach
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6))
    >>> bank = hk.AdapterBank({"0": (6, 4)}, ranks=[2, 3])
    >>> model = attach(model, bank)
    >>> if torch.cuda.is_available():
    ...     model, bank = model.cuda(), bank.to("cuda")
    ... else:
    ...     StepGraph(model, [0, 1], lambda: model(torch.ones(2, 4)))
    Traceback (most recent call last):
    ValueError: model: expected a bank on a CUDA device, which alone records graphs, got cpu
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Sequence[int] | Tensor,
        step: Callable[[], Tensor],
        seeds: Tensor | None = None,
        number: int = 0,
        sequence_index: Tensor | None = None,
        record: Record | None = None,
    ) -> None:
        """record: (step, device) -> (result, function that does the step again), for tests without a device; default a CUDA graph."""
        shared = attachment(model)
        if shared is None:
            raise ValueError("model: no bank is attached; call attach(model, bank) first")
        device = shared.bank.device
        if record is None and device.type != "cuda":
            raise ValueError(f"model: expected a bank on a CUDA device, which alone records graphs, got {device}")
        if any(is_stack(layer) for layer in shared.layers.values()):
            raise ValueError("model: the bank is on stacked experts, whose numbers of rows are read from the device at every call; a graph cannot do that")
        with client_segments(model, ids, seeds=seeds, step=number, sequence_index=sequence_index):
            self.first: Tensor = step() if record else _beside(step, device)  # makes the batch's tables, which the recorded step reads
            if shared.batch.to_follow():
                raise ValueError("model: rows of its layers have to be followed at every call, which a recorded step does not do")
            self._batch = shared.batch  # the tables live as long as the graph
            self._result, self._run = (record or _record)(step, device)
        self._seeds = seeds

    def replay(self, number: int) -> Tensor:
        """The step with this number, on what the caller has written to its tensors."""
        if self._batch.seeds is not None and self._seeds is not None:
            self._batch.seeds.rewrite(self._seeds, number)
        self._run()
        return self._result


def _beside(step: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The step on a stream of its own, as torch wants it before a capture: what libraries set up at their first call is there then."""
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        result = step()
    here.wait_stream(side)
    return result


def _record(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], object]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        result = step()
    return result, graph.replay
