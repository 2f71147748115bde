"""hetlora_kernels.peft on real model classes: a mixed batch equals stock PEFT client by client, and nothing of it stays behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import same_bits
from model_cases import LLAMA_RANKS, VOCAB, filled_bank, peft_client, tiny_gpt2, tiny_llama, token_batch

import hetlora_kernels as hk
from hetlora_kernels.peft import attach, client_losses, client_segments, detach

IDS = [2, 0, -1, 1, 2, 0]
SCALE = [0.5, 1.0, 2.0]


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


def carried(model, device, scale=SCALE, dropout=0.0, dtype=torch.float64):
    """A copy of the model with a bank of three clients attached."""
    model = copy.deepcopy(model).to(device, dtype)
    bank = filled_bank(model, LLAMA_RANKS, dtype=dtype, device=device)
    return attach(model, bank, scale=scale, dropout=dropout), bank


def mean_loss(logits, tokens):
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))


def assert_batch_is_peft_per_client(model, bank, ids, scales, tokens, **options):
    """Logits and every factor's gradient of one mixed batch against stock PEFT, one client after another, in float64."""
    stock = copy.deepcopy(model)
    attach(model, bank, scale=scales)
    with client_segments(model, ids):
        logits = model(tokens).logits
        client_losses(logits, tokens, ids, bank.num_clients).sum().backward()
    owners = torch.tensor(ids)
    for k in range(bank.num_clients):
        mine = owners == k
        single = peft_client(stock, bank, k, scales[k], **options)
        alone = single(tokens[mine]).logits
        torch.testing.assert_close(logits[mine], alone, rtol=1e-10, atol=1e-10)
        mean_loss(alone, tokens[mine]).backward()
        theirs = {name.removesuffix(".default.weight"): p.grad for name, p in single.named_parameters() if "lora_" in name}
        for name, layout in bank.layouts.items():
            if layout.ranks[k]:
                rows = layout.rows(k)
                torch.testing.assert_close(bank.a[name].grad[rows], theirs[f"base_model.model.{name}.lora_A"], rtol=1e-8, atol=1e-12)
                torch.testing.assert_close(bank.bt[name].grad[rows].t(), theirs[f"base_model.model.{name}.lora_B"], rtol=1e-8, atol=1e-12)
    base = stock(tokens[owners == -1]).logits
    torch.testing.assert_close(logits[owners == -1], base, rtol=1e-12, atol=1e-12)
    assert float((logits[owners == 0] - stock(tokens[owners == 0]).logits).detach().abs().max()) > 0.1  # the adapters are large enough to matter


def test_a_mixed_batch_is_peft_per_client(llama, device):
    model = copy.deepcopy(llama).to(device)
    bank = filled_bank(model, LLAMA_RANKS, device=device)
    assert_batch_is_peft_per_client(model, bank, IDS, SCALE, token_batch(6, 9, device))


def test_conv1d_goes_through_lora_add(device):
    model = tiny_gpt2(device=device)
    bank = filled_bank(model, {"c_attn": [4, 1, 7], "c_fc": [2, 0, 3]}, device=device)
    assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert_batch_is_peft_per_client(model, bank, IDS, SCALE, token_batch(6, 9, device), fan_in_fan_out=True)


def test_one_client_needs_no_segments(llama, device):
    """K = 1: a plain fine-tune; the adapter that comes out is the one stock PEFT runs."""
    model = copy.deepcopy(llama).to(device)
    bank = filled_bank(model, {name: ranks[:1] for name, ranks in LLAMA_RANKS.items()}, device=device)
    single, tokens = peft_client(model, bank, 0, 0.5), token_batch(3, 7, device)
    attach(model, bank, scale=0.5)
    torch.testing.assert_close(model(tokens).logits, single(tokens).logits, rtol=1e-10, atol=1e-10)


def test_ids_per_token(llama, device):
    """A causal model whose first five positions are client 0's: they do not see what client 2 does later; constant rows equal ids per sequence."""
    model, _ = carried(llama, device)
    tokens = token_batch(2, 9, device)
    table = torch.tensor([[0] * 5 + [2] * 4, [1] * 9])
    with client_segments(model, table):
        split = model(tokens).logits
    with client_segments(model, [0, 1]):
        whole = model(tokens).logits
    torch.testing.assert_close(split[0, :5], whole[0, :5], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split[1], whole[1], rtol=1e-12, atol=1e-12)
    assert float((split[0, 5:] - whole[0, 5:]).detach().abs().max()) > 1e-2


