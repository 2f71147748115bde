"""Drop-in for PEFT and transformers models.

`fuse`, `unfuse`, `enable`: fused LoRA layers for a PEFT model. `attach`, `detach`: a bank of K clients' adapters on any model. `client_segments`,
`client_losses`: many clients in one batch, on either. `hidden_states`, `Head`: their losses without logits. `StepGraph`: a training step of such a batch as
one CUDA graph. The first three need the `peft` package and load it at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hetlora_kernels.peft.attached import attach, detach
from hetlora_kernels.peft.batch import SEQUENCE_STRIDE
from hetlora_kernels.peft.context import client_segments
from hetlora_kernels.peft.graphs import StepGraph
from hetlora_kernels.peft.head import Head, HeadError, Hidden, hidden_states
from hetlora_kernels.peft.losses import client_losses
from hetlora_kernels.peft.seeds import layer_seeds

if TYPE_CHECKING:
    from hetlora_kernels.peft.swap import FusedLinear, FuseReport, enable, fuse, unfuse

__all__ = [
    "SEQUENCE_STRIDE",
    "FuseReport",
    "FusedLinear",
    "Head",
    "HeadError",
    "Hidden",
    "StepGraph",
    "attach",
    "client_losses",
    "client_segments",
    "detach",
    "enable",
    "fuse",
    "hidden_states",
    "layer_seeds",
    "unfuse",
]

_FROM_SWAP = ("FuseReport", "FusedLinear", "enable", "fuse", "unfuse")


def __getattr__(name: str) -> Any:
    if name not in _FROM_SWAP:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from hetlora_kernels.peft import swap
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("peft", "transformers"):
            raise
        needs = f"hetlora_kernels.peft.{name} needs the packages peft and transformers: pip install peft transformers"
        raise ModuleNotFoundError(needs, name=error.name) from None
    return getattr(swap, name)
