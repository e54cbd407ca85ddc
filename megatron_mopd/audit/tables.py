"""An audit on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from megatron_mopd.audit.numbers import OVERALL

if TYPE_CHECKING:
    from megatron_mopd.audit.findings import Audit


def audit_tables(audit: Audit) -> Iterator[Table]:
    yield _log_probs(audit)
    if audit.routing:
        yield _routing(audit)
    if audit.layers:
        yield _layers(audit)
    yield _verdicts(audit)


def _log_probs(audit: Audit) -> Table:
    layout = "".join(str(degree) for degree in audit.about["layout"].values())
    title = f"log-probs, nats: {audit.about['engine']}, {audit.about['dtype']}, TP PP EP {layout}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("domain")
    for name in ("tokens", "max", "mean", "p99", "KL", "k3"):
        table.add_column(name, justify="right")
    for pair in audit.pairs:
        rows = {name: figures for name, figures in pair.by_domain.items() if name != OVERALL}
        if len(rows) == 1:
            rows = {}
        for name, f in {OVERALL: pair.overall, **rows}.items():
            cells = (f"{value:.1e}" for value in (f.largest, f.mean, f.p99, f.kl, f.k3))
            table.add_row(pair.title if name == OVERALL else "", name, f"{f.tokens:,}", *cells)
        table.add_section()
    return table


def _routing(audit: Audit) -> Table:
    table = Table(title="same experts, share of tokens", title_justify="left")
    table.add_column("")
    layers = len(audit.routing[0].per_layer)
    shown = sorted({round(i * (layers - 1) / min(7, max(1, layers - 1))) for i in range(min(8, layers))})
    for layer in shown:
        table.add_column(f"layer {layer}", justify="right")
    for name in ("all", "first differing", "margin there"):
        table.add_column(name, justify="right")
    for routing in audit.routing:
        first = routing.partings[0] if routing.partings else None
        table.add_row(
            f"{routing.left} / {routing.right}",
            *(f"{routing.per_layer[layer]:.4f}" for layer in shown),
            f"{routing.same:.4f}",
            f"layer {first.layer}" if first else "none",
            f"{first.margin:.1e}" if first else "",
        )
    return table


def _layers(audit: Audit) -> Table:
    table = Table(title="hidden states, student / transformers fp32, relative L2", title_justify="left")
    for name in ("", "mean", "max", "at", "tokens that part here"):
        table.add_column(name, justify="left" if name in ("", "at") else "right")
    for layer in audit.layers:
        at = f"sequence {layer.sequence}, token {layer.token}"
        table.add_row(layer.name, f"{layer.mean:.1e}", f"{layer.largest:.1e}", at, f"{layer.parted:,}")
    return table


def _verdicts(audit: Audit) -> Table:
    bound = f"max {audit.tolerance.largest:g}"
    if audit.tolerance.kl < audit.tolerance.largest:
        bound = f"KL (k3) {audit.tolerance.kl:g}, {bound}"
    outcome = "within" if audit.passed else "NOT within"
    table = Table(title=f"{outcome} tolerance ({bound})", title_justify="left", show_header=False, show_lines=True)
    for verdict in audit.verdicts:
        table.add_row(f"[bold]{verdict.part}[/]", "[bold red]this[/]" if verdict.blamed else "no", verdict.text)
    return table
