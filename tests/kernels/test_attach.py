"""hetlora_kernels.peft on real model classes: a mixed batch equals stock PEFT client by client, and nothing of it stays behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import kept, same_bits
from model_cases import LLAMA_RANKS, VOCAB, filled_bank, peft_client, tiny_gpt2, tiny_llama, token_batch
from torch import nn

import hetlora_kernels as hk
from hetlora_kernels.peft import SEQUENCE_STRIDE, attach, client_losses, client_segments, detach, layer_seeds

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


# ---------------------------------------------------------------- dropout


def drop_logits(model, tokens, ids, **options):
    with client_segments(model, ids, seeds=torch.tensor([11, 22, 33]), **options):
        return model(tokens).logits


def test_when_dropout_is_on(llama, device):
    """Seeds given: in any mode. None: in training mode only, from torch's generator."""
    model, _ = carried(llama, device, dropout=0.4)
    tokens = token_batch(6, 9, device)
    with client_segments(model, IDS):
        plain = model(tokens).logits
        model.train()
        torch.manual_seed(1)
        first, second = model(tokens).logits, model(tokens).logits
        torch.manual_seed(1)
        assert same_bits(first, model(tokens).logits) and not same_bits(first, second) and not same_bits(first, plain)
    seeded = drop_logits(model, tokens, IDS)
    model.eval()
    assert same_bits(seeded, drop_logits(model, tokens, IDS)) and not same_bits(seeded, plain)
    assert not same_bits(seeded, drop_logits(model, tokens, IDS, step=1))
    assert same_bits(drop_logits(model, tokens, IDS, step=1), drop_logits(model, tokens, IDS, step=torch.tensor([1, 1, 1])))
    own_steps = drop_logits(model, tokens, IDS, step=torch.tensor([0, 1, 0]))
    changed = [not same_bits(own_steps[i], seeded[i]) for i in range(6)]
    assert changed == [k == 1 for k in IDS]


