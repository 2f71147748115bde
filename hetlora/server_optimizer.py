"""The server's optimiser: a round's change is taken for a gradient, with momentum or with Adam. It follows numbers, whatever merge made the change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hetlora.config import Config

LEARNING_RATE = {"fedavgm": 1.0, "fedadam": 0.01}
"""Where `server_lr` is 0. FedAdam's steps have the size of its rate, whatever the change's."""


@torch.no_grad()
def step(cfg: Config, moments: dict[str, Tensor], old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    """new <- the optimiser's step from `old`, in place, for the change D = new - old of each tensor. `moments` are kept up to date, and made at first use.

    'fedavgm': v <- beta v + D; new = old + lr v (Hsu et al., arXiv 1909.06335). With beta = 0 and lr = 1 it is the change itself, to rounding.
    'fedadam': m <- beta1 m + (1 - beta1) D; v <- beta2 v + (1 - beta2) D^2; new = old + lr m / (sqrt(v) + tau), from m = 0 and v = tau^2 (Reddi et al., arXiv
    2003.00295, algorithm 2: no correction of the moments' start).
    lr, beta or beta1, beta2, tau: the settings server_lr, server_momentum, server_beta2, server_tau. Moments are float32, or float64 as the tensors.
    """
    lr, beta = cfg.server_lr or LEARNING_RATE[cfg.server_optimizer], cfg.server_momentum
    for name, after in new.items():
        kind = torch.float64 if after.dtype == torch.float64 else torch.float32
        before = old[name].to(kind)
        change = after.to(kind) - before
        m = moments.setdefault(f"m.{name}", torch.zeros_like(change))
        if cfg.server_optimizer == "fedavgm":
            m.mul_(beta).add_(change)
            after.copy_(before + lr * m)
        else:
            v = moments.setdefault(f"v.{name}", torch.full_like(change, cfg.server_tau**2))
            m.mul_(beta).add_(change, alpha=1 - beta)
            v.mul_(cfg.server_beta2).addcmul_(change, change, value=1 - cfg.server_beta2)
            after.copy_(before + lr * m / (v.sqrt() + cfg.server_tau))
