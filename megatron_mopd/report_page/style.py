"""How figures look: fonts and sizes of a paper, colours that colour-blind readers tell apart, one look per method."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

COLUMN, PAGE = 3.4, 7.0
"""Inches: the width of one column, and of both, of a two-column paper."""
TEXT, GRID, TEACHER, BASE = "#222222", "#DDDDDD", "#222222", "#777777"

# Okabe and Ito's colours.
_FAMILIES = {"mopd": "#0072B2", "rl": "#D55E00", "off_policy": "#009E73", "merge": "#CC79A7"}
_OTHERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TINTS = (0.0, 0.35, -0.35, 0.58, -0.62)
"""For a family's first, second, ... method: part of the way from its colour to white, or (below 0) to black."""
_MARKERS = "osD^v"
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1, 1.2)), (0, (5, 1.4, 1, 1.4)), (0, (2.5, 1)))

_SETTINGS = {
    # Both are part of matplotlib: the same figure on every machine. Times to the eye, and the rest of Unicode.
    "font.family": ["STIXGeneral", "DejaVu Sans"],
    "mathtext.fontset": "stix",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.6,
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.visible": False,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "text.parse_math": False,  # a label may have dollar signs
    "axes.unicode_minus": True,
    "figure.facecolor": "white",
}
_DPI = 300


@dataclass(frozen=True, slots=True)
class Look:
    colour: str
    line: Any
    """A matplotlib line style."""
    marker: str


def looks(families: Mapping[str, str]) -> dict[str, Look]:
    """Name -> look: the hue is the family's, tint and dashes the place in it; names without a family get a hue each."""
    seen: dict[str, int] = {}
    table = {}
    for name, family in families.items():
        place = seen.get(family, 0)
        seen[family] = place + 1
        if family in _FAMILIES:
            colour, turn = _tinted(_FAMILIES[family], _TINTS[place % len(_TINTS)]), place
        else:
            colour, turn = _OTHERS[place % len(_OTHERS)], place // len(_OTHERS)
        table[name] = Look(colour, _LINES[turn % len(_LINES)], _MARKERS[turn % len(_MARKERS)])
    return table


def domain_colours(domains: Sequence[str]) -> dict[str, str]:
    """Light colours for areas that lie beside each other; they come again after the ninth (Paul Tol's `light`)."""
    soft = ("#77AADD", "#EE8866", "#44BB99", "#FFAABB", "#EEDD88", "#99DDFF", "#BBCC33", "#DDDDDD", "#AAAA00")
    return {name: _tinted(soft[index % len(soft)], 0.3) for index, name in enumerate(domains)}


def luminance(colour: str) -> float:
    """0 (black) to 1 (white), of '#RRGGBB' without its gamma: enough to choose between dark and light text."""
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ink(colour: str) -> str:
    """The colour, darkened until text in it can be read on white."""
    while luminance(colour) > 0.48:
        colour = _tinted(colour, -0.1)
    return colour


def _tinted(colour: str, by: float) -> str:
    parts = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    end = 255 if by > 0 else 0
    return "#" + "".join(f"{round(part + abs(by) * (end - part)):02X}" for part in parts)


@contextmanager
def styled() -> Iterator[None]:
    """Figures that are made and saved in the block have this style."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what the user's matplotlibrc says
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches. Not pyplot: it looks for a display and keeps figures alive."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
    return file.getvalue()


def as_pdf(figure: Any) -> bytes:
    """Without a date: the same figure is the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})
    return file.getvalue()
