"""benchmarks/fold.py: what its tables say, and that a wrong merge or another gradient is refused before a figure is printed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fold as bench
from hetlora import fold
from hetlora.low_rank import best_rank


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_both_tables_have_every_case(capsys, one_thread):
    bench.main(["--clients", "3", "--rank", "2", "--shrink", "64", "--rounds", "2"])
    lines = [line.strip("| \n").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    merges, layers = ([line for line in lines if len(line) == width and line[0] not in ("merge", "m = n")] for width in (10, 9))
    assert [line[:4] for line in merges] == [
        ["fold", "2", "64 x 64", "70"],  # ranks 5, 9 and 20: 2 r rows of each, and those of the bank
        ["fold", "2", "16 x 64", "136"],  # 5 r, at most 64
        ["recon-svd", "2", "64 x 64", "34"],
        ["recon-svd", "2", "16 x 64", "34"],
    ]
    assert [line[0] for line in layers] == ["2", "2", "9", "9", "24", "24"] and all(line[-1].endswith("%") for line in layers)


def test_parts_are_the_rows_that_the_merge_stacks():
    ranks = [3, 5, 2]
    fresh = fold.fresh_ranks({"q": ranks}, {"q": (16, 24)})["q"]
    assert bench.parts_of("fold", 16, 24, ranks, 4) == 4 + sum(fresh) and bench.parts_of("recon-svd", 16, 24, ranks, 4) == 10


@pytest.mark.parametrize(
    ("m", "n", "parts", "expected"),
    [
        (30, 30, 10, {"QR": 8 * 30 * 100 - 8 / 3 * 1000, "core": 2000, "SVD": 12_000, "back": 2 * 2 * 30 * 10 * 4}),
        (20, 30, 40, {"QR": 0, "core": 2 * 20 * 30 * 40, "SVD": 12 * 8000 + 8 * 30 * 400, "back": 0}),
    ],
    ids=["narrow stacks", "wide stacks"],
)
def test_operations_are_those_of_the_shapes(m, n, parts, expected):
    counts, read = bench.operations(m, n, parts, 4)
    assert counts == pytest.approx(expected) and read == pytest.approx(16 / 3 * min(m, n, parts) ** 3)


def test_a_merge_that_is_none_of_the_sum_is_refused():
    (stack,) = bench.stacks_of("recon-svd", [(12, 16)], [3, 4], 5)
    bt, a = best_rank([stack], 5)[0]
    bench.check_merge(stack, bt, a)
    for wrong in ((bt.flip(0), a), (bt, 1.001 * a)):
        with pytest.raises(SystemExit, match=r"no singular vectors of the sum, off by \d"):
            bench.check_merge(stack, *wrong)


def test_a_gradient_that_depends_on_what_is_trained_is_refused(monkeypatch):
    real = bench.lora.ours

    def spoiled(problem, rung):
        run, results = real(problem, rung)
        return run, lambda: tuple(None if grad is None else grad + (not problem.a.requires_grad) for grad in results())

    monkeypatch.setattr(bench.lora, "ours", spoiled)
    with pytest.raises(SystemExit, match="8 x 8: the gradients of x and B depend on whether A is trained"):
        bench.layer_of(8, 16, [2, 3])