class Twins(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.left, self.middle, self.right = (nn.Linear(width, width, bias=False) for _ in range(3))
        for layer in (self.left, self.middle, self.right):
            nn.init.zeros_(layer.weight)

    def forward(self, x):
        return self.left(x), self.middle(x), self.right(x)


def test_masks_by_module_step_and_sequence(device):
    """Identity adapters show each layer's mask: that of layer_seeds(seed, step, module) and the row key sequence * 2^20 + position."""
    width, length = 19, 3
    model = Twins(width).to(device)
    shapes = {name: (width, width) for name in ("left", "middle", "right")}
    bank = hk.AdapterBank(shapes, [width, width], device=device)
    for factor in bank.parameters():
        factor.data.copy_(torch.eye(width).repeat(2, 1))
    attach(model, bank, dropout=0.5)
    seeds, ids, order = torch.tensor([5, -6]), [1, 0, 1], [0, 0, 1]
    for step in (0, 3):
        with client_segments(model, ids, seeds=seeds, step=step):
            outputs = model(torch.ones(3, length, width, device=device))
        for module, out in enumerate(outputs):
            own = layer_seeds(seeds, step, module).tolist()
            for row, (k, sequence) in enumerate(zip(ids, order, strict=True)):
                keys = [sequence * SEQUENCE_STRIDE + t for t in range(length)]
                assert torch.equal(out[row].cpu() != 0, kept(own[k], keys, width, 0.5))


def test_micro_batches_have_the_masks_of_the_whole(llama, device):
    """Logits and gradients of a step do not depend on how its batch was split, given each sequence's index in the step batch."""
    model, bank = carried(llama, device, dropout=0.4)
    ids, tokens = [0, 2, 0, 0, 2], token_batch(5, 9, device)
    index = torch.tensor([0, 0, 1, 2, 1])

    def grads(parts, indexed):
        for p in bank.parameters():
            p.grad = None
        logits = []
        for part in parts:
            own = [ids[i] for i in part]
            with client_segments(model, own, seeds=torch.tensor([11, 22, 33]), step=4, sequence_index=index[part] if indexed else None):
                logits.append(model(tokens[part]).logits)
                client_losses(logits[-1], tokens[part], own, 3, reduction="sum").sum().backward()
        return torch.cat(logits), [p.grad.clone() for p in bank.parameters()]

    whole, split = grads([[0, 1, 2, 3, 4]], False), grads([[0, 1, 2], [3, 4]], True)
    torch.testing.assert_close(split[0], whole[0], rtol=1e-10, atol=1e-10)
    for one, other in zip(split[1], whole[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
    forgotten = grads([[0, 1, 2], [3, 4]], False)
    assert float((forgotten[0][3:] - whole[0][3:]).detach().abs().max()) > 1e-3


def test_batch_mates_and_padding_do_not_change_masks(llama, device):
    model, _ = carried(llama, device, dropout=0.4)
    tokens = token_batch(3, 6, device)
    alone = drop_logits(model, tokens, [1, 0, 1])
    among = drop_logits(model, torch.cat((token_batch(2, 6, device, seed=1), tokens)), [2, -1, 1, 0, 1])
    torch.testing.assert_close(among[2:], alone, rtol=1e-10, atol=1e-10)
    padded = torch.cat((tokens, torch.zeros(3, 4, dtype=torch.int64, device=device)), 1)
    attention = torch.cat((torch.ones(3, 6), torch.zeros(3, 4)), 1).to(device)
    with client_segments(model, [1, 0, 1], seeds=torch.tensor([11, 22, 33])):
        longer = model(padded, attention_mask=attention).logits
    torch.testing.assert_close(longer[:, :6], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("known", [False, True])
def test_packed_rows_have_the_logits_gradients_and_masks_of_rows_of_their_own(llama, known, device):
    """Two rows of three sequences and padding.   known: whether an earlier call showed the layers' order, or it is followed in this one."""
    index, tokens = torch.tensor([0, 0, 1, 0]), token_batch(4, 5, device)
    owners, lengths, seeds = [1, 0, 1, -1], [5, 2, 3, 4], torch.tensor([11, 22, 33])
    model, bank = carried(llama, device, dropout=0.4)
    alone, outcomes = [], []
    for k, own in enumerate(owners):
        with client_segments(model, [own], seeds=seeds, step=4, sequence_index=index[k : k + 1]):
            alone.append(model(tokens[k : k + 1, : lengths[k]]).logits[0])
            client_losses(alone[-1][None], tokens[k : k + 1, : lengths[k]], [own], 3, reduction="sum").sum().backward()
    outcomes.append((torch.cat(alone).detach(), [p.grad for p in bank.parameters()]))
    model, bank = carried(llama, device, dropout=0.4)
    if known:
        with client_segments(model, [0, 1, 2], seeds=seeds):
            model(token_batch(3, 4, device))
    rows, table = [[(0, 5), (3, 4)], [(1, 2), (2, 3)]], torch.zeros(5, 2, 9, dtype=torch.int64)
    table[0] = -1
    ids, where, positions, packed, labels = table
    labels[:] = -100
    for row, held in enumerate(rows):
        start = 0
        for k, length in held:
            at = row, slice(start, start + length)
            ids[at], where[at], positions[at], packed[at] = owners[k], index[k], torch.arange(length), tokens[k, :length].cpu()
            labels[row, start + 1 : start + length] = tokens[k, 1:length].cpu()
            start += length
        positions[row, start:] = torch.arange(9 - start)
    with client_segments(model, ids, seeds=seeds, step=4, sequence_index=where, positions=positions):
        logits = model(packed.to(device), position_ids=positions.to(device)).logits
        client_losses(logits, labels.to(device), ids, 3, reduction="sum").sum().backward()
    outcomes.append((torch.cat([logits[0, :5], logits[1, :2], logits[1, 2:5], logits[0, 5:9]]).detach(), [p.grad for p in bank.parameters()]))
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-10, atol=1e-10)
    for one, other in zip(outcomes[1][1], outcomes[0][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seeds", [None, [11, 22, 33]])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_of_the_model(llama, seeds, use_reentrant, device):
    seeds = None if seeds is None else torch.tensor(seeds)
    tokens, outcomes = token_batch(6, 9, device), []
    for checkpointing in (False, True):
        model, bank = carried(llama, device, dropout=0.4)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(4)
        with client_segments(model, IDS, seeds=seeds):
            logits = model(tokens).logits
            torch.rand(5)
            client_losses(logits, tokens, IDS, 3).sum().backward()
        outcomes.append([logits.detach(), *(p.grad for p in bank.parameters())])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


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
