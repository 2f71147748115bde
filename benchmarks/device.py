"""`python -m benchmarks.device layer server host step`: what the kernels take on a GPU, by the device's own events, beside what model.py says.

layer: the steps of a LoRA layer one by one, the base product with and without adding, forward and backward pass. Calls rotate among inputs that no cache holds.
server: every server and optimiser op on the uploads of 16 clients. host: processor time of a call that nobody waits for; launches and copies, counted by the
profiler; whether a CUDA graph and a fresh thread give the same bits. step: time and peak memory of a co-batched training step, with logits and without.
Results are compared with the reference before anything is timed. `--device cpu` is a dry run: tiny shapes, every call once, no figure, and it says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora_kernels import _library, _native, reference
from hetlora_kernels.peft import attach, client_losses, client_segments, detach, hidden_states

from . import lora, model, server
from .run import device_facts, versions
from .shapes import TINY, elements_per_rank, power_law_ranks

DRY = "dry run: not a measurement"
SHAPES = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (1536, 1536), (1536, 8960), (8960, 1536)]
LOADS = [(8192, [16]), (2048, [16]), (8192, [64]), (8192, [4, 8, 16, 32]), (8192, [5, 7, 11, 23, 50, 9, 5, 6])]
LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]  # out, in: a block's linear layers
CACHE_BYTES = 160_000_000  # more than the L2 of any device: calls rotate among inputs of so many bytes
MODELLED = {"truncate": model.truncate, "aggregate": model.aggregate, "delta_norms": model.delta_norms, "adamw": model.adamw, "sgd": model.sgd}  # in float32

Record = dict[str, Any]
Calls = Sequence[Callable[[], object]]


class Clock:
    """Times on one device; on a CPU every call once, and None."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def device_us(self, calls: Calls, rounds: int = 30) -> float | None:
        """Median of one call between two events; the calls are taken in turn, and are queued before the first begins."""
        for call in calls:
            call()
        if not self.cuda:
            return None
        self.wait()
        times = []
        for turn in range(rounds):
            torch.cuda._sleep(200_000)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            calls[turn % len(calls)]()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def host_us(self, call: Callable[[], object], rounds: int = 200) -> float | None:
        """Lower quartile of a call that is queued and not waited for."""
        call()
        if not self.cuda:
            return None
        times = []
        for _ in range(rounds):
            self.wait()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return sorted(times)[rounds // 4] * 1e6

    def modelled_us(self, *work: model.Work) -> float | None:
        gpu = model.gpu_of(self.device) if self.cuda else None
        return model.total(work, gpu) if gpu and work else None


# ---------------------------------------------------------------- results first


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def check(name: str, *args: Any) -> None:
    """`WrongResultError` where op `name` gives or writes something else than the reference, on copies of `args`."""
    overload = getattr(torch.ops.hetlora, name).default
    written = [i for i, one in enumerate(overload._schema.arguments) if one.alias_info is not None and one.alias_info.is_write]
    found = []
    for run in (_library.call(name), getattr(reference, name)):
        own = torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, list(args))
        found.append(_leaves([run(*own), [own[i] for i in written]]))
    for position, (one, true) in enumerate(zip(*found, strict=True)):
        error = float((one.double() - true.double()).norm() / true.double().norm().clamp_min(1e-30))
        if not error <= lora.TOLERANCE[torch.bfloat16]:
            raise server.WrongResultError(f"{name}: result {position} is off by {error:.2e}; nothing is timed")


# ---------------------------------------------------------------- layer


def layer(clock: Clock) -> Iterator[Record]:
    if clock.cuda:
        yield from _ceilings(clock)
    for n, m in SHAPES if clock.cuda else [(48, 40)]:
        for tokens, ranks in LOADS if clock.cuda else [(64, [16]), (64, [3, 5])]:
            yield from _layer(clock, n, m, tokens, ranks)


