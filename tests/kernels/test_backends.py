"""The operator library: schemas, shape functions and the ladder of backends."""

from __future__ import annotations

import os
from pathlib import Path

import forked
import pytest
import torch

import hetlora_kernels as hk
from hetlora_kernels import _library, reference
from hetlora_kernels.ops.quantize import CODES, code_bytes


def factors(device, *sizes, dtype=torch.float32):
    return [torch.randn(*size, device=device, dtype=dtype) for size in sizes]


def layer_arguments(device, gathered, seeds):
    """(seeds, row_keys, index, ranks, starts, lengths, dropout) of 7 rows, 3 clients of ranks 2, 0, 3."""
    index = torch.tensor([6, 0, 3, 1, 4], device=device) if gathered else None
    keys = torch.arange(5 if gathered else 7, device=device)
    drawn = torch.tensor([1, 2, 3], device=device) if seeds else None
    return drawn, keys if seeds else None, index, [2, 0, 3], [0, 2, 3], [2, 1, 2], 0.25 if seeds else 0.0


def samples(name: str, device) -> list[tuple]:
    """Arguments for the op `name` that use every optional argument, and none."""
    lr, flags = torch.rand(2, dtype=torch.float64, device=device), torch.tensor([True, False], device=device)
    modules = [(3, 5), (3, 7), (3, 4), (3, 6)]  # a and bt of two modules, ranks 1 and 2
    extras = [(None, None, [1, 2, 1, 2], []), (lr.clone(), lr.clone(), [1, 2, 1, 2], [0, 1, 1, 1])]
    if name in ("shrink", "expand_", "grouped_gram"):
        s, x, rows, out = factors(device, (10,), (7, 6), (5, 6), (7, 6))
        scale = torch.rand(3, device=device)
        cases = [layer_arguments(device, gathered, seeds) for gathered in (False, True) for seeds in (False, True)]
        if name == "shrink":
            return [(x, rows, scale, *case) for case in cases]
        return [(out, s, rows, *case) for case in cases] if name == "expand_" else [(s, x, *case, torch.float32) for case in cases]
    if name in ("lora_forward", "lora_backward"):
        x, weight, bias, base, a, bt, s, d_y = factors(device, (7, 5), (4, 5), (4,), (7, 4), (5, 5), (5, 4), (10,), (7, 4))
        drawn = [layer_arguments(device, gathered, seeds) for gathered in (False, True) for seeds in (False, True)]
        cases = [(torch.rand(3, device=device), *own, [7, *ranks, *starts, *lengths], p) for *own, ranks, starts, lengths, p in drawn]
        given = [(bt, False), (bt.t().contiguous(), True), (bt.t().contiguous().t(), False)]
        if name == "lora_forward":
            ends = [(factor, *case, transposed) for case in cases for factor, transposed in given]
            kinds = [(x, weight, bias, None), (x, weight, None, None), (x, None, None, base), (x.view(7, 1, 5), weight, bias, None)]
            return [(*kind, a, *end) for end in ends for kind in kinds]
        types = torch.float32, torch.float32
        needs = [(True, True, True), (False, True, False), (True, False, False), (False, False, True)]
        ends = [(factor, s, *case, transposed, *need, *types) for case, need in zip(cases, needs, strict=True) for factor, transposed in given]
        kinds = [(d_y, x, weight), (d_y, x, None), (d_y.view(7, 1, 4), x.view(7, 1, 5), weight)]
        return [(*kind, a, *end) for end in ends for kind in kinds]
    if name == "truncate_":
        banks = factors(device, (4, 5), (4, 7))
        return [
            (factors(device, (5, 5), (4, 7), dtype=torch.bfloat16), banks, [4, 1, 0, 4], False),
            (factors(device, (2, 4, 5), (2, 4, 7)), banks, [4, 1, 0, 4], True),
        ]
    if name == "aggregate_":
        out, keep, weights = factors(device, (3, 5), (3, 7)), factors(device, (3, 5), (3, 7)), torch.rand(2, 2, device=device)
        return [(out, factors(device, (3, 5), (1, 7)), weights, kept, [1, 2, 0, 1], owners) for kept, owners in (([], False), (keep, True))]
    if name == "accumulate_":
        return [(factors(device, (3, 5), (3, 7)), factors(device, (2, 5), (0, 7), dtype=torch.bfloat16), torch.rand(2, device=device))]
    if name == "gram":
        return [(factors(device, (3, 5), (2, 7)), [1, 2, 0, 2], exact) for exact in (False, True)]
    if name == "delta_norms":
        return [(factors(device, (3, 5), (2, 7)), factors(device, (3, 4), (2, 2)), [1, 2, 0, 2], exact) for exact in (False, True)]
    if name == "tail_norms":
        return [(factors(device, (3, 5), (2, 7)), [1, 2, 0, 2], [0, 1, 0, 5])]
    if name in ("quantize_rows_", "dequantize_rows_"):
        rows = factors(device, (3, 5), (2, 8))
        cases = []
        for bits, kind in CODES.items():
            codes = [torch.zeros(r.shape[0], code_bytes(r.shape[1], bits), dtype=kind, device=device) for r in rows]
            scales = [torch.rand(r.shape[0], device=device) for r in rows]
            cases.append((codes, scales, rows, bits) if name == "quantize_rows_" else (rows, [c + 0x35 for c in codes], scales, bits))
        return cases
    if name == "cross_entropy_":
        labels = torch.tensor([4, -100, 0], device=device)
        forms = [(None, 1.0, 0.0, 0.0, 0.0, True), (torch.rand(3, device=device), 0.7, 3.0, 0.1, 0.05, True), (None, 1.0, 0.0, 0.1, 0.0, False)]
        return [(logits, labels, *form) for form in forms for dtype in (torch.float32, torch.bfloat16) for logits in factors(device, (3, 5), dtype=dtype)]
    states = [factors(device, *modules) for _ in range(4)]
    states[3] = [t.square() for t in states[3]]
    copies: list[list[torch.Tensor]] = [[], [t.to(torch.bfloat16) for t in states[0]]]
    half = [t.to(torch.bfloat16) for t in states[2]]
    if name == "adamw_":
        step = torch.tensor([3, 1], device=device)
        return [
            (*states[:2], means, states[3], casts, lr, step, flags, clip, lam, ranks, keep, 0.9, 0.99, 1e-8, 0.1)
            for clip, lam, ranks, keep in extras
            for casts in copies
            for means in (states[2], half)
        ]
    assert name == "sgd_"
    return [
        (*states[:2], buffers, casts, lr, flags, clip, lam, ranks, keep, 0.9 if buffers else 0.0, 0.1)
        for clip, lam, ranks, keep in extras
        for buffers in ([], states[2], half)
        for casts in copies
    ]


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_opcheck(name, device):
    """Schema (what is mutated, what is aliased), shape function and tracing of every op, as the dispatcher runs it; a graph's own overloads too.

    Of the layer's samples a third: each pair of a kind of base, a way in which the factor lies, and segments. Their values are compared below, all of them.
    """
    packet = getattr(torch.ops.hetlora, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    assert len(overloads) == (2 if name in _library.LAYER else 1)
    kinds = {"lora_forward": 4, "lora_backward": 3}.get(name)
    for position, arguments in enumerate(samples(name, device)):
        if kinds and (position % kinds + position // kinds % 3 + position // kinds // 3) % 3:
            continue
        for overload in overloads[: 1 if position % 7 else None]:  # the second differs in its schema alone
            torch.library.opcheck(overload, arguments)


@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_every_backend_gives_what_the_reference_gives(name, device):
    """Op by op, below the public functions: mutated arguments and results alike."""
    for position in range(len(samples(name, device))):
        outcomes = []
        for run in (_library.call(name), getattr(reference, name)):
            torch.manual_seed(position)
            arguments = samples(name, device)[position]
            result = run(*arguments)
            outcomes.append([t for t in torch.utils._pytree.tree_leaves((result, arguments)) if isinstance(t, torch.Tensor)])
        assert len(outcomes[0]) == len(outcomes[1]) > 0
        for one, other in zip(*outcomes, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=2e-2 if one.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_no_op_returns_its_own_memory_twice(device):
    """A result is fresh: writing into it changes no argument and no later result."""
    rows = torch.ones(3, 4, device=device)
    layout = hk.RankLayout([1, 2])
    for op in (lambda: hk.gram(rows, layout), lambda: hk.delta_norms(rows, rows, layout), lambda: hk.tail_norms(rows, layout, [0, 0])):
        first = op()
        kept = first.clone()
        first.fill_(-5)
        assert torch.equal(op(), kept) and bool((rows == 1).all())


def test_the_served_rung_is_said_and_forced(backend):
    report = hk.backends()
    assert list(report) == list(_library.SCHEMAS)
    for rung, reason in report.values():
        assert rung in _library.available() and reason
    assert any(rung == backend for rung, _ in report.values())  # a rung that serves nothing would make its tests empty


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
def test_use_backend_ends_with_its_block():
    before = hk.backends()
    assert any("forced" in reason for _, reason in before.values()) == bool(os.environ.get("HETLORA_BACKEND", "").strip())
    with hk.use_backend("reference"):
        assert {rung for rung, _ in hk.backends().values()} == {"reference"}
        assert all("forced" in reason for _, reason in hk.backends().values())
    assert hk.backends() == before
    with pytest.raises(KeyError), hk.use_backend("reference"):
        raise KeyError
    assert hk.backends() == before


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
def test_a_forced_rung_is_the_one_that_runs(monkeypatch):
    seen = []
    real = reference.truncate_
    monkeypatch.setattr(reference, "truncate_", lambda *args: seen.append("reference") or real(*args))
    with hk.use_backend("reference"):
        hk.truncate(torch.ones(2, 2), hk.RankLayout([1]))
    assert seen == ["reference"]


def test_unknown_and_absent_rungs():
    with pytest.raises(ValueError, match=r"^use_backend: expected one of reference, cpu, cuda, triton, got 'gpu'"), hk.use_backend("gpu"):
        pass
    for rung in set(_library.RUNGS) - set(_library.available()):
        with pytest.raises(ValueError, match=rf"^use_backend: the '{rung}' rung is not available"), hk.use_backend(rung):
            pass


@pytest.mark.parametrize("backend", ["auto"], indirect=True)
@pytest.mark.parametrize(("value", "code", "text"), [("reference", 0, "reference, forced"), ("fast", 1, "HETLORA_BACKEND: expected one of")])
def test_environment_variable(value, code, text):
    script = "import hetlora_kernels as hk; print(*hk.backends()['truncate_'], sep=', ')"
    run = forked.python(script, Path.cwd(), {**os.environ, "HETLORA_BACKEND": value})
    assert run.returncode == code and text in run.stdout + run.stderr
