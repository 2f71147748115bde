"""What is read out of figures: cases, the share of the device's ceiling, and other ways' time over this project's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Record = Mapping[str, Any]
Key = tuple[str, str, int, str, int]  # operation, shape, clients, type, threads
FLOORS = ("copy", "read", "frozen layer", "frozen base", "frozen head")  # yardsticks that nobody could use instead
Ceilings = dict[tuple[str, str, int], float]


def key(record: Record) -> Key:
    return record["op"], record["shape"], record["clients"], record["dtype"], record["threads"]


def by_case(records: Iterable[Record]) -> dict[Key, dict[str, Record]]:
    """{case: {provider: its figures}}, in the order of the records, without the ceilings."""
    found: dict[Key, dict[str, Record]] = {}
    for record in records:
        if not is_ceiling(record):
            found.setdefault(key(record), {})[record["provider"]] = record
    return found


def is_ceiling(record: Record) -> bool:
    return bool(record["yardstick"] == "torch")


def ceilings(records: Iterable[Record]) -> Ceilings:
    """{("copy", type, threads): bytes a second, ("product", type, threads): operations a second}: the best that was measured."""
    best: Ceilings = {}
    for record in records:
        if is_ceiling(record) and record["op"] in ("copy", "product"):
            name = (record["op"], record["dtype"], record["threads"])
            amount = record["flops"] if record["op"] == "product" else record["bytes"]
            best[name] = max(best.get(name, 0.0), amount / record["median_s"])
    return best


def product(best: Ceilings, dtype: str, threads: int) -> tuple[float, str] | None:
    """(the best product's rate, its name). Every bfloat16 and float16 is a float32 too, so where a device multiplies float32 faster, that bounds them."""
    rate, wide = best.get(("product", dtype, threads)), best.get(("product", "float32", threads), 0.0)
    if not rate:
        return None
    return (wide, "float32 product") if dtype in ("bfloat16", "float16") and wide > rate else (rate, "product")


def share(record: Record, best: Ceilings) -> tuple[float, str] | None:
    """(the least time that the device could take, over the time taken; what bounds it); None where bytes or operations are not known.

    An operation on the server's rows is held against copying (or reading) as many bytes in the same rounds. A layer's least time is that of its products at the
    rate of the best product, or of its bytes at that of a copy, whichever is longer.
    """
    if record["yardstick"] in ("copy", "read"):
        return 1 / record["ratio"], record["yardstick"]
    if is_ceiling(record) or not record.get("flops"):
        return None
    multiplied, copied = product(best, record["dtype"], record["threads"]), best.get(("copy", record["dtype"], record["threads"]))
    if multiplied is None or not copied:
        return None
    least = {multiplied[1]: record["flops"] / multiplied[0], "copy": record["bytes"] / copied}
    bound = max(least, key=lambda name: least[name])
    return least[bound] / record["median_s"], bound


def own(case: Mapping[str, Record]) -> Record | None:
    """This project's row: of the rung that is in use, which stands first."""
    return next((record for name, record in case.items() if name.startswith("hetlora")), None)


def alternatives(case: Mapping[str, Record]) -> dict[str, float]:
    """{other way: its time over this project's}, of the ways that a user has."""
    ours = own(case)
    if ours is None:
        return {}
    return {name: r["median_s"] / ours["median_s"] for name, r in case.items() if not name.startswith("hetlora") and name not in FLOORS}


def overhead(record: Record, case: Mapping[str, Record]) -> float:
    """Its time over its floor's, less one: of the medians that stand beside it. `ratio` is of the rounds that both have, and some ways have three."""
    return record["median_s"] / case[record["yardstick"]]["median_s"] - 1


def seconds(value: float) -> str:
    unit, scale = next((pair for pair in (("s", 1.0), ("ms", 1e-3)) if value >= pair[1]), ("us", 1e-6))
    return f"{value / scale:.3g} {unit}"


def title(of: Key) -> str:
    op, shape, clients, dtype, threads = of
    return f"{op}, {shape}, {clients} client{'s' * (clients > 1)}, {dtype}, {threads} thread{'s' * (threads > 1)}"


def rate(record: Record) -> str:
    """Of a frozen layer there is none: the operations that a case counts are those with LoRA."""
    if record.get("flops") and record["provider"] not in FLOORS:
        return f"{record['flops'] / record['median_s'] / 1e9:.3g} GFLOP/s"
    return f"{record['gb_per_s']:.3g} GB/s" if record["yardstick"] in ("copy", "read") or record["op"] in ("copy", "read") else ""


def memory(record: Record) -> str:
    """How far memory rose during a call; "" where it was not measured."""
    held = record.get("peak_extra_bytes")
    return "" if held is None else f"{held / 2**20:.3g} MiB"


def line(record: Record, case: Mapping[str, Record], best: Ceilings) -> str:
    """One provider's figures in a line."""
    spread = f"{seconds(record['median_s'])} ({seconds(record['p20_s'])} to {seconds(record['p80_s'])})"
    name, ours, of = record["provider"], own(case), share(record, best)
    said = [f"{seconds(record['device_s'])} between events on the device"] if "device_s" in record else []
    if of is not None and name != record["yardstick"]:
        said.append(f"{100 * of[0]:.0f} % of {of[1]}")
    if modelled := record.get("modelled_s"):
        said.append(f"{100 * modelled / record['median_s']:.0f} % of the modelled floor")
    others = alternatives(case)
    if ours is not None and name in others:
        said.append(f"{others[name]:.2f} x the time of {ours['provider']}")
    elif record["yardstick"].startswith("frozen") and name != record["yardstick"]:
        said.append(f"{100 * overhead(record, case):+.0f} % over the {record['yardstick']}")
    if held := memory(record):
        said.append(f"+{held}")
    return f"  {name:26s} {spread:32s} {rate(record):14s} {', '.join(said)}".rstrip()
