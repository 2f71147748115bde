"""What torch functions do to the owners of their tensors: a rule for each kind of function, (entry of a tensor, func, out, args, kwargs) -> entry of out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hetlora_kernels.peft.owners import LOST, NOBODY, Entry, Look, Owners, aligned, compact, join, plainer, reshaped, tensors
from hetlora_kernels.peft.writes import masked_scatter, widths, write, write_along


def _dims(given: Any, count: int) -> list[int]:
    given = range(count) if given is None else [given] if isinstance(given, int) else given
    return [dim % count for dim in given]


def _given(args: Any, kwargs: Any, name: str, at: int, default: Any = None) -> Any:
    """The argument of this name, or at this place."""
    return kwargs.get(name, args[at] if len(args) > at else default)


def _of_first(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule (owners of the first argument, func, out, args, kwargs). A rule is asked only where some argument is somebody's. So where the first is nobody's,
    another argument is. In functions named `..._as` that one only gives the shape, and the result is nobody's. Otherwise it decides what is taken of the first,
    nothing says for whom, and the result is `LOST`."""

    def whole(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
        own = look(_given(args, kwargs, "input", 0))
        if isinstance(own, Owners):
            return rule(own, func, out, args, kwargs)
        return None if own is None and func.__name__.endswith("_as") else LOST

    return whole


def _mixing(dims: Callable[[int, Any, Any], Sequence[int]]) -> Callable[..., Any]:
    """The rule of functions that mix elements along some dimensions and keep the others: `dims` names them, of (count of dimensions, args, kwargs)."""
    return _of_first(lambda own, func, out, args, kwargs: LOST if any(own.varies(dim) for dim in dims(own.table.dim(), args, kwargs)) else own)


def _pointwise(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    return join([look(tensor) for tensor in tensors((*args, *kwargs.values()))], out.dim())


def _first(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    return look(args[0])


def _overwrite(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    return join([look(args[1])], out.dim())


def nothing(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    return None


@_of_first
def _shape(own: Owners, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    return own.like(reshaped(own.table, args[0].shape, out.shape))


@_of_first
def _view(own: Owners, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
    """Functions that only choose among elements by position."""
    moved = func(own.table.expand(args[0].shape), *args[1:], **kwargs)
    if isinstance(moved, Tensor):
        return own.like(compact(moved) if moved._is_view() else plainer(moved))
    return [own.like(compact(part)) for part in moved]


def _unfold(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
    """`Tensor.unfold`, or the patches of each picture."""
    own = look(args[0])
    if not isinstance(own, Owners) or (len(args) > 1 and isinstance(args[1], int) and out.dim() == args[0].dim() + 1):
        return _view(look, func, out, args, kwargs)
    return LOST if any(own.varies(d) for d in range(1, own.table.dim())) else own.like(own.table.reshape(-1, 1, 1))


def _reduce(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    if isinstance(_given(args, kwargs, "other", 1), Tensor):  # maximum of two
        return _pointwise(look, func, out, args, kwargs)
    own = look(args[0])
    if not isinstance(own, Owners):
        return own
    at = 2 if func.__name__ == "norm" else 1
    given = kwargs.get("dim", args[at] if len(args) > at and not isinstance(args[at], bool) else None)
    dims = _dims(given, own.table.dim())
    if any(own.varies(dim) for dim in dims):
        return LOST
    first = out if isinstance(out, Tensor) else out[0]
    table = own.table if first.dim() == own.table.dim() else own.table.reshape([size for dim, size in enumerate(own.table.shape) if dim not in dims])
    return own.like(table)


@_of_first
def _per_sample(own: Owners, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """Functions that treat the first dimension sample by sample: convolutions, pooling, group norms."""
    first = out if isinstance(out, Tensor) else out[0]
    name = func.__name__
    one = name.startswith("conv") and own.table.dim() != int(name[-2]) + 2  # no batch: the first dimension is mixed
    return LOST if one or any(own.varies(d) for d in range(1, own.table.dim())) or first.dim() != own.table.dim() else own


def _linear(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    if any(look(other) is not None for other in (*args[1:], *kwargs.values())):
        return LOST
    return LOST if isinstance(own, Owners) and own.varies(-1) else own


def _product(one: Entry, two: Entry, a: Tensor, b: Tensor, dims: int) -> Entry:
    """a [..., i, k] times b [..., k, j]."""
    if any(isinstance(entry, Owners) and (tensor.dim() < 2 or entry.varies(inner)) for entry, tensor, inner in ((one, a, -1), (two, b, -2))):
        return LOST
    return join([one, two], dims)


def _matmul(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    a, b = (args[1], args[0]) if func.__name__ == "__rmatmul__" else args[:2]
    return _product(look(a), look(b), a, b, out.dim())


def _add_product(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    one, two = (kwargs.get(f"batch{at}", _given(args, kwargs, f"mat{at}", at)) for at in (1, 2))
    return join([look(args[0]), _product(look(one), look(two), one, two, out.dim())], out.dim())


def _attention(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """Rows of a query see the keys of their own sequence only: so all vary in the leading dimensions alone."""
    given = [tensor for tensor in tensors((*args, *kwargs.values()))]
    entries = [look(tensor) for tensor in given]
    if any(isinstance(entry, Owners) and (entry.varies(-1) or entry.varies(-2)) for entry in entries):
        return LOST
    return join(entries, out.dim())


def _einsum(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    equation, operands = args[0].replace(" ", ""), tensors(args[1:])
    terms, result = equation.split("->")
    free = [tensor.dim() - len(term.replace("...", "")) if "..." in term else 0 for term, tensor in zip(terms.split(","), operands, strict=True)]
    spelt = "ABCDEFGH"  # for the dimensions that dots stand for, counted from the last
    result = result.replace("...", spelt[len(spelt) - max(free) :])
    parts: list[Entry] = []
    for term, dots, tensor in zip(terms.split(","), free, operands, strict=True):
        own, letters = look(tensor), term.replace("...", spelt[len(spelt) - dots :])
        if isinstance(own, Owners):
            if any(own.varies(d) and letter not in result for d, letter in enumerate(letters)):
                return LOST
            order = [letters.index(letter) for letter in result if letter in letters]
            kept = own.table.reshape([s for d, s in enumerate(own.table.shape) if d in order]) if len(order) < len(letters) else own.table
            left = [letter for letter in letters if letter in result]
            kept = kept.permute([left.index(letter) for letter in result if letter in left])
            sizes = iter(kept.shape)
            own = own.like(kept.reshape([next(sizes) if letter in letters else 1 for letter in result]))
        parts.append(own)
    return join(parts, out.dim())


def _cat(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    tensors, dim = [tensor for tensor in args[0] if tensor.numel()], _given(args, kwargs, "dim", 1, 0) % out.dim()
    entries = [look(tensor) for tensor in tensors]
    if any(entry is LOST for entry in entries):
        return LOST
    owners = [entry for entry in entries if isinstance(entry, Owners)]
    whole = LOST if any(own.varies(dim) for own in owners) else join(entries, out.dim())
    if whole is not LOST:
        return whole
    parts = [(own.table if isinstance(own, Owners) else out.new_full((1,) * out.dim(), NOBODY, dtype=torch.int64)) for own in entries]
    sizes = [max(part.shape[d] for part in parts) for d in range(out.dim())]
    table = torch.cat([part.expand([*sizes[:dim], tensor.shape[dim], *sizes[dim + 1 :]]) for part, tensor in zip(parts, tensors, strict=True)], dim)
    return Owners(table, all(own.fixed for own in owners), all(own.sure for own in owners))


def _stack(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    dim = _given(args, kwargs, "dim", 1, 0) % out.dim()
    parts: list[Entry] = [own.like(own.table.unsqueeze(dim)) if isinstance(own := look(tensor), Owners) else own for tensor in args[0]]
    return join(parts, out.dim())


def _embedding(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    given = tensors((*args, *kwargs.values()))
    if any(look(tensor) is not None for tensor in given if tensor.is_floating_point()):  # rows of a table that is somebody's
        return LOST
    own = next((look(tensor) for tensor in given if not tensor.is_floating_point()), LOST)
    return own.like(own.table.unsqueeze(-1)) if isinstance(own, Owners) else own


# Which dimensions functions mix.
_along = _mixing(lambda count, args, kwargs: [kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], int) else -1)])
_grouped = _mixing(lambda count, args, kwargs: [-1])  # rows times the weights of their groups
_top = _mixing(lambda count, args, kwargs: [_given(args, kwargs, "dim", 2, -1)])
_unit = _mixing(lambda count, args, kwargs: [_given(args, kwargs, "dim", 2, 1)])
_normalised = _mixing(lambda count, args, kwargs: range(-len(_given(args, kwargs, "normalized_shape", 1)), 0))
_transformed = _mixing(lambda count, args, kwargs: _dims(kwargs.get("dim"), count))
_pad = _mixing(lambda count, args, kwargs: [-1 - at // 2 for at, size in enumerate(_given(args, kwargs, "pad", 1, ())) if size])


@_of_first
def _repeat(own: Owners, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    sizes = list(args[1]) if isinstance(args[1], (tuple, list)) else list(args[1:])
    table = aligned(own.table, out.dim())
    return own.like(table.repeat([times if size > 1 else 1 for times, size in zip(sizes, table.shape, strict=True)]))


@_of_first
def _repeat_interleave(own: Owners, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    repeats, dim = _given(args, kwargs, "repeats", 1), _given(args, kwargs, "dim", 2)
    if dim is None:
        return LOST
    return own.like(own.table.repeat_interleave(repeats, dim=dim), not isinstance(repeats, Tensor)) if own.varies(dim) else own


def _chosen(own: Owners, tensor: Tensor, index: Any) -> Owners:
    """Owners of tensor[index]."""
    index = index if isinstance(index, tuple) else (index,)
    by_data, dim, last = False, 0, tensor.dim() - 1
    taken = widths(index)
    consumed: set[int] = set()
    for one, width in zip(index, taken, strict=True):
        if one is ...:
            dim += tensor.dim() - sum(taken)
        consumed |= set(range(dim, dim + width))
        if isinstance(one, (Tensor, list)):
            by_data |= any(own.varies(d) for d in range(dim, dim + width))
        dim += width
    table = own.table.expand(tensor.shape if last in consumed or own.varies(-1) else (*tensor.shape[:-1], 1))
    chosen = table[index]
    return own.like(plainer(chosen) if any(isinstance(one, (Tensor, list)) for one in index) else compact(chosen), not by_data)


def _index(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    return _chosen(own, args[0], args[1]) if isinstance(own, Owners) else own or _looked_up(look, args[1], out)


def _looked_up(look: Look, index: Any, out: Tensor) -> Entry:
    """Owners of table[index], where the table is nobody's: those of the index, which is one tensor or several after slices of whole dimensions."""
    parts = index if isinstance(index, tuple) else (index,)
    chosen = [part for part in parts if not (isinstance(part, slice) and part == slice(None))]
    entries = [look(part) for part in tensors(parts)]
    if all(entry is None for entry in entries):
        return None
    before = len(parts) - len(chosen)
    if parts[before:] != tuple(chosen) or any(not isinstance(part, Tensor) or part.dtype == torch.bool for part in chosen):
        return LOST
    width = max(part.dim() for part in chosen)
    own = join(entries, width)
    return own.like(own.table.reshape([1] * before + list(own.table.shape) + [1] * (out.dim() - before - width))) if isinstance(own, Owners) else own


def _index_select(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    dim, index = _given(args, kwargs, "dim", 1, 0), _given(args, kwargs, "index", 2)
    where = look(index)
    if own is None and isinstance(where, Owners):
        return where.like(where.table.reshape([-1 if d == dim % out.dim() else 1 for d in range(out.dim())]))
    if not isinstance(own, Owners) or not own.varies(dim):
        return own or where
    return own.like(own.table.index_select(dim, index), False)


@_of_first
def _sorted(own: Owners, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    order = out if isinstance(out, Tensor) else out[1]
    dim = kwargs.get("dim", args[1] if len(args) > 1 and type(args[1]) is int else -1)
    return own.like(plainer(own.table.expand(args[0].shape).gather(dim, order)), False) if own.varies(dim) else own


@_of_first
def _strided(own: Owners, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """Any other look at the same memory."""
    tensor = args[0]
    memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int64, device=tensor.device).copy_(own.table.expand(tensor.shape))
    return own.like(plainer(memory.as_strided(out.shape, out.stride(), out.storage_offset() - tensor.storage_offset())))


def _multi_head(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
    """torch's own attention: query, key and value are [length, sequences, n]."""
    entries = [look(tensor) for tensor in args[:3]]
    if args[0].dim() != 3 or any(isinstance(entry, Owners) and (entry.varies(0) or entry.varies(2)) for entry in entries):
        return LOST
    return [join(entries, 3), LOST]


def _gather(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own, tensor = look(args[0]), args[0]
    dim, index = _given(args, kwargs, "dim", 1, 0) % tensor.dim(), _given(args, kwargs, "index", 2)
    if not isinstance(own, Owners):
        return own or look(index)
    if not own.varies(dim):
        return own if all(index.shape[d] == tensor.shape[d] for d in range(tensor.dim()) if own.varies(d)) else LOST
    return own.like(plainer(own.table.expand(tensor.shape).gather(dim, index)), False)


def _take_along_dim(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """`gather` with the sizes of the other dimensions broadcast."""
    own, tensor = look(args[0]), args[0]
    index, dim = _given(args, kwargs, "indices", 1), _given(args, kwargs, "dim", 2)
    if dim is None:  # elements of the whole
        return LOST
    if not isinstance(own, Owners):
        return own or look(index)
    return own.like(plainer(own.table.expand(tensor.shape).take_along_dim(index, dim)), False) if own.varies(dim) else own


_NAMES: dict[Callable[..., Any], str] = {
    _pointwise: "abs absolute acos add addcdiv addcmul alpha_dropout and asin atan atan2 bernoulli bfloat16 bitwise_and bitwise_not bool ceil celu clamp "
    "bitwise_or clamp_max clamp_min clip clone contiguous copysign cos cosh cpu cuda detach div divide double dropout dropout1d dropout2d dropout3d elu eq "
    "erf erfc erfinv exp exp2 expm1 feature_dropout float floor floor_divide floordiv fmod ge gelu gt half hardsigmoid hardswish hardtanh hypot "
    "int invert isfinite isinf isnan le leaky_relu lerp log log10 log1p log2 logaddexp logical_and logical_not logical_or logical_xor "
    "logsigmoid long lt masked_fill maximum minimum mish mod mul multiply nan_to_num native_dropout ne neg negative normal or pin_memory pow prelu "
    "reciprocal relu relu6 remainder round rpow rsqrt rsub selu sigmoid sign silu sin sinh softplus softsign sqrt square sub subtract tanh "
    "tanhshrink threshold true_divide truediv type where xor .data .real",
    _first: "to type_as",
    _overwrite: "copy",
    nothing: "empty_like fill full_like new_empty new_full new_ones new_tensor new_zeros ones_like rand_like randn_like random uniform zero zeros_like",
    _shape: "_unsafe_view flatten reshape reshape_as unflatten view view_as",
    _view: "broadcast_to chunk diagonal expand expand_as flip hsplit moveaxis movedim narrow permute roll rot90 select split split_with_sizes squeeze swapaxes "
    "swapdims t tensor_split tile transpose unbind unsqueeze vsplit .H .T .mT",
    _unfold: "unfold",
    _along: "cumprod cumsum glu log_softmax logcumsumexp softmax",
    _sorted: "argsort sort",
    _strided: "as_strided",
    _transformed: "fft_fft fft_fft2 fft_fftn fft_ifft fft_irfft fft_rfft fft_rfftn",
    _multi_head: "multi_head_attention_forward",
    _pad: "pad",
    _top: "topk",
    _unit: "normalize",
    _reduce: "all amax amin any argmax argmin count_nonzero logsumexp max mean median min norm prod std sum var",
    _normalised: "layer_norm rms_norm",
    _per_sample: "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d batch_norm boolean_dispatch conv1d conv2d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d grid_sample group_norm instance_norm interpolate max_pool1d max_pool2d max_pool3d "
    "native_multi_head_attention pixel_shuffle pixel_unshuffle transformer_encoder_layer_fwd",
    _linear: "linear",
    _grouped: "grouped_mm",
    _matmul: "bmm matmul mm rmatmul",
    _add_product: "addmm baddbmm",
    _attention: "scaled_dot_product_attention",
    _einsum: "einsum",
    _cat: "cat concat concatenate",
    _stack: "stack",
    _embedding: "embedding one_hot",
    _repeat: "repeat",
    _repeat_interleave: "repeat_interleave",
    _index: "getitem",
    _index_select: "index_select",
    _gather: "gather",
    _take_along_dim: "take_along_dim",
    write: "index_put setitem",
    write_along: "index_add index_copy scatter scatter_add",
    masked_scatter: "masked_scatter",
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}


def rule_of(name: str) -> Callable[..., Any] | None:
    """The rule of a function, of its in-place form and of its operators (`__add__`, `__radd__`, `__iadd__`)."""
    if name in _RULES:
        return _RULES[name]
    plain = name[2:-2] if name.startswith("__") and name.endswith("__") else name.rstrip("_").lstrip("_")
    if plain in _RULES:
        return _RULES[plain]
    return _RULES.get(plain[1:]) if name.startswith("__") and plain[:1] in ("r", "i") else None
