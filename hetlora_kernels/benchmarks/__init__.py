"""In a checkout and an editable installation: the folder `benchmarks/` at the checkout's top. A wheel has that folder in this one's place."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "benchmarks")]
