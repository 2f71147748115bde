"""The peft suite: fused layers against stock PEFT, on one layer (call overhead among them) and on training steps of whole models of random weights.

A step is zero_grad, forward, loss, backward and AdamW (lr 0, so that every step does the same work) over the adapters, in float32. With K > 1 adapters stock
PEFT takes them one after another, as it must in training; the fused model takes one mixed batch through `client_segments`. Compiled models are cut to
CUT_LAYERS layers, as compiling all of them takes minutes. Every provider's gradients are compared with stock PEFT's before anything is timed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetlora_kernels.peft import client_losses, client_segments

from .server import WrongResultError
from .shapes import chosen
from .timing import interleaved, peak_extra_bytes

RANKS = {1: [16], 8: [4, 4, 8, 8, 16, 16, 32, 64]}
BATCH, LENGTH, CUT_LAYERS = 8, 32, 2
SHORT_LENGTH = 16  # of a quick run on a CPU, where a step takes as long as its tokens are many
LAYERS = [(576, 576), (576, 1536), (1536, 576), (768, 768), (768, 3072)]  # in -> out: SmolLM2-135M, then BERT-base
ROWS = [1, 256, 1024]
YARDSTICK = "PEFT"
TOLERANCE = 1e-4  # relative, float32
STEP = "training step"
Runs = tuple[dict[str, Callable[[], None]], dict[str, nn.Module]]  # what each provider does, on which model


@dataclass(frozen=True)
class Case:
    kind: str  # "layer", or a model of MODELS
    clients: int = 1
    dropout: float = 0.0
    layers: int | None = None  # of a model
    compiled: bool = False
    length: int = LENGTH  # of each of BATCH sequences
    shape: tuple[int, int] = (0, 0)  # of a layer
    rows: int = 0

    @property
    def op(self) -> str:
        return f"{'layer, forward and backward' if self.kind == 'layer' else STEP} p={self.dropout}"

    @property
    def label(self) -> str:
        if self.kind == "layer":
            return f"{self.shape[0]}->{self.shape[1]} T={self.rows} r=16"
        return f"{self.kind} {self.layers} layers {BATCH}x{self.length}"


def smollm(layers: int, quick: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    if not quick:
        sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=True, use_cache=False))


def bert(layers: int, quick: bool) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4} if quick else {}
    return BertForMaskedLM(BertConfig(**sizes, num_hidden_layers=layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


MODELS: dict[str, tuple[Callable[[int, bool], nn.Module], int, list[str]]] = {
    "SmolLM2-135M": (smollm, 30, ["q_proj", "k_proj", "v_proj", "o_proj"]),
    "BERT-base": (bert, 12, ["query", "key", "value"]),
}


def adapted(base: nn.Module, targets: list[str], ranks: list[int], dropout: float) -> nn.Module:
    """Stock PEFT with adapters "0", "1", ... of these ranks, none of them zero; all are trained."""
    from peft import LoraConfig, get_peft_model

    def config(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)

    model = get_peft_model(base, config(ranks[0]), adapter_name="0")
    for k, rank in enumerate(ranks[1:], 1):
        model.add_adapter(str(k), config(rank))
    model.base_model.set_adapter([str(k) for k in range(len(ranks))])
    return model.train()


def twin(model: nn.Module) -> nn.Module:
    """A copy with adapters of its own and the same frozen weights: where weights lie in memory changes a step by several per cent."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def stepper(model: nn.Module, run: nn.Module, case: Case, tokens: Tensor, mixed: bool) -> Callable[[], None]:
    """One training step of `run` (the model, or its compiled form)."""
    optimiser = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_" in name], lr=0.0, weight_decay=0.0)
    clients = torch.arange(BATCH) % case.clients
    names = [str(k) for k in range(case.clients)]

    def step() -> None:
        optimiser.zero_grad()
        if case.clients == 1:
            loss_of(run, tokens).backward()
        elif mixed:
            with client_segments(model, clients):
                logits = run(input_ids=tokens).logits
                client_losses(logits, tokens, clients, case.clients, shift=False).sum().backward()
        else:
            for k, name in enumerate(names):
                model.base_model.set_adapter(name)
                loss_of(run, tokens[clients == k]).backward()
            model.base_model.set_adapter(names)  # the optimiser's parameters are all trained again
        optimiser.step()

    return step


