"""Pages have pictures of one look, the wide one on white, and the figures are made but not drawn: two thirds of a page's time went into that. A test that
looks at a picture asks for `drawn`, one of whole pages for `every_look`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import SIZES, Interrupt, Stop, contents, tiny_config, tiny_federation

from hetlora.loop import simulate
from hetlora.report import drawing

LOOKS = drawing.LOOKS


@pytest.fixture(autouse=True)
def _blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "every_look" not in request.fixturenames:
        monkeypatch.setattr(drawing, "LOOKS", ())
        if "drawn" not in request.fixturenames:
            monkeypatch.setattr(drawing.FigureCanvasAgg, "draw", drawing.FigureCanvasAgg.get_renderer)


@pytest.fixture
def drawn() -> None:
    """Asked for by tests of what a drawing shows."""


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


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's server looks for clients and replies without a pause."""
    from flower_grid import Clock

    monkeypatch.setattr("hetlora.deployed.members.POLL", 0.01)
    monkeypatch.setattr("hetlora.flower.replies.time", Clock())


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict:
    """{client's sequences: (vector, uploads, received)} of what the clients added to the sums of the last round."""
    from secure_runs import SIZES

    from hetlora import secure_sum

    found: dict = {}
    made = secure_sum.contribution

    def kept(cfg, uploads, received, share, rows):
        vector = made(cfg, uploads, received, share, rows)
        found[round(share * max(SIZES))] = (vector, uploads, received)
        return vector

    monkeypatch.setattr("hetlora.deployed.local.contribution", kept)
    return found


@pytest.fixture
def totals(monkeypatch: pytest.MonkeyPatch) -> list:
    """The sums as the server reads them, round by round."""
    from hetlora import secure_sum

    found: list = []
    made = secure_sum.mean

    def kept(cfg, total, *rest):
        found.append(total)
        return made(cfg, total, *rest)

    monkeypatch.setattr("hetlora.flower.secure_server.mean", kept)
    return found
