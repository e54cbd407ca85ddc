"""The picture of `precision`: error over KL, both logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kernels.bench.precision import BF16, ROUNDED, Errors
from kernels.bench.report import GRID, INK, OURS

WRONG, PLAIN = "#D55E00", "#8A9099"
SHOWN = (
    (BF16, "torch, bf16 logits", WRONG, 0.35, 9),
    (ROUNDED, "torch, fp32 logits, bf16 dlogits", PLAIN, 0.0, 9),
    ("linear_divergence B, recompute", "linear_divergence", OURS, 0.0, -25),
)
"""Method, its name in the picture, colour, where along the lines the name stands, points above (below) them."""
PANELS: tuple[tuple[str, Callable[[Errors], float]], ...] = (
    ("Error of the gradient of the hidden states", lambda each: each.dhidden),
    ("Error of the KL that is read", lambda each: each.value),
)


def write_plot(path: Path, errors: Sequence[Errors]) -> None:
    """Solid and named: the last head. Dashed: the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(11, 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    heads = list(dict.fromkeys(each.head for each in errors))
    for axes, (title, of) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for method, name, colour, place, above in SHOWN:
            anchors = []
            for head in heads:
                points = sorted((each.kl, of(each)) for each in errors if (each.method, each.head) == (method, head))
                last = head == heads[-1]
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=2 if last else 1.1, markersize=4,
                          linestyle="-" if last else (0, (4, 3)), marker="o" if last else "")  # fmt: skip
                anchors.append(points[int(place * len(points))])
            kl, value = (max if above > 0 else min)(anchors, key=lambda point: point[1])
            axes.annotate(name, (kl, value), (0, above), textcoords="offset points", color=colour, fontsize=10)
        axes.set(xscale="log", yscale="log")
        axes.margins(y=0.18)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("KL(student || teacher), nats per token", color=INK)
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{100 * value:.6f}".rstrip("0").rstrip(".") + "%")
        )
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(which="major", color=GRID)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
    note = ", ".join((f"solid: {heads[-1]}", *(f"dashed: {head}" for head in heads[:-1])))
    figure.supxlabel(note, fontsize=9, color=PLAIN)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
