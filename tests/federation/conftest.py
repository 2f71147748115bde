"""Pages are drawn in one look, the wide one on white, unless a test asks for `every_look`: each further look costs as much as the first."""

from __future__ import annotations

import pytest

from hetlora.report import drawing

LOOKS = dict(drawing.LOOKS)


@pytest.fixture(autouse=True)
def _one_look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "LOOKS", LOOKS if "every_look" in request.fixturenames else {})


@pytest.fixture
def every_look() -> None:
    """Asked for by tests of the looks themselves and of whole pages."""
