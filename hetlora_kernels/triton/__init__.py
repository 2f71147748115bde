"""The Triton rung: the layer, the server and the client ops for any CUDA device without the compiled library. Import it only where triton is installed."""

from hetlora_kernels.triton.accumulate import accumulate_
from hetlora_kernels.triton.adamw import adamw_
from hetlora_kernels.triton.aggregate import aggregate_
from hetlora_kernels.triton.cross_entropy import cross_entropy_
from hetlora_kernels.triton.delta_norms import delta_norms
from hetlora_kernels.triton.expand import expand_
from hetlora_kernels.triton.gram import gram
from hetlora_kernels.triton.grouped_gram import grouped_gram
from hetlora_kernels.triton.lora import lora_backward, lora_forward
from hetlora_kernels.triton.quantize import dequantize_rows_, quantize_rows_
from hetlora_kernels.triton.sgd import sgd_
from hetlora_kernels.triton.shrink import shrink
from hetlora_kernels.triton.tail_norms import tail_norms
from hetlora_kernels.triton.truncate import truncate_

_LAYER = (shrink, expand_, grouped_gram, lora_forward, lora_backward)
_SERVER_AND_CLIENT = (truncate_, aggregate_, accumulate_, gram, delta_norms, tail_norms, quantize_rows_, dequantize_rows_, adamw_, sgd_)
_LOSS = (cross_entropy_,)
OPS = {op.__name__: op for op in (*_LAYER, *_SERVER_AND_CLIENT, *_LOSS)}
"""Op name -> launcher with the signature of the reference's."""
