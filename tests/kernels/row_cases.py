"""A model of one adapted layer inside some movement of rows, and what its rows must come to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import hetlora_kernels as hk
from hetlora_kernels.peft import attach

WIDTH = 8


def filled(shapes, ranks, seed=0, device="cpu"):
    bank = hk.AdapterBank(shapes, ranks, dtype=torch.float64, device=device)
    g = torch.Generator().manual_seed(seed)
    for factor in bank.parameters():
        factor.data.copy_(torch.randn(factor.shape, generator=g, dtype=torch.float64))
    return bank


def linear():
    return nn.Linear(WIDTH, WIDTH, bias=False)


class Model(nn.Module):
    """`layer`, the adapted one, inside some movement of rows: `way(layer, x)` with x [batch, seq, n]."""

    def __init__(self, way):
        super().__init__()
        self.layer, self.way = linear(), way

    def forward(self, x):
        return self.way(self.layer, x)


def order_of(x):
    """An order of all rows that the data decide, as a router's: [rows] indices."""
    return x.reshape(-1, WIDTH)[:, 0].argsort()


def through_sorted(layer, x):
    flat, order = x.reshape(-1, WIDTH), order_of(x)
    out = torch.zeros_like(flat)
    out[order] = layer(flat[order])
    return out.view_as(x)


def through_index_add(layer, x):
    flat, order = x.reshape(-1, WIDTH), order_of(x)
    half = order[: len(order) // 2]  # as many as batch and length may divide
    return torch.zeros_like(flat).index_add_(0, half, layer(flat.index_select(0, half))).view_as(x)


def through_gather(layer, x):
    flat, order = x.reshape(-1, WIDTH), order_of(x)
    where = order[:, None].expand(-1, WIDTH)
    return torch.zeros_like(flat).scatter_(0, where, layer(F.gelu(flat.gather(0, where)))).view_as(x)


def through_buffers(layer, x):
    """Experts with a fixed capacity: [experts, capacity, n], all written."""
    flat, order = x.reshape(-1, WIDTH), order_of(x)
    slots = torch.zeros(len(x), len(order) // len(x), WIDTH, dtype=x.dtype, device=x.device)
    slots[torch.arange(len(order), device=x.device) % len(x), torch.arange(len(order), device=x.device) // len(x)] = flat[order]
    out = layer(slots).transpose(0, 1).reshape(-1, WIDTH)
    return torch.empty_like(flat).index_copy_(0, order, out).view_as(x)


def mask_of(x):
    return x[..., 0] > 0


def through_mask(layer, x):
    out = x.clone()
    out[mask_of(x)] = layer(x[mask_of(x)])
    return out


def constants(x):
    """[16, n]."""
    return torch.linspace(-1, 1, 16 * WIDTH, dtype=x.dtype, device=x.device).view(16, WIDTH)


def whole(x):
    """int64 [batch, seq]: numbers that the data give."""
    return (x[..., 0].abs() * 4).long().clamp(max=15)


def with_data_set(x):
    out = x.clone()
    out.data = x.flip(0)
    return out


FOLLOWED = {
    "batch first": lambda layer, x: layer(x),
    "sequence first": lambda layer, x: layer(x.transpose(0, 1).contiguous()).transpose(0, 1),
    "flattened": lambda layer, x: layer(torch.relu(x.reshape(-1, WIDTH))).view_as(x),
    "flattened sequence first": lambda layer, x: layer(x.transpose(0, 1).reshape(-1, WIDTH)).view(x.shape[1], x.shape[0], WIDTH).transpose(0, 1),
    "pooled": lambda layer, x: layer(x[:, 0])[:, None] + x,
    "mean": lambda layer, x: layer(x.mean(1)).unsqueeze(1).expand_as(x),
    "reversed batch": lambda layer, x: layer(x.flip(0)).flip(0),
    "heads": lambda layer, x: layer(torch.stack([x, 2 * x], 1)).sum(1),
    "repeated": lambda layer, x: layer(x.repeat_interleave(2, 0)).view(len(x), 2, *x.shape[1:]).sum(1),
    "tiled": lambda layer, x: layer(x.repeat(2, 1, 1)).view(2, *x.shape).sum(0),
    "joined": lambda layer, x: layer(torch.cat([x[1:], x[:1]])).roll(1, 0),
    "packed": lambda layer, x: torch.stack(layer(torch.cat(list(x))).split(x.shape[1])),
    "last of each": lambda layer, x: layer(x[torch.arange(len(x)), -1])[:, None] + x,
    "sorted": through_sorted,
    "index_add": through_index_add,
    "gather and scatter": through_gather,
    "buffers": through_buffers,
    "mask": through_mask,
    "data set": lambda layer, x: layer(with_data_set(x)).flip(0),
    "table indexed": lambda layer, x: layer(constants(x)[whole(x)].flip(0)).flip(0),
    "table indexed by two": lambda layer, x: layer(constants(x).view(4, 4, WIDTH)[whole(x) // 4, whole(x) % 4].flip(0)).flip(0),
    "rows of a table selected": lambda layer, x: layer(constants(x).index_select(0, whole(x).view(-1))).view_as(x),
    "table gathered": lambda layer, x: layer(constants(x)[:8].expand(len(x), 8, 8).gather(1, x.argsort(-1)).flip(0)).flip(0),
    "along an axis": lambda layer, x: layer(torch.stack([x.softmax(axis=2), x], axis=1)).sum(axis=1),
    "greater of two": lambda layer, x: layer(torch.max(torch.full_like(x, -9.0), x).flip(0)).flip(0),
    "normal": lambda layer, x: layer(torch.normal(x, torch.zeros_like(x)).flip(0)).flip(0),
}


def right(model, bank, owners, given, out):
    """Whether rows `out` are the layer's of rows `given`, each with its owner's adapter."""
    for client, x, y in zip(owners, given, out, strict=True):
        rows = bank.layouts["layer"].rows(client)
        weight = model.layer.weight + bank.bt["layer"][rows].t() @ bank.a["layer"][rows]
        torch.testing.assert_close(y, x @ weight.t(), rtol=1e-10, atol=1e-10)


def carrying(way, device="cpu", ranks=(3, 2, 4)):
    torch.manual_seed(0)
    model, bank = Model(way).double().to(device), filled({"layer": (WIDTH, WIDTH)}, list(ranks), device=device)
    return attach(model, bank), bank


def drawn_rows(*shape, device="cpu"):
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(device)
