"""The report on compiled kernels: that it measures, and that a limit can be exceeded. The full table is
`python -m kernels.aot`, half a minute."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from kernels import aot, sass

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                    /* 0x00 */
        /*0010*/              @P0 LDG.E.128 R4, [R2.64] ;                    /* 0x00 */
        /*0020*/                   LDG.E.U16 R8, [R2.64+0x10] ;              /* 0x00 */
        /*0030*/                   NOP ;                                     /* 0x00 */
        /*0040*/              @!P1 BRA 0x10 ;                                /* 0x00 */
        /*0050*/              @P2 BRA 0x80 ;                                 /* 0x00 */
        /*0060*/                   FADD R1, R2, R3 ;                         /* 0x00 */
        /*0070*/                   EXIT ;                                    /* 0x00 */
        /*0080*/                   EXIT ;                                    /* 0x00 */
        /*0090*/                   BRA 0x90 ;                                /* 0x00 */
"""


def test_listing() -> None:
    whole, loops = sass.parse(LISTING)
    assert len(whole) == 9
    assert [(len(loop), loop.loaded_bytes(), loop.count("LDG.E.128")) for loop in loops] == [(3, 18, 1)]
    short, long = sass.shortest_and_longest_path(LISTING)
    assert (len(short), len(long)) == (6, 7)
    assert sass.parse_usage("REG:96 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:600") == (96, 12)
    with pytest.raises(ValueError, match="no resource usage"):
        sass.parse_usage("nothing")


def configuration(name: str) -> aot.Configuration:
    return next(each for each in aot.configurations() if each.name == name)


def test_reverse_kl_of_bf16_logits_within_limits() -> None:
    forward = aot.report(configuration("divergence_sums bf16"))
    assert not forward.faults
    assert (forward.spill_bytes, forward.shuffles, forward.barriers, forward.wide_loads) == (0, 0, 0, "8/8")
    assert 14 < forward.per_column <= 20
    backward = aot.report(configuration("divergence_gradient bf16 -> bf16, reverse KL"))
    assert not backward.faults
    assert 10 < backward.per_column <= 15


def test_faults_are_found() -> None:
    given = configuration("divergence_sums bf16")
    found = aot.report(replace(given, limit=10.0))
    assert found.faults == (f"{found.per_column:.1f} instructions per column, the limit is 10",)
    code = sass.Code(sass.parse(LISTING)[0].counts + sass.Counter({"STL.64": 2, "BAR.SYNC": 1, "SHFL.BFLY": 5}))
    faults = aot.judge(given, 255, 0, 0, code, code, 64.0).faults
    assert faults == (
        "8 bytes spilled",
        "1 of 16 loads of logits are 128 bits wide",
        "5 shuffles and 1 barriers where lanes are to work alone",
    )
    assert "divergence_sums bf16" in aot.table([found])


@pytest.mark.parametrize("name", ["linear_sums bf16 H=2048", "linear_gradient bf16 H=2048"])
def test_fused_linear_kernels_within_limits(name: str) -> None:
    given = configuration(name)
    found = aot.report(given)
    assert not found.faults
    assert found.spill_bytes == 0 and found.registers <= 255
    assert found.wide_loads == "64/64"  # two operands, student and teacher, four stages
    assert found.shared_bytes == 4 * 2 * 128 * 64 * 2
    code = sass.parse(LISTING)[0]
    faults = aot.judge_products(given, 255, 40, 300_000, code).faults
    assert faults == (
        "40 bytes spilled",
        "no product on tensor cores (HGMMA)",
        "0 of 0 copies to shared memory are 128 bits wide",
        "300000 bytes of shared memory, a block can have 232448",
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_one_read_kernel_within_limits() -> None:
    found = aot.report_one_read(str(shutil.which("nvcc")))
    assert not found.faults
    assert (found.spill_bytes, found.shuffles, found.barriers) == (0, 0, 0)
    assert 20 < found.per_column <= 35
