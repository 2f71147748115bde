"""Dropout of attached layers: when it is on, the masks by module, step and sequence, and what does not change them."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import kept, same_bits
from model_cases import tiny_llama, token_batch
from test_attach import IDS, carried
from torch import nn

import hetlora_kernels as hk
from hetlora_kernels.peft import SEQUENCE_STRIDE, attach, client_losses, client_segments, layer_seeds


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


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
