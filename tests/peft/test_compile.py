"""torch.compile over fused models and attached banks: one graph without a break, sizes as symbols, and the values of the same model without it."""

from __future__ import annotations

from contextlib import nullcontext
from types import MappingProxyType

import pytest
import torch
from kernel_cases import drawn
from model_cases import tiny_llama, token_batch
from peft import LoraConfig
from peft_cases import assert_same, filled, lora_model, outcome, several_adapters
from torch import nn
from torch._dynamo.utils import counters

import hetlora_kernels as hk
from hetlora_kernels.peft import attach, client_segments, fuse

IN_ORDER, SHUFFLED = [0, 0, 1, -1, 2], [1, 0, 2, 0, -1]  # rows of a client lie together, or not


def block(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 12, bias=False)).to(device, torch.float64)


def compiled(model, compiler="aot_eager", **options):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend=compiler, **{"fullgraph": True, **options})


def graphs():
    return counters["stats"]["unique_graphs"]


def block_outcome(run, trained, x):
    for parameter in trained:
        parameter.grad = None
    y = run(x)
    y.square().sum().backward()
    return {"y": y.detach()} | {str(i): p.grad for i, p in enumerate(trained) if p.grad is not None}


def trained_by(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_a_bank(model, device, dropout=0.0, shapes=MappingProxyType({"0": (20, 12), "2": (12, 20)})):
    """(model that carries a bank of three clients, its factors)"""
    g = drawn(3)
    bank = hk.AdapterBank(dict(shapes), ranks=[2, 3, 1], dtype=torch.float64, device=device)
    for factor in (*bank.a.values(), *bank.bt.values()):
        factor.data.copy_(torch.randn(factor.shape, generator=g, dtype=torch.float64) * 0.3)
    return attach(model, bank, scale=2.0, dropout=dropout), [*bank.a.values(), *bank.bt.values()]


def with_a_small_bank(model, device, dropout=0.0):
    return with_a_bank(model, device, dropout, {"0": (20, 12)})


def with_adapters(model, device, dropout=0.0):
    """(fused PEFT model with three adapters, one of them in one layer alone, their factors)"""
    options = {"target_modules": ["0", "2"], "lora_dropout": dropout}
    model = lora_model(model, **options)
    model.add_adapter("b", LoraConfig(r=2, **options))
    model.add_adapter("c", LoraConfig(r=7, **{**options, "target_modules": ["0"]}))
    filled(model).to(device, torch.float64).train().base_model.set_adapter(["default", "b", "c"])
    assert not fuse(model).left
    return model, trained_by(model)


# ---------------------------------------------------------------- one adapter


@pytest.mark.parametrize(
    ("compiler", "kind"),
    [("aot_eager", "plain"), ("aot_eager", "two active adapters"), ("aot_eager", "dropout"), pytest.param("inductor", "plain", marks=pytest.mark.slow)],
)
def test_one_graph(compiler, kind, device):
    """Forward and backward traced without a break; a second length of the batch too."""
    options = {"target_modules": ["0", "2"], "lora_dropout": 0.3 if kind == "dropout" else 0.0}
    model = lora_model(block(device), **options)
    if kind == "two active adapters":
        model.add_adapter("b", LoraConfig(r=2, **options))
        filled(model).to(torch.float64).base_model.set_adapter(["default", "b"])
    assert not fuse(model).left
    run = compiled(model, compiler)
    for rows in (5, 8):
        x = torch.randn(rows, 12, dtype=torch.float64, device=device)
        if kind == "dropout":
            model.train()
            assert not torch.equal(run(x), run(x))
            model.eval()
        assert_same(block_outcome(run, trained_by(model), x), block_outcome(model, trained_by(model), x))


@pytest.mark.slow
def test_a_whole_model_in_one_graph(device):
    model, tokens = lora_model(device=device), token_batch(3, 7, device)
    assert not fuse(model).left
    run = compiled(model)
    assert_same(outcome(model, tokens, lambda m, t: run(t).logits), outcome(model, tokens))


def test_a_compiled_stock_model_can_be_fused_later(device):
    model = lora_model(nn.Sequential(nn.Linear(12, 20)).to(device, torch.float64), target_modules=["0"])
    x = torch.randn(5, 12, dtype=torch.float64, device=device)
    run = compiled(model, "eager", fullgraph=False)
    expected = run(x)
    fuse(model)
    torch.testing.assert_close(run(x), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lengths_are_symbols(dropout, dynamic, device):
    """As many graphs as plain PEFT for twelve lengths: without symbols there was one for each, until torch gave up and compiled no more."""
    counts = []
    for fused in (False, True):
        model = lora_model(block(device), target_modules=["0", "2"], lora_dropout=dropout).train()
        if fused:
            assert not fuse(model).left
        run = compiled(model, dynamic=dynamic)
        for length in range(10, 22):
            x = torch.randn(2, length, 12, dtype=torch.float64, device=device)
            got = block_outcome(run, trained_by(model), x)
            if not dropout:
                assert_same(got, block_outcome(model, trained_by(model), x))
        counts.append(graphs())
    assert counts[1] == counts[0] <= 2


def test_a_bank_of_one_client(device):
    """No block is needed, and its keys are made in the graph: one after another, as eagerly."""
    model = block(device)
    bank = hk.AdapterBank({"0": (20, 12), "2": (12, 20)}, ranks=[3], dtype=torch.float64, device=device)
    for bt in bank.bt.values():
        nn.init.normal_(bt)
    attach(model, bank)
    trained = [*bank.a.values(), *bank.bt.values()]
    run = compiled(model)
    for length in (6, 7, 9, 10):
        x = torch.randn(2, length, 12, dtype=torch.float64, device=device)
        assert_same(block_outcome(run, trained, x), block_outcome(model, trained, x))
    assert graphs() == 2


def test_default_keys_are_made_in_the_graph(device):
    """On the device of x, for which the meta device stands: nothing of the host's is copied at each call. A call leaves nothing that makes another graph."""
    seg, seen = hk.Segments.from_ids([2, 2, -1, 0, 0, 0, 1]), []

    def look(graph, inputs):
        seen.extend(node for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    run = compiled(lambda x: x + seg.keys_on(x.device), look)
    for _ in range(2):
        assert run(torch.zeros(7, dtype=torch.int64, device="meta")).is_meta
    made = [node for node in seen if node.target in (torch.arange, torch.zeros)]
    assert len(made) == 4 and all(torch.device(node.kwargs["device"]).type == "meta" for node in made)  # a buffer, and the rows of each client
    assert graphs() == 1
    assert run(torch.zeros(7, dtype=torch.int64, device=device)).tolist() == [0, 1, 0, 0, 1, 2, 0]


# ---------------------------------------------------------------- several clients


@pytest.mark.parametrize(
    ("compiler", "ids", "dropout", "rung", "made"),
    [
        # Both doors with either order, without dropout, are in test_another_division_is_another_graph; with it, compiled whole, below.
        ("aot_eager", IN_ORDER, 0.0, None, with_a_bank),
        ("aot_eager", SHUFFLED, 0.3, None, with_adapters),
        # Both doors lead to the same call, so one is enough. The graph of the reference's masks is large.
        pytest.param("aot_eager", SHUFFLED, 0.3, "reference", with_a_small_bank, marks=pytest.mark.slow),
        pytest.param("inductor", SHUFFLED, 0.3, None, with_a_bank, marks=pytest.mark.slow),
    ],
)
def test_clients_of_one_batch(compiler, ids, dropout, rung, made, device):
    """No break and no eager call before, a new block and a new length each time, each client's own masks: two graphs, the second has a symbol."""
    model, trained = made(block(device), device, dropout)
    run, outcomes = compiled(model, compiler), []
    seeds = torch.arange(7, 10) if dropout else None
    inputs = [torch.randn(len(ids), length, 12, dtype=torch.float64, device=device) for length in (8, 9, 11, 12)]
    for way in (run, model):
        for step, x in enumerate(inputs):
            with hk.use_backend(rung) if rung else nullcontext(), client_segments(model, ids, seeds=seeds, step=step):
                outcomes.append(block_outcome(way, trained, x))
    assert graphs() == 2
    for got, expected in zip(outcomes[: len(inputs)], outcomes[len(inputs) :], strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("made", [with_a_bank, with_adapters])
def test_another_division_is_another_graph(made, device):
    """Never the rows of the batch before. Where each client has as many sequences as before, their places are data."""
    model, trained = made(block(device), device)
    run, counts = compiled(model), []
    x = torch.randn(5, 6, 12, dtype=torch.float64, device=device, requires_grad=True)
    divisions, outcomes = [IN_ORDER, [0, 1, 1, -1, 2], SHUFFLED, [2, 0, 1, 0, -1], [-1, 0, 2, 1, 0], [1] * 5, [-1] * 5, IN_ORDER], []
    for way in (run, model):
        for ids in divisions:
            with client_segments(model, ids):
                outcomes.append(block_outcome(way, trained, x))
            counts.append(graphs())
    assert counts[:5] == [1, 2, 3, 3, 3]
    for got, expected in zip(outcomes[: len(divisions)], outcomes[len(divisions) :], strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_an_order_that_an_eager_call_showed(dim, device):
    """Square inputs, sequence-first ones, and clients of tokens: a graph takes the order of rows that was followed before."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = block(device)

        def forward(self, x):
            return self.inner(x.transpose(0, dim)).transpose(0, dim)

    bank = hk.AdapterBank({"inner.0": (20, 12), "inner.2": (12, 20)}, ranks=[2, 3, 1], dtype=torch.float64, device=device)
    model, trained = attach(Turned(), bank, dropout=0.3), [*bank.a.values(), *bank.bt.values()]
    nn.init.normal_(bank.bt["inner.0"])
    run, outcomes, seeds = compiled(model), [], torch.arange(3)
    inputs = [torch.randn(5, length, 12, dtype=torch.float64, device=device) for length in (7, 5, 8)]
    for way in (model, run):
        for x in inputs:
            with client_segments(model, SHUFFLED, seeds=seeds):
                outcomes.append(block_outcome(way, trained, x))
    assert graphs() > 0
    for expected, got in zip(outcomes[:3], outcomes[3:], strict=True):
        assert_same(got, expected)


def test_clients_of_tokens(device):
    model, trained = with_a_bank(block(device), device, 0.3)
    run, ids = compiled(model), torch.tensor([[0, 0, 1, -1], [2, 1, 1, 0]])
    x = torch.randn(2, 4, 12, dtype=torch.float64, device=device)
    with client_segments(model, ids, seeds=torch.arange(3)):
        got = block_outcome(run, trained, x)
        assert_same(got, block_outcome(model, trained, x))


def test_rows_of_one_client_in_any_shape(device):
    """Square inputs, and rows that no dimension counts, are that client's, once an eager call has shown that the batch is the model's."""
    model, trained = with_a_bank(block(device), device, 0.3)
    run, outcomes = compiled(model), []
    for way in (model, run):
        with client_segments(model, [1], seeds=torch.arange(3)):
            outcomes.append(block_outcome(way, trained, torch.ones(1, 7, 12, dtype=torch.float64, device=device)))
            outcomes.append(block_outcome(way, trained, torch.ones(7, 12, dtype=torch.float64, device=device)[:1]))
    for one, other in zip(outcomes[:2], outcomes[2:], strict=True):
        assert_same(one, other)


def test_named_rows(device):
    model, trained = with_a_bank(block(device), device, 0.3)
    run, x = compiled(model), torch.randn(4, 3, 12, dtype=torch.float64, device=device)
    with client_segments(model, [0, 1], seeds=torch.arange(3), rows={"0": [[1, 0, 2]] * 4, "2": [0] * 12}):
        got = block_outcome(run, trained, x)
        assert_same(got, block_outcome(model, trained, x))


def test_a_square_input_that_was_not_followed_is_refused(device):
    """Of five sequences of five tokens a graph cannot tell which dimension counts the sequences: a symbol that equals the batch's size is seen."""
    model, _ = with_a_bank(block(device), device)
    run = compiled(model, fullgraph=False)
    for length in (7, 8, 9):
        with client_segments(model, IN_ORDER):
            run(torch.randn(5, length, 12, dtype=torch.float64, device=device))
    with pytest.raises(ValueError, match=r"whose the rows of layer '0' are.*run the model once without torch\.compile first"), client_segments(model, IN_ORDER):
        run(torch.randn(5, 5, 12, dtype=torch.float64, device=device))


@pytest.mark.slow
def test_a_whole_model_with_several_clients(device):
    model = several_adapters(device, base=tiny_llama(device=device, layers=1))
    model.base_model.set_adapter(["default", "b", "c"])
    assert not fuse(model).left
    run = compiled(model)
    for length in (9, 11, 12):
        tokens = token_batch(3, length, device)
        with client_segments(model, ["b", "default", "c"]):
            got = outcome(model, tokens, lambda m, t: run(t).logits)
            assert_same(got, outcome(model, tokens))
    assert graphs() == 2


@pytest.mark.slow
def test_a_compiled_layer_of_a_model_that_runs_eagerly(device):
    """Regional compilation: the model's own hooks run, its compiled layers have no break."""
    model = tiny_llama(device=device)
    names = [name for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    shapes = {name: (model.get_submodule(name).out_features, model.get_submodule(name).in_features) for name in names}
    bank = hk.AdapterBank(shapes, ranks=[2, 3], dtype=torch.float64, device=device)
    for bt in bank.bt.values():
        nn.init.normal_(bt, std=0.3)
    attach(model, bank, dropout=0.2)
    trained, losses = [*bank.a.values(), *bank.bt.values()], []
    for regional in (False, True):
        if regional:
            torch._dynamo.reset()
            for layer in model.model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        for length in (6, 7, 9):
            tokens = token_batch(3, length, device)
            with client_segments(model, [1, 0, 1], seeds=torch.arange(2), step=length):
                losses.append(block_outcome(lambda t: model(t).logits, trained, tokens))
    for expected, got in zip(losses[:3], losses[3:], strict=True):
        assert_same(got, expected)


# ---------------------------------------------------------------- what a graph refuses


def test_a_refused_call_draws_no_seeds(device):
    layout, seg = hk.RankLayout([2]), hk.Segments.from_lengths([4])
    x, weight, a, bt = (torch.randn(*shape, device=device) for shape in ((5, 6), (3, 6), (2, 6), (2, 3)))
    run = compiled(lambda x: hk.lora_linear(x, weight, None, a, bt, layout, seg, dropout=0.5), fullgraph=False)
    state = torch.get_rng_state()
    with pytest.raises(Exception, match=r"seg: expected segments over the 5 rows of x, got 4"):
        run(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert run(x[:4]).shape == (4, 3) and not torch.equal(torch.get_rng_state(), state)
