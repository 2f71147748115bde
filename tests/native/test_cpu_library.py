"""`_C_cpu.so` below the public functions: what it needs of torch, what it does with arguments that Python would have refused, threads and memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
from torch import Tensor

from hetlora_kernels import _library, _native
from hetlora_kernels.ops.quantize import CODES, code_bytes

pytestmark = pytest.mark.skipif("cpu" not in _library.available(), reason=f"no CPU library: {_library.absent().get('cpu')}")

ops = torch.ops.hetlora
RANKS = [4, 0, 1, 33, 3, 7]
WIDTHS = [577, 3000]
# What torch 2.10 exports of its stable interface and this library uses, apart from the getters of types, devices, layouts and memory formats.
STABLE = """aoti_torch__reinterpret_tensor aoti_torch_abi_version aoti_torch_cpu_addmm_out aoti_torch_cpu_mm_out aoti_torch_delete_library_object
aoti_torch_delete_tensor_object aoti_torch_empty_strided aoti_torch_get_device_type aoti_torch_get_dim aoti_torch_get_dtype aoti_torch_get_numel
aoti_torch_get_size aoti_torch_get_stride aoti_torch_is_contiguous aoti_torch_library_def aoti_torch_library_init_fragment
aoti_torch_library_init_impl aoti_torch_new_tensor_handle torch_call_dispatcher torch_delete_list torch_get_const_data_ptr torch_get_mutable_data_ptr
torch_get_num_threads torch_library_impl torch_list_get_item torch_list_push_back torch_list_size torch_new_list_reserve_size torch_parallel_for""".split()
GETTERS = re.compile(r"aoti_torch_(device_type|dtype|layout|memory_format)_\w+")


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_the_library_needs_nothing_of_torch_beyond_the_stable_interface_of_2_10():
    shown = subprocess.run(["nm", "-D", "--undefined-only", _native.FOLDER / "_C_cpu.so"], capture_output=True, text=True, check=True).stdout
    needed = {line.split()[-1].partition("@")[0] for line in shown.splitlines()}
    of_torch = {name for name in needed if name.startswith(("aoti_", "torch_", "_ZN2at", "_ZN3c10", "_ZN5torch", "_ZNK2at", "_ZNK3c10", "Py", "_Py"))}
    assert {name for name in of_torch if not GETTERS.fullmatch(name)} <= set(STABLE)
    assert "torch_parallel_for" in of_torch


def rows(dtype: torch.dtype = torch.float32, make: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    return [make(torch.randn(sum(RANKS), width).to(dtype)) for width in WIDTHS]


def runs(dtype: torch.dtype, make: Callable[[Tensor], Tensor] = lambda t: t) -> dict[str, list[Tensor]]:
    """{op: everything it wrote or returned} on the same data each time; `make` places each tensor."""
    torch.manual_seed(3)
    count, modules = len(RANKS), len(WIDTHS)
    ranks, keep = RANKS * modules, [2] * count * modules
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    lr, clip, lam = torch.rand(3, count, dtype=torch.float64).unbind()
    active, step = torch.tensor([True, True, False, True, True, True]), torch.arange(1, count + 1)
    a, bt = rows(dtype, make), rows(dtype, make)
    weights = torch.rand(count, modules).to(wide)
    bank = [make(torch.randn(40, width).to(dtype)) for width in WIDTHS]
    packed, dense, total = rows(torch.bfloat16, make), [make(torch.empty(count, 40, w, dtype=dtype)) for w in WIDTHS], [make(t.to(wide)) for t in bank]
    merged, kept = [make(torch.empty(40, w, dtype=torch.float16)) for w in WIDTHS], [make(torch.randn(40, w).to(dtype)) for w in WIDTHS]
    ops.truncate_(packed, bank, ranks, False)
    ops.truncate_(dense, bank, ranks, True)
    ops.aggregate_(merged, a, weights, kept, ranks, True)
    ops.accumulate_(total, [t[:33] for t in a], weights[0].contiguous())
    out = {"truncate_": packed + dense, "aggregate_": merged, "accumulate_": total}
    out["quantize_rows_"], out["dequantize_rows_"] = [], []
    for bits, kind in CODES.items():
        codes = [make(torch.empty(40, code_bytes(w, bits), dtype=kind)) for w in WIDTHS]
        scales, back = [make(torch.empty(40)) for _ in WIDTHS], [make(torch.empty(40, w, dtype=dtype)) for w in WIDTHS]
        ops.quantize_rows_(codes, scales, kept, bits)
        ops.dequantize_rows_(back, codes, scales, bits)
        out["quantize_rows_"] += codes + scales
        out["dequantize_rows_"] += back
    out["gram"] = ops.gram(a, ranks, False) + ops.gram(a, ranks, True)
    out["delta_norms"] = [ops.delta_norms(a, bt, ranks, exact) for exact in (False, True)]
    out["tail_norms"] = [ops.tail_norms(a, ranks, keep)]
    logits, labels = rows(dtype, make), make(torch.randint(0, min(WIDTHS), (sum(RANKS),)))
    labels[3] = -100
    factor = make(torch.rand(sum(RANKS)).to(wide))
    out["cross_entropy_"] = [ops.cross_entropy_(t, labels, factor, 0.7, cap, 0.1, 0.05, True) for t, cap in zip(logits, (0.0, 3.0), strict=True)] + logits
    params, grads, m, v = ([make(t) for t in rows(dtype) + rows(dtype)] for _ in range(4))
    for t in v:
        t.abs_()
    ops.adamw_(params, grads, m, v, [], lr, step, active, clip, lam, ranks, keep, 0.9, 0.99, 1e-8, 0.1)
    out["adamw_"] = [t.clone() for t in params + m + v]
    ops.sgd_(params, grads, m, [], lr, active, clip, lam, ranks, keep, 0.9, 0.1)
    out["sgd_"] = [t.clone() for t in params + m]
    if dtype == torch.float32:
        half = [make(t.to(torch.bfloat16)) for t in m]
        ops.adamw_(params, grads, half, v, [], lr, step, active, clip, lam, ranks, keep, 0.9, 0.99, 1e-8, 0.1)
        ops.sgd_(params, grads, half, [], lr, active, clip, lam, ranks, keep, 0.9, 0.1)
        out["moments in bfloat16"] = params + half
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_do_not_depend_on_the_number_of_threads(dtype, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = runs(dtype)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for name, tensors in runs(dtype).items():
                assert all(torch.equal(t.view(torch.uint8), u.view(torch.uint8)) for t, u in zip(tensors, alone[name], strict=True)), name
    finally:
        torch.set_num_threads(before)


def at_page_end(values: Tensor) -> Tensor:
    """A copy whose last byte is the last before a page that must not be touched."""
    size, page = values.numel() * values.element_size(), mmap.PAGESIZE
    pages = (size + page - 1) // page
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + pages * page), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=pages * page - size).view(values.shape).copy_(values)


def main() -> None:
    torch.set_num_threads(2)
    dtype = getattr(torch, sys.argv[1])
    plain, guarded = runs(dtype), runs(dtype, at_page_end)
    for name, tensors in plain.items():
        if not all(torch.equal(t.view(torch.uint8), u.contiguous().view(torch.uint8)) for t, u in zip(tensors, guarded[name], strict=True)):
            sys.exit(f"{name} differs at another address")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs mprotect")
def test_nothing_beyond_a_buffer_is_read_or_written(dtype):
    """Every tensor ends where a page begins that faults when touched; in a process of its own, since the failure is a crash."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_native.FOLDER.parent), str(root), str(root / "tests")])}
    done = forked.python(f"import runpy, sys; sys.argv = ['', {dtype!r}]; runpy.run_path({__file__!r}, run_name='__main__')", root, environment)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"


