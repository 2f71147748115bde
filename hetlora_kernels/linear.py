"""What a linear layer is, and how its weight lies: [out, in] in `nn.Linear`, [in, out] in the `Conv1D` of GPT-2."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def linear_shape(layer: Any) -> tuple[int, int] | None:
    """(out, in) widths of a linear layer: `nn.Linear`, its quantised kinds, `Conv1D`. None where the module does not say."""
    if hasattr(layer, "out_features") and hasattr(layer, "in_features"):
        return int(layer.out_features), int(layer.in_features)
    if hasattr(layer, "nf") and getattr(layer, "weight", None) is not None:
        return int(layer.nf), int(layer.weight.shape[0])
    return None


def linear_weight(layer: Any) -> Tensor:
    """The weight as [out, in], a view: what is written into it is in the layer. For layers that keep an unpacked weight."""
    return layer.weight.t() if hasattr(layer, "nf") else layer.weight
