"""The one-read CUDA kernel without a GPU: its arithmetic, compiled for this CPU, and the autograd function around it.

The launch itself is not run here; that it compiles within limits is `test_aot`'s.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import VocabShard, build_cpp, build_cuda, divergence, linear_divergence, one_read
from tests.kernels.problems import relative_error

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = tmp_path_factory.mktemp("one_read") / "host.so"
    source = Path(__file__).with_name("one_read_host.cpp")
    command = ["c++", "-std=c++17", "-O2", "-fPIC", "-shared", f"-I{build_cpp.source_folder()}", str(source), "-o"]
    subprocess.run([*command, str(built)], check=True)
    return build_cuda.declared(ctypes.CDLL(str(built)))


@pytest.fixture
def on_cpu(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_read, "why_not", lambda device: None)
    monkeypatch.setattr(build_cuda, "load", lambda: library)


def logits(rows: int, columns: int, noise: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows + columns)
    student = 2.5 * torch.randn(rows, columns, generator=draw)
    student[torch.arange(rows), torch.randint(columns, (rows,), generator=draw)] += 12.0
    teacher = student + noise * torch.randn(rows, columns, generator=draw) - offset
    return (student + offset).bfloat16(), teacher.bfloat16()


def expected(student: Tensor, teacher: Tensor, upstream: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    z = student.double().requires_grad_()
    p, q = (z / temperature).log_softmax(-1), (teacher.double() / temperature).log_softmax(-1)
    terms = torch.where(p.isinf(), 0.0, p.exp() * (p - q).nan_to_num())
    value = terms.sum(-1)
    return value.detach(), torch.autograd.grad(value, z, upstream.double())[0]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize(("columns", "noise", "offset"), [(8, 0.5, 0.0), (1000, 3.0, 40.0), (20_000, 0.3, 0.0)])
def test_value_and_gradient(
    on_cpu: None, columns: int, noise: float, offset: float, temperature: float, inplace: bool
) -> None:
    student, teacher = logits(4, columns, noise, offset)
    weights = torch.tensor([0.5, 1.0, 0.0, 2.0])
    value, gradient = expected(student, teacher, weights, temperature)
    # Padding after the vocabulary: rows still start at multiples of 16 bytes.
    z, other = (torch.nn.functional.pad(each, (0, 8), value=3.0) for each in (student, teacher))
    shard = VocabShard.whole(columns)
    z.requires_grad_()
    found = divergence(z, other, weights=weights, temperature=temperature, shard=shard, impl="cuda", inplace=inplace)
    assert relative_error(found.detach(), value * weights) < 1e-5
    found.backward(torch.ones(4))
    assert z.grad is not None
    assert relative_error(z.grad[:, :columns].double(), gradient) < 3e-3  # rounded to bf16
    assert not z.grad[2].any() and not z.grad[:, columns:].any()
    if inplace:
        assert torch.equal(z.detach(), z.grad)
    else:
        assert torch.equal(z.detach()[:, :columns], student)


def test_other_upstream_gradients_scale_and_a_second_backward_raises(on_cpu: None) -> None:
    student, teacher = logits(3, 64, 0.5)
    upstream = torch.tensor([1.0, -0.25, 0.0])
    z = student.clone().requires_grad_()
    found = divergence(z, teacher, impl="cuda")
    found.backward(upstream, retain_graph=True)
    assert z.grad is not None
    assert relative_error(z.grad.double(), expected(student, teacher, upstream)[1]) < 3e-3
    with pytest.raises(ValueError, match="second backward"):
        found.backward(upstream)
    before = student.clone()
    with torch.no_grad():
        alone = divergence(student.requires_grad_(), teacher, impl="cuda", inplace=True)
    assert torch.equal(alone, found.detach())
    assert torch.equal(student, before)


def test_masked_and_broken_logits(on_cpu: None) -> None:
    student, teacher = logits(3, 4096 + 64, 0.5)
    student[0, 5:90] = teacher[0, 5:90] = -torch.inf
    student[1, :4096] = -torch.inf
    student[2, 7] = torch.nan
    value, gradient = expected(student[:2], teacher[:2], torch.ones(2))
    z = student.clone().requires_grad_()
    found = divergence(z, teacher, impl="cuda")
    found.backward(torch.ones(3))
    assert relative_error(found[:2].detach(), value) < 1e-5
    assert z.grad is not None
    assert relative_error(z.grad[:2].double(), gradient.nan_to_num()) < 3e-3
    assert found[2].isnan()


def test_small_divergence(on_cpu: None) -> None:
    """Few columns differ, by one bit of bf16: the sums about other maxima lose none of it."""
    student, _ = logits(6, 8192, 0.0)
    teacher = student.clone()
    teacher[:, ::97] *= 1.0 + 2**-7
    value, _ = expected(student, teacher, torch.ones(6))
    assert value.max() < 1e-2
    found = divergence(student, teacher, impl="cuda")
    assert ((found - value).abs() <= 1e-5 * value + 3e-8).all()


def test_no_rows(on_cpu: None) -> None:
    empty = torch.zeros(0, 16, dtype=torch.bfloat16)
    assert divergence(empty, empty, impl="cuda").shape == (0,)


Z = torch.zeros(2, 16, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: divergence(Z.float(), Z.float(), impl="cuda"), r"\(2, 16\) torch.float32 .* needs bf16"),
        (lambda: divergence(Z[:, :12], Z[:, :12], impl="cuda"), "12 tokens: .* multiple of 8 up to"),
        (lambda: divergence(Z[:, 1:9], Z[:, :8], impl="cuda"), "student_logits .* multiples of 16 bytes"),
        (lambda: divergence(Z, Z, "jsd", impl="cuda"), "reverse_kl on one rank, not jsd on 1"),
        (lambda: divergence(Z, Z, impl="cuda", return_stats=True), "no statistics"),
        (lambda: linear_divergence(Z, Z, Z, Z, impl="cuda"), "divergences of logits only"),
    ],
)
def test_bad_input(on_cpu: None, call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_reason_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run here: it needs CUDA tensors, these are on cpu"):
        divergence(Z, Z, impl="cuda")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(build_cpp.Unavailable, match="no nvcc: neither in CUDA_HOME/bin nor on the path"):
        build_cuda.load.__wrapped__()


@pytest.mark.skipif(build_cuda.compiler() is None, reason="no nvcc")
def test_library_builds_once_and_has_the_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = build_cuda.load.__wrapped__()
    assert build_cuda.load.__wrapped__()._name == built._name
    # No driver here: the launch is refused with CUDA's own words, or accepted where there is one.
    status = built.one_read_launch(None, None, None, None, None, 0, 8, 0, 0, 0, 1.0, 0, None)
    assert status == 0 or built.error_text(status).decode()
