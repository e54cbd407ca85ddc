"""Where a model name in the configuration leads to: a local folder, a checkpoint of this program, or the Hub.

Only JSON, safetensors, Jinja and text files are ever fetched: no pickle is read from a file that came from
elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_mopd.yaml_config import ConfigError

MANIFEST = "manifest.json"
"""Written last into a checkpoint of this program: without it the checkpoint is not complete."""
MODEL_FOLDER = "model"
"""Subfolder of a checkpoint with config.json and the tokenizer, as `transformers` names them."""
HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.txt")
NEVER_FETCHED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_folder(name: str, key: str) -> Path:
    """The folder with config.json that `name` stands for.

    `name` is a folder, a checkpoint of this program, or a Hub name. A checkpoint of this
    program (it has a manifest.json) resolves to its `model` subfolder. `key` is the configuration key that is
    named in errors. Raises ConfigError; may download.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _local_folder(path, key)
    if path.is_symlink():
        raise ConfigError(f"{key}: {name} is a link to {path.readlink()}, which does not exist")
    if path.exists():
        raise ConfigError(f"{key}: {name} is a file; name the folder that holds config.json")
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"{key}: folder {name} does not exist")
    return _hub_folder(name, key)


def _local_folder(path: Path, key: str) -> Path:
    if path.resolve().name.endswith(".tmp"):
        raise ConfigError(f"{key}: checkpoint {path} is incomplete (.tmp: its writing was cut off); use an earlier one")
    if (path / MANIFEST).is_file():
        if not (path / MODEL_FOLDER / "config.json").is_file():
            raise ConfigError(f"{key}: checkpoint {path} is incomplete: {MODEL_FOLDER}/config.json is missing")
        return path / MODEL_FOLDER
    if (path / "config.json").is_file():
        _refuse_pickle(path, key)
        return path
    if (path / MODEL_FOLDER).is_dir():
        raise ConfigError(f"{key}: checkpoint {path} is incomplete: it has no {MANIFEST}; use an earlier one")
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"{key}: {path} is a run folder; name one of its checkpoints: {path / 'checkpoints/latest'}")
    raise ConfigError(f"{key}: folder {path} has no config.json; name a folder with a Hugging Face model")


def _refuse_pickle(path: Path, key: str) -> None:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    if pickled and not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"{key}: {path} has its weights in {pickled[0]} only, a pickle, which is not read; convert it to"
            " safetensors with transformers' save_pretrained"
        )


def _hub_folder(name: str, key: str) -> Path:
    # Imported here: three quarters of a second that local folders need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    remedy = f"download it where there is a network: hf download {name} --local-dir models/{name.split('/')[-1]}"
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=list(NEVER_FETCHED)))
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{key}: '{name}' is no folder here and not in the Hub's cache, and the Hub cannot be reached; {remedy}"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise ConfigError(
            f"{key}: '{name}' is no folder here and the Hub does not give it out (HTTP {status}); check the"
            f" name, or log in with hf auth login if it is gated, or {remedy}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{key}: '{name}' could not be downloaded ({error}); {remedy}") from None
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}: '{name}' on the Hub has no config.json; name a model repository")
    return folder
