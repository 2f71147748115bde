"""`hetlora bench --static --arch 87`: what a compiled CUDA library says of its kernels, and what each should take on known devices. No GPU is needed.

Read from the machine code: registers, shared memory, spills, threads of a block, and how many instructions there are in all, on tensor cores and on integers.
They are counted where they stand, not how often they run. Occupancy follows from the architecture's limits: blocks that one multiprocessor holds at once. The
times are modelled (model.py), none was measured. Where the library cannot be read, a line says NOT READ and why, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetlora_kernels import _native

from . import model, saved

WARP, REGISTERS, SUBPARTITIONS, WARP_REGISTERS, SHARED_UNIT, SHARED_RESERVED = 32, 65536, 4, 256, 128, 1024  # the same from sm_80 to sm_120


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (CUDA C++ Programming Guide, compute capabilities)."""

    threads: int
    blocks: int
    shared: int  # bytes


LIMITS = {
    80: Limits(2048, 32, 164 << 10),
    86: Limits(1536, 16, 100 << 10),
    87: Limits(1536, 16, 164 << 10),
    89: Limits(1536, 24, 100 << 10),
    90: Limits(2048, 32, 228 << 10),
    100: Limits(2048, 32, 228 << 10),
    110: Limits(1536, 24, 228 << 10),
    120: Limits(1536, 24, 100 << 10),
}
# What launches these says so, and not the kernel. tests/native/test_static.py compares with csrc/cuda.
THREADS = {"delta_norms_kernel": 32, "tail_norms_kernel": 32, "upload_kernel": 256}
TENSOR = re.compile(r"([HIDBQO]|F16|HG|IG|QG|BG|UTC[HIQO])MMA")
# A pipe of half the lanes of a multiprocessor.
INTEGER = {"LOP3", "IADD3", "IADD", "VIADD", "PRMT", "ISETP", "SEL", "SHF", "LEA", "IMNMX", "VIMNMX", "VIADDMNMX"}


@dataclass
class Kernel:
    """One compiled kernel; bytes are of a block, local memory (stack and spills) of a thread."""

    name: str
    arch: int
    registers: int = 0
    shared: int = 0
    local: int = 0
    threads: int | None = None  # of a block; None: not stated
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def tensor(self) -> int:
        return sum(count for code, count in self.instructions.items() if TENSOR.fullmatch(code))

    @property
    def integer(self) -> int:
        return sum(count for code, count in self.instructions.items() if code in INTEGER)

    def record(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("name", "arch", "threads", "registers", "shared", "local", "tensor", "integer")}
        blocks, share, bound = occupancy(self) or (None, None, None)
        return {
            **own,
            "blocks": blocks,
            "occupancy": share,
            "bound": bound,
            "instructions": self.instructions.total() - self.instructions["NOP"],
            "by_code": dict(self.instructions),
        }