def test_half_precision_model_with_float32_bank(llama, device):
    model = copy.deepcopy(llama).to(device, torch.bfloat16)
    bank = filled_bank(model, LLAMA_RANKS, dtype=torch.float32, device=device)
    attach(model, bank, scale=SCALE)
    tokens = token_batch(6, 9, device)
    with client_segments(model, IDS):
        logits = model(tokens).logits
        client_losses(logits, tokens, IDS, 3).sum().backward()
    assert logits.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in bank.parameters())


# ---------------------------------------------------------------- coming and going


def test_detach_leaves_the_model_as_it_was(llama, device):
    model = copy.deepcopy(llama).to(device)
    model.lm_head.weight.requires_grad_(False)
    tokens = token_batch(2, 5, device)
    classes, keys, text = [type(m) for m in model.modules()], list(model.state_dict()), repr(model)
    wanted, logits = {name: p.requires_grad for name, p in model.named_parameters()}, model(tokens).logits
    bank = filled_bank(model, LLAMA_RANKS, device=device)
    assert attach(model, bank) is model
    assert list(model.state_dict()) == keys and repr(model) == text and not any(p.requires_grad for p in model.parameters())
    with client_segments(model, [0, 1]):
        assert not same_bits(model(tokens).logits, logits)
    assert detach(model) is model
    assert [type(m) for m in model.modules()] == classes and {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert (
        list(model.state_dict()) == keys and same_bits(model(tokens).logits, logits) and not any("hetlora" in key for m in model.modules() for key in vars(m))
    )
    detach(attach(model, bank))  # and again


def test_trained_factors_are_the_banks_own(llama, device):
    model, bank = carried(llama, device)
    with client_segments(model, [0, 1]):
        model(token_batch(2, 5, device)).logits.sum().backward()
    assert all(p.grad is not None for p in bank.parameters()) and all(p.grad is None for p in model.parameters())
    before = model.state_dict()["lm_head.weight"].clone()
    hk.AdamW(bank, lr=0.1).step()
    assert same_bits(before, model.state_dict()["lm_head.weight"])


@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_frozen_factor_has_no_gradient_and_the_other_the_same_bits(llama, frozen, device):
    tokens = token_batch(2, 5, device)
    grads = []
    for freeze in (False, True):
        model, bank = carried(llama, device)
        if freeze:
            assert (bank.freeze_a() if frozen == "a" else bank.freeze_b()) is bank
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="client_segments")  # nothing is amiss with a frozen factor
            with client_segments(model, [0, 1]):
                model(tokens).logits.square().sum().backward()
        cold, warm = (bank.a, bank.bt) if frozen == "a" else (bank.bt, bank.a)
        assert all((t.grad is None) == freeze for t in cold.values())
        grads.append([t.grad for t in warm.values()])
        detach(model)
    assert all(same_bits(one, other) and bool(one.any()) for one, other in zip(*grads, strict=True))


def test_segments_end_with_their_block(llama, device):
    model, _ = carried(llama, device)
    tokens = token_batch(2, 5, device)
    with client_segments(model, [0, 1]):
        outer = model(tokens).logits
        with client_segments(model, [1, 0]):
            inner = model(tokens).logits
        assert same_bits(model(tokens).logits, outer) and not same_bits(outer, inner)
    with pytest.raises(RuntimeError, match="3 clients: run the model, and its backward pass, inside"):
        model(tokens)


# ---------------------------------------------------------------- isolation


def test_one_clients_nan_touches_nobody_else(llama, device):
    """Adapters, logits, losses and gradients of the others keep their bits."""
    tokens, outcomes = token_batch(6, 9, device), []
    for spoil in (False, True):
        model, bank = carried(llama, device, dropout=0.2)
        if spoil:
            name = "model.layers.0.self_attn.q_proj"
            bank.a[name].data[bank.layouts[name].rows(2)] = float("nan")
        with client_segments(model, IDS, seeds=torch.tensor([1, 2, 3])):
            logits = model(tokens).logits
            losses = client_losses(logits, tokens, IDS, 3)
            losses.sum().backward()
        outcomes.append((logits, losses, bank))
    (good, good_losses, clean), (bad, bad_losses, spoilt) = outcomes
    others = [i for i, k in enumerate(IDS) if k != 2]
    assert bad_losses.isnan().tolist() == [False, False, True] and same_bits(good_losses[:2], bad_losses[:2]) and same_bits(good[others], bad[others])
    for name, layout in clean.layouts.items():
        for side in ("a", "bt"):
            for k in (0, 1):
                assert same_bits(getattr(clean, side)[name].grad[layout.rows(k)], getattr(spoilt, side)[name].grad[layout.rows(k)])


