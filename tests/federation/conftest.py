"""Pages are drawn in one look, the wide one on white, unless a test asks for `every_look`: each further look costs as much as the first."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import SIZES, Interrupt, Stop, contents, tiny_config, tiny_federation

from hetlora.loop import simulate
from hetlora.report import drawing

LOOKS = dict(drawing.LOOKS)


@pytest.fixture(autouse=True)
def _one_look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "LOOKS", LOOKS if "every_look" in request.fixturenames else {})


@pytest.fixture
def every_look() -> None:
    """Asked for by tests of the looks themselves and of whole pages."""


@pytest.fixture(scope="module")
def stopped_bytes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that stands at round 2."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stop):
        simulate(tiny_config(folder), federation=tiny_federation(SIZES), observer=Interrupt("round_start", 3))
    return contents(folder)


@pytest.fixture
def stopped(tmp_path: Path, stopped_bytes: dict[str, bytes]) -> Path:
    """A run folder of one's own, whose run stands at round 2."""
    folder = tmp_path / "run"
    for name, content in stopped_bytes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
