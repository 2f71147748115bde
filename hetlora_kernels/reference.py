"""Every op once in plain PyTorch: the executable specification, and the kernel of last resort on every device.

Arithmetic is float32 inside (float64 for float64 tensors); results are rounded once, when they are stored. Arguments are those of the
schemas in `_library.py`, already checked by `ops/`. K clients, M modules; `ranks` holds M * K integers, as `layout.joined` puts them.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from hetlora_kernels.layout import own_list
from hetlora_kernels.ops._layer import base_first, whole_layer

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 7
_MASK32 = 0xFFFFFFFF


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the arithmetic on tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(x: Tensor) -> torch.dtype:
    """Type of the factors and of S in the products with x. On a CPU that of the arithmetic: 16-bit numbers are converted to it anyway, so exactness is free.
    On a GPU that of x: tensor cores multiply 16-bit operands."""
    return compute_dtype(x.dtype) if x.is_cpu else x.dtype


def _clients(ranks: list[int], module: int, modules: int) -> list[tuple[int, int]]:
    """(first row, rank) of each client in the packed rows of `module`."""
    own = own_list(ranks, module, modules)
    return [(end - rank, rank) for end, rank in zip(accumulate(own), own, strict=True)]


# ---------------------------------------------------------------- dropout


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = _PHILOX_ROUNDS) -> tuple[Tensor, ...]:
    """Philox4x32 (Salmon et al., SC 2011): four 32-bit words from a 4-word counter and a 2-word key, all held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        hi0, hi1 = (p0 >> 32) & _MASK32, (p1 >> 32) & _MASK32
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, p1 & _MASK32, hi0 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK32, (k1 + _PHILOX_WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """Of the 65536 values of a 16-bit draw, how many drop an element: round(65536 p)."""
    return round(65536 * p)


def keep_mask(seed: Tensor, row_keys: Tensor, columns: int, p: float) -> Tensor:
    """Boolean [rows, columns], True where an element is kept.

    The key is the 64 bits of `seed`. The counter is (row key low, row key high, c, 0) with c = column // 8. Its 128 output bits are eight 16-bit values, low
    half of each word first. Value j belongs to column 8 c + j. An element is dropped when its value < round(65536 p).
    """
    blocks = (columns + 7) // 8
    column = torch.arange(blocks, device=row_keys.device, dtype=torch.int64)[None, :]
    low, high = (row_keys & _MASK32)[:, None], ((row_keys >> 32) & _MASK32)[:, None]
    counter = tuple(t.expand(row_keys.numel(), blocks) for t in (low, high, column, torch.zeros_like(column)))
    words = torch.stack(philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32)), dim=-1)
    values = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(row_keys.numel(), blocks * 8)
    return values[:, :columns] >= dropout_threshold(p)


def _drop(x: Tensor, seeds: Tensor | None, row_keys: Tensor, client: int, start: int, p: float) -> Tensor:
    """What dropout leaves of a client's rows, whose keys begin at `start`; without seeds all."""
    if seeds is None:
        return x
    kept = keep_mask(seeds[client], row_keys[start : start + len(x)], x.shape[1], p)
    return torch.where(kept, x / (1 - dropout_threshold(p) / 65536), 0.0)


# ---------------------------------------------------------------- layer: shrink, expand, grouped Gram


def _segments(ranks: list[int], starts: list[int], lengths: list[int]):
    """(client, first rank row, rank, first batch row, batch rows, first element in the packed S) of each client that has work."""
    row = flat = 0
    for k, rank in enumerate(ranks):
        length = lengths[k] if k < len(lengths) else 0
        if rank and length:
            yield k, row, rank, starts[k], length, flat
        row += rank
        flat += rank * length