def _ceilings(clock: Clock) -> Iterator[Record]:
    source = torch.ones(1 << 28, device=clock.device)
    target = torch.empty_like(source)
    for what, call, size in (("copy", lambda: target.copy_(source), 8 * len(source)), ("read", source.sum, 4 * len(source))):
        yield {"what": what, "us": clock.device_us([call]), "bytes": size}


def _layer(clock: Clock, n: int, m: int, tokens: int, ranks: list[int]) -> Iterator[Record]:
    """bfloat16 x, base and factors, equal rows for each client."""
    device, rows, clients = clock.device, sum(ranks), len(ranks)
    seg = hk.Segments.from_lengths([tokens // clients] * clients)
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=draw, device=device) * std).bfloat16()

    weight, a, bt = normal(m, n, std=n**-0.5), normal(rows, n, std=n**-0.5), normal(rows, m, std=0.1)
    copies = max(2, CACHE_BYTES // (2 * tokens * (n + m)) + 1) if clock.cuda else 1
    x, d_y = ([normal(tokens, width) for _ in range(copies)] for width in (n, m))
    y, d_x = ([torch.zeros_like(own) for own in like] for like in (d_y, x))
    scale, seeds, keys = torch.ones(clients, device=device), torch.arange(clients, device=device), seg.keys_on(device)
    lists = (ranks, list(seg.starts), list(seg.lengths))
    s, d_s = (reference.shrink(own[0], factor, scale, None, None, None, *lists, 0.0) for own, factor in ((x, a), (d_y, bt)))
    rank = rows // clients  # of the model: it knows one
    tall, wide = 2 * tokens * n, 2 * tokens * m
    head = {"shape": f"{n}->{m}", "tokens": tokens, "ranks": ranks}

    def timed(what: str, size: int, work: Sequence[model.Work], make: Callable[[int], Callable[[], object]]) -> Record:
        return {**head, "what": what, "us": clock.device_us([make(i) for i in range(copies)]), "bytes": size, "modelled_us": clock.modelled_us(*work)}

    def op(what: str, size: int, work: Sequence[model.Work], name: str, args: Callable[[int], tuple]) -> Record:
        check(name, *args(0))
        own = _library.call(name)
        return timed(what, size, work, lambda i: lambda: own(*args(i)))

    def product(adds: bool) -> list[model.Work]:
        return [model.base_product(tokens, n, m, adds)]

    yield timed("base product", tall + wide + 2 * n * m, product(False), lambda i: lambda: torch.mm(x[i], weight.t(), out=y[i]))
    yield timed("base product, adding", tall + 2 * wide + 2 * n * m, product(True), lambda i: lambda: y[i].addmm_(x[i], weight.t()))
    for p in (0.0, 0.1):
        drop = p > 0
        masked = (seeds if drop else None, keys if drop else None, None, *lists, p)
        plain = (None, None, None, *lists, 0.0)
        packed = (seeds if drop else None, keys if drop else None, None, [tokens, *(value for own in lists for value in own)], p, False)
        down, up = model.shrink(tokens, n, rank, drop), model.expand(tokens, n, rank, drop, True)
        yield op(f"shrink x, p={p}", tall, [down], "shrink", lambda i, masked=masked: (x[i], a, scale, *masked))
        yield op(f"expand_ d_x, p={p}", 2 * tall, [up], "expand_", lambda i, masked=masked: (d_x[i], d_s, a, *masked))
        sums = model.grouped_gram(tokens, n, rank, drop)
        yield op(f"grouped_gram d_a, p={p}", tall, [sums], "grouped_gram", lambda i, masked=masked: (d_s, x[i], *masked, torch.float32))
        if not drop:
            yield op("expand_ y", 2 * wide, [model.expand(tokens, m, rank, False, True)], "expand_", lambda i, plain=plain: (y[i], s, bt, *plain))
        whole = model.layer(tokens, n, m, rank, drop)
        base, need = (weight, None, None), (True, True, True, torch.float32, torch.float32)
        yield op(f"forward, p={p}", tall + 2 * wide, whole[:3], "lora_forward", lambda i, own=(a, bt, scale, *packed), base=base: (x[i], *base, *own))
        rest = (weight, a, bt, s, scale, *packed, *need)
        yield op(f"backward, p={p}", 4 * tall + 3 * wide, whole[3:], "lora_backward", lambda i, rest=rest: (d_y[i], x[i], *rest))


# ---------------------------------------------------------------- server


def server_ops(clock: Clock) -> Iterator[Record]:
    shape, name, clients = (LLAMA_8B * 8, "Llama-3.1-8B, 8 blocks", 16) if clock.cuda else (TINY, "tiny", 3)
    ranks = power_law_ranks(clients)
    for dtype in (torch.float32, torch.bfloat16):
        for op in server.operations(shape, clients, dtype, memory_gb=1000.0):
            case = server.make_case(op, name, shape, ranks, dtype, clock.device, 1000.0)
            truth = server.reference_result(case)
            own, make = next(iter(case.providers.items()))
            run = make(case.problem)
            server.check(case, own, run, truth)
            del truth
            elements, work = elements_per_rank(shape), []
            if op == "gram":
                work = [model.gram(elements, ranks, dtype.itemsize)]
            elif op in MODELLED and dtype == torch.float32:
                work = [MODELLED[op](elements, ranks)]
            record = {"what": op, "shape": name, "clients": clients, "dtype": str(dtype).removeprefix("torch."), "bytes": case.bytes}
            yield {**record, "us": clock.device_us([run[0]], 12), "host_us": clock.host_us(run[0], 12), "modelled_us": clock.modelled_us(*work)}


# ---------------------------------------------------------------- host


def host(clock: Clock) -> Iterator[Record]:
    n = 1536 if clock.cuda else 48
    for ranks in ([16], [16] * 8):
        p = lora.Problem(n, n, 64, ranks, torch.bfloat16, clock.device, 0.1)
        both = lora.ours(p, _library.backends(clock.device.type)["lora_forward"][0])[0]
        ways = {"hetlora": both, "frozen layer": lora.frozen(p), **({"PEFT": lora.peft(p)[0]} if len(ranks) == 1 else {})}
        for name, call in ways.items():
            yield {"what": f"forward and backward, {name}", "clients": len(ranks), "host_us": clock.host_us(call), **_counted(clock, call)}
        if clock.cuda:
            yield {"what": "forward and backward in a CUDA graph", "clients": len(ranks), **_captured(clock, p, both)}
        yield {"what": "forward and backward in a fresh thread", "clients": len(ranks), "same": _in_a_thread(clock, p, both)}


def _counted(clock: Clock, call: Callable[[], object]) -> Record:
    if not clock.cuda:
        return {"launches": None, "copies": None}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
        clock.wait()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"launches": len(names), "copies": sum("Memcpy" in name for name in names)}


