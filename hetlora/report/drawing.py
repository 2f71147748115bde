"""What all pictures share: their style, the figure that becomes a PNG, and axes.

Colours are Okabe and Ito's, distinct to colour-blind readers.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
_CJK_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "Noto Sans CJK JP", "Noto Sans CJK SC")
MOST_LABELS = 50


@dataclass
class Picture:
    """A drawn figure. `notes`: what the reader of the report must know about how it was drawn."""

    png: bytes
    title: str
    caption: str
    alt: str
    notes: list[str] = field(default_factory=list)


def render(draw: Callable[[Figure], tuple[str, str, str]]) -> Picture:
    """The picture of what `draw` puts into a figure; it returns title, caption and alternative text."""
    with _style():
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        title, caption, alt = draw(figure)
        buffer = io.BytesIO()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figure.savefig(buffer, format="png", dpi=130)
    missing = any("missing from" in str(w.message) for w in caught)
    notes = ["No installed font has all characters of the clients' names; the pictures show boxes in their place."] if missing else []
    return Picture(buffer.getvalue(), title, caption, alt, notes)


@contextmanager
def _style() -> Iterator[None]:
    installed = set(font_manager.get_font_names())
    with matplotlib.rc_context(
        {
            "font.family": ["DejaVu Sans", *(font for font in _CJK_FONTS if font in installed)],
            "font.size": 10,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "axes.axisbelow": True,
            "figure.facecolor": "white",
            "legend.frameon": False,
            # Client names may hold '$', which is no mathematics.
            "text.parse_math": False,
        }
    ):
        yield


def marker_size(points: list[int]) -> float:
    return 4 if len(points) <= MOST_LABELS else 0


def empty(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=axes.transAxes)


def log_axis(axes: Axes, shown: list[float], axis: Axis | None = None) -> bool:
    """Make `axis` (default: y) logarithmic where the values shown span more than a factor of five; whether it did."""
    if not max(shown) > 5 * min(shown) > 0:
        return False
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log", subs=[2, 5])
    axis = axis or axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    return True
