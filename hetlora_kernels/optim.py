"""Multi-client optimisers: one call steps every client of a bank, each with its own learning rate, step count, clipping and tail regulariser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hetlora_kernels._library import call, register_fake
from hetlora_kernels._uploads import uploaded
from hetlora_kernels.casts import Casts
from hetlora_kernels.ops._lists import client_integers, flat_ranks, written

if TYPE_CHECKING:
    from hetlora_kernels.bank import AdapterBank

PerClient = float | Sequence[float] | Tensor

SLOWEST = 0.95
"""The largest beta1 or momentum with moments in bfloat16. Rounding to nearest holds a moment m still while |g - m| < 2^-9 / (1 - beta1) |m|: 2 % of it at 0.9,
4 % here, 20 % at 0.99 and twice the whole of it at 0.999."""


class _BankOptimizer:
    """What AdamW and SGD share: the bank's factors, per-client settings and state.

    bank: the `AdapterBank` to train. A factor that needs no gradient (`AdapterBank.freeze_a`, `freeze_b`) is left alone: it has no state and no part in the
    clipped norm.
    lr: learning rate, a number or [K]; `opt.lr` is a float64 tensor [K] that may be written between steps.
    clip_norm: None or 0 = no clipping; else a number or [K]: the gradient of each client, over all its modules and the regulariser
    included, is scaled by min(1, clip / (norm + 1e-6)).
    tail_penalty: (lam, keep): adds the gradient of lam_k * sum over modules of ||B[:, q:]||_F ||A[q:, :]||_F, q = keep[k], to that of the loss,
    before clipping and moments: equal to autograd of loss + penalty, with the zero sub-gradient at a zero norm (HETLORA section 3.2).
    lam: a number or [K]; keep: K integers, or {module: K integers}.
    cast: None, or the 16-bit type of the base. With a type every step also writes the factors in it, for attached layers on a GPU. Without it these layers cast
    float32 factors in every forward and backward pass. Factors must not be written through `.data` then, which autograd does not see. Layers on a CPU do not
    use it.
    moments_dtype: None keeps moments in the factors' type. torch.bfloat16, for factors in float32, keeps AdamW's first moment and SGD's momentum in it,
    rounded to nearest once a step, and takes beta1 or momentum up to 0.95. AdamW's second moment stays in float32: in bfloat16 its changes of one
    thousandth (beta2 = 0.999) would be rounded away.
    """

    def __init__(
        self,
        bank: AdapterBank,
        lr: PerClient,
        clip_norm: PerClient | None,
        tail_penalty: tuple | None,
        cast: torch.dtype | None,
        moments: tuple[torch.dtype | None, str, float],  # the type, and the setting that says how slowly a moment moves, with its name
    ) -> None:
        self.bank = bank
        self._moments_dtype = _moments_type(bank.dtype, *moments)
        bank.casts = self._casts = None if cast in (None, bank.dtype) else Casts(bank.shapes, bank.parameters(), cast)
        self._layouts = [bank.layouts[name] for name in bank.layouts]
        self._ranks = flat_ranks(self._layouts)
        # Of a frozen factor no columns: the ops step the rows that their lists have, and a state of no elements costs nothing.
        self._params = [p if p.requires_grad else p.detach()[:, :0] for p in bank.parameters()]
        self._everyone = torch.ones(bank.num_clients, dtype=torch.bool, device=bank.device)
        self.lr = self._per_client("lr", lr)
        self.clip_norm = None if clip_norm is None else self._per_client("clip_norm", clip_norm)
        self._lam, self._keep = None, []
        if tail_penalty is not None:
            if not isinstance(tail_penalty, (tuple, list)) or len(tail_penalty) != 2:
                raise TypeError(f"tail_penalty: expected a pair (lam, keep), got {tail_penalty!r}")
            if any(not p.requires_grad for p in bank.parameters()):
                raise ValueError("tail_penalty: expected a bank that trains A and B, whose norms it multiplies, got one with frozen factors")
            lam, keep = tail_penalty
            self._lam = self._per_client("tail_penalty", lam)
            if isinstance(keep, Mapping):
                if set(keep) != set(bank.layouts):
                    raise ValueError(f"tail_penalty: expected keep for the modules {list(bank.layouts)}, got {list(keep)}")
                keep = [list(keep[name]) for name in bank.layouts]
            self._keep = client_integers("tail_penalty", keep, self._layouts)

    def _per_client(self, name: str, value: PerClient) -> Tensor:
        tensor = torch.as_tensor(value, dtype=torch.float64, device=self.bank.device)
        clients = self.bank.num_clients
        if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.numel() != clients):
            raise ValueError(f"{name}: expected a number or {clients} numbers, one per client, got shape {tuple(tensor.shape)}")
        if bool((tensor < 0).any()) or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: expected finite values >= 0, got {value}")
        return tensor.expand(clients).clone()

    def _state_like_params(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [torch.zeros_like(p, dtype=dtype, requires_grad=False) for p in self._params]

    def _active(self, active: Sequence[bool] | Tensor | None) -> Tensor:
        """[K] on the bank's device. A step does not wait for the mask. A mask on the device, and one that is all true, is not copied. Any other goes up from
        pinned memory."""
        if active is None:
            return self._everyone
        mask = active.bool() if isinstance(active, Tensor) else torch.tensor(active, dtype=torch.bool, device="cpu")
        clients, device = self.bank.num_clients, self.bank.device
        if tuple(mask.shape) != (clients,):
            raise ValueError(f"active: expected {clients} booleans, one per client, got shape {tuple(mask.shape)}")
        if mask.device.type == "cpu" and bool(mask.all()):
            return self._everyone
        return uploaded("active", mask, device)

    def _grads(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]

    def _copies(self) -> list[Tensor]:
        """What gets the new values in `cast`."""
        return [] if self._casts is None else [copy[:, : p.shape[1]] for copy, p in zip(self._casts.current(), self._params, strict=True)]

    def stepped(self) -> None:
        """Say that the factors were stepped past this object: by a replay of a CUDA graph that holds its `step`."""
        written(self._params)
        if self._casts is not None:
            self._casts.in_step()

    def zero_grad(self) -> None:
        """Forget the gradients of every factor."""
        for parameter in self._params:
            parameter.grad = None


def _moments_type(factors: torch.dtype, moments: torch.dtype | None, name: str, slow: float) -> torch.dtype:
    """Of the first moment; `ValueError` for a type that it cannot have, and for one that would hold it still."""
    if moments is None or moments == factors:
        return factors
    if moments != torch.bfloat16 or factors != torch.float32:
        raise ValueError(f"moments_dtype: expected None or {factors}, the factors' type, or torch.bfloat16 beside factors in torch.float32, got {moments}")
    if slow > SLOWEST:
        raise ValueError(f"moments_dtype: expected {name} of at most {SLOWEST} with torch.bfloat16, whose rounding would hold slower moments still, got {slow}")
    return moments


class AdamW(_BankOptimizer):
    """Decoupled-weight-decay Adam for every client of a bank in one fused step (Loshchilov & Hutter 2019; `torch.optim.AdamW` per client).

    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;  w = w (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps),
    t = the client's own step count. See `_BankOptimizer` for lr, clip_norm, tail_penalty, cast and moments_dtype, the type of m.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> bank = hk.AdapterBank({"layer": (6, 4)}, ranks=[2, 3])
    >>> opt = hk.AdamW(bank, lr=[1e-3, 1e-2], clip_norm=1.0, tail_penalty=(0.1, [1, 2]))
    >>> loss = sum((p**2).sum() for p in bank.parameters())
    >>> loss.backward()
    >>> opt.step(active=[True, False])  # the second client has no data in this step
    >>> opt.step_count.tolist()
    [1, 0]
    >>> opt.zero_grad()
    """

    def __init__(
        self,
        bank: AdapterBank,
        lr: PerClient = 1e-3,
        weight_decay: float = 0.0,
        clip_norm: PerClient | None = None,
        tail_penalty: tuple | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        cast: torch.dtype | None = None,
        moments_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(bank, lr, clip_norm, tail_penalty, cast, (moments_dtype, "betas[0]", betas[0]))
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        if eps <= 0 or weight_decay < 0:
            raise ValueError(f"eps, weight_decay: expected eps > 0 and weight_decay >= 0, got {eps}, {weight_decay}")
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.exp_avg, self.exp_avg_sq = self._state_like_params(self._moments_dtype), self._state_like_params()
        self.step_count = torch.zeros(bank.num_clients, dtype=torch.int64, device=bank.device)

    @torch.no_grad()
    def step(self, active: Sequence[bool] | Tensor | None = None) -> None:
        """Step the clients of `active` (K booleans, default all); the others' factors, moments and counts do not change."""
        call("adamw_")(
            *([p.detach() for p in self._params], self._grads(), self.exp_avg, self.exp_avg_sq, self._copies()),
            *(self.lr, self.step_count, self._active(active), self.clip_norm, self._lam, self._ranks, self._keep),
            *(*self.betas, self.eps, self.weight_decay),
        )
        self.stepped()


