"""The `mopd` command. A configuration is checked within seconds; torch is imported only when it is good."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from megatron_mopd import __version__, cli_text
from megatron_mopd.config import RunConfig, Split, load_config
from megatron_mopd.environment import joined_world, prepare_environment, world_size
from megatron_mopd.launch import Outcome, launch
from megatron_mopd.merge.config import load_merge_config
from megatron_mopd.metrics import check_log
from megatron_mopd.plan import arguments as plan_arguments
from megatron_mopd.rank_process import EXIT_CONFIG
from megatron_mopd.yaml_config import ConfigError

EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    prepare_environment()
    arguments, overrides = _parse(argv)
    try:
        return int(arguments.command(arguments, overrides))
    except ConfigError as error:
        print(f"mopd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a table has left, as in `mopd reproduce CONFIG --dry-run | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails too
        return EXIT_NO_READER


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="mopd",
        description=cli_text.DESCRIPTION,
        epilog=cli_text.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mopd {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    _add_run_commands(commands)
    _add_model_commands(commands)
    _add_study_commands(commands)
    # key=value may stand anywhere, also after options, where argparse would not take a list of positionals.
    arguments, overrides = parser.parse_known_args(argv)
    unknown = [item for item in overrides if item.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}; see --help")
    return arguments, overrides


def _add_run_commands(commands: Any) -> None:
    """The commands that take a run's file."""
    _command(commands, "run CONFIG", _run, "train: one stage, one YAML file", cli_text.RUN, cli_text.RUN_EPILOG)
    sample = _command(
        commands,
        "sample CONFIG --out FILE",
        _sample,
        "store the teachers' answers, to learn from off-policy",
        cli_text.SAMPLE,
        cli_text.SAMPLE_EPILOG,
    )
    sample.add_argument("--out", metavar="FILE", required=True, help="dataset to write; must not exist")
    sample.add_argument("--keep", choices=("all", "correct"), default="all", help="default: %(default)s")
    evaluate = _command(
        commands,
        "eval CONFIG --checkpoint DIR",
        _evaluate,
        "measure a checkpoint: accuracies, perplexity",
        cli_text.EVAL,
        cli_text.EVAL_EPILOG,
    )
    evaluate.add_argument("--split", choices=get_args(Split), default="held_out", help="default: %(default)s")
    export = _command(
        commands,
        "export CONFIG --checkpoint DIR --hf OUT",
        _export,
        "write a checkpoint as a Hugging Face folder",
        cli_text.EXPORT,
        cli_text.EXPORT_EPILOG,
    )
    export.add_argument("--hf", metavar="OUT", required=True, help="folder to write; must not exist or be empty")
    for command in (evaluate, export):
        command.add_argument("--checkpoint", metavar="DIR", required=True, help="of this program, or Hugging Face")
    for command in commands.choices.values():
        command.add_argument("config", metavar="CONFIG", help="YAML file of the run")


def _add_model_commands(commands: Any) -> None:
    merge = _command(
        commands,
        "merge CONFIG",
        _merge,
        "merge the weights of several checkpoints into one model",
        cli_text.MERGE,
        cli_text.MERGE_EPILOG,
    )
    merge.add_argument("config", metavar="CONFIG", help="YAML file of the merge")
    benchmark = _command(
        commands,
        "benchmark NAME --from FILE --out FILE",
        _benchmark,
        "AIME, IFEval, IFBench or SWE-bench as prompts for eval",
        cli_text.BENCHMARK,
        cli_text.BENCHMARK_EPILOG,
        takes_values=False,
    )
    benchmark.add_argument("name", metavar="NAME", help="aime25, aime26, ifeval, ifbench or swe_bench_verified")
    benchmark.add_argument("--from", metavar="FILE", dest="origin", required=True, help="or hub:OWNER/NAME:SPLIT")
    benchmark.add_argument("--out", metavar="FILE", required=True, help="JSONL file to write; must not exist")


def _add_study_commands(commands: Any) -> None:
    demo = _command(
        commands, "demo", _demo, "all of it, small, on this machine's cores", cli_text.DEMO, cli_text.DEMO_EPILOG
    )
    demo.add_argument("--config-dir", metavar="DIR", default="configs/tiny", help="default: %(default)s")
    demo.add_argument("--run-dir", metavar="DIR", default="runs/demo", help="default: %(default)s")
    demo.add_argument(
        "--student", metavar="NAME", default="mopd", help="its file in the configuration folder; default: %(default)s"
    )
    compare = _command(
        commands,
        "reproduce CONFIG",
        _reproduce,
        "compare methods over seeds, all from one base",
        cli_text.REPRODUCE,
        cli_text.REPRODUCE_EPILOG,
    )
    compare.add_argument("config", metavar="CONFIG", help="YAML file of the comparison")
    compare.add_argument("--seeds", metavar="N", type=int, help="the first N seeds of the file; default: all")
    compare.add_argument("--only", metavar="METHOD", help="this method and what it needs")
    compare.add_argument("--dry-run", action="store_true", help="print the nodes and their cost; make none")
    compare.add_argument("--prune", action="store_true", help="delete results that the file no longer leads to")
    compare.add_argument("--tune", action="store_true", help="run the trials of `tune`, on the validation split")
    report = _command(
        commands,
        "report RUN...",
        _report,
        "tables and figures of runs, as one page",
        cli_text.REPORT,
        cli_text.REPORT_EPILOG,
        takes_values=False,
    )
    report.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, a demo or a reproduction")
    report.add_argument("--out", metavar="DIR", help="folder to write; default: report in the first RUN")
    about = "memory, bytes, FLOPs, time and cost of a run"
    plan_arguments.add(_command(commands, "plan CONFIG", _plan, about, cli_text.PLAN, cli_text.PLAN_EPILOG))


