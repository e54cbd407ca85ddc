"""`mopd audit`: checks, starts the ranks, prints what they found. Imports torch only when CONFIG is good."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_mopd.audit.options import Options
from megatron_mopd.config import RunConfig, load_config
from megatron_mopd.environment import joined_world, world_size
from megatron_mopd.launch import launch
from megatron_mopd.yaml_config import ConfigError

if TYPE_CHECKING:
    from megatron_mopd.audit.findings import Audit

WIDTH = 150
"""Of what is printed where there is no terminal."""
OUTSIDE = 1
"""Exit code: the audit was made, and is outside of the tolerance."""


def run_audit(path: str, overrides: Sequence[str], settings: Options) -> int:
    """Print the audit and return the exit code. Raises ConfigError."""
    config = load_config(path, overrides)
    from megatron_mopd import preflight
    from megatron_mopd.audit.setting import audit_config

    config = audit_config(config, settings)
    if settings.json_file is not None:
        preflight.check_writable(Path(settings.json_file).parent, "--json")
    preflight.check(config, world_size(config.parallel))
    outcome = launch(config, audit_rank, settings)
    found: Audit | None = outcome.result
    if found is None:
        return outcome.exit_code
    joined = joined_world()
    if joined is None or joined[0] == 0:
        _show(found, settings.json_file)
    return outcome.exit_code or (0 if found.passed else OUTSIDE)


def audit_rank(config: RunConfig, settings: Options) -> Audit:
    from megatron_mopd.audit.audit import audit

    return audit(config, settings)


def _show(found: Audit, json_file: str | None) -> None:
    from megatron_mopd.audit.tables import audit_tables

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    for table in audit_tables(found):
        console.print(table)
    if json_file is not None:
        try:
            Path(json_file).write_text(json.dumps(found.as_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: {json_file} cannot be written: {error.strerror}") from None
        print(json_file, file=sys.stderr)
