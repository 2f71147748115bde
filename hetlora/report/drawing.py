"""What all pictures share: their style, the figure that becomes PNGs (wide and narrow, light and dark), and axes.

Colours are Okabe and Ito's, distinct to colour-blind readers.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color, to_rgba
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
_CJK_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo", "Noto Sans CJK JP", "Noto Sans CJK SC")
MOST_LABELS = 50


_NARROW = 4.3  # inches, of a telephone
LOOKS = ("narrow", "dark", "narrow dark")  # beside the wide one on white
_PAPER, _INK = "#15171a", "#e6e8eb"  # of the dark pages (style.css)
_GRID = "#dddddd"
_ON_DARK = {"black": _INK, _GRID: "#3a3f46", "#332288": "#9c8df0", "#882255": "#d9679f", BLUE: "#4ba3e3", GREY: "#a3aab4"}
_ON_DARK |= {"#999999": "#7d848e", "#eeeeee": "#2a2e33"}
"""Colours that a dark page would swallow -> what stands for them there."""


@dataclass
class Picture:
    """A drawn figure. `notes`: what the reader of the report must know about how it was drawn.

    png: wide, on white.   others: 'narrow', 'dark' and 'narrow dark' -> the same drawn anew for a telephone, for a dark page.
    """

    png: bytes
    title: str
    caption: str
    alt: str
    notes: list[str] = field(default_factory=list)
    others: dict[str, bytes] = field(default_factory=dict)


def render(draw: Callable[[Figure], tuple[str, str, str]]) -> Picture:
    """The picture of what `draw` puts into a figure; it returns title, caption and alternative text."""
    pngs, missing, words = _drawn(draw, "wide")
    if "narrow" in LOOKS:
        pngs |= _drawn(draw, "narrow")[0]
    notes = ["No installed font has all characters of the clients' names; the pictures show boxes in their place."] if missing else []
    return Picture(pngs.pop("wide"), *words, notes, pngs)


def _drawn(draw: Callable[[Figure], tuple[str, str, str]], look: str) -> tuple[dict[str, bytes], bool, tuple[str, str, str]]:
    """({`look`, 'wide' or 'narrow': PNG on white, its dark one of LOOKS: PNG}, whether a font lacks characters, what `draw` returns).

    Most of the time of a drawing goes to its layout. The dark picture is the same figure in other colours, with the layout that is there.
    """
    narrow = look == "narrow"
    dark = "narrow dark" if narrow else "dark"
    with _style(narrow):
        figure = Figure(figsize=(_NARROW, 4.2) if narrow else (9, 5), layout="constrained", dpi=170 if narrow else 130)
        canvas = FigureCanvasAgg(figure)
        words = draw(figure)
        if narrow:
            _break_titles(figure)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pngs = {look: _png(canvas)}
            if dark in LOOKS:
                figure.set_layout_engine("none")
                _darken(figure)
                pngs[dark] = _png(canvas)
    return pngs, any("missing from" in str(w.message) for w in caught), words


def _png(canvas: FigureCanvasAgg) -> bytes:
    buffer = io.BytesIO()
    canvas.draw()  # once; savefig would draw twice, the first time for a layout that this one makes too
    imsave(buffer, canvas.buffer_rgba(), format="png", dpi=canvas.figure.dpi)
    return buffer.getvalue()


def is_narrow(figure: Figure | SubFigure) -> bool:
    """Whether the figure is the one for telephones."""
    root = figure.get_figure(root=True)
    return isinstance(root, Figure) and bool(root.get_figwidth() <= _NARROW)


def resize(figure: Figure, width: float, height: float) -> None:
    """Inches; a narrow figure keeps its width."""
    figure.set_size_inches(min(width, _NARROW) if is_narrow(figure) else width, height)


def panels(figure: Figure, count: int) -> list[Axes]:
    """Axes side by side; in a narrow figure one below the other."""
    if not is_narrow(figure):
        return list(figure.subplots(1, count, squeeze=False).flatten())
    figure.set_size_inches(_NARROW, 3.2 * count + 0.8)
    return list(figure.subplots(count, 1, squeeze=False).flatten())


def legend_below(figure: Figure, columns: int, handles: Sequence[Artist] = (), fontsize: float | None = None) -> None:
    """A legend under the panels in at most `columns` columns, fewer where names are long; a name wider than the figure takes more lines.

    handles: those of all axes, unless given.
    """
    handles = list(handles) or [handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]]
    names = [str(handle.get_label()) for handle in handles]
    for count in range(max(1, min(columns, len(names))), 0, -1):
        legend = figure.legend(handles, names, loc="outside lower center", ncols=count, fontsize=fontsize)
        width = legend.get_window_extent().width / figure.bbox.width
        if width <= 1:
            return
        legend.remove()
    letters = int(max(map(len, names)) / width) - 4  # letters are not all as wide as the longest name's are
    figure.legend(handles, [textwrap.fill(name, letters) for name in names], loc="outside lower center", fontsize=fontsize)


def _break_titles(figure: Figure) -> None:
    for axes in figure.axes:
        axes.set_title(textwrap.fill(axes.get_title(loc="left"), 30), fontsize=10)
    above = getattr(figure, "_suptitle", None)
    if above is not None:
        above.set_text(textwrap.fill(above.get_text(), 42))


def _darken(figure: Figure) -> None:
    """Dark paper, and other colours for those that it would swallow."""
    figure.set_facecolor(_PAPER)
    for axes in figure.axes:
        if same_color(axes.get_facecolor(), "white"):
            axes.set_facecolor(_PAPER)
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            read, write = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if read is None or write is None:
                continue
            colour: Any = read()
            if not isinstance(colour, str) and getattr(colour, "ndim", 1) == 2:
                if len(colour) != 1:
                    continue
                colour = colour[0]
            if isinstance(colour, str) and colour in ("none", "auto"):
                continue
            for dull, bright in _ON_DARK.items():
                if same_color(to_rgba(colour, 1), dull):
                    write(to_rgba(bright, to_rgba(colour)[3]))
                    break


@contextmanager
def _style(narrow: bool) -> Iterator[None]:
    installed = set(font_manager.get_font_names())
    with matplotlib.rc_context(
        {
            "font.family": ["DejaVu Sans", *(font for font in _CJK_FONTS if font in installed)],
            "font.size": 8.5 if narrow else 10,
            "axes.titlesize": 12,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": _GRID,
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