def cuobjdump() -> str | None:
    """The CUDA toolkit's, which an installation may lack, or the one that Triton brings along."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [home / "bin" for home in [*homes, Path("/usr/local/cuda")]]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which("cuobjdump") or next((str(place / "cuobjdump") for place in places if (place / "cuobjdump").is_file()), None)


def needed(tool: str | None) -> str:
    if tool is None:
        raise ValueError(
            "no cuobjdump on PATH, in CUDA_HOME/bin or beside Triton; install that of the CUDA toolkit (package cuda-cuobjdump), or Triton, which has one"
        )
    return tool


def _lines(tool: str | Path, option: str, file: Path, arch: int | None = None) -> Iterator[str]:
    """Of what the tool prints, one by one: of a library it is hundreds of megabytes. What it says beside that goes to a file, so that it never waits for us."""
    command = [str(tool), *(("-arch", f"sm_{arch}") if arch else ()), option, str(file)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            yield from process.stdout
        errors.seek(0)
        error = " ".join(errors.read().split())
    if process.returncode:
        raise ValueError(f"{Path(tool).name} {' '.join(command[1:])}: {error or f'exit status {process.returncode}'}")


def resources(tool: str | Path, file: Path, arch: int | None = None) -> Iterator[tuple[int, str, tuple[int, int, int]]]:
    """(architecture, name as compiled, (registers, bytes of shared memory, of stack and local memory)). A bare cubin has the architecture asked for, or 0."""
    place, name = arch or 0, ""
    for line in _lines(tool, "-res-usage", file, arch):
        if head := re.match(r"arch = sm_(\d+)|\s*Function (\w+):", line):
            place, name = (int(head[1]), "") if head[1] else (place, head[2])
        elif name and (own := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)):
            registers, stack, shared, local = map(int, own.groups())
            yield place, name, (registers, shared, stack + local)


def block_sizes(tool: str, file: Path, arch: int | None = None) -> Iterator[tuple[int, str, int]]:
    """(architecture, name, threads) of kernels that state the size of a block; the architecture as in `resources`."""
    place, name, asked = arch or 0, "", False
    for line in _lines(tool, "-elf", file, arch):
        if head := re.match(r"arch = sm_(\d+)|\.nv\.info\.(\w+)|\.\S+\s*$", line):
            place, name, asked = (int(head[1]), "", False) if head[1] else (place, head[2] or "", False)
        elif "Attribute:" in line:
            asked = "EIATTR_MAX_THREADS" in line or "EIATTR_REQNTID" in line
        elif name and asked and (size := re.search(r"Value:\s*(0x\w+) (0x\w+) (0x\w+)", line)):
            yield place, name, math.prod(int(own, 16) for own in size.groups())


def codes(tool: str, file: Path, arch: int | None = None) -> Iterator[tuple[int, str, str]]:
    """(architecture, name, instruction without its modifiers), for every one."""
    place, name = arch or 0, ""
    for line in _lines(tool, "-sass", file, arch):
        if head := re.match(r"\s*code for sm_(\d+)|\s*Function : (\w+)", line):
            place, name = (int(head[1]), "") if head[1] else (place, head[2])
        elif code := re.match(r"\s*/\*\w+\*/\s+(?:@!?\w+ )?(\w+)", line):
            yield place, name, code[1]


def read(file: Path, arch: int | None = None) -> dict[tuple[int, str], Kernel]:
    """{(architecture, name as compiled): kernel} of a library or an object; of one architecture, which a bare cubin needs, or of all."""
    tool = needed(cuobjdump())
    found: dict[tuple[int, str], Kernel] = {}
    for place, name, own in resources(tool, file, arch):
        if (place, name) in found:
            raise ValueError(f"{file} has {name} twice for sm_{place}, and their instructions cannot be told apart; give a file that has one of them")
        found[place, name] = Kernel(name, place, *own)

    def known(place: int, name: str, what: str) -> Kernel:
        if (place, name) not in found:
            raise ValueError(f"{file}: cuobjdump tells {what} of {name or 'a kernel without a name'}, sm_{place}, and not its registers")
        return found[place, name]

    for place, name, threads in block_sizes(tool, file, arch):
        known(place, name, "the threads").threads = threads
    for place, name, code in codes(tool, file, arch):
        known(place, name, "the instructions").instructions[code] += 1
    empty = [name for (_, name), kernel in found.items() if not kernel.instructions]
    if empty or not found:
        raise ValueError(f"{file}: cuobjdump tells no instructions of {empty[0] if empty else 'any kernel'}{f', sm_{arch}' if arch else ''}")
    for (_, name), kernel in found.items():
        kernel.threads = kernel.threads or next((count for part, count in THREADS.items() if f"{len(part)}{part}" in name), None)
    return found


def occupancy(kernel: Kernel) -> tuple[int, float, str] | None:
    """(blocks that a multiprocessor holds, their share of its threads, what bounds them); None where the block's size or the architecture is not known.

    Registers are given to a warp in units of 256, and each of the four parts of a multiprocessor has a quarter of them; a block takes 1 KB of shared memory
    beside its own.
    """
    limits = LIMITS.get(kernel.arch)
    if limits is None or kernel.threads is None:
        return None
    warps = -(-kernel.threads // WARP)
    of_a_warp = -(-kernel.registers * WARP // WARP_REGISTERS) * WARP_REGISTERS
    shared = -(-(kernel.shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    by = {
        "threads": limits.threads // WARP // warps,
        "blocks": limits.blocks,
        "registers": REGISTERS // SUBPARTITIONS // max(of_a_warp, 1) * SUBPARTITIONS // warps,
        "shared memory": limits.shared // shared,
    }
    blocks = min(by.values())
    return blocks, blocks * warps * WARP / limits.threads, min(by, key=lambda name: by[name])


def readable(names: Sequence[str]) -> list[str]:
    """As in the source, without what all have in common; as compiled where there is no c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return list(names)
    shown = subprocess.run([tool, "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"hetlora::|_kernel(?=<|$)", "", name).replace("__nv_bfloat16", "bfloat16").replace("__half", "float16") for name in shown]


def how_to_build(arch: int) -> str:
    switches = f"HETLORA_CUDA=1 HETLORA_CUDA_ARCHS={arch // 10}.{arch % 10}"
    return f"{switches} pip install --no-build-isolation . (in place: {switches} python setup.py build_ext --inplace) builds it, without a GPU, in some minutes"


def library_of(arch: int, given: Path | None) -> tuple[Path, str]:
    """The library that has code for this architecture, and the name of that code (`sm_90`, `sm_90a`); `ValueError` that says how to build it."""
    file = given or _native.FOLDER / "_C_cuda.so"
    if not file.is_file():
        reason = _native.build_info().get("cuda", {}).get("reason") if given is None else ""
        raise ValueError(f"no CUDA library {file}{f' ({reason})' if reason else ''}; {how_to_build(arch)}")
    found = {(int(number), letter) for line in _lines(needed(cuobjdump()), "-lelf", file) for number, letter in re.findall(r"\.sm_(\d+)(\w?)\.cubin", line)}
    has = [f"sm_{number}{letter}" for number, letter in sorted(found)]
    own = [name for name in has if re.fullmatch(rf"sm_{arch}\D?", name)]
    if not own:
        raise ValueError(f"{file} has {', '.join(has) or 'no code for a GPU'}, not sm_{arch}; {how_to_build(arch)}")
    if len(own) > 1:
        raise ValueError(f"{file} has {' and '.join(own)}, which cuobjdump reads as one; give --library a file that has one of them")
    return file, own[0]


class Paragraphs(argparse.HelpFormatter):
    """Each paragraph of a description in lines of the terminal's width."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(Paragraphs, self)._fill_text(part, width, indent) for part in text.strip().split("\n\n"))


def arguments(argv: list[str], prog: str, parser_type: type[argparse.ArgumentParser]) -> argparse.Namespace:
    parser = parser_type(prog=f"{prog} --static", description=__doc__, formatter_class=Paragraphs)
    parser.add_argument("--static", action="store_true", help="this, in place of measuring")
    parser.add_argument("--arch", type=int, choices=LIMITS, required=True, help="compute capability: 87 is Orin, 90 H100 and H200, 110 Thor")
    parser.add_argument("--library", type=Path, metavar="FILE", help="a library, object or cubin [default: the one that is installed]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only kernels that have one of these in their name, such as shrink")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there too, with every instruction by its name")
    options = parser.parse_args(argv)
    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"--json {options.json}: expected a file in a folder that exists")
    return options


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]


def kernel_lines(kernels: Sequence[dict[str, Any]]) -> list[str]:
    head = ("kernel", "threads", "registers", "shared", "local", "blocks", "occupancy", "bound", "instructions", "tensor", "integer")
    rows = [head]
    for own in kernels:
        share = "not known" if own["occupancy"] is None else f"{100 * own['occupancy']:.0f} %"
        cells = (own["shown"], own["threads"], own["registers"], own["shared"], own["local"], own["blocks"], share, own["bound"], own["instructions"])
        rows.append(tuple("-" if cell is None else str(cell) for cell in (*cells, own["tensor"], own["integer"])))
    return aligned(rows)


def modelled(only: Sequence[str] | None) -> list[dict[str, Any]]:
    """The rows of model.py, each with its time on every device that the model knows."""
    return [
        {
            "kernel": work.kernel,
            "load": load,
            "launches": work.launches,
            "bytes": work.bytes,
            "modelled_us": {gpu.name: work.microseconds(gpu) for gpu in model.GPUS},
            "bound": {gpu.name: work.bound(gpu) for gpu in model.GPUS},
        }
        for load, work in model.rows()
        if not only or any(name in work.kernel for name in only)
    ]


def modelled_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ["modelled microseconds", "MB", *(gpu.name for gpu in model.GPUS)]
    return aligned(
        [head, *([f"{row['kernel']}: {row['load']}", f"{row['bytes'] / 1e6:.1f}", *(f"{us:.3g}" for us in row["modelled_us"].values())] for row in rows)]
    )


def main(options: argparse.Namespace, command: str) -> int:
    refused, kernels, file, code = [], [], None, ""
    try:
        file, code = library_of(options.arch, options.library)
        kernels = [own.record() for own in read(file, options.arch).values()]
    except ValueError as error:
        refused.append(str(error))
    for own, shown in zip(kernels, readable([own["name"] for own in kernels]), strict=True):
        own["shown"] = shown
    count = f"{len(kernels)} kernels"
    if options.only:
        kernels = [own for own in kernels if any(name in own["shown"] for name in options.only)]
        count = f"{len(kernels)} of {count}"
    rows = modelled(options.only)
    if options.only and not (kernels or rows or refused):
        raise ValueError(f"--only {' '.join(options.only)}: no kernel has one of these in its name")
    kernels.sort(key=lambda own: own["shown"])
    if not refused:
        print(f"library   {file}, {code}; {count}, {sum(own['local'] > 0 for own in kernels)} of them with a stack or spills")
        print("bytes of shared memory are of a block, of local memory (stack and spills) of a thread; instructions are counted where they stand\n")
        print("\n".join(kernel_lines(kernels)))
    for reason in refused:
        print(f"NOT READ  {reason}", file=sys.stderr, flush=True)
    print("\nmodelled: arithmetic on the makers' public figures, not a measurement; see the head of benchmarks/model.py for what it assumes\n")
    print("\n".join(modelled_lines(rows)))
    if options.json:
        head = {"date": f"read {datetime.date.today()}", "suite": "static", "command": command, "measurement": False, "library": str(file) if file else None}
        text = json.dumps({**head, "build": _native.build_info(), "arch": options.arch, "kernels": kernels, "modelled": rows, "refused": refused}, indent=1)
        saved.replace(options.json, text + "\n")
        print(f"\nwritten: {options.json}")
    return 1 if refused else 0
