"""Self-contained HTML pages: tables and plots in one file without external resources."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000"]
STYLE: dict[Any, Any] = {  # matplotlib's type for a key is a literal of every name that it has
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "svg.hashsalt": "joint_train",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


Interval = Mapping[str, float | None]
"""``value``, ``low`` and ``high``, as :func:`joint_train.evaluate.intervals.interval` makes them."""

DRAFTS = "K, drafts in a verification"  # label of an axis


@dataclass
class Table:
    """Rows of strings under column heads; ``note`` explains it."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Section:
    """A part of a page. ``figures`` are (what it shows, SVG)."""

    title: str
    text: str = ""
    figures: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def figure(draw: Callable[[Any], None], x: str, y: str) -> str:
    """An SVG figure without a size of its own: as wide as there is room.

    Args:
        draw: draws into a matplotlib ``Axes``.
        x, y: axis labels. Labelled curves get a legend, above the axes, where it hides nothing.

    Raises:
        ImportError: without matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = fig.subplots()
        axes.set_prop_cycle(color=COLOURS)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        draw(axes)
        if labels := axes.get_legend_handles_labels()[1]:
            beside = 3 if max(map(len, labels)) <= 10 else 2
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=beside, borderpad=0)
        out = io.StringIO()
        fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = out.getvalue().replace("#000000", "currentColor")  # black on white, white on black
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ' role="img">' + rest


def errorbars(axes, points: Sequence[tuple[float, Interval]], joined: bool = True, **style: Any) -> None:
    """Points with their intervals; ``joined`` by a line where the axis is a quantity."""

    def distance(low: float | None, high: float | None) -> float:
        return 0.0 if low is None or high is None else high - low

    below = [distance(i["low"], i["value"]) for _, i in points]
    above = [distance(i["value"], i["high"]) for _, i in points]
    axes.errorbar(
        [x for x, _ in points],
        [i["value"] for _, i in points],
        yerr=[[max(0, b) for b in below], [max(0, a) for a in above]],
        fmt="o-" if joined else "o",
        markersize=4,
        linewidth=1.5,
        capsize=3,
        **style,
    )


def whole_numbers(axes: Any) -> None:
    """Ticks of the x axis at whole numbers only: there are no 1.5 drafts, and no half steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plots_available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def format_interval(interval: Interval, digits: int = 2) -> str:
    """``1.52 [1.45, 1.60]``; a dash where there is no value."""
    if interval["value"] is None:
        return "–"
    if interval["low"] is None:
        return f"{interval['value']:.{digits}f}"
    return f"{interval['value']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def html(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page."""
    template = (resources.files(__package__) / "page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(title=title, lead=lead, sections=sections)
