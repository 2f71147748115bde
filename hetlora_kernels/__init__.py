"""hetlora_kernels: fused operations for low-rank adapters of different ranks that share one frozen base. torch is the only dependency."""

from hetlora_kernels._library import backends, use_backend
from hetlora_kernels.bank import AdapterBank
from hetlora_kernels.layout import RankLayout, Segments
from hetlora_kernels.ops.aggregate import Accumulator, aggregate
from hetlora_kernels.ops.lora import lora_add, lora_linear
from hetlora_kernels.ops.norms import delta_norms, gram, tail_norms, unpack_gram
from hetlora_kernels.ops.quantize import dequantize_rows, quantize_rows
from hetlora_kernels.ops.truncate import truncate
from hetlora_kernels.optim import SGD, AdamW

__all__ = [
    "SGD",
    "Accumulator",
    "AdamW",
    "AdapterBank",
    "RankLayout",
    "Segments",
    "aggregate",
    "backends",
    "delta_norms",
    "dequantize_rows",
    "gram",
    "lora_add",
    "lora_linear",
    "quantize_rows",
    "tail_norms",
    "truncate",
    "unpack_gram",
    "use_backend",
]