def _gradients(clock: Clock, p: lora.Problem) -> list[Tensor]:
    clock.wait()
    return [leaf.grad.clone() for leaf in (p.x, p.a, p.bt)]


def _captured(clock: Clock, p: lora.Problem, call: Callable[[], object]) -> Record:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    want, graph = _gradients(clock, p), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for leaf in (p.x, p.a, p.bt):
        leaf.grad.zero_()
    graph.replay()
    same = all(map(torch.equal, _gradients(clock, p), want))
    return {"same": same, "us": clock.device_us([graph.replay])}


def _in_a_thread(clock: Clock, p: lora.Problem, call: Callable[[], object]) -> bool:
    call()
    want = _gradients(clock, p)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return all(map(torch.equal, _gradients(clock, p), want))


# ---------------------------------------------------------------- a training step

MODELS = {
    "qwen": (8192, {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}),
    "llama": (4096, {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "tiny": (64, {"vocab_size": 211, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
}


def step(clock: Clock) -> Iterator[Record]:
    """Random weights of the sizes of Qwen2.5-1.5B and Llama-3.1-8B, bfloat16; a float32 bank of 8 clients in one batch."""
    for name in ("qwen", "llama") if clock.cuda else ("tiny",):
        yield from _steps(clock, name)


def _steps(clock: Clock, name: str) -> Iterator[Record]:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens, sizes = MODELS[name]
    heads = {"num_key_value_heads": 8 if name == "llama" else 2}
    with torch.device(clock.device):
        config = LlamaConfig(**sizes, **heads, use_cache=False, tie_word_embeddings=True, attn_implementation="sdpa")
        base = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    length, ranks = (512, [4, 4, 8, 8, 16, 16, 32, 64]) if clock.cuda else (16, [4, 8])
    ids = torch.arange(len(ranks)).repeat_interleave(tokens // length // len(ranks))
    batch = torch.randint(0, sizes["vocab_size"], (len(ids), length), device=clock.device)
    linears = {part: one for part, one in base.named_modules() if isinstance(one, torch.nn.Linear) and part != "lm_head"}
    bank = hk.AdapterBank({part: (one.out_features, one.in_features) for part, one in linears.items()}, ranks, device=clock.device)
    optimizer = hk.AdamW(bank, lr=0.0, cast=torch.bfloat16)

    def one(form: str, p: float) -> Tensor:
        optimizer.zero_grad()
        with client_segments(base, ids, seeds=torch.arange(len(ranks)) if p else None, step=3):
            if form == "states":
                with hidden_states(base) as hidden:
                    base(input_ids=batch)
                losses = client_losses(hidden.states, batch, ids, len(ranks), head=hidden.head)
            else:
                losses = client_losses(base(input_ids=batch).logits, batch, ids, len(ranks))
            losses.sum().backward()
        optimizer.step()
        return losses.detach()

    for p in (0.0, 0.1):
        attach(base, bank, dropout=p)
        try:
            for form in ("states", "logits"):
                yield {
                    "what": f"step, loss from {form}, p={p}",
                    "model": name,
                    "tokens": batch.numel(),
                    **_of_a_step(clock, lambda form=form, p=p: one(form, p)),
                }
        finally:
            detach(base)


def _of_a_step(clock: Clock, run: Callable[[], Tensor]) -> Record:
    try:
        losses = run()
        if not bool(losses.isfinite().all()):
            raise server.WrongResultError(f"losses {losses.tolist()}; nothing is timed")
        if not clock.cuda:
            return {"us": None, "host_us": None, "peak_gb": None}
        clock.wait()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run()
        queued = time.perf_counter() - start
        return {"us": clock.device_us([run], 5), "host_us": queued * 1e6, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of memory"}


# ---------------------------------------------------------------- the command

SECTIONS: dict[str, Callable[[Clock], Iterator[Record]]] = {"layer": layer, "server": server_ops, "host": host, "step": step}


def line(record: Record) -> str:
    cells = [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in record.items() if value is not None]
    if record.get("us") and record.get("bytes"):
        cells.append(f"gb_per_s={record['bytes'] / record['us'] / 1e3:.4g}")
    return " ".join(cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run (default: cuda)")
    parser.add_argument("--json", type=Path, help="where to write; default: only print")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu makes a dry run")
    clock = Clock(torch.device(options.device))
    served = {op: rung for op, (rung, _) in hk.backends(options.device).items()}
    result: dict[str, Any] = {
        "date": f"measured {datetime.date.today()}" if clock.cuda else DRY,
        "measurement": clock.cuda,
        "command": "python -m benchmarks.device " + shlex.join(sys.argv[1:] if argv is None else argv),
        "device": device_facts(clock.device),
        "versions": versions(),
        "build": _native.build_info(),
        "backends": served,
        "results": [],
    }
    print(f"{result['date']}; the layer is served by {served['lora_forward']}", flush=True)
    for section in options.sections:
        for record in SECTIONS[section](clock):
            result["results"].append({"section": section, **record})
            print(f"{section}: {line(record)}", flush=True)
            if options.json:  # after every record, so that a run that is stopped leaves what it measured
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
