"""What a model name may stand for, and one clear line for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mopd.hub import resolve_folder
from megatron_mopd.yaml_config import ConfigError

KEY = "model.checkpoint"


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def checkpoint(path: Path) -> Path:
    model_folder(path / "model")
    (path / "manifest.json").write_text("{}")
    return path


def refusal(name: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_folder(str(name), KEY)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(name), "NAME")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The Hub client in its offline mode with a cache of its own."""
    from huggingface_hub import _snapshot_download, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert _snapshot_download.constants is constants
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_a_model_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_folder(str(model_folder(tmp_path / "m")), KEY) == tmp_path / "m"


def test_a_checkpoint_is_its_model_folder_also_through_latest(tmp_path: Path) -> None:
    checkpoint(tmp_path / "step_20")
    (tmp_path / "latest").symlink_to("step_20")
    assert resolve_folder(str(tmp_path / "step_20"), KEY) == tmp_path / "step_20/model"
    assert resolve_folder(str(tmp_path / "latest"), KEY).samefile(tmp_path / "step_20/model")


def test_half_written_checkpoints_are_refused(tmp_path: Path) -> None:
    model_folder(tmp_path / "a/model")
    assert refusal(tmp_path / "a") == (
        "model.checkpoint: checkpoint NAME is incomplete: it has no manifest.json; use an earlier one"
    )
    checkpoint(tmp_path / "b.tmp")
    assert "NAME is incomplete (.tmp: its writing was cut off)" in refusal(tmp_path / "b.tmp")
    checkpoint(tmp_path / "c")
    (tmp_path / "c/model/config.json").unlink()
    assert "NAME is incomplete: model/config.json is missing" in refusal(tmp_path / "c")


def test_other_folders_are_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "folder NAME has no config.json" in refusal(tmp_path / "empty")
    checkpoint(tmp_path / "run/checkpoints/step_1")
    assert "NAME is a run folder; name one of its checkpoints: NAME/checkpoints/latest" in refusal(tmp_path / "run")
    assert "NAME is a file" in refusal(model_folder(tmp_path / "m") / "config.json")
    (tmp_path / "dangling").symlink_to("gone")
    assert refusal(tmp_path / "dangling") == "model.checkpoint: NAME is a link to gone, which does not exist"
    assert refusal(tmp_path / "nowhere") == "model.checkpoint: folder NAME does not exist"


def test_pickled_weights_are_refused_unless_safetensors_are_there(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin only, a pickle, which is not read; convert it to safetensors" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"")
    assert resolve_folder(str(folder), KEY) == folder


def test_offline_and_missing_says_what_to_download(offline: Path) -> None:
    assert refusal("Qwen/Qwen3-0.6B") == (
        "model.checkpoint: 'NAME' is no folder here and not in the Hub's cache, and the Hub cannot"
        " be reached; download it where there is a network: hf download NAME --local-dir models/Qwen3-0.6B"
    )


def test_offline_and_cached_is_found(offline: Path) -> None:
    snapshot = model_folder(offline / "models--some--model/snapshots/abc")
    (offline / "models--some--model/refs").mkdir()
    (offline / "models--some--model/refs/main").write_text("abc")
    assert resolve_folder("some/model", KEY) == snapshot