def _take(x: Tensor, index: Tensor | None, start: int, length: int, dtype: torch.dtype) -> Tensor:
    """One client's rows of x in `dtype`, in memory of their own: a BLAS may round otherwise at another alignment, and a client's gradients
    must have the same bits alone and beside others."""
    return x[start : start + length].to(dtype, copy=True) if index is None else x[index[start : start + length]].to(dtype)


def shrink(x, rows, scale, seeds, row_keys, index, ranks, starts, lengths, dropout):
    """S_k = scale_k * drop(x_k) rows_k^T for each client; packed [sum T_k r_k], client k's [T_k, r_k] in order. The rows and S are of `operand_dtype`."""
    out = x.new_zeros(sum(r * n for r, n in zip(ranks, lengths, strict=False)), dtype=operand_dtype(x))
    dtype = compute_dtype(x.dtype)
    for k, row, rank, start, length, flat in _segments(ranks, starts, lengths):
        own = _drop(_take(x, index, start, length, dtype), seeds, row_keys, k, start, dropout)
        product = own @ rows[row : row + rank].to(out.dtype).to(dtype, copy=True).t() * scale[k]
        out[flat : flat + rank * length] = product.reshape(-1).to(out.dtype)
    return out


def expand_(out, s, rows, seeds, row_keys, index, ranks, starts, lengths, dropout):
    """out[rows of client k] += S_k rows_k, the rows in S's type, with the dropout mask and 1 / (1 - p) on the product when `seeds` is given (the way of dx)."""
    dtype = compute_dtype(s.dtype)
    for k, row, rank, start, length, flat in _segments(ranks, starts, lengths):
        product = s[flat : flat + rank * length].view(length, rank).to(dtype) @ rows[row : row + rank].to(s.dtype).to(dtype)
        product = _drop(product, seeds, row_keys, k, start, dropout)
        if index is None:
            target = out[start : start + length]
            target.copy_((target.to(dtype) + product).to(out.dtype))
        else:
            own = index[start : start + length]
            out[own] = (out[own].to(dtype) + product).to(out.dtype)


def grouped_gram(s, x, seeds, row_keys, index, ranks, starts, lengths, dropout, dtype):
    """[S, d]: S_k^T drop(x_k) for each client, exactly zero for a client without rows; in `dtype`."""
    out = x.new_zeros((sum(ranks), x.shape[1]), dtype=dtype)
    compute = compute_dtype(x.dtype)
    for k, row, rank, start, length, flat in _segments(ranks, starts, lengths):
        own = _drop(_take(x, index, start, length, compute), seeds, row_keys, k, start, dropout)
        out[row : row + rank] = (s[flat : flat + rank * length].view(length, rank).to(compute, copy=True).t() @ own).to(dtype)
    return out


_with_base, _beside = base_first(expand_)
lora_forward, lora_backward = whole_layer(shrink, _with_base, _beside, grouped_gram)


# ---------------------------------------------------------------- server: truncate, aggregate, norms, rows in few bits


def truncate_(out, bank, ranks, dense):
    """out = each client's leading rows of the bank: packed [S, d], or zero-masked [K, R, d] when `dense`."""
    for module, (target, source) in enumerate(zip(out, bank, strict=True)):
        for k, (row, rank) in enumerate(_clients(ranks, module, len(bank))):
            if dense:
                target[k, :rank] = source[:rank].to(target.dtype)
                target[k, rank:] = 0
            else:
                target[row : row + rank] = source[:rank].to(target.dtype)


def aggregate_(out, rows, weights, keep, ranks, owners):
    """out[i] = sum over the clients k with r_k > i of weights[k] * rows_k[i], in client order; divided by the owners' weight when `owners`.

    A row that no client owns is keep[i], or zero without `keep`. An owned row whose owners' weights sum to zero stays at zero.
    """
    for module, (target, source) in enumerate(zip(out, rows, strict=True)):
        dtype = compute_dtype(source.dtype)
        total = torch.zeros(target.shape, dtype=dtype, device=source.device)
        owned_weight = torch.zeros(target.shape[0], 1, dtype=dtype, device=source.device)
        owned = 0
        for k, (row, rank) in enumerate(_clients(ranks, module, len(rows))):
            weight = weights[k, module].to(dtype)
            total[:rank] += source[row : row + rank].to(dtype) * weight
            owned_weight[:rank] += weight
            owned = max(owned, rank)
        if owners:
            total = torch.where(owned_weight != 0, total / owned_weight, 0.0)
        if keep:
            total[owned:] = keep[module][owned:].to(dtype)
        target.copy_(total.to(target.dtype))