class SGD(_BankOptimizer):
    """SGD for every client of a bank in one fused step: d = g + wd w;  buf = momentum buf + d;  w = w - lr buf (`torch.optim.SGD` per client).

    See `_BankOptimizer` for lr, clip_norm, tail_penalty, cast and moments_dtype, the type of buf.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> bank = hk.AdapterBank({"layer": (6, 4)}, ranks=[2, 3])
    >>> before = bank.a["layer"].detach().clone()
    >>> opt = hk.SGD(bank, lr=0.25)
    >>> (bank.a["layer"] ** 2).sum().backward()  # the gradient is twice the factor
    >>> opt.step()
    >>> torch.allclose(bank.a["layer"], before / 2)
    True
    """

    def __init__(
        self,
        bank: AdapterBank,
        lr: PerClient = 1e-3,
        weight_decay: float = 0.0,
        clip_norm: PerClient | None = None,
        tail_penalty: tuple | None = None,
        momentum: float = 0.0,
        cast: torch.dtype | None = None,
        moments_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(bank, lr, clip_norm, tail_penalty, cast, (moments_dtype, "momentum", momentum))
        if not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(f"momentum, weight_decay: expected momentum in [0, 1) and weight_decay >= 0, got {momentum}, {weight_decay}")
        if moments_dtype is not None and not momentum:
            raise ValueError(f"moments_dtype: of momentum, and there is none; leave it out, or give momentum > 0; got {moments_dtype}")
        self.momentum, self.weight_decay = momentum, weight_decay
        self.buffers = self._state_like_params(self._moments_dtype) if momentum else []

    @torch.no_grad()
    def step(self, active: Sequence[bool] | Tensor | None = None) -> None:
        """Step the clients of `active` (K booleans, default all); the others' factors and buffers do not change."""
        call("sgd_")(
            *([p.detach() for p in self._params], self._grads(), self.buffers, self._copies()),
            *(self.lr, self._active(active), self.clip_norm, self._lam, self._ranks, self._keep),
            *(self.momentum, self.weight_decay),
        )
        self.stepped()


@register_fake("adamw_")
def _(params, grads, exp_avg, exp_avg_sq, casts, lr, step, active, clip, lam, ranks, keep, beta1, beta2, eps, weight_decay):
    return None


@register_fake("sgd_")
def _(params, grads, buffers, casts, lr, active, clip, lam, ranks, keep, momentum, weight_decay):
    return None
