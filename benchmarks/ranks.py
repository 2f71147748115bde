"""Large ranks: a fused layer's time over stock PEFT's: `python -m benchmarks.ranks`.

One layer of PEFT's, n = m, forward and backward. Stock PEFT and the fused layer run in processes of their own that take turns, each for SECONDS of its thread's
processor time a turn, one thread. With `--before FOLDER` a third process takes hetlora_kernels from another checkout, built there, so that a change can be
measured. A turn's ratio is of times next to each other. Gradients are compared with stock PEFT's before anything is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hetlora_kernels

# Rows, width, rank.
SIXTEEN = ((256, 1024, 128), (256, 1024, 256), (256, 1024, 512), (64, 1024, 128), (1024, 576, 128), (1024, 576, 256), (2048, 1024, 256), (64, 4096, 256))
SHAPES = {
    torch.bfloat16: (*SIXTEEN, (256, 1024, 96), (256, 1024, 64), (256, 1024, 32)),
    torch.float32: ((256, 1024, 128), (256, 1024, 256), (256, 1024, 512)),
}
SECONDS = 0.1


class Layer:
    """One layer of PEFT's in one type, stock or fused."""

    def __init__(self, rows: int, width: int, rank: int, dtype: torch.dtype, dropout: float, fused: bool) -> None:
        from peft import LoraConfig, get_peft_model

        from hetlora_kernels.peft import fuse

        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(width, width))
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
        self.model: Any = get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)
        if fused:
            fuse(self.model)
        self.layer: Any = self.model.base_model.model[0]
        self.x = torch.randn(rows, width).to(dtype).requires_grad_()
        self.d_y = torch.randn(rows, width).to(dtype)
        self.leaves = [self.x, *(p for p in self.model.parameters() if p.requires_grad)]

    def step(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.layer(self.x).backward(self.d_y)

    def gradients(self) -> list[torch.Tensor]:
        self.step()
        return [leaf.grad.double() for leaf in self.leaves if leaf.grad is not None]


def check(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    """The distance of two results that are each rounded to `dtype`, or that each have a thousand roundings."""
    stock, fused = (Layer(rows, width, rank, dtype, 0.0, own).gradients() for own in (False, True))
    bound = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    for ours, theirs in zip(fused, stock, strict=True):
        off = float((ours - theirs).norm() / theirs.norm())
        if not off <= bound:
            raise SystemExit(f"{rows} rows, {width} columns, rank {rank}, {dtype}: a gradient differs from stock PEFT's by {off:.1e}; nothing is measured")


def work(fused: bool) -> None:
    """A line of a case makes its layer, an empty line is a turn: the mean seconds of a step are printed."""
    torch.set_num_threads(1)
    layer = None
    for line in sys.stdin:
        if line.strip():
            kind, rows, width, rank, dropout = line.split()
            case = int(rows), int(width), int(rank), getattr(torch, kind)
            if fused:
                check(*case)
            layer = Layer(*case, float(dropout), fused)
            for _ in range(3):
                layer.step()
            print("ready", flush=True)
        elif layer:
            steps, spent, start = 0, 0.0, time.thread_time()
            while spent < SECONDS:
                layer.step()
                steps, spent = steps + 1, time.thread_time() - start
            print(spent / steps, flush=True)


class Worker:
    """This file in a process that imports hetlora_kernels from `folder`."""

    def __init__(self, folder: Path, kind: str) -> None:
        code = f"import runpy, sys; sys.path.insert(0, {str(folder)!r}); runpy.run_path({__file__!r}, run_name='__main__')"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, "--worker", kind]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, line: str = "") -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if not answer:
            raise SystemExit(f"a process of the measurement ended with status {self.process.wait()}")
        return answer


def measure(workers: dict[str, Worker], case: tuple[int, int, int], dtype: torch.dtype, dropout: float, rounds: int) -> str:
    kind = str(dtype).removeprefix("torch.")
    for worker in workers.values():
        worker.ask(f"{kind} {' '.join(map(str, case))} {dropout}")
    times: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds):
        for name in list(workers) if turn % 2 else reversed(workers):
            times[name].append(float(workers[name].ask()))
    cells = [kind, *map(str, case), f"{1e3 * statistics.median(times['PEFT']):.2f} ms"]
    for name in list(workers)[1:]:
        low, middle, high = statistics.quantiles([own / peft for own, peft in zip(times[name], times["PEFT"], strict=True)], n=4)
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return f"| {' | '.join(cells)} |"


def case_of(text: str) -> tuple[int, int, int]:
    rows, width, rank = map(int, text.split(","))
    return rows, width, rank


def main() -> None:
    options = argparse.ArgumentParser(description="Time of a fused layer of large rank over that of stock PEFT.")
    options.add_argument("--rounds", type=int, default=13, help="turns of each case, at least two (default 13)")
    options.add_argument("--before", type=Path, help="another checkout, built, to be measured as well")
    options.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of layer and factors (default bfloat16, then float32)")
    options.add_argument("--case", nargs="*", type=case_of, help="ROWS,WIDTH,RANK of each case (default a list)")
    options.add_argument("--dropout", type=float, default=0.0)
    options.add_argument("--worker", choices=["stock", "fused"], help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.worker:
        return work(chosen.worker == "fused")
    here = Path(hetlora_kernels.__file__).parents[1]
    folders = {"PEFT": here, **({"before": chosen.before.resolve()} if chosen.before else {}), "now": here}
    workers = {name: Worker(folder, "stock" if name == "PEFT" else "fused") for name, folder in folders.items()}
    print(f"one thread, dropout {chosen.dropout}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}\n")
    print(f"| type | rows | width | rank | PEFT |{' before / PEFT |' if chosen.before else ''} now / PEFT (quartiles) |\n|---|{'--:|' * (len(workers) + 3)}")
    try:
        for dtype in [getattr(torch, chosen.dtype)] if chosen.dtype else list(SHAPES):
            for case in chosen.case or SHAPES.get(dtype, SIXTEEN):
                print(measure(workers, case, dtype, chosen.dropout, max(2, chosen.rounds)), flush=True)
    finally:
        for worker in workers.values():
            worker.process.communicate()


if __name__ == "__main__":
    main()
