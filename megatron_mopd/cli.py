"""The `mopd` command. A configuration is checked within seconds; torch is imported only when it is good."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_mopd import __version__
from megatron_mopd.cli_text import MERGE, MERGE_EPILOG
from megatron_mopd.config import RunConfig, load_config
from megatron_mopd.environment import joined_world, prepare_environment, world_size
from megatron_mopd.launch import launch
from megatron_mopd.merge.config import load_merge_config
from megatron_mopd.metrics import check_log
from megatron_mopd.rank_process import EXIT_CONFIG
from megatron_mopd.yaml_config import ConfigError

EXIT_INTERRUPTED = 130

DESCRIPTION = """\
Multi-teacher on-policy distillation (MOPD) with Megatron-Core.

One YAML file is one complete run. Its `stage` says what the run does:
  sft    learn from the reference answers of the domains
  rl     learn from verified rewards (GRPO); makes a teacher
  mopd   learn from one teacher per domain, on the student's own answers
"""

EPILOG = """\
examples:
  mopd demo                                               all of it, small, on this machine's cores
  mopd run configs/tiny/mopd.yaml                         one stage
  mopd run configs/tiny/mopd.yaml steps=5 optim.lr=1e-4   the same with other values
  mopd COMMAND --help                                     more on one command

exit codes:
  0           done
  2           a mistake in the configuration or its files; one line says which, and nothing was started
  130, 143    stopped by Ctrl-C or SIGTERM after saving; the same command goes on
  137         a rank was killed
  1           anything else
"""

RUN = """\
Train as CONFIG says: to its last step, on from the newest checkpoint in its run_dir if there is one.

The ranks are started on this machine: `parallel.ranks` of them, by default one per GPU, or without GPUs
the fewest that the layout needs. Under torchrun or srun (RANK and WORLD_SIZE, or SLURM_PROCID and
SLURM_NTASKS, with MASTER_ADDR and MASTER_PORT) this process is one rank of that world.

Ctrl-C or SIGTERM: the step is finished, a checkpoint saved, and the run left. A second Ctrl-C kills.
In run_dir: config.yaml (every default filled in), metrics.jsonl, tensorboard/, checkpoints/, logs/rank<r>.log
"""

RUN_EPILOG = """\
key.path=value sets one value of the file; the value is read as YAML.

examples:
  mopd run configs/tiny/sft.yaml
  mopd run configs/tiny/mopd.yaml run_dir=runs/try2 objective.kind=sampled
  mopd run configs/tiny/mopd.yaml parallel.tensor=2 parallel.ranks=4
  torchrun --nproc-per-node 8 -m megatron_mopd run CONFIG
"""

EVAL = """\
Answer the held-out prompts of CONFIG's domains with the model of a checkpoint, verify the answers, and print
the accuracy per domain as JSON. The prompts depend on `evaluation.seed` only: checkpoints can be compared.
"""

EVAL_EPILOG = """\
examples:
  mopd eval configs/tiny/mopd.yaml --checkpoint runs/mopd/checkpoints/latest
  mopd eval configs/tiny/mopd.yaml --checkpoint models/my-hf-model evaluation.prompts=1000
"""

EXPORT = """\
Write a checkpoint as a Hugging Face folder: safetensors, config.json and the tokenizer, which `transformers`
and inference servers load.
"""

EXPORT_EPILOG = """\
examples:
  mopd export configs/tiny/mopd.yaml --checkpoint runs/mopd/checkpoints/latest --hf exported/student
"""

DEMO = """\
All of MOPD in minutes on two CPU cores: an SFT base, three domain teachers trained from it by RL, one
student that learns from all three on its own answers, and a table that says how much of each it inherited.

An interrupted demo goes on where it stopped. It leaves summary.json and a PNG in the run folder.
"""

DEMO_EPILOG = """\
examples:
  mopd demo
  mopd demo --run-dir runs/demo2 seed=1
"""


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


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="mopd",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mopd {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = _command(commands, "run CONFIG", _run, "train: one stage, one YAML file", RUN, RUN_EPILOG)
    evaluate = _command(commands, "eval CONFIG --checkpoint DIR", _evaluate, "accuracy per domain", EVAL, EVAL_EPILOG)
    export = _command(
        commands,
        "export CONFIG --checkpoint DIR --hf OUT",
        _export,
        "checkpoint -> Hugging Face folder",
        EXPORT,
        EXPORT_EPILOG,
    )
    demo = _command(commands, "demo", _demo, "all of it, small, on this machine's cores", DEMO, DEMO_EPILOG)
    merge = _command(commands, "merge CONFIG", _merge, "several checkpoints -> one model", MERGE, MERGE_EPILOG)
    merge.add_argument("config", metavar="CONFIG", help="YAML file of the merge")
    for command in (run, evaluate, export):
        command.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    for command in (evaluate, export):
        command.add_argument("--checkpoint", metavar="DIR", required=True, help="of this program, or Hugging Face")
    export.add_argument("--hf", metavar="OUT", required=True, help="folder to write; must not exist or be empty")
    demo.add_argument("--config-dir", metavar="DIR", default="configs/tiny", help="default: %(default)s")
    demo.add_argument("--run-dir", metavar="DIR", default="runs/demo", help="default: %(default)s")
    # key=value may stand anywhere, also after options, where argparse would not take a list of positionals.
    arguments, overrides = parser.parse_known_args(argv)
    unknown = [item for item in overrides if item.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}; see --help")
    return arguments, overrides


def _command(
    commands: Any,
    usage: str,
    function: Callable[[argparse.Namespace, list[str]], int],
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        usage.split()[0],
        usage=f"mopd {usage} [options] [key.path=value ...]",
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

    preflight.check_evaluation(config, arguments.checkpoint, world_size(config.parallel))
    outcome = launch(config, _evaluate_rank, arguments.checkpoint)
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


def _demo(arguments: argparse.Namespace, overrides: list[str]) -> int:
    config_dir = Path(arguments.config_dir)
    if not config_dir.is_dir():
        raise ConfigError(f"--config-dir {config_dir}: no such folder; run from the repository, or name it")
    from megatron_mopd.demo import run_demo

    return run_demo(config_dir, Path(arguments.run_dir), overrides)


# Imported on the ranks: on a machine with GPUs the launcher must not load what may touch them.


def _train_rank(config: RunConfig) -> None:
    from megatron_mopd.train import train

    train(config)


def _evaluate_rank(config: RunConfig, checkpoint: str) -> dict[str, float]:
    from megatron_mopd.evaluate import evaluate_checkpoints

    return evaluate_checkpoints(config, {"--checkpoint": checkpoint})["--checkpoint"]


if __name__ == "__main__":
    sys.exit(main())
