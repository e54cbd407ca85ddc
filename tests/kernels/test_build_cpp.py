"""Building and finding the C++ library: once, whoever asks; and one clear line where it cannot be built."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest

from kernels import build_cpp, rows_cpp

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def load_portable() -> None:
    build_cpp.load.__wrapped__("portable")


def test_processes_that_start_together_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", compiler(tmp_path, f'[ "$1" = --version ] || echo build >> {log}\nexec c++ "$@"'))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=load_portable) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    load_portable()
    assert log.read_text() == "build\n"
    kept = {path.suffix for path in (tmp_path / "cache" / "mopd-kernels").iterdir()}
    assert kept == {".so", ".lock"}


def test_a_compiler_without_openmp_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = 'case "$*" in *-fopenmp*) echo unknown option >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", compiler(tmp_path, f'{refuse}\nexec c++ "$@"'))
    load_portable()


def test_other_flags_and_compilers_get_other_libraries(tmp_path: Path) -> None:
    path = str(shutil.which("c++"))
    names = {build_cpp._fingerprint(path, name) for name in build_cpp.INSTRUCTION_SETS}
    assert len(names) == len(build_cpp.INSTRUCTION_SETS)
    assert build_cpp._fingerprint(compiler(tmp_path, "echo another"), "portable") not in names


@pytest.mark.parametrize(
    ("script", "message"),
    [(None, "no C++ compiler: .*/compiler not found"),
     ('[ "$1" = --version ] || { echo "no space left" >&2; exit 1; }', "could not build rows.cpp: no space left")],
)  # fmt: skip
def test_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, message: str) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, script) if script else str(tmp_path / "compiler"))
    monkeypatch.setattr(rows_cpp, "load", build_cpp.load.__wrapped__)
    rows_cpp.reason.cache_clear()
    try:
        with pytest.raises(build_cpp.Unavailable, match=message.replace("+", r"\+")):
            load_portable()
        assert not rows_cpp.available() and "\n" not in str(rows_cpp.reason())
    finally:
        rows_cpp.reason.cache_clear()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build_cpp.Unavailable, match="mopd-kernels"):
        load_portable()
