"""Run cases on a library built by emulated.py, in every schedule asked for; print {schedule: {case: failure or null}} as JSON.

`emulator_worker.py LIBRARY f32,bf16 SHAPES fwd,rev,rand,warp [case ...]`, with AddressSanitizer preloaded; SHAPES is small, large or edge of cases.py,
lora-NAME of lora_cases.py, or `checks` for those of layer_checks.py. A memory error ends the process; memory that an op allocates is full of NaN.

Without arguments: the same for each line of standard input, a JSON list of the arguments and of the files for both outputs, in a process of its own that is
forked with everything imported; its exit status is a line of the output. Importing takes longer than most cases.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from functools import partial

import torch
from cases import DTYPES, SHAPES, cases, failures
from layer_checks import CHECKS, Check
from lora_cases import LORA_SHAPES, lora_cases

from hetlora_kernels._library import SCHEMAS


def checks_of(shapes: str) -> dict[str, Check]:
    if shapes == "checks":
        return CHECKS
    named = lora_cases(LORA_SHAPES[shapes.removeprefix("lora-")]) if shapes.startswith("lora-") else cases(SHAPES[shapes])
    return {name: partial(failures, case) for name, case in named.items()}


def run(library: str, dtypes: str, shapes: str, schedules: str, *names: str) -> None:
    namespace = torch.library.Library("hetlora_emulated", "DEF")
    for name, schema in SCHEMAS.items():
        namespace.define(name + schema)
    torch.ops.load_library(library)
    ops = {name: getattr(torch.ops.hetlora_emulated, name).default for name in SCHEMAS}
    every, report = checks_of(shapes), {}
    for schedule in schedules.split(","):
        os.environ["HETLORA_SCHEDULE"] = schedule
        report[schedule] = {}
        for dtype in dtypes.split(","):
            for name in names or every:
                try:
                    report[schedule][f"{name}-{dtype}"] = every[name](ops, DTYPES[dtype])
                except RuntimeError as error:
                    report[schedule][f"{name}-{dtype}"] = str(error).splitlines()[0]
    print(json.dumps(report))


def serve() -> None:
    for line in sys.stdin:
        *arguments, out, errors = json.loads(line)
        child = os.fork()
        if child == 0:
            for file, own in ((out, sys.stdout), (errors, sys.stderr)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), own.fileno())
            try:
                run(*arguments)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if sys.argv[1:]:
        run(*sys.argv[1:])
    else:
        serve()


if __name__ == "__main__":
    main()
