"""Merging the uploads of a round into the next bank: weights, then one of three merges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.config import Config


def client_weights(uploads: hk.AdapterBank, samples: Sequence[int], cfg: Config) -> tuple[Tensor, Tensor]:
    """(p, S): p [K, modules] float64, columns sum to 1 over the uploads that arrived; S [K] float64 = ||B_k A_k||_F over all modules.

    'sparsity': p_k = S_k / sum S per module, or with S over all modules for cfg.weight_scope = 'client' (HETLORA section 3.3); S is clipped at
    cfg.weight_cap times the median of the round's S where that is given. All S = 0: uniform. 'uniform': 1 / K. 'samples': by sequences.
    """
    norms = uploads.delta_norms().double().cpu()
    total = norms.square().sum(1).sqrt()
    clients, modules = norms.shape
    if cfg.weights == "uniform":
        scores = torch.ones(clients, modules, dtype=torch.float64)
    elif cfg.weights == "samples":
        scores = torch.tensor(samples, dtype=torch.float64)[:, None].expand(clients, modules)
    else:
        scores = norms if cfg.weight_scope == "module" else total[:, None].expand(clients, modules)
        if cfg.weight_cap:
            scores = scores.minimum(cfg.weight_cap * scores.median(0, keepdim=True).values)
    sums = scores.sum(0, keepdim=True)
    return torch.where(sums > 0, scores / sums.clamp_min(torch.finfo(torch.float64).tiny), 1 / clients), total


def clip_updates(uploads: hk.AdapterBank, received: hk.AdapterBank, limit: float) -> list[float]:
    """Scale each client's update, upload - received over all factors, in place to Frobenius norm <= limit; the factors used, [K].

    received: what the client downloaded, cut to the rank of its upload.
    """
    with torch.no_grad():
        squares = torch.zeros(uploads.num_clients, dtype=torch.float64)
        pairs = list(zip(uploads.parameters(), received.parameters(), [*uploads.layouts.values()] * 2, strict=True))
        for new, old, layout in pairs:
            for k in range(layout.num_clients):
                squares[k] += (new[layout.rows(k)].double() - old[layout.rows(k)].double()).square().sum().cpu()
        factors = (limit / squares.sqrt().clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1).tolist()
        for new, old, layout in pairs:
            for k, factor in enumerate(factors):
                if factor < 1:
                    rows = layout.rows(k)
                    new[rows] = old[rows] + factor * (new[rows] - old[rows])
    return factors


def merge_factors(bank: hk.AdapterBank, uploads: hk.AdapterBank, weights: Tensor, r_max: int, cfg: Config) -> hk.AdapterBank:
    """bank A <- sum p_k A_k, bank B <- sum p_k B_k, zero-padded to r_max (HETLORA section 3.3), with the choices for unowned and shared rows."""
    keep = bank if cfg.unowned_rows == "keep" else None
    return uploads.aggregate(weights.to(uploads.device), r_max, normalize=cfg.shared_rows, keep=keep)


def merge_svd(bank: hk.AdapterBank, uploads: hk.AdapterBank, weights: Tensor, r_max: int) -> hk.AdapterBank:
    """The best rank-r_max approximation of sum p_k B_k A_k in the Frobenius norm (FlexLoRA, "Recon+SVD"), without forming it.

    With stacks X = [p_k B_k] and Y = [A_k]: X = Q_x R_x, Y^T = Q_y R_y, R_x R_y^T = U S V^T; B = Q_x U sqrt(S), A = sqrt(S) V^T Q_y^T, in
    float64. Rows past the rank of the sum take the old bank's A with B = 0, which training can revive; zeros in both could not.
    """
    merged = hk.AdapterBank(bank.shapes, [r_max], dtype=bank.dtype, device=bank.device)
    merged.load_state_dict(bank.state_dict())
    for module, name in enumerate(bank.shapes):
        layout = uploads.layouts[name]
        p = torch.repeat_interleave(weights[:, module].to(uploads.device), torch.tensor(layout.ranks, device=uploads.device))
        q_x, r_x = torch.linalg.qr((uploads.bt[name].detach().double() * p[:, None]).t())
        q_y, r_y = torch.linalg.qr(uploads.a[name].detach().double().t())
        u, s, vh = torch.linalg.svd(r_x @ r_y.t(), full_matrices=False)
        rank = min(r_max, int((s > s.max().clamp_min(0) * 1e-12).sum()) if s.numel() else 0)
        root = s[:rank].sqrt()
        with torch.no_grad():
            merged.a[name][:rank] = ((q_y @ vh.t()[:, :rank]) * root).t().to(bank.dtype)
            merged.bt[name].zero_()
            merged.bt[name][:rank] = ((q_x @ u[:, :rank]) * root).t().to(bank.dtype)
    return merged


@torch.no_grad()
def fold_stack(model: torch.nn.Module, uploads: hk.AdapterBank, weights: Tensor, scale: float) -> None:
    """W <- W + s * sum p_k B_k A_k in every target module (FLoRA's stacking): exact, and the base model changes."""
    for module, name in enumerate(uploads.shapes):
        layout = uploads.layouts[name]
        p = torch.repeat_interleave(weights[:, module].to(uploads.device), torch.tensor(layout.ranks, device=uploads.device))
        a, bt = uploads.a[name].detach(), uploads.bt[name].detach()
        weight: Tensor = model.get_parameter(f"{name}.weight")
        if hasattr(model.get_submodule(name), "nf"):  # GPT-2's Conv1D stores [in, out]
            weight = weight.t()
        weight.add_((scale * (bt * p[:, None].to(bt.dtype)).t() @ a).to(weight.dtype))