def accumulate_(total, rows, weights):
    """total[m][:r_m] += weights[m] * rows[m]; `total` is float32 (float64 for float64)."""
    for module, (target, source) in enumerate(zip(total, rows, strict=True)):
        target[: source.shape[0]] += source.to(target.dtype) * weights[module].to(target.dtype)


def gram(rows, ranks, exact):
    """Per module the packed [sum r_k^2] of rows_k rows_k^T: float32 products and result, float64 for float64 or `exact`."""
    out = []
    for module, source in enumerate(rows):
        dtype = torch.float64 if exact else compute_dtype(source.dtype)
        blocks = [source[row : row + rank].to(dtype) for row, rank in _clients(ranks, module, len(rows))]
        out.append(torch.cat([(block @ block.t()).reshape(-1) for block in blocks]) if blocks else source.new_zeros(0, dtype=dtype))
    return out


def delta_norms(a, bt, ranks, exact):
    """[K, M]: ||B_k A_k||_F = sqrt(max(0, sum (B^T B) o (A A^T))), combined in float64; float32, float64 for float64 or `exact`."""
    columns = []
    for module, (grams_a, grams_b) in enumerate(zip(gram(a, ranks, exact), gram(bt, ranks, exact), strict=True)):
        sizes = [rank * rank for _, rank in _clients(ranks, module, len(a))]
        product = (grams_a.double() * grams_b.double()).split(sizes) if sizes else ()
        columns.append(torch.stack([p.sum() for p in product]) if product else grams_a.new_zeros(0, dtype=torch.float64))
    dtype = torch.float64 if exact else compute_dtype(a[0].dtype)
    return torch.stack(columns, dim=1).clamp_min(0).sqrt().to(dtype)


def tail_norms(rows, ranks, keep):
    """[K, M]: Frobenius norm of rows keep[k]: of each client, 0 for an empty tail; float32, float64 for float64."""
    columns = []
    for module, source in enumerate(rows):
        dtype = compute_dtype(source.dtype)
        clients = _clients(ranks, module, len(rows))
        kept = own_list(keep, module, len(rows))
        norms = [source[row + min(q, rank) : row + rank].double().norm() for (row, rank), q in zip(clients, kept, strict=True)]
        columns.append(torch.stack(norms).to(dtype) if norms else source.new_zeros(0, dtype=dtype))
    return torch.stack(columns, dim=1)


def quantize_rows_(codes, scales, rows, bits):
    """scale_i = max |x_i| / q, q = 2^(bits - 1) - 1, zero below 2^-126; codes = x / scale to the nearest integer, ties to even. 4 bits: two codes a byte.

    A row whose scale is zero or not finite has codes of zero.
    """
    limit = 2 ** (bits - 1) - 1
    for code, scale, source in zip(codes, scales, rows, strict=True):
        wide = source.to(compute_dtype(source.dtype))
        largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
        own = (largest / limit).float()
        own = torch.where(own < torch.finfo(torch.float32).tiny, 0.0, own)
        usable = (own > 0) & torch.isfinite(own)
        values = torch.where(usable[:, None], torch.round(wide / torch.where(usable, own, 1.0)[:, None].to(wide.dtype)), 0.0).to(torch.int8)
        if bits == 4:
            halves = F.pad(values, (0, wide.shape[1] % 2)) & 15
            values = (halves[:, 0::2] | (halves[:, 1::2] << 4)).view(torch.uint8)
        scale.copy_(own)
        code.copy_(values)


