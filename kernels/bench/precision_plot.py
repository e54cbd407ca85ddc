"""The picture of `precision`: error over KL, both logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kernels.bench.precision import BF16, Errors
from kernels.bench.report import GRID, INK, OURS

WRONG = "#D55E00"
SHOWN = ((BF16, WRONG), ("divergence, fp32 logits", "#56B4E9"), ("linear_divergence B, recompute", OURS))


def write_plot(path: Path, errors: Sequence[Errors]) -> None:
    """Left the gradient of the hidden states, right the KL that is read. Solid: the last head, dashed: the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(11, 4.3), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels: tuple[tuple[str, Callable[[Errors], float]], ...] = (
        ("Error of the gradient (hidden states)", lambda each: each.dhidden),
        ("Error of the KL that is read", lambda each: each.value),
    )
    heads = list(dict.fromkeys(each.head for each in errors))
    for axes, (title, of) in zip(figure.subplots(1, 2), panels, strict=True):
        for method, colour in SHOWN:
            for head in heads:
                points = [(each.kl, of(each)) for each in errors if (each.method, each.head) == (method, head)]
                axes.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=2 if head == heads[-1] else 1.2,
                          linestyle="-" if head == heads[-1] else (0, (4, 2)), marker="o", markersize=3.5)  # fmt: skip
        axes.set(xscale="log", yscale="log")
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("KL(student || teacher), nats per token", color=INK)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(which="major", color=GRID)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