def model_runs(case: Case, quick: bool, device: torch.device) -> Runs:
    from hetlora_kernels.peft import fuse

    make, _, targets = MODELS[case.kind]
    torch.manual_seed(0)
    base = make(case.layers or 1, quick).to(device)
    tokens = torch.randint(0, base.config.vocab_size, (BATCH, case.length), generator=torch.Generator().manual_seed(1)).to(device)
    stock = adapted(base, targets, RANKS[case.clients], case.dropout)
    models = {YARDSTICK: stock, "hetlora": twin(stock)}
    fuse(models["hetlora"])
    runs = {name: stepper(model, model, case, tokens, name == "hetlora") for name, model in models.items()}
    if case.compiled:
        for name in list(models):
            models[f"{name} compiled"] = other = twin(models[name])
            runs[f"{name} compiled"] = stepper(other, torch.compile(other), case, tokens, name == "hetlora")
    return runs, models


def layer_runs(case: Case, device: torch.device) -> Runs:
    from hetlora_kernels.peft import fuse

    n, m = case.shape
    torch.manual_seed(0)
    stock = adapted(nn.Sequential(nn.Linear(n, m)).to(device), ["0"], RANKS[1], case.dropout)
    x, d_y = torch.randn(case.rows, n, device=device), torch.randn(case.rows, m, device=device)
    models = {YARDSTICK: stock, "hetlora": twin(stock)}
    fuse(models["hetlora"])

    def runner(model: nn.Module) -> Callable[[], None]:
        layer, own = model.base_model.model[0], x.clone().requires_grad_()
        factors = [p for p in layer.parameters() if p.requires_grad]

        def run() -> None:
            own.grad = None
            for factor in factors:
                factor.grad = None
            layer(own).backward(d_y)

        return run

    return {name: runner(model) for name, model in models.items()}, models


def make_runs(case: Case, quick: bool, device: torch.device) -> Runs:
    return layer_runs(case, device) if case.kind == "layer" else model_runs(case, quick, device)


def check(case: Case, built: Runs) -> None:
    """`WrongResultError` where an adapter's gradient is not stock PEFT's; for runs without dropout."""
    runs, models = built
    truth: dict[str, Tensor] = {}
    for name, run in runs.items():
        run()
        grads = {key: p.grad for key, p in models[name].named_parameters() if "lora_" in key}
        truth = truth or {key: grad.double() for key, grad in grads.items()}
        for key, true in truth.items():
            error = float((grads[key].double() - true).norm() / true.norm())
            if not error <= TOLERANCE:
                raise WrongResultError(f"{name}: the gradient of {key} in {case.label}, K={case.clients} is off by {error:.2e}; nothing is timed")


def wanted(options: Any, device: torch.device) -> list[Case]:
    shapes, rows = ([(24, 16)], [1, 8]) if options.quick else (LAYERS[:1], ROWS[:2]) if options.short else (LAYERS, ROWS)
    found = [Case("layer", dropout=p, shape=shape, rows=count) for shape in shapes for count in rows for p in (0.0, 0.1)]
    for name, (_, layers, _) in MODELS.items():
        if options.short:
            length = SHORT_LENGTH if device.type == "cpu" else LENGTH
            found += [Case(name, k, 0.0, CUT_LAYERS, length=length) for k in RANKS if name == next(iter(MODELS))]
            continue
        found += [Case(name, k, p, 1 if options.quick else layers) for k, p in ((1, 0.0), (1, 0.1), (8, 0.0))]
        found.append(Case(name, 1, 0.0, CUT_LAYERS, not options.quick))
    return [case for case in found if chosen(options, case.kind, case.op, case.op.split(" p=")[0], "float32")]


def cases(options: Any, device: torch.device) -> Iterator[Case]:
    return iter(wanted(options, device))


def measure(case: Case, options: Any, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """One record for each provider; bytes: the weights once forward, once backward."""
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        built = make_runs(case, options.quick, device)
        check(case, built if case.dropout == 0 else make_runs(replace(case, dropout=0.0), options.quick, device))
        runs, models = built
        layer = case.kind == "layer"
        seconds, most, least = (options.seconds / 4, 200, 20) if layer else (options.seconds, 15, 3 if options.short else 15)
        timings = interleaved(runs, YARDSTICK, device, seconds, most_rounds=most, least_rounds=least, how=options.how)
    size = 2 * sum(p.numel() * p.element_size() for p in models[YARDSTICK].parameters() if not p.requires_grad)
    n, m = case.shape
    flops = 4 * case.rows * n * m + 6 * case.rows * RANKS[1][0] * (n + m) if layer else None  # as the lora suite counts them
    records = []
    for name, timing in timings.items():
        record = {"op": case.op, "shape": case.label, "clients": case.clients, "dtype": "float32", "threads": threads, "provider": name}
        record |= {"yardstick": YARDSTICK, "bytes": size, "flops": flops, "note": ""} | timing.figures(size)
        record["peak_extra_bytes"] = peak_extra_bytes(runs[name], device)
        records.append(record)
    return records