def dequantize_rows_(out, codes, scales, bits):
    """out_ij = code_ij * scale_i."""
    for target, code, scale in zip(out, codes, scales, strict=True):
        values = code
        if bits == 4:
            pairs = code.view(torch.int8)
            values = torch.stack(((pairs << 4) >> 4, pairs >> 4), dim=-1).flatten(1)[:, : target.shape[1]]
        dtype = compute_dtype(target.dtype)
        target.copy_((values.to(dtype) * scale[:, None].to(dtype)).to(target.dtype))


# ---------------------------------------------------------------- client: the loss of a language model


def cross_entropy_(logits, labels, weights, scale, softcap, smoothing, z_loss, slopes):
    """[T] losses of rows x of logits; with `slopes` weights_t d loss_t / d x_t takes the place of x_t. Label -100: both are zero.

    With z = scale x, or softcap tanh(scale x / softcap), m the largest of a row and e = exp(z - m), made once: logsumexp(z) = m + log sum e and
    softmax(z) = e / sum e.
    """
    ignored, label = labels == -100, labels.masked_fill(labels == -100, 0)[:, None]
    dtype = compute_dtype(logits.dtype)
    if not logits.shape[1]:
        return logits.new_zeros(len(logits), dtype=dtype)
    z = logits if dtype == logits.dtype and slopes else logits.to(dtype, copy=True)
    if scale != 1 or softcap:
        z *= scale
    steep = scale
    if softcap:
        z.div_(softcap)
        if slopes:  # of tanh a: 4 u / (1 + u)^2 with u = exp(-2 |a|), which is exact where tanh a is near 1 too
            u = z.abs().mul_(-2).exp_()
            steep = (1 + u).square_().reciprocal_().mul_(u).mul_(4 * scale)
        z.tanh_().mul_(softcap)
    top = z.amax(1)
    z -= top[:, None]
    losses = (smoothing - 1) * z.gather(1, label)[:, 0]
    if smoothing:
        losses -= smoothing * z.mean(1)
    e = z.exp_()
    sums = e.sum(1)
    exponents = sums.log()
    losses += exponents
    total = exponents + top
    if z_loss:
        losses += z_loss * total.square()
    if slopes:
        e *= ((1 + 2 * z_loss * total) / sums)[:, None]
        if smoothing:
            e -= smoothing / e.shape[1]
        e.scatter_add_(1, label, e.new_full((len(label), 1), smoothing - 1))
        e *= steep
        if weights is not None:
            e *= weights[:, None].to(dtype)
        e.masked_fill_(ignored[:, None], 0.0)
        if e is not logits:
            logits.copy_(e)
    return losses.masked_fill(ignored, 0.0)


# ---------------------------------------------------------------- client: optimisers over a bank


def _penalised_grads(params, grads, lam, ranks, keep):
    """Gradients of loss + lam_k * sum over modules of ||A_k[keep:]|| * ||Bt_k[keep:]||, in compute precision; zero sub-gradient at a zero norm.

    The added part is made in float64: squares of small rows, and the quotient of two norms, leave the range of float32.

    `params` and `grads` hold the M A factors, then the M Bt factors.
    """
    out = [g.to(compute_dtype(g.dtype), copy=True) for g in grads]
    if lam is None:
        return out
    modules = len(params) // 2
    for module in range(modules):
        a, bt = (params[module + side * modules] for side in (0, 1))
        clients, cuts = _clients(ranks, module, modules), own_list(keep, module, modules)
        for k, (row, rank) in enumerate(clients):
            tail = slice(row + min(cuts[k], rank), row + rank)
            a_tail, bt_tail = a[tail].double(), bt[tail].double()
            norm_a, norm_bt = a_tail.norm(), bt_tail.norm()
            weight = lam[k].double()
            out[module][tail] += torch.where(norm_a > 0, weight * norm_bt / norm_a * a_tail, 0.0).to(out[module].dtype)
            out[module + modules][tail] += torch.where(norm_bt > 0, weight * norm_a / norm_bt * bt_tail, 0.0).to(out[module].dtype)
    return out