def _command(
    commands: Any,
    usage: str,
    function: Callable[[argparse.Namespace, list[str]], int],
    summary: str,
    description: str,
    epilog: str,
    *,
    takes_values: bool = True,
) -> argparse.ArgumentParser:
    """takes_values: whether `key.path=value` may follow."""
    parser: argparse.ArgumentParser = commands.add_parser(
        usage.split()[0],
        usage=f"mopd {usage} [options]" + (" [key.path=value ...]" if takes_values else ""),
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=function)
    return parser


def _checked(path: str, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration, once nothing is found wrong with it or with what it names."""
    config = load_config(path, overrides)
    check_log(config.log)
    from megatron_mopd import preflight

    preflight.check(config, world_size(config.parallel))
    return config


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    return launch(_checked(arguments.config, overrides), _train_rank).exit_code


def _evaluate(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(arguments.config, overrides)
    from megatron_mopd import preflight

    preflight.check_evaluation(config, arguments.checkpoint, world_size(config.parallel), arguments.split)
    return _print_result(launch(config, _evaluate_rank, arguments.checkpoint, arguments.split))


def _print_result(outcome: Outcome) -> int:
    joined = joined_world()
    if outcome.result is not None and (joined is None or joined[0] == 0):
        print(json.dumps(outcome.result, indent=2))
    return outcome.exit_code


def _export(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(arguments.config, overrides)
    from megatron_mopd.export import export

    export(config, arguments.checkpoint, Path(arguments.hf))
    print(arguments.hf)
    return 0


def _merge(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = load_merge_config(arguments.config, overrides)
    from megatron_mopd.merge.run import run_merge

    print(run_merge(config, say=lambda line: print(line, file=sys.stderr)))
    return 0


def _reproduce(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megatron_mopd.reproduce.command import Options, reproduce

    options = Options(
        seeds=arguments.seeds,
        only=arguments.only,
        dry_run=arguments.dry_run,
        prune=arguments.prune,
        tune=arguments.tune,
    )
    return reproduce(arguments.config, overrides, options)


def _sample(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config = load_config(arguments.config, overrides)
    from megatron_mopd import preflight
    from megatron_mopd.sample import check_sampling, sampling_config

    check_sampling(config, Path(arguments.out), arguments.keep)
    config = sampling_config(config)
    preflight.check(config, world_size(config.parallel))
    return _print_result(launch(config, _sample_rank, arguments.out, arguments.keep))


def _plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from megatron_mopd.plan.command import plan

    return plan(arguments.config, overrides, plan_arguments.options(arguments))


def _demo(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config_dir = Path(arguments.config_dir)
    if not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder; run from the repository, or name it")
    from megatron_mopd.demo import run_demo

    return run_demo(config_dir, Path(arguments.run_dir), overrides, arguments.student)


def _report(arguments: argparse.Namespace, more_runs: list[str]) -> int:
    from megatron_mopd.report_page.write import write_report

    folders = [Path(run) for run in (*arguments.runs, *more_runs)]
    print(write_report(folders, Path(arguments.out) if arguments.out else folders[0] / "report"))
    return 0


def _benchmark(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(f"benchmark: takes no {overrides[0]!r}; only NAME, --from and --out")
    from megatron_mopd.domains.benchmarks import BENCHMARKS, convert

    count = convert(arguments.name, arguments.origin, Path(arguments.out))
    print(f"{arguments.out}: {count} questions; verifier: {BENCHMARKS[arguments.name].verifier}")
    return 0


# Imported on the ranks: on a machine with GPUs the launcher must not load what may touch them.


def _train_rank(config: RunConfig) -> None:
    from megatron_mopd.train import train

    train(config)


def _sample_rank(config: RunConfig, out: str, keep: str) -> dict[str, Any]:
    from megatron_mopd.sample import sample

    return sample(config, out, keep)  # type: ignore[arg-type]


def _evaluate_rank(config: RunConfig, checkpoint: str, split: Split) -> dict[str, Any]:
    from megatron_mopd.evaluation import evaluate_checkpoints

    return evaluate_checkpoints(config, {"--checkpoint": checkpoint}, split)["--checkpoint"].as_json()


if __name__ == "__main__":
    sys.exit(main())
