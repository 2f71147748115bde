"""Calls of the public functions with one wrong argument: refused by its name, and nothing is written. HETLORA_TEST_SEED draws others."""

from __future__ import annotations

import pytest
import torch
from fuzz_draws import Draw, refused, repeat

import hetlora_kernels as hk

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("backend", ["auto"], indirect=True)]


def bad_tensors(draw: Draw, good, rows: bool = True, dims: bool = True):
    """Never taken for the 2-D tensor `good`.   rows, dims: nor is one of more rows, of more dimensions."""
    more = [torch.cat((good, good[:1]))] * rows + [good[None]] * dims
    return draw.choice(
        [
            *more,
            None,
            "x",
            object(),
            3,
            good + 1j,
            good.long(),
            good > 0,
            good.to(torch.float8_e4m3fn),
            good.to_sparse(),
            good.flatten(),
            good[:-1],
        ]
    )


def wrong_arguments(draw: Draw) -> int:
    """One argument of a call that is right is replaced by a wrong one: refused by its name, and nothing is written."""
    layout, seg = hk.RankLayout([1, 2]), hk.Segments.from_lengths([2, 1])
    dtype = draw.dtype()
    rows, bt, x, weight = (draw.normal(*shape, dtype=dtype) for shape in ((3, 4), (3, 5), (3, 4), (5, 4)))
    no_layout = [None, 2, "x", [1, 2], hk.RankLayout([1, 1]), hk.RankLayout([1, 2, 1])]
    no_number = [None, "x", 1.5, -1, 2**70, float("nan"), [1], True]
    no_dtype = [torch.int64, torch.complex64, "float32", torch.bool]
    no_out = [bt, rows.double() if dtype != torch.float64 else rows.float(), rows.to_sparse(), "x", [None], 5, rows]
    no_weights = [
        None,
        "x",
        [1.0],
        [1.0, -1.0],
        [1.0, float("nan")],
        [1.0, 1e400],
        torch.ones(2, dtype=torch.complex64),
        torch.ones(3),
        torch.ones(2).to("meta"),
    ]
    no_cut = [None, 3, [1], [1, -1], [1, 1.5], [2**70, 1], [[1, 1]] * 2, {1, 2}, {1: 1, 2: 2}]
    layer = {"a": (bad_tensors(draw, rows),), "bt": (bad_tensors(draw, bt),), "layout": (None, 3, hk.RankLayout([1, 1]), hk.RankLayout([3]))}
    layer |= {"seg": (None, 3, hk.Segments.from_lengths([2]), hk.Segments.from_lengths([1, 1, 1]))}
    layer |= {"scale": (None, "x", float("nan"), 1e400, [1.0], [1.0, float("inf")], [1.0, None], torch.ones(3), torch.ones(2, dtype=torch.complex64))}
    layer |= {"dropout": (None, "x", -0.1, 1.0, float("nan"), 2)}
    batch = {"a": rows, "bt": bt, "layout": layout, "seg": seg, "scale": 2.0, "dropout": 0.5}
    codes, scales = hk.quantize_rows(rows, 4)
    bank = hk.AdapterBank({"q": (5, 4)}, [1, 2], dtype=dtype)
    ids = [1, 0, -1]
    table = {
        hk.aggregate: (
            {"rows": rows, "layout": layout, "weights": [0.5, 0.5], "max_rank": 2, "normalize": "none", "keep": None, "dtype": None, "out": None},
            {"rows": (bad_tensors(draw, rows),), "layout": no_layout, "weights": no_weights, "max_rank": [1, *no_number], "normalize": [None, "x", 1]}
            | {"keep": [rows, "x", rows[:2].long(), rows[:2].to_sparse()], "dtype": no_dtype, "out": no_out},
        ),
        hk.Accumulator([rows], 2).add: (
            {"rows": [rows[:2]], "weight": 1.0},
            {"rows": [None, [], [None], [rows], [rows[:2].long()], [rows[:2]] * 2, 3], "weight": no_weights},
        ),
        hk.Accumulator: ({"like": [rows], "max_rank": 2}, {"like": [None, [], ["x"], [rows, rows.long()], 3], "max_rank": no_number}),
        hk.truncate: (
            {"bank_rows": rows, "layout": layout, "dtype": None, "out": None},
            {"bank_rows": (bad_tensors(draw, rows[:2], rows=False),), "layout": [None, 2, "x", [1, 2], hk.RankLayout([4])], "dtype": no_dtype, "out": no_out},
        ),
        hk.gram: ({"rows": rows, "layout": layout}, {"rows": (bad_tensors(draw, rows),), "layout": no_layout}),
        hk.delta_norms: ({"a": rows, "bt": bt, "layout": layout}, {"a": (bad_tensors(draw, rows),), "bt": (bad_tensors(draw, bt), [bt]), "layout": no_layout}),
        hk.tail_norms: ({"rows": rows, "layout": layout, "keep": [1, 1]}, {"rows": (bad_tensors(draw, rows),), "layout": no_layout, "keep": no_cut}),
        hk.quantize_rows: (
            {"rows": rows, "bits": 8},
            {"rows": (rows * float("nan"), rows.long(), rows.to_sparse(), None, rows[0]), "bits": [3, 0, None, 8.0, "8"]},
        ),
        hk.dequantize_rows: (
            {"codes": codes, "scales": scales, "width": 4, "dtype": torch.float32, "out": None},
            {"codes": [None, 3, codes.long(), codes[0], codes[:2], codes.to_sparse()], "scales": [None, 3, scales.double(), scales[:2], [scales] * 2]}
            | {"width": [None, 7, 1, -1, [4, 4], "x"], "dtype": no_dtype, "out": [bt, "x", rows.to(torch.float64), 5]},
        ),
        hk.lora_linear: (
            {"x": x, "weight": weight, "bias": None, **batch},
            {
                **layer,
                "x": (bad_tensors(draw, x, dims=False),),
                "weight": (bad_tensors(draw, weight), weight.clone().requires_grad_()),
                "bias": [3, weight, x[0]],
            },
        ),
        hk.lora_add: ({"base_out": bt.clone(), "x": x, **batch}, {**layer, "x": (bad_tensors(draw, x, dims=False),), "base_out": (bad_tensors(draw, bt),)}),
        hk.RankLayout: ({"ranks": [1]}, {"ranks": [None, 3, "x", [-1], [1.5], [True], {1, 2}, {1: 2}, [2**70], torch.ones(2), torch.ones(2, 2).long()]}),
        hk.Segments.from_lengths: (
            {"lengths": [1, 2], "row_keys": None},
            {"lengths": [None, 3, [-1, 4], [1.5], {1, 2}, [2**70]], "row_keys": [[1, 2, 3], torch.ones(3), torch.ones(2).long()]},
        ),
        hk.Segments.from_ids: (
            {"ids": ids, "row_keys": None, "num_clients": 2},
            {
                "ids": [None, 3, [-2], [2], [1.0], {0, 1}, [2**70]],
                "row_keys": [[1, 2, 3], torch.ones(3), torch.ones(2).long()],
                "num_clients": ["x", 1.5, -1, 1, 2**70],
            },
        ),
        bank.select: ({"clients": [0]}, {"clients": [None, 0, [2], [-1], [0.5], {0, 1}]}),
        bank.prune: ({"ranks": [1, 1]}, {"ranks": [None, 1, [2, 2], [1], [1, -1], {"x": [1, 1]}]}),
        bank.select([1]).truncate: ({"ranks": [1, 2]}, {"ranks": [None, 1, [3], [-1], [1.5], {"x": [1]}, {"q": 1}]}),
        bank.aggregate: ({"weights": [0.5, 0.5], "max_rank": 2}, {"weights": no_weights, "max_rank": [1, *no_number]}),
        bank.num_bytes: ({"client": 0, "factors": "ab"}, {"client": [-1, 2, None, "x", 0.5], "factors": [None, "", "c", 1]}),
        bank.adapter: ({"client": 0}, {"client": [-1, 2, None, "x", 0.5, torch.ones(2)]}),
        bank.load_adapter: (
            {"client": 1, "state_dict": bank.adapter(1)},
            {"client": [-1, 2, None, "x", 0.5], "state_dict": [None, 3, {}, bank.adapter(0), {1: rows}]},
        ),
    }
    before = {key: value.clone() for key, value in bank.state_dict().items()}
    call, (good, bad) = draw.choice(list(table.items()))
    call(**good)
    name = draw.choice(list(bad))
    value = draw.choice(list(bad[name]))
    # A tensor of another size fits neither its layout nor what it meets: either of the two may be named.
    aliases = {
        "rows": ["layout"],
        "layout": ["rows", "a", "bank_rows", "seg", "keep", "weights"],
        "a": ["x", "layout", "bt"],
        "bt": ["a", "layout", "base_out"],
    }
    aliases |= {
        "x": ["weight", "seg", "a", "base_out"],
        "weight": ["x", "bias", "bt", "weights"],
        "base_out": ["bt"],
        "bank_rows": ["layout"],
        "codes": ["scales", "width"],
    }
    aliases |= {"clients": ["client"], "max_rank": ["weights"], "lengths": ["row_keys"], "num_clients": ["ids"], "ids": ["num_clients"], "scales": ["codes"]}
    aliases |= {"factors": [], "ranks": ["layout"]}
    refused(lambda: call(**{**good, name: value}), [name, *aliases.get(name, [])], f"{call.__qualname__}({name}={value!r})")
    assert all(torch.equal(value, before[key]) for key, value in bank.state_dict().items())
    return 2


def test_wrong_arguments_are_refused_by_name():
    repeat(wrong_arguments, 3000)