# ---------------------------------------------------------------- errors


def test_attach_errors(llama, device):
    model = copy.deepcopy(llama).to(device)
    good = filled_bank(model, LLAMA_RANKS, device=device)
    name = "model.layers.0.self_attn.q_proj"
    with hk.use_backend("reference"):  # compiled kernels take no meta tensors
        on_meta = hk.AdapterBank({name: (24, 24)}, [1], device="meta")
    for bank, text in (
        (hk.AdapterBank({"model.nowhere": (24, 24)}, [1], dtype=torch.float64, device=device), r"^bank: module 'model\.nowhere' is not in the model"),
        (hk.AdapterBank({name: (24, 25)}, [1], dtype=torch.float64, device=device), rf"^bank: expected \(out, in\) = \(24, 24\) for module '{name}'"),
        (on_meta, r"^bank: expected device .* as the model, got meta"),
    ):
        with pytest.raises(ValueError, match=text):
            attach(model, bank)
        assert all(p.requires_grad for p in model.parameters()) and not any("Attached" in type(m).__name__ for m in model.modules())
    with pytest.raises(ValueError, match=r"^scale: .*\(2,\)"):
        attach(model, good, scale=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"^dropout: .*1\.5"):
        attach(model, good, dropout=1.5)
    attach(model, good)
    with pytest.raises(ValueError, match=r"^model: a bank is attached already"):
        attach(model, good)
    detach(model)
    for call in (lambda: detach(model), lambda: client_segments(model, [0]).__enter__()):
        with pytest.raises(ValueError, match=r"^model: no bank is attached"):
            call()


BAD_SEGMENTS = [
    ({"ids": [0, 3]}, ValueError, r"^ids: expected -1 \(base only\) or a client below 3, got values 0 \.\. 3"),
    ({"ids": [-2, 0]}, ValueError, r"^ids: .*-2 \.\. 0"),
    ({"ids": torch.zeros(1, 2, 2, dtype=torch.int64)}, ValueError, r"^ids: .*\(1, 2, 2\)"),
    ({"ids": 0}, ValueError, r"^ids: .*\(\)"),
    ({"ids": [0.5, 1.0]}, TypeError, r"^ids: expected integers, got torch\.float32"),
    ({"ids": [0, 1], "seeds": torch.zeros(2, dtype=torch.int64)}, ValueError, r"^seeds: .*\(3,\), got torch\.int64 \(2,\)"),
    ({"ids": [0, 1], "seeds": torch.zeros(3)}, ValueError, r"^seeds: .*float32"),
    ({"ids": [0, 1], "step": torch.zeros(2, dtype=torch.int64)}, ValueError, r"^step: expected an integer or \(3,\).*\(2,\)"),
    ({"ids": [0, 1], "step": 0.5}, ValueError, r"^step: .*float32"),
    ({"ids": [0, 1], "sequence_index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"^sequence_index: expected .*\(2,\).*\(3,\)"),
    ({"ids": [0, 1], "sequence_index": torch.zeros(2)}, ValueError, r"^sequence_index: .*float32"),
    ({"ids": [0, 1], "positions": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"^positions: only with ids per token, \[batch, seq\], got .*\(2,\)"),
    ({"ids": [[0, 1]], "positions": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, r"^positions: expected .*\(1, 2\), one per token.*\(1, 3\)"),
    ({"ids": [[0, 1]], "positions": torch.zeros(1, 2, dtype=torch.int64)}, ValueError, r"^sequence_index: expected .*\(1, 2\), one per token.*NoneType"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_SEGMENTS)
def test_client_segments_errors(llama, arguments, error, text, device):
    model, _ = carried(llama, device)
    with pytest.raises(error, match=text), client_segments(model, **arguments):
        pass


@pytest.mark.parametrize("ids", [[0, 1, 2], [[0] * 5] * 2, [[0] * 4] * 3])
def test_ids_that_do_not_fit_the_batch(llama, ids, device):
    model, _ = carried(llama, device)
    with pytest.raises(ValueError, match=r"^ids: expected one client per sequence, or per token"), client_segments(model, ids):
        model(token_batch(2, 4, device))