def f(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


LR, STEP, ON = f(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
BAD = {
    "ranks beyond the rows": lambda: ops.aggregate_([f(3, 4)], [f(2, 4)], f(1, 1), [], [3], False),
    "a negative rank": lambda: ops.gram([f(2, 4)], [-1], False),
    "ranks whose sum overflows": lambda: ops.gram([f(2, 4)], [2**62, 2**62, 2], False),
    "ranks that are no multiple of the modules": lambda: ops.gram([f(2, 4), f(2, 4)], [2, 2, 2], False),
    "a bank that is too short": lambda: ops.truncate_([f(3, 4)], [f(2, 4)], [3], False),
    "another width": lambda: ops.truncate_([f(2, 5)], [f(2, 4)], [2], False),
    "too few planes": lambda: ops.truncate_([f(1, 2, 4)], [f(2, 4)], [2, 2], True),
    "dense where packed is written": lambda: ops.truncate_([f(1, 2, 4)], [f(2, 4)], [2], False),
    "one dimension": lambda: ops.gram([f(4)], [1], False),
    "too few modules": lambda: ops.truncate_([], [f(2, 4)], [2], False),
    "integers": lambda: ops.tail_norms([torch.zeros(2, 4, dtype=torch.int32)], [2], [0]),
    "too few weights": lambda: ops.aggregate_([f(2, 4)], [f(2, 4)], f(0), [], [2], False),
    "a keep of another shape": lambda: ops.aggregate_([f(2, 4)], [f(2, 4)], f(1, 1), [f(1, 4)], [2], False),
    "an upload taller than the total": lambda: ops.accumulate_([f(2, 4)], [f(3, 4)], f(1)),
    "a total in half precision": lambda: ops.accumulate_([f(2, 4, dtype=torch.float16)], [f(2, 4)], f(1)),
    "b of other rows": lambda: ops.delta_norms([f(2, 4)], [f(3, 4)], [2], False),
    "a place past the distinct lists": lambda: ops.tail_norms([f(2, 4), f(2, 4)], [-1, 0, 1, 2], [0, 0]),
    "a negative place": lambda: ops.tail_norms([f(2, 4), f(2, 4)], [-1, 0, -1, 2], [0, 0]),
    "half a list": lambda: ops.gram([f(2, 4), f(2, 4)], [-2, 0, 0, 1, 1, 1], False),
    "more clients than integers": lambda: ops.gram([f(2, 4), f(2, 4)], [-(2**63), 0, 0, 2], False),
    "a negative cut": lambda: ops.tail_norms([f(2, 4)], [2], [-1]),
    "too few cuts": lambda: ops.tail_norms([f(2, 4)], [2], []),
    "an odd number of factors": lambda: ops.sgd_([f(2, 4)], [f(2, 4)], [], [], LR, ON, None, None, [2], [], 0.0, 0.0),
    "factors of different rows": lambda: ops.sgd_([f(2, 4), f(3, 4)], [f(2, 4), f(3, 4)], [], [], LR, ON, None, None, [2], [], 0.0, 0.0),
    "gradients of another shape": lambda: ops.sgd_([f(2, 4), f(2, 4)], [f(2, 4), f(2, 3)], [], [], LR, ON, None, None, [2], [], 0.0, 0.0),
    "a small state": lambda: ops.adamw_(
        [f(2, 4), f(2, 4)], [f(2, 4), f(2, 4)], [f(2, 4), f(1, 4)], [f(2, 4), f(2, 4)], [], LR, STEP, ON, None, None, [2], [], 0.9, 0.9, 1e-8, 0.0
    ),
    "wide moments": lambda: ops.sgd_(
        [f(2, 4), f(2, 4)], [f(2, 4), f(2, 4)], [f(2, 4, dtype=torch.float64)] * 2, [], LR, ON, None, None, [2], [], 0.9, 0.0
    ),
    "moments of two types": lambda: ops.sgd_(
        [f(2, 4), f(2, 4)], [f(2, 4), f(2, 4)], [f(2, 4), f(2, 4, dtype=torch.bfloat16)], [], LR, ON, None, None, [2], [], 0.9, 0.0
    ),
    "a learning rate for nobody": lambda: ops.sgd_([f(2, 4), f(2, 4)], [f(2, 4), f(2, 4)], [], [], LR[:0], ON, None, None, [2], [], 0.0, 0.0),
    "codes that are too narrow": lambda: ops.quantize_rows_([torch.zeros(2, 4, dtype=torch.uint8)], [f(2)], [f(2, 9)], 4),
    "codes of another type": lambda: ops.dequantize_rows_([f(2, 4)], [f(2, 4)], [f(2)], 8),
    "too few scales": lambda: ops.dequantize_rows_([f(2, 4)], [torch.zeros(2, 4, dtype=torch.int8)], [f(1)], 8),
    "bits of no code": lambda: ops.quantize_rows_([torch.zeros(2, 4, dtype=torch.int8)], [f(2)], [f(2, 4)], 6),
    "a word past the last": lambda: ops.cross_entropy_(f(1, 4), torch.tensor([4]), None, 1.0, 0.0, 0.0, 0.0, True),
    "a negative word": lambda: ops.cross_entropy_(f(1, 4), torch.tensor([-1]), None, 1.0, 0.0, 0.0, 0.0, True),
    "too few labels": lambda: ops.cross_entropy_(f(2, 4), torch.tensor([1]), None, 1.0, 0.0, 0.0, 0.0, True),
    "too few weights of rows": lambda: ops.cross_entropy_(f(2, 4), torch.tensor([1, 1]), f(1), 1.0, 0.0, 0.0, 0.0, True),
    "logits that do not lie row by row": lambda: ops.cross_entropy_(f(4, 4).t(), torch.zeros(4, dtype=torch.int64), None, 1.0, 0.0, 0.0, 0.0, True),
    "a regulariser without cuts": lambda: ops.sgd_([f(2, 4), f(2, 4)], [f(2, 4), f(2, 4)], [], [], LR, ON, None, LR, [2], [], 0.0, 0.0),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_would_leave_a_buffer_are_an_error(case):
    with pytest.raises(RuntimeError):
        BAD[case]()


def test_the_rest_of_a_wrong_call_is_not_written():
    out = [f(3, 4), f(3, 4)]
    with pytest.raises(RuntimeError):
        ops.truncate_(out, [f(3, 4) + 1, f(2, 4) + 1], [3, 3], False)
    assert not out[0].any() and not out[1].any()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """By address arithmetic: untouched pages of anonymous memory read as zero and cost nothing."""
    width = 2**30 + 8
    memory = mmap.mmap(-1, 2 * width * 2)
    big = torch.frombuffer(memory, dtype=torch.float16).view(2, width)
    big[1, width - 1], big[0, 5] = 3, 4
    assert ops.tail_norms([big], [2], [0]).tolist() == [[5.0]] and ops.tail_norms([big], [2], [1]).tolist() == [[3.0]]
    total = torch.zeros(1, 1)
    ops.accumulate_([total], [big.view(-1)[-1:].view(1, 1)], torch.ones(1))
    assert total.item() == 3


if __name__ == "__main__":
    main()
