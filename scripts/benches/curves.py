"""The picture of the echo bench: what a call costs, how long its echo takes, and the memory, over the number of calls."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from scripts.benches.results import Figures

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}
_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9742b", "#9a9a9a"
_SIZE_INCHES = (13, 4.2)
_DPI = 130
Loads = Mapping[int, Figures]


def draw(loads: Loads, caption: str, path: Path) -> None:
    """Draw the curves into a PNG."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
        cost, echo, memory = figure.subplots(1, 3)
        _cost(cost, loads)
        _echo(echo, loads)
        _memory(memory, loads)
        for axes in (cost, echo, memory):
            _calls_below(axes, sorted(loads))
        figure.supxlabel(caption, fontsize=8, color="#777777", x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _line(axes: Axes, loads: Loads, name: str, **look: Any) -> None:
    points = [(calls, found[name]) for calls, found in sorted(loads.items()) if name in found]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", **look)


def _cost(axes: Axes, loads: Loads) -> None:
    _line(axes, loads, "cost.tree_cpu_ms", label="dialogd and all its processes", color=_BLUE)
    _line(axes, loads, "cost.supervisor_cpu_ms", label="dialogd alone", color=_ORANGE)
    _line(axes, loads, "generator_cpu_ms", label="the load generator", color=_GREY, linestyle="--")
    axes.set(title="CPU for each call", ylabel="ms of CPU per call and second", ylim=(0, None))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _echo(axes: Axes, loads: Loads) -> None:
    _line(axes, loads, "echo_ms.p99", label="99 % of the frames within", color=_BLUE)
    _line(axes, loads, "echo_ms.p50", label="half of the frames within", color=_ORANGE)
    axes.set(title="Echo of a frame", ylabel="ms (logarithmic)", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend()


def _memory(axes: Axes, loads: Loads) -> None:
    _line(axes, loads, "cost.loaded_mb", label="with the calls", color=_BLUE)
    _line(axes, loads, "cost.idle_mb", label="before the calls", color=_GREY, linestyle="--")
    axes.set(title="Memory of dialogd and all its processes", ylabel="MB (PSS)", ylim=(0, None))
    axes.legend()


def _calls_below(axes: Axes, numbers: list[int]) -> None:
    margin = numbers[-1] * 0.03  # so that no point lies on the frame
    axes.set(xlabel="calls at the same time", xlim=(-margin, numbers[-1] + margin))
    axes.xaxis.set_major_locator(FixedLocator(numbers))
    axes.xaxis.set_minor_locator(NullLocator())