def _clip_factors(grads, clip, ranks):
    """[K] float64: min(1, clip_k / (norm of client k's gradient over all modules + 1e-6)); clip_k = 0 does not clip."""
    modules = len(grads) // 2
    squares = clip.new_zeros(clip.shape, dtype=torch.float64)
    for i, grad in enumerate(grads):
        for k, (row, rank) in enumerate(_clients(ranks, i % modules, modules)):
            squares[k] += grad[row : row + rank].double().square().sum()
    factors = (clip.double() / (squares.sqrt() + 1e-6)).clamp(max=1)
    return torch.where(clip > 0, factors, 1.0)


def _client_steps(params, grads, casts, active, clip, lam, ranks, keep):
    """(list index, client, rows, gradient to use) of every active client's every factor. What the caller has stepped then goes into `casts` too."""
    modules = len(params) // 2
    grads = _penalised_grads(params, grads, lam, ranks, keep)
    factors = None if clip is None else _clip_factors(grads, clip, ranks)
    for i, grad in enumerate(grads):
        for k, (row, rank) in enumerate(_clients(ranks, i % modules, modules)):
            rows = slice(row, row + rank)
            if active[k] and rank:
                yield i, k, rows, grad[rows] if factors is None else grad[rows] * factors[k].to(grad.dtype)
                if casts:
                    casts[i][rows] = params[i][rows].to(casts[i].dtype)


def adamw_(params, grads, exp_avg, exp_avg_sq, casts, lr, step, active, clip, lam, ranks, keep, beta1, beta2, eps, weight_decay):
    """One decoupled-weight-decay Adam step (Loshchilov & Hutter 2019) of every active client, which `step` counts.

    casts: tensors like `params`, of any one type, that get the new values too; or none.   exp_avg: of the type of `params`, or bfloat16 beside float32.
    """
    step += active
    for i, k, rows, grad in _client_steps(params, grads, casts, active, clip, lam, ranks, keep):
        dtype = grad.dtype
        rate = lr[k].double()
        m, v = exp_avg[i][rows].to(dtype), exp_avg_sq[i][rows].to(dtype)
        m = m + (grad - m) * (1 - beta1)
        v = v * beta2 + grad * grad * (1 - beta2)
        exp_avg[i][rows], exp_avg_sq[i][rows] = m.to(exp_avg[i].dtype), v.to(exp_avg_sq[i].dtype)
        count = step[k].double()
        denominator = v.sqrt() / (1 - beta2**count).sqrt().to(dtype) + eps
        value = params[i][rows].to(dtype) * (1 - rate * weight_decay).to(dtype)
        params[i][rows] = (value - (rate / (1 - beta1**count)).to(dtype) * (m / denominator)).to(params[i].dtype)


def sgd_(params, grads, buffers, casts, lr, active, clip, lam, ranks, keep, momentum, weight_decay):
    """One SGD step of every active client: d = g + weight_decay * w; buffer = momentum * buffer + d; w -= lr * buffer (d without momentum).

    casts: as in `adamw_`.   buffers: as `exp_avg` there.
    """
    for i, k, rows, grad in _client_steps(params, grads, casts, active, clip, lam, ranks, keep):
        value = params[i][rows].to(grad.dtype)
        direction = grad + weight_decay * value
        if buffers:
            direction = buffers[i][rows].to(grad.dtype) * momentum + direction
            buffers[i][rows] = direction.to(buffers[i].dtype)
        params[i][rows] = (value - lr[k].to(grad.dtype) * direction).to(params[i].dtype)
