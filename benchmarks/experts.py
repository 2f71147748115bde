"""What adapters of stacked experts take, fused and by stock PEFT (`target_parameters`): `python -m benchmarks.experts`.

One layer of experts, forward and backward, its rows routed at random: one adapter, and eight adapters of ranks 4 to 32 in one batch against one after another.
Outputs and gradients are compared before anything is measured. Memory: what a process of its own takes at most beyond its start. Time: of the thread's
processor, paired rounds in turn, one thread. `frozen` is the layer without adapters, the floor.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hetlora_kernels.peft import client_segments, fuse

from .timing import peak_extra_mib

FORMS = ("frozen", "PEFT", "fused")
RANKS = {1: [8], 8: [4, 8, 8, 16, 16, 16, 32, 32]}
Step = Callable[[], list[Tensor]]


class Layer(nn.Module):
    """Experts, and a choice of them for every token that is made beforehand."""

    def __init__(self, chosen: argparse.Namespace, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = MixtralConfig(hidden_size=chosen.columns, intermediate_size=chosen.inner, num_local_experts=chosen.experts)
        sizes._experts_implementation = "grouped_mm"  # the fastest of transformers on a CPU
        self.experts = MixtralExperts(sizes).to(dtype)
        draw = torch.Generator().manual_seed(0)
        for parameter in self.experts.parameters():
            parameter.data = (torch.randn(parameter.shape, generator=draw) / chosen.columns**0.5).to(dtype)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x.flatten(0, 1), index.flatten(0, 1), weights.flatten(0, 1)).view(x.shape)


def step_of(form: str, clients: int, chosen: argparse.Namespace, dtype: torch.dtype) -> Step:
    """Forward and backward -> [output, gradients of the factors]. x: [clients, tokens, columns], those of each client alone."""
    model: nn.Module = Layer(chosen, dtype)
    draw = torch.Generator().manual_seed(1)
    shape = clients, chosen.tokens // clients
    x = torch.randn(*shape, chosen.columns, generator=draw).to(dtype).requires_grad_()
    scores, index = torch.rand(*shape, chosen.experts, generator=draw).topk(chosen.each, -1)
    weights = (scores / scores.sum(-1, keepdim=True)).to(dtype)
    names = [f"client{k}" for k in range(clients)]
    if form == "frozen":
        model.requires_grad_(False)
    else:
        for name, rank in zip(names, RANKS[clients], strict=True):
            config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
            if name == names[0]:
                model = get_peft_model(model, config, name, autocast_adapter_dtype=False)
            else:
                model.add_adapter(name, config)
        own = [(key, parameter) for key, parameter in model.named_parameters() if "lora_" in key]
        for _, parameter in own:
            parameter.data = (torch.randn(parameter.shape, generator=draw) / parameter.shape[1] ** 0.5).to(dtype)
        if form == "fused":
            fuse(model)
        model.base_model.set_adapter(names)
        factors = [parameter for _, parameter in own]

    def step() -> list[Tensor]:
        model.zero_grad()
        x.grad = None
        if form == "PEFT" and clients > 1:
            outs = []
            for k, name in enumerate(names):
                model.base_model.set_adapter(name)
                outs.append(model(x[k : k + 1], index[k : k + 1], weights[k : k + 1]))
                outs[-1].float().square().mean().backward()
            out = torch.cat([out.detach() for out in outs])
        elif form == "fused" and clients > 1:
            with client_segments(model, names):
                out = model(x, index, weights)
                out.float().square().mean((1, 2)).sum().backward()
        else:
            out = model(x, index, weights)
            out.float().square().mean().backward()
        assert x.grad is not None
        return [out.detach(), x.grad, *([] if form == "frozen" else [factor.grad for factor in factors if factor.grad is not None])]

    return step


def check(ours: Step, stock: Step, dtype: torch.dtype) -> None:
    """PEFT rounds W + B A to the type of W, this project only what comes out: a few roundings, larger in the gradients of small factors."""
    for one, other in zip(ours(), stock(), strict=True):
        off = float((one.double() - other.double()).norm() / other.double().norm())
        if not off <= 16 * torch.finfo(dtype).eps:
            raise SystemExit(f"{dtype}: fused experts differ from PEFT's by {off:.1e}; nothing is measured")


def peak(form: str, clients: int, options: list[str]) -> float:
    """MiB beyond the start, of a process that does one step."""
    command = [sys.executable, "-m", f"{__package__}.experts", "--of", form, "--clients", str(clients), *options]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    options = argparse.ArgumentParser(description="Time and memory of adapters on stacked experts.")
    options.add_argument("--experts", type=int, default=32, help="(default 32)")
    options.add_argument("--each", type=int, default=4, help="experts of a token (default 4)")
    options.add_argument("--columns", type=int, default=512, help="width of the hidden states (default 512)")
    options.add_argument("--inner", type=int, default=384, help="width inside an expert (default 384)")
    options.add_argument("--tokens", type=int, default=512, help="of all clients (default 512)")
    options.add_argument("--rounds", type=int, default=7, help="paired rounds (default 7)")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], help="this one alone (default both)")
    options.add_argument("--clients", type=int, choices=list(RANKS), help="so many alone (default 1 and 8)")
    options.add_argument("--of", choices=FORMS, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    if chosen.of:
        step = step_of(chosen.of, chosen.clients, chosen, getattr(torch, chosen.dtype))
        print(peak_extra_mib(step))
        return
    sizes = f"{chosen.experts} experts of {chosen.columns} -> {chosen.inner}, {chosen.each} for each of {chosen.tokens} tokens"
    print(f"{sizes}, one thread, torch {torch.__version__}\n")
    heads = "type", "clients", *FORMS, "fused / PEFT (quartiles)", "fused / frozen", "peak, PEFT", "peak, fused"
    print(f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}")
    for name in [chosen.dtype] if chosen.dtype else ["float32", "bfloat16"]:
        for clients in [chosen.clients] if chosen.clients else RANKS:
            steps = {form: step_of(form, clients, chosen, getattr(torch, name)) for form in FORMS}
            check(steps["fused"], steps["PEFT"], getattr(torch, name))
            times: dict[str, list[float]] = {form: [] for form in FORMS}
            for turn in range(chosen.rounds + 1):
                for form in FORMS if turn % 2 else reversed(FORMS):
                    start = time.thread_time()
                    steps[form]()
                    times[form].append(time.thread_time() - start)
            own = {form: values[1:] for form, values in times.items()}
            low, middle, high = statistics.quantiles((a / b for a, b in zip(own["fused"], own["PEFT"], strict=True)), n=4)
            floor = statistics.median(a / b for a, b in zip(own["fused"], own["frozen"], strict=True))
            own_sizes = [f"--{key}={getattr(chosen, key)}" for key in ("experts", "each", "columns", "inner", "tokens")]
            peaks = [f"{peak(form, clients, [*own_sizes, '--dtype', name]):.0f} MiB" for form in ("PEFT", "fused")]
            cells = [f"{1e3 * statistics.median(own[form]):.0f} ms" for form in FORMS]
            print(f"| {' | '.join([name, str(clients), *cells, f'{middle:.2f} ({low:.2f} to {high:.2f})', f'{floor:.2f}', *peaks])} |", flush=True)


if __name__ == "__main__":
    main()
