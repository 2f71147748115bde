"""Losses from hidden states: those from logits, gradients too, and no logits of a batch are ever held."""

from __future__ import annotations

import pytest
import torch
import transformers
from accuracy import assert_as_exact_as, factor_of
from architectures import ARCHITECTURES, batch_of, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from hetlora_kernels import AdapterBank
from hetlora_kernels.peft import Head, HeadError, attach, client_losses, client_segments, hidden_states, losses

WORDS, D, CLIENTS = 37, 9, 3
OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.1}]
HEADS = [{}, {"scale": 0.3}, {"softcap": 1.5}, {"scale": 2.0, "softcap": 3.0}]


def case(dtype=torch.float64, sequences=4, length=6):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(sequences, length, D, generator=generator, dtype=torch.float64).to(dtype)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((WORDS, D), (WORDS,)))
    labels = torch.randint(0, WORDS, (sequences, length), generator=generator)
    labels[0, 3:] = labels[-1, 1] = -100
    return states, weight, bias, labels, [0, 1, -1, 1][:sequences]


@pytest.fixture(params=[1, 7, 1000], ids=lambda rows: f"{rows} rows a chunk")
def chunk(request, monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", request.param * WORDS)
    return request.param


@pytest.fixture(params=[{"cpu"}, set()], ids=["labelled rows", "all rows, as on a GPU"])
def counted(request, monkeypatch):
    monkeypatch.setattr(losses, "COUNTED", request.param)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("parts", HEADS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_losses_and_gradients_are_those_from_logits(chunk, counted, options, parts, biased):
    """Of states, weight and bias, for a sum with another factor for each client."""
    states, weight, bias, labels, ids = case()
    leaves = [tensor.requires_grad_() for tensor in (states, weight, bias)[: 2 + biased]]
    factors = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    for shift, reduction in ((True, "mean"), (False, "sum")):
        head = Head(weight, bias if biased else None, **parts)
        given = {"num_clients": CLIENTS, "shift": shift, "reduction": reduction, **options}
        found = client_losses(states, labels, ids, head=head, **given)
        expected = client_losses(head.logits(states), labels, ids, **given)
        assert found[2] == 0 and bool((found[:2] > 0).all())
        grads, truth = (torch.autograd.grad((loss * factors).sum(), leaves) for loss in (found, expected))
        for own, other in ((found, expected), *zip(grads, truth, strict=True)):
            off, size = (float(tensor.detach().norm()) for tensor in (own - other, other))
            assert off <= 64 * torch.finfo(torch.float64).eps * size, "sums of at most 37 in another order"


HALVES = (torch.bfloat16, torch.float16)


def test_gradcheck(chunk, counted):
    states, weight, bias, labels, ids = case(sequences=2, length=4)
    leaves = [tensor.requires_grad_() for tensor in (states, weight, bias)]

    def loss(states, weight, bias):
        return client_losses(states, labels, ids, CLIENTS, head=Head(weight, bias, 0.7, 4.0), label_smoothing=0.1, z_loss=0.05)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize(("dtype", "widened"), [(torch.float32, False), *((dtype, widened) for dtype in HALVES for widened in (False, True))])
def test_errors_are_no_larger_than_those_from_logits(dtype, widened, monkeypatch):
    """A client for each word: 1280 losses and rows of gradients of the states, 12,000 of the weight, against float64 of the same numbers.

    widened: as on a processor where torch multiplies the type slowly, in parts of 100 words.
    """
    monkeypatch.setattr(losses, "multiplies_fast", lambda kind, _: kind != dtype or not widened)
    monkeypatch.setattr(losses, "PART", 6400)
    errors: dict[str, list[list[torch.Tensor]]] = {"states": [[], [], []], "logits": [[], [], []]}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        states, weight = torch.randn(4, 8, 64, generator=generator).to(dtype), (torch.randn(301, 64, generator=generator) / 8).to(dtype)
        labels = torch.randint(0, 301, (4, 8), generator=generator)

        def results(states, weight, form, labels=labels):
            states, weight = states.detach().requires_grad_(), weight.detach().requires_grad_()
            head = Head(weight)
            given = (states, head) if form == "states" else (head.logits(states), None)
            loss = client_losses(given[0], labels, torch.arange(32).reshape(4, 8), 32, shift=False, head=given[1])
            loss.sum().backward()
            return loss.detach().double(), states.grad.double(), weight.grad.double()

        truth = results(states.double(), weight.double(), "logits")
        for form, found in errors.items():
            for kept, own, exact in zip(found, results(states, weight, form), truth, strict=True):
                kept.append((own - exact).reshape(-1, own.shape[-1] if own.dim() > 1 else 1))
    for ours, theirs, what in zip(errors["states"], errors["logits"], ("losses", "states", "weight"), strict=True):
        assert_as_exact_as(torch.cat(ours), torch.cat(theirs), factor_of(dtype), what)


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen = max([self.seen, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


def test_no_more_logits_than_a_chunk_are_held(monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", 5 * 500)
    states, weight = torch.randn(4, 50, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    labels = torch.randint(0, 500, (4, 50))
    with Largest() as largest:
        client_losses(states, labels, [0, 1, 0, 1], 2, head=Head(weight)).sum().backward()
    assert largest.seen == weight.numel() == 4000 < 4 * 49 * 500


def test_rows_without_a_label_touch_nobody(counted):
    states, weight, bias, labels, ids = case(torch.float32)
    states = states.clone()
    states[0, 4:] = states[2] = float("nan")  # of an ignored tail, and of a sequence that is nobody's
    labels[0, 4:] = -100
    states.requires_grad_()
    weight.requires_grad_()
    found = client_losses(states, labels, ids, CLIENTS, head=Head(weight, bias), shift=False)
    found.sum().backward()
    assert bool(found.isfinite().all()) and bool(weight.grad.isfinite().all())
    assert not bool(states.grad[2].any()) and not bool(states.grad[0, 4:].any()) and bool(states.grad[1].any())


def test_a_non_finite_loss_is_its_clients_alone(counted):
    states, weight, _, labels, ids = case(torch.float32)
    clean = client_losses(states, labels, ids, CLIENTS, head=Head(weight))
    spoilt = states.clone()
    spoilt[0, 0] = float("inf")
    found = client_losses(spoilt.requires_grad_(), labels, ids, CLIENTS, head=Head(weight))
    found.sum().backward()
    assert not bool(found[0].isfinite()) and found[1] == clean[1] and bool(spoilt.grad[1:].isfinite().all())


def test_no_labels_at_all(counted):
    states, weight, _, labels, ids = case()
    found = client_losses(states.requires_grad_(), torch.full_like(labels, -100), ids, CLIENTS, head=Head(weight))
    found.sum().backward()
    assert not bool(found.any()) and not bool(states.grad.any())


@pytest.mark.parametrize("label", [-1, WORDS])
def test_a_label_that_is_no_word_is_refused(counted, label):
    """A GPU's path took the label -1 for word 0."""
    states, weight, _, labels, ids = case()
    labels[1, 2] = label
    with pytest.raises(RuntimeError, match=f"index {label} is out of bounds"):
        client_losses(states, labels, ids, CLIENTS, head=Head(weight))


def test_under_autocast_products_are_in_its_type():
    states, weight, bias, labels, ids = case(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = client_losses(states.requires_grad_(), labels, ids, CLIENTS, head=Head(weight, bias))
    expected = client_losses(states.bfloat16(), labels, ids, CLIENTS, head=Head(weight.bfloat16(), bias.bfloat16()))
    assert torch.equal(found, expected) and found.dtype == torch.float32


def bad(**changes):
    states, weight, _, labels, ids = case()
    given = {"states": states, "labels": labels, "ids": ids, "num_clients": CLIENTS, "head": Head(weight), **changes}
    return lambda: client_losses(**given)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, bad(states=torch.zeros(4, 6, D + 1).double()), r"states: expected 9 columns as the head's weight \(37, 9\), got 10"),
        (ValueError, bad(states=torch.zeros(4, 6, D)), "states: expected the dtype of the head's weight, torch.float64, got torch.float32"),
        (ValueError, bad(label_smoothing=1.0), "label_smoothing: expected a number from 0 to below 1, got 1.0"),
        (ValueError, bad(z_loss=-1.0), "z_loss: expected a finite number >= 0, got -1.0"),
        (ValueError, bad(reduction="none"), "reduction: expected 'mean' or 'sum', got 'none'"),
        (TypeError, bad(head=torch.nn.Linear(D, 37)), r"head: expected a Head, got Linear; Head\(linear\.weight, linear\.bias\) makes one"),
    ],
)
def test_bad_input_is_named(error, call, message):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------- models

CAUSAL = [name for name, found in ARCHITECTURES.items() if found.kind in ("text", "pair", "picture in text") and "classifier" not in name]
"""Models of words, whose logits are over words."""

WITHOUT = {"bart", "marian"}
"""Models that add a vector to their logits."""


def with_options(name: str):
    """Gemma's cap at a value that matters for logits of tiny models."""
    model = tiny(name)
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        model.config.final_logit_softcapping = 0.05
    return model


@pytest.mark.parametrize("name", CAUSAL)
def test_a_models_losses_are_those_of_its_logits_or_it_says_why_not(name):
    model, inputs, ids = with_options(name), batch_of(name, 3, 6), [0, 1, 0]
    with torch.no_grad():
        logits = model(**inputs).logits
        labels = torch.randint(0, 50, logits.shape[:2])
        try:
            with hidden_states(model) as hidden:
                model(**inputs)
        except HeadError as error:
            assert str(error).startswith("hidden_states: ") and "take the logits" in str(error)
            assert name in WITHOUT
            return
        assert name not in WITHOUT
        assert torch.equal(logits, model(**inputs).logits), "the model is as it was"
        found, expected = client_losses(hidden.states, labels, ids, 2, head=hidden.head), client_losses(logits, labels, ids, 2)
    assert float((found - expected).abs().max()) <= 64 * torch.finfo(logits.dtype).eps * float(expected.max())


def plain(vocab=50, **options):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **options)
    return LlamaForCausalLM(config)


def patched(model):
    model.lm_head.forward = model.lm_head.forward
    return model


def hooked(model):
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def cut(model):
    model.config.vocab_size = 49
    return model


def adapted(model):
    attach(model, AdapterBank({"lm_head": (50, 16)}, [2]))
    return model


class Twice(LlamaForCausalLM):
    def forward(self, input_ids):
        found = super().forward(input_ids)
        self.lm_head(torch.zeros(1, 16))
        return found


class Shifted(LlamaForCausalLM):
    def forward(self, input_ids):
        found = super().forward(input_ids)
        found.logits = found.logits + 1
        return found


class Never(LlamaForCausalLM):
    def forward(self, input_ids):
        return self.model(input_ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear has no output embeddings"),
        (lambda: patched(plain()), "the head of LlamaForCausalLM is no plain Linear but Linear or patched"),
        (lambda: adapted(plain()), "the head of LlamaForCausalLM is no plain Linear"),
        (lambda: hooked(plain()), "the head of LlamaForCausalLM has hooks"),
        (lambda: cut(plain()), "has 50 rows for 49 words"),
        (lambda: Twice(plain().config), "Twice calls its head 2 times"),
        (lambda: Shifted(plain().config), "Shifted does more with its logits than a known scale and softcap"),
        (lambda: Never(plain().config), "Never calls its head 0 times"),
    ],
)
def test_a_head_that_is_more_than_a_head_is_refused(make, message):
    model = make()
    before = dict(vars(model.lm_head)) if hasattr(model, "lm_head") else None
    with pytest.raises(HeadError, match=f"hidden_states: .*{message}.*take the logits"), hidden_states(model):
        model(torch.zeros(1, 3, dtype=torch.int64))
    assert before is None or ("forward" in vars(model.lm_head)) == ("forward" in before)


def test_a_second_call_that_fails_leaves_nothing_of_the_first():
    model = plain()
    with hidden_states(model) as hidden:
        model(torch.zeros(1, 3, dtype=torch.int64))
        assert hidden.states.shape == (1, 3, 16)
        with pytest.raises(IndexError):
            model(torch.full((1, 3), 50))
        with pytest.raises(RuntimeError, match="call the model inside the block first"):
            _ = hidden.states


def test_before_the_model_is_called_there_is_nothing_to_take():
    with hidden_states(plain()) as hidden, pytest.raises(RuntimeError, match="call the model inside the block first"):
        _ = hidden.states


def test_a_setting_that_changes_is_seen_again():
    """Numbers of the config are part of what is known of a model."""
    model = with_options("gemma2")
    inputs = batch_of("gemma2", 1, 4)
    caps = []
    for value in (0.05, 0.2):
        model.config.final_logit_softcapping = value
        with torch.no_grad(), hidden_states(model) as hidden:
            model(**inputs)
        caps.append(hidden.head.softcap)
    assert caps == [0.05, 0.2]


PUBLISHED = {
    "Gemma2": ("final_logit_softcapping", 30.0, (1.0, 30.0)),
    "Granite": ("logits_scaling", 6.0, (1 / 6, 0.0)),
    "Cohere": ("logit_scale", 0.0625, (0.0625, 0.0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_are_seen_in_every_type(dtype, name):
    """Gemma's cap of 30 changes a logit of 7 by 2 percent, less than a few roundings of bfloat16 allow for: small probes took it for no cap."""
    setting, value, expected = PUBLISHED[name]
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(vocab_size=50, **sizes, **{setting: value})
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    with torch.no_grad(), hidden_states(model) as hidden:
        model(input_ids=torch.arange(4)[None])
    assert (hidden.head.scale, hidden.head.softcap) == expected


def test_numbers_that_cannot_be_told_apart_are_refused():
    """In bfloat16 a cap of 10,000 is below the rounding of any probe, and no less a cap for it."""
    model = tiny("gemma2").bfloat16()
    model.config.final_logit_softcapping = 1e4
    with pytest.raises(HeadError, match="take the logits"), torch.no_grad(), hidden_states(model):
        model(**batch_of("gemma2", 1, 4))


def test_a_mixed_batch_gives_each_client_the_gradients_of_its_logits_loss():
    """With adapters of two ranks: as `model(...).logits` gives them, to the rounding of float64."""
    model = plain().double()
    bank = AdapterBank({"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.0.mlp.down_proj": (16, 32)}, [2, 5], dtype=torch.float64)
    for factor in bank.parameters():
        torch.nn.init.normal_(factor)
    attach(model, bank)
    tokens, ids = torch.randint(0, 50, (3, 7)), [0, 1, 0]

    def gradients(without):
        for factor in bank.parameters():
            factor.grad = None
        with client_segments(model, ids):
            if without:
                with hidden_states(model) as hidden:
                    model(input_ids=tokens)
                found = client_losses(hidden.states, tokens, ids, 2, head=hidden.head)
            else:
                found = client_losses(model(input_ids=tokens).logits, tokens, ids, 2)
            found.sum().backward()
        return [found.detach(), *(factor.grad for factor in bank.parameters())]

    for own, other in zip(gradients(True), gradients(False), strict=True):
        assert bool(other.any()) and float((own - other).norm()) <= 1e3 * torch.finfo(torch.float64).eps * float(other.norm())


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_widened_products_know_nothing_of_the_default_type_or_of_autocast(kind, monkeypatch):
    """The same bits with another default type, and with a backward pass that is called inside autocast."""
    monkeypatch.setattr(losses, "multiplies_fast", lambda *_: False)
    monkeypatch.setitem(losses.CHUNK, "cpu", 5 * 301)  # sums over chunks, which autocast would round
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(2, 9, 64, generator=generator).bfloat16(), torch.randn(301, 64, generator=generator).bfloat16()
    labels, outcomes = torch.randint(0, 301, (2, 9), generator=generator), []
    for changed in (False, True):
        leaves = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
        before = torch.get_default_dtype()
        torch.set_default_dtype(kind if changed else before)
        try:
            loss = client_losses(leaves[0], labels, [0, 1], 2, head=Head(leaves[1])).sum()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=changed):
                loss.backward()
        finally:
            torch.set_default_dtype(before)
        outcomes.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(own, other) for own, other in zip(*outcomes, strict=True))
