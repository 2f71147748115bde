"""Compile, for one GPU architecture and without a GPU, every Triton kernel variant that a set of real launches asks for; print one JSON line each.

Run as a script, in a process of its own (TRITON_INTERPRET must not be set): `python triton_aot.py 90 [case ...]`. The launchers run on CPU tensors with
the launch itself replaced by a recorder, so what is compiled is what they would launch.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from launches import CASES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks import static

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}
_POINTERS[torch.bool] = "*i1"


def record(case: Callable[[], None]) -> list[tuple[JITFunction, tuple, dict[str, Any]]]:
    """(kernel, positional arguments, keyword arguments) of each launch of `case`."""
    seen, run = [], JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: seen.append((self, args, kwargs))
    try:
        case()
    finally:
        JITFunction.run = run
    return seen


def _specialised(parameter: Any, value: Any) -> tuple[str, bool]:
    """(type, whether it is promised to be a multiple of 16) of an argument, as a launch would have it; "constexpr" for None and 1."""
    if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], value.data_ptr() % 16 == 0
    return "i32" if abs(value) < 2**31 else "i64", value % 16 == 0 and not parameter.do_not_specialize


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict[str, Any], arch: int) -> Any:
    """The compiled kernel, specialised as a launch would."""
    constants = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    signature, attrs = dict.fromkeys(constants, "constexpr"), {}
    for position, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        signature[name], divisible = _specialised(kernel.params[position], value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif divisible:
            attrs[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers per thread, bytes of stack and local memory together (spills), and shared memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        ((_, _, (registers, static_shared, local)),) = static.resources(_TOOLS / "cuobjdump", Path(file.name))
    return {"registers": registers, "local": local, "shared": max(static_shared, compiled.metadata.shared)}


def main() -> None:
    arch, chosen = int(sys.argv[1]), sys.argv[2:] or list(CASES)
    for name in chosen:
        for kernel, args, kwargs in record(CASES[name]):
            compiled = compile_launch(kernel, args, kwargs, arch)
            wide = len(re.findall(r"\b[lds]\w*\.global[\w.:]*\.v4\.b32|\b[lds]\w*\.global[\w.:]*\.v2\.b64|\bcp\.async\.cg", compiled.asm["ptx"]))
            mma = len(re.findall(r"\bmma\.sync|\bwgmma\.mma_async|\btcgen05\.mma", compiled.asm["ptx"]))
            line = {
                "case": name,
                "kernel": kernel.fn.__name__,
                "arch": arch,
                "warps": kwargs["num_warps"],
                "wide": wide,
                "mma": mma,
                "tf32": "tf32" in compiled.asm["ptx"],
                **resources(compiled),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
