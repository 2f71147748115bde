"""quantize_rows, dequantize_rows: integers of 8 or 4 bits with one scale a row, the same bits on every rung, within half a step of what came in."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS, guarded, same_bits, scattered

import hetlora_kernels as hk
from hetlora_kernels import reference
from hetlora_kernels.ops.quantize import CODES, code_bytes

BITS = [8, 4]
LIMIT = {8: 127, 4: 7}
WIDTHS = [0, 1, 2, 7, 33, 64, 257]


def data(width, dtype, device="cpu", seed=0):
    """Rows of all magnitudes, of zeros, with one outlier, and of few integers (ties)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, width, generator=g, dtype=torch.float64)
    x[1], x[2] = 0, x[2] * 1e-3
    x[3] = torch.randint(-7, 8, (width,), generator=g)
    x[4] *= 1e4
    x[5, width // 2 :] *= 100
    return x.to(dtype).to(device)


def oracle(row, bits):
    """(codes, scale) of one float32 row in exact arithmetic, but for the roundings to float32 that the definition names."""
    largest = max((abs(value) for value in row), default=0.0)
    scale = float(torch.tensor(largest, dtype=torch.float32) / LIMIT[bits])
    if scale < 2**-126:
        return [0] * len(row), 0.0
    quotients = [float(torch.tensor(value, dtype=torch.float32) / torch.tensor(scale, dtype=torch.float32)) for value in row]
    return [round(Fraction(q)) for q in quotients], scale  # Python's round of a Fraction: ties to even


def unpacked(codes, bits, width):
    """Codes as integers, from the bytes that the layout is said to have."""
    if bits == 8:
        return codes.tolist()
    rows = []
    for row in codes.tolist():
        halves = [half for byte in row for half in (byte & 15, byte >> 4)]
        assert all(half == 0 for half in halves[width:])
        rows.append([half - 16 if half > 7 else half for half in halves[:width]])
    return rows


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", WIDTHS)
def test_codes_and_scales_are_those_of_the_definition(bits, width, device):
    rows = data(width, torch.float32, device)
    codes, scales = hk.quantize_rows(rows, bits)
    assert codes.dtype == CODES[bits] and codes.shape == (8, code_bytes(width, bits)) and scales.dtype == torch.float32
    for row, own, scale in zip(rows.tolist(), unpacked(codes, bits, width), scales.tolist(), strict=True):
        assert (own, scale) == oracle(row, bits)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
def test_round_trip_is_within_half_a_step(dtype, bits, device):
    for width in WIDTHS:
        rows = data(width, dtype, device)
        codes, scales = hk.quantize_rows(rows, bits)
        for target in (torch.float32, torch.float64):
            back = hk.dequantize_rows(codes, scales, width, dtype=target)
            error = (back.double() - rows.double()).abs()
            assert bool((error <= (0.5 + 2**-16) * scales.double()[:, None]).all())
            assert bool((back.abs().double() <= rows.abs().double().amax(1, keepdim=True) * (1 + 2**-22)).all() if width else True)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
def test_every_rung_has_the_bits_of_the_reference(dtype, bits, device):
    for width in WIDTHS:
        rows = data(width, dtype, device, seed=width)
        codes, scales = hk.quantize_rows(rows, bits)
        expected = [torch.full_like(t, 3) for t in (codes, scales)]
        reference.quantize_rows_(expected[:1], expected[1:], [rows], bits)
        assert torch.equal(codes, expected[0]) and same_bits(scales, expected[1])
        for target in FLOATS:
            back, wanted = hk.dequantize_rows(codes, scales, width, dtype=target), torch.full((8, width), 3.0, dtype=target, device=device)
            reference.dequantize_rows_([wanted], [codes], [scales], bits)
            assert same_bits(back, wanted)


@pytest.mark.parametrize("bits", BITS)
def test_small_integers_come_back_exactly(bits, device):
    limit = LIMIT[bits]
    rows = torch.arange(-limit, limit + 1, device=device).float().repeat(2, 1) * torch.tensor([[1.0], [2.0**-20]], device=device)
    codes, scales = hk.quantize_rows(rows, bits)
    assert scales.tolist() == [1.0, 2.0**-20]
    assert same_bits(hk.dequantize_rows(codes, scales, 2 * limit + 1), rows)
    half = torch.tensor([[limit, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]], device=device)
    codes, scales = hk.quantize_rows(half, bits)
    assert hk.dequantize_rows(codes, scales, 7).tolist() == [[limit, 0, 2, 2, 0, -2, -2]]  # ties to even


@pytest.mark.parametrize("bits", BITS)
def test_zero_rows_and_rows_below_the_smallest_scale(bits, device):
    tiny, q = 2.0**-126, LIMIT[bits]
    rows = torch.tensor([[0.0, -0.0], [tiny * q, -tiny], [tiny * q * 0.99, tiny], [1e-45, 0.0]], device=device)
    codes, scales = hk.quantize_rows(rows, bits)
    assert scales.tolist() == [0.0, tiny, 0.0, 0.0]
    back = hk.dequantize_rows(codes, scales, 2)
    assert back.tolist() == [[0, 0], [tiny * q, -tiny], [0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_named(dtype, bits, bad, device):
    rows = [torch.ones(3, 40, dtype=dtype, device=device) for _ in range(2)]
    rows[1][2, 33] = bad
    with pytest.raises(ValueError, match=r"^rows\[1\]: expected finite values .* in row 2$"):
        hk.quantize_rows(rows, bits)
    with pytest.raises(ValueError, match=r"^rows: expected finite values .* in row 2$"):
        hk.quantize_rows(rows[1], bits)


def test_a_scale_beyond_float32_is_refused(device):
    with pytest.raises(ValueError, match=r"^rows: expected finite values with a scale in float32, got a scale of inf in row 0"):
        hk.quantize_rows(torch.full((1, 3), 1e300, dtype=torch.float64, device=device))
    largest = torch.full((1, 3), 2.0**128 - 2.0**104, device=device)  # float32's largest number has a scale
    codes, scales = hk.quantize_rows(largest)
    assert codes.tolist() == [[127] * 3] and bool(torch.isfinite(scales).all())


@pytest.mark.parametrize("bits", BITS)
def test_modules_in_one_call_and_other_strides(bits, device):
    rows = [data(w, torch.float32, device, seed=w)[:n] for w, n in ((33, 8), (5, 0), (64, 3))]
    codes, scales = hk.quantize_rows(rows, bits)
    for own, code, scale in zip(rows, codes, scales, strict=True):
        alone = hk.quantize_rows(scattered(own), bits)
        assert torch.equal(code, alone[0]) and same_bits(scale, alone[1])
    back = hk.dequantize_rows(codes, scales, [33, 5, 64], dtype=torch.bfloat16)
    for own, code, scale in zip(back, codes, scales, strict=True):
        assert same_bits(own, hk.dequantize_rows(code.t().contiguous().t(), scale, own.shape[1], dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", BITS)
def test_out_is_written_whole_and_nothing_else(bits, device):
    codes, scales = hk.quantize_rows(data(33, torch.float32, device), bits)
    out, guards_hold = guarded((8, 33), torch.float16, device)
    out.fill_(float("nan"))
    returned = hk.dequantize_rows(codes, scales, 33, dtype=torch.float16, out=out)
    guards_hold()
    assert returned.data_ptr() == out.data_ptr() and same_bits(out, hk.dequantize_rows(codes, scales, 33, dtype=torch.float16))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1, max_size=4),
    bits=st.sampled_from(BITS),
)
def test_any_values(device, values, bits):
    rows = torch.tensor(values, device=device)
    codes, scales = hk.quantize_rows(rows, bits)
    assert list(zip(unpacked(codes, bits, 3), scales.tolist(), strict=True)) == [oracle(row, bits) for row in rows.tolist()]


X = torch.ones(2, 5)
C8, S8 = torch.ones(2, 5, dtype=torch.int8), torch.ones(2)
C4 = torch.ones(2, 3, dtype=torch.uint8)
BAD = [
    (lambda: hk.quantize_rows(X, 6), ValueError, r"^bits: expected 8 or 4, got 6"),
    (lambda: hk.quantize_rows(X[0]), ValueError, r"^rows: .*\(5,\)"),
    (lambda: hk.quantize_rows([X, X.double()]), ValueError, r"^rows\[1\]: .*float64"),
    (lambda: hk.dequantize_rows(X, S8), ValueError, r"^codes\[0\]: .*float32"),
    (lambda: hk.dequantize_rows([C8, C4], [S8, S8]), ValueError, r"^codes\[1\]: .*uint8"),
    (lambda: hk.dequantize_rows([], []), TypeError, r"^codes: "),
    (lambda: hk.dequantize_rows(C8, S8.double()), ValueError, r"^scales\[0\]: expected float32 of shape \(2,\).*float64"),
    (lambda: hk.dequantize_rows([C8, C8], [S8]), ValueError, r"^scales: expected 2 tensors.*got 1"),
    (lambda: hk.dequantize_rows(C4, S8), ValueError, r"^width: expected the number of columns.*None"),
    (lambda: hk.dequantize_rows(C4, S8, 7), ValueError, r"^width: .*3 bytes a row in 4 bits, got 7"),
    (lambda: hk.dequantize_rows(C8, S8, 4), ValueError, r"^width: .*5 bytes a row in 8 bits, got 4"),
    (lambda: hk.dequantize_rows([C8], [S8], [5, 5]), ValueError, r"^width: expected one number or 1"),
    (lambda: hk.dequantize_rows(C8, S8, dtype=torch.int8), TypeError, r"^dtype: .*int8"),
    (lambda: hk.dequantize_rows(C8, S8, out=torch.ones(2, 4)), ValueError, r"^out\[0\]: .*\(2, 5\).*\(2, 4\)"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
