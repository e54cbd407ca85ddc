"""The command line of the benchmarks.

    python -m kernels.bench divergence          logits [T, V], also token_logprob and topk_divergence
    python -m kernels.bench linear_divergence   hidden states and output layers
    python -m kernels.bench memory              peak of linear_divergence, gradient="recompute", over T
    python -m kernels.bench precision           errors against float64 over the KL

`faster` and `smaller` are ratios to eager torch, the first line. Peaks are over the inputs, logits or hidden states,
weights and main_grad. GB/s and TFLOP/s count what the operation must do, the same for every contender, so the share
of the copy or GEMM that was measured on this device compares them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from kernels.bench import precision, report
from kernels.bench.ceilings import Work, linear_work, logits_work, measured_ceiling
from kernels.bench.checks import linear_missed, logits_missed, memory_missed
from kernels.bench.heads import Heads, smollm2, synthetic, with_teacher
from kernels.bench.linear import NOISE, LinearProblem, exact_gradients, linear_contenders, memory_floor
from kernels.bench.logits import LogitsProblem, divergence_contenders, token_contenders, topk_contenders
from kernels.bench.measure import Measured, measure, meter_for
from kernels.bench.precision_plot import write_plot

CPU_TOKEN, CPU_CALL = ("cpu us/token", 1e6, 0), ("cpu s", 1.0, 2)
LOGITS_OPERATIONS = ("divergence", "token_logprob", "topk_divergence")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; with `--check` the exit code is 1 if a bar is missed."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    missed: list[str] = options.run(options)
    for line in missed if options.check else ():
        print(f"missed: {line}")
    return int(options.check and bool(missed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    operations = parser.add_subparsers(metavar="OPERATION", required=True)

    def operation(
        name: str, run: object, *, tokens: int | None = None, rounds: int | None = None
    ) -> argparse.ArgumentParser:
        added = operations.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        added.set_defaults(run=run, operation=name)
        if tokens is not None:
            added.add_argument("--tokens", type=int, default=tokens)
        if rounds is not None:
            added.add_argument("--rounds", type=int, default=rounds)
            added.add_argument("--no-compile", action="store_true", help="without torch.compile, a minute each")
        added.add_argument("--vocab", type=int, default=151936)
        added.add_argument("--threads", type=int, default=1)
        added.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
        added.add_argument("--csv", type=Path, help="also write the figures here")
        added.add_argument("--png", type=Path, help="also draw them here")
        added.add_argument(
            "--check", action="store_true", help="exit code 1 if a bar is missed: kernels/bench/checks.py"
        )
        return added

    for name in LOGITS_OPERATIONS:
        added = operation(name, _logits, tokens=256, rounds=5)
        if name == "topk_divergence":
            added.add_argument("--k", type=int, default=64, help="tokens of the teacher's support")
    added = operation("linear_divergence", _linear, tokens=512, rounds=3)
    added.add_argument("--hidden", type=int, default=2048)
    added.add_argument("--liger-chunk", type=int, default=1024, help="tokens in a chunk of Liger's loss")
    added.add_argument("--no-main-grad", action="store_true", help="dW as a tensor of its own, in bf16")
    added = operation("memory", _memory)
    added.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    added.add_argument("--hidden", type=int, default=256)
    added = operation("precision", _precision, tokens=16)
    added.add_argument("--hidden", type=int, default=256)
    added.add_argument("--no-model", action="store_true", help="without SmolLM2-135M")
    return parser


def _report(
    title: str, measured: Sequence[Measured], work: Work, unit: report.Unit, errors: Sequence[str],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    ceiling = measured_ceiling(work, meter_for(torch.device(options.device)))
    table = report.timings(title, measured, unit, work, ceiling, errors)
    report.show(table)
    print(f"{work.ceiling} on this device: {ceiling:.3g} {work.unit}")
    if options.csv:
        report.write_csv(options.csv, table.header, table.rows)
    if options.png:
        report.write_bars(options.png, title, measured, unit)


def _unit(cpu: tuple[str, float, int], device: str, tokens: int = 1) -> report.Unit:
    if device == "cuda":
        return report.Unit("ms", 1e3, 3)
    label, per_second, digits = cpu
    return report.Unit(label, per_second / tokens, digits)


def _logits(options: argparse.Namespace) -> list[str]:
    device = torch.device(options.device)
    problem = LogitsProblem.draw(options.tokens, options.vocab, device)
    if options.operation == "divergence":
        entries = divergence_contenders(problem, not options.no_compile)
    elif options.operation == "token_logprob":
        entries = token_contenders(problem, not options.no_compile)
    else:
        entries = topk_contenders(problem, not options.no_compile, options.k)
    measured = measure(entries, meter_for(device), options.rounds, problem.restore)
    title = (f"{options.operation}, forward and backward: {options.tokens} x {options.vocab} bf16 logits, "
             f"{_where(options)}, median of {options.rounds}")  # fmt: skip
    work = logits_work(options.operation, options.tokens, options.vocab, problem.student.itemsize)
    _report(title, measured, work, _unit(CPU_TOKEN, options.device, options.tokens), ("gradient error",), options)
    return logits_missed(measured) if options.operation == "divergence" and device.type == "cpu" else []


def _where(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"CPU, {options.threads} thread{'s' if options.threads > 1 else ''}"


def _heads(tokens: int, options: argparse.Namespace) -> Heads:
    heads = with_teacher(synthetic(tokens, options.hidden, options.vocab), NOISE)
    device = torch.device(options.device)
    return Heads(
        *(each.to(device) for each in (heads.hidden, heads.weight, heads.teacher_hidden, heads.teacher_weight))
    )


def _linear(options: argparse.Namespace) -> list[str]:
    device = torch.device(options.device)
    heads = _heads(options.tokens, options)
    main_grad = None if options.no_main_grad else torch.zeros(heads.weight.shape, device=device)
    problem, exact = LinearProblem(heads, main_grad), exact_gradients(heads)
    entries = linear_contenders(problem, exact, not options.no_compile, options.liger_chunk)
    measured = measure(entries, meter_for(device), options.rounds, problem.restore)
    title = (f"linear_divergence, forward and backward, dW {'new' if main_grad is None else 'into main_grad'}: "
             f"T={options.tokens}, H={options.hidden}, V={options.vocab}, bf16, KL {exact.kl:.3f}, {_where(options)}, "
             f"median of {options.rounds}")  # fmt: skip
    work = linear_work(options.tokens, options.hidden, options.vocab)
    _report(title, measured, work, _unit(CPU_CALL, options.device), ("dX error", "dW error"), options)
    return linear_missed(measured) if device.type == "cpu" else []


def _memory(options: argparse.Namespace) -> list[str]:
    meter = meter_for(torch.device(options.device))
    heads = _heads(max(options.tokens), options)
    main_grad = torch.zeros(heads.weight.shape, device=heads.weight.device)
    floors = []
    for tokens in (min(options.tokens), *options.tokens):  # the first loads libraries
        part = Heads(heads.hidden[:tokens], heads.weight, heads.teacher_hidden[:tokens], heads.teacher_weight)
        floors.append(memory_floor(LinearProblem(part, main_grad), meter))
    floors = floors[1:]
    header = ("T", "peak MiB", "[T, H] fp32 MiB", "[T, V] fp32 MiB")
    rows = tuple((str(each.tokens), *(f"{mib:.1f}" for mib in (each.peak, each.states, each.logits)))
                 for each in floors)  # fmt: skip
    title = (f"Peak memory of linear_divergence, gradient=recompute, over the inputs: H={options.hidden}, "
             f"V={options.vocab}, bf16, dW into main_grad, {_where(options)}")  # fmt: skip
    report.show(report.Table(title, header, rows))
    if options.csv:
        report.write_csv(options.csv, header, rows)
    if options.png:
        report.write_floors(options.png, title, floors)
    return memory_missed(floors)


def _precision(options: argparse.Namespace) -> list[str]:
    students = [synthetic(options.tokens, options.hidden, options.vocab)]
    model = None if options.no_model else smollm2()
    if model is not None:
        students.append(model)
    errors: list[precision.Errors] = []
    for student in students:
        found = precision.measure_precision(student)
        errors += found
        for title, of in precision.COLUMNS:
            lines = precision.pivot(found, of)
            report.show(report.Table(f"{student.name}: {title}", lines[0], tuple(lines[1:])))
    if options.csv:
        report.write_csv(options.csv, precision.HEADER, [each.cells() for each in errors])
    if options.png:
        write_plot(options.png, errors)
    return precision.missed(errors)
