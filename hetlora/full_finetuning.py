"""Full fine-tuning by FedAvg: the baseline in which every weight of the base model trains and travels, and no adapter does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.client import local_steps
from hetlora.config import Config
from hetlora.merge import MergeCall, Merged
from hetlora.training import Trained, Work


class _Optimizer:
    """torch's own optimiser with the clipping of `hk.AdamW`, over all weights of a model."""

    def __init__(self, parameters: Sequence[Tensor], cfg: Config, lr: float) -> None:
        self._parameters, self._limit = parameters, cfg.clip_norm
        if cfg.optimizer == "adamw":
            self._inner: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=cfg.weight_decay)
        else:
            self._inner = torch.optim.SGD(parameters, lr=lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum)

    def zero_grad(self) -> None:
        self._inner.zero_grad()

    def step(self) -> None:
        if self._limit:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._limit)
        self._inner.step()


class _Mean:
    """Weighted mean of models that arrive one at a time, in memory of one model. A weight [m, n] is m rows for the accumulation kernel, a vector is one row."""

    def __init__(self, start: dict[str, Tensor]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in start.items()}
        groups: dict[int, list[str]] = {}
        for name, tensor in start.items():
            groups.setdefault(len(self._rows(tensor)), []).append(name)
        self._sums = {rows: (names, hk.Accumulator([self._rows(start[name]) for name in names], rows)) for rows, names in groups.items()}

    @staticmethod
    def _rows(tensor: Tensor) -> Tensor:
        return tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)

    def add(self, model: dict[str, Tensor], weight: float) -> None:
        for names, sums in self._sums.values():
            sums.add([self._rows(model[name]) for name in names], weight)

    def result(self) -> dict[str, Tensor]:
        means: dict[str, Tensor] = {}
        for names, sums in self._sums.values():
            # 'owners' divides by the weights added so far, so that a refused update leaves no gap
            means |= dict(zip(names, sums.result(normalize="owners"), strict=True))
        return {name: means[name].view(shape) for name, shape in self._shapes.items()}


@contextlib.contextmanager
def _trainable(model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Every weight of the model, by name; afterwards frozen and as before."""
    weights = {name: parameter for name, parameter in model.named_parameters()}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    model.requires_grad_(True)
    try:
        yield start
    finally:
        model.requires_grad_(False)
        for name, weight in weights.items():
            weight.grad = None
            weight.data.copy_(start[name])


def train_full(work: Work) -> Trained:
    """Each client trains its own copy of the model, one after another; the model itself stays as it is.

    p_k = the client's training sequences (weights = 'samples') or 1 ('uniform'), over the sum of those that arrived; S_k = ||W_k - W||_F over all
    weights. A client whose weights are not finite afterwards is left out, and `dropped` says so. `uploads`: {parameter: sum_k p_k W_k}.
    """
    cfg, model = work.cfg, work.model
    results, dropped, counts, norms = [], {}, [], []
    with _trainable(model) as start:
        mean = _Mean(start)
        weights = dict(model.named_parameters())
        for k, data in enumerate(work.clients):
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(start[name])
            optimizer = _Optimizer(list(weights.values()), cfg, work.lr)
            device = next(iter(weights.values())).device
            results.append(local_steps(model, data, cfg, work.number, optimizer, device, lambda *_: contextlib.nullcontext()))
            trained = {name: weight.detach() for name, weight in weights.items()}
            faulty = next((name for name, weight in trained.items() if not bool(torch.isfinite(weight).all())), None)
            if faulty is None:
                counts.append(float(len(data.train)) if cfg.weights == "samples" else 1.0)
                norms.append(float(sum((trained[name].double() - start[name].double()).square().sum() for name in trained) ** 0.5))
                mean.add(trained, counts[-1])
            else:
                dropped[k] = f"update has non-finite values in {faulty}"
            if work.progress:
                work.progress(k + 1, len(work.clients))
    size = sum(parameter.numel() * parameter.dtype.itemsize for parameter in weights.values())  # what a client receives and sends in a round
    total = sum(counts)
    p = torch.tensor([[count / total] for count in counts], dtype=torch.float64)
    return Trained(
        results,
        dropped,
        ranks=work.ranks,
        tails=[(0.0, 0.0)] * len(results),
        uploads=mean.result() if counts else {},
        received=None,
        bytes_down=[size] * len(results),
        bytes_up=[size] * len(counts),
        parameters=len(results) * sum(parameter.numel() for parameter in weights.values()),
        weighed=(p, torch.tensor(norms, dtype=torch.float64)),
    )


@torch.no_grad()
def merge_models(call: MergeCall) -> Merged:
    """W <- sum_k p_k W_k. The uploads are that mean already: models arrive one at a time, and none is kept."""
    for name, weight in call.model.named_parameters():
        weight.copy_(call.uploads[name])
    return Merged(None)
