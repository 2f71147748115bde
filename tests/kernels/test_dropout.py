"""The dropout mask, bit by bit: Philox against its published vectors, the mapping of seed, row key and column against frozen values."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import kept, philox_words

import hetlora_kernels as hk
from hetlora_kernels.peft import layer_seeds
from hetlora_kernels.peft.seeds import SeedTable
from hetlora_kernels.reference import dropout_threshold, keep_mask, philox4x32

# Random123 (D. E. Shaw Research), tests/kat_vectors, the lines "philox4x32 7" and "philox4x32 10": counter, key, rounds, output.
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
ONES = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
PUBLISHED = [
    ((0,) * 4, (0,) * 2, 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (*ONES, 7, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (*PI, 7, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ((0,) * 4, (0,) * 2, 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
]

# Columns 0..15 of p = 0.5, bit c set where column c is kept: frozen, computed once in Python integers.
FROZEN_MASKS = {(0, 0): 0xF801, (1, 0): 0xC917, (-1, 0): 0x0B24, (0x0123456789ABCDEF, (5 << 20) + 17): 0xB824, (-(2**63), 2**40 + 3): 0xB965}
FROZEN_LAYER_SEEDS = {  # (client seed, step, module): the seed the layer gets
    (0, 0, 0): 7905728728188956330,
    (1, 0, 0): 3863476554324639077,
    (0, 1, 0): 8412719839381286156,
    (0, 0, 1): 4724225610243625108,
    (-7, 12, 2): -281492005175557294,
    (2**63 - 1, 1000, 223): -3608151950924869392,
}


def observed_mask(seed: int, keys: list[int], columns: int, p: float, device: torch.device) -> torch.Tensor:
    """What the running backend keeps, seen through the public layer: x = 1, A = B = identity."""
    eye = torch.eye(columns, device=device)
    seg = hk.Segments.from_lengths([len(keys)], row_keys=torch.tensor(keys, dtype=torch.int64))
    base, ones = torch.zeros(len(keys), columns, device=device), torch.ones(len(keys), columns, device=device)
    y = hk.lora_add(base, ones, eye, eye, hk.RankLayout([columns]), seg, dropout=p, seeds=torch.tensor([seed], device=device))
    value = 1 / (1 - round(65536 * p) / 65536)
    assert set(y.unique().tolist()) <= {0.0, torch.tensor(value, dtype=torch.float32).item()}
    return (y != 0).cpu()


@pytest.mark.parametrize(("counter", "key", "rounds", "expected"), PUBLISHED)
def test_published_vectors_of_philox(counter, key, rounds, expected):
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key), rounds)
    assert tuple(int(w) for w in words) == expected
    assert philox_words(counter, key, rounds) == expected


@pytest.mark.parametrize(("counter", "key", "rounds", "expected"), [vector for vector in PUBLISHED if vector[2] == 7])
def test_published_vectors_in_triton(counter, key, rounds, expected, backend, device):
    if backend != "triton":
        pytest.skip("a kernel of the Triton rung")
    from philox_kernel import philox_in_triton

    assert tuple(philox_in_triton(counter, key, device).tolist()) == expected


def test_seven_rounds_by_default():
    words = philox4x32(tuple(torch.tensor([c]) for c in PI[0]), tuple(torch.tensor([k]) for k in PI[1]))
    assert tuple(int(w) for w in words) == PUBLISHED[2][3]


@pytest.mark.parametrize(("seed", "key"), FROZEN_MASKS)
def test_frozen_masks(seed, key, device):
    bits = [FROZEN_MASKS[seed, key] >> c & 1 for c in range(16)]
    assert observed_mask(seed, [key], 16, 0.5, device)[0].int().tolist() == bits
    assert kept(seed, [key], 16, 0.5)[0].int().tolist() == bits


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 37])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_of_every_backend_is_the_written_one(columns, p, device):
    keys = [0, 1, 2, 63, 64, 2**20, 3 * 2**20 + 511, 2**32 - 1, 2**32, 2**63 - 1, -1]
    for seed in (0, 1, -1, 0x9E3779B97F4A7C15 - 2**64, 2**63 - 1):
        assert torch.equal(observed_mask(seed, keys, columns, p, device), kept(seed, keys, columns, p))


def test_backward_regenerates_the_forward_mask(device):
    columns, keys, seed, p = 21, [4, 2**20 + 1, 9], 77, 0.3
    eye = torch.eye(columns, device=device, requires_grad=True)
    bt = torch.eye(columns, device=device, requires_grad=True)
    x = torch.ones(3, columns, device=device, requires_grad=True)
    seg = hk.Segments.from_lengths([3], row_keys=torch.tensor(keys))
    y = hk.lora_add(torch.zeros(3, columns, device=device), x, eye, bt, hk.RankLayout([columns]), seg, dropout=p, seeds=torch.tensor([seed]))
    y.backward(torch.ones_like(y))
    mask = kept(seed, keys, columns, p).to(device)
    assert torch.equal(x.grad != 0, mask)
    assert torch.allclose(eye.grad, y.detach().sum(0).expand(columns, columns))
    assert torch.allclose(bt.grad, y.detach().sum(0)[:, None].expand(columns, columns))


@pytest.mark.parametrize(("seed", "step", "module"), FROZEN_LAYER_SEEDS)
def test_frozen_layer_seeds(seed, step, module):
    expected = FROZEN_LAYER_SEEDS[seed, step, module]
    assert mixed_seed(seed, step, module) == expected
    assert layer_seeds(torch.tensor([seed]), step, module).tolist() == [expected]
    assert layer_seeds(torch.tensor([5, seed]), torch.tensor([3, step]), module).tolist() == [mixed_seed(5, 3, module), expected]


def mixed_seed(seed: int, step: int, module: int) -> int:
    """SplitMix64's finaliser over seed + step * golden ratio, then once more over that + (module + 1) * an odd constant; as a signed integer."""

    def finish(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    z = finish((finish((seed + step * 0x9E3779B97F4A7C15) % 2**64) + (module + 1) * 0x632BE59BD9B4E019) % 2**64)
    return z - 2**64 if z >> 63 else z


@pytest.mark.parametrize("step", [0, 2**40, [7, -1, 3]])
@pytest.mark.parametrize("clients", [2, 3])
def test_a_table_has_the_seeds_of_every_layer(clients, step, device):
    """Made once for a batch, with rows that start at multiples of 16 bytes; a row is a part of the table, not a copy."""
    seeds = torch.tensor([5, -(2**63), 2**63 - 1][:clients])
    step = torch.tensor(step[:clients]) if isinstance(step, list) else step
    table = SeedTable(seeds, step, 9)
    whole = table.place(torch.device(device))
    for module in range(9):
        row = table.row(module, torch.device(device)).values
        assert torch.equal(row.cpu(), layer_seeds(seeds, step, module))
        assert row.data_ptr() == whole.data_ptr() + module * whole.stride(0) * 8 and row.data_ptr() % 16 == whole.data_ptr() % 16


def test_layer_seeds_differ_between_clients_steps_and_modules():
    seeds = torch.arange(20)
    seen = {int(v) for step in range(20) for module in range(20) for v in layer_seeds(seeds, step, module)}
    assert len(seen) == 20 * 20 * 20


@pytest.mark.parametrize(("p", "threshold"), [(0.0, 0), (0.1, 6554), (0.5, 32768), (1 / 65536, 1), (0.4 / 65536, 0), (0.6 / 65536, 1), (0.9, 58982)])
def test_threshold_is_rounded(p, threshold):
    assert dropout_threshold(p) == threshold


@pytest.mark.parametrize("p", [1 / 65536, 0.05, 0.1, 0.37, 0.5, 0.95])
def test_drop_rate(p):
    """Within four standard deviations over 2^20 draws, in every row and column position alike."""
    rows, columns = 4096, 256
    dropped = ~keep_mask(torch.tensor(20240607), torch.arange(rows), columns, p)
    q = round(65536 * p) / 65536
    assert abs(dropped.double().mean().item() - q) < 4 * math.sqrt(q * (1 - q) / (rows * columns))
    if p >= 0.05:
        for axis, count in ((0, rows), (1, columns)):
            spread = (dropped.double().mean(axis) - q) / math.sqrt(q * (1 - q) / count)
            assert spread.abs().max() < 5 and 0.8 < spread.std() < 1.2


def test_neighbours_are_independent():
    """Masks of neighbouring rows, columns and seeds agree on as many elements as chance has it."""
    masks = [keep_mask(torch.tensor(seed), torch.arange(1024), 256, 0.5) for seed in (0, 1)]
    for left, right in ((masks[0][1:], masks[0][:-1]), (masks[0][:, 1:], masks[0][:, :-1]), (masks[0], masks[1])):
        assert abs((left == right).double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(left.numel())


def test_kept_elements_keep_the_mean(device):
    """E[drop(x)] = x: the scale of kept elements uses the rounded probability, not p."""
    p = 0.4 / 65536 + 0.25
    y = hk.lora_add(
        *(torch.zeros(1, 8, device=device), torch.ones(1, 8, device=device), torch.eye(8, device=device), torch.eye(8, device=device)),
        *(hk.RankLayout([8]), hk.Segments.from_lengths([1])),
        dropout=p,
        seeds=torch.tensor([3]),
    )
    assert y[y != 0].unique().tolist() == [torch.tensor(1 / 0.75).item()]
