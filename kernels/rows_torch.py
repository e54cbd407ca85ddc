"""Row primitives in plain torch: what one vocabulary shard contributes. The other implementations give the same.

With z the student's logits, t the teacher's, m = max z, n = max t over the shard, x = z - m, y = t - n.
Logits are [C, rows] in fp32, bf16, fp16 or float64 and are never changed (but for `out`); sums and rows come in
the accumulation dtype. A logit of -inf is a token with probability 0, on either side. Beside the other side's, a logit
further than 1e4 below the maximum of its part of the vocabulary (shard, or lane of a kernel) counts as 1e4 below: what
one side excludes and the other does not costs a lot, not inf (and, by the choice of the part, up to 1e-3 more or less).
The gradient there is that of a logit which is merely very small.
No collectives. Rows are worked through a few at a time, so that the temporaries stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.objective import accumulation_dtype

__all__ = ["divergence_gradient", "divergence_sums", "jsd_gradient", "jsd_sums", "token_gradient", "token_sums"]

FAR_BELOW_MAX = -60.0
"""e^-60 is nothing beside the 1 that the maximum adds to Z, and e^60 is still finite in fp32."""

LOWEST = -1e4
"""Stands for -inf in x and y: e^LOWEST is 0, and 0 * LOWEST too."""

EMPTY_SHARD_MAX = -1e30
"""Lower than any logit, yet finite: infinities would turn 0 * inf into NaN when shards are merged."""

BLOCK_ELEMENTS = 1 << 19
"""2 MiB in fp32: three rows of a vocabulary of 151,936."""


def _divergence_block(student: Tensor, teacher: Tensor, *, both: bool) -> Tensor:
    """`divergence_sums` of a few rows in the accumulation dtype, not empty. Overwrites both arguments."""
    m = student.amax(-1).clamp_(min=EMPTY_SHARD_MAX)
    n = teacher.amax(-1).clamp_(min=EMPTY_SHARD_MAX)
    x = student.sub_(m[:, None])
    y = teacher.sub_(n[:, None]).clamp_(min=LOWEST)
    more: tuple[Tensor, ...] = ()
    if both:
        f = y.exp()
        more = ((y - x.clamp(min=LOWEST)).mul_(f).sum(-1), f.mul_(y).sum(-1))
    # The clamp lets expm1 below stay finite where the student finds impossible what the teacher likes.
    x.clamp_(min=FAR_BELOW_MAX)
    difference = torch.sub(x, y, out=y)
    e = x.exp()
    cross = x.mul_(e).sum(-1)
    divergence = torch.mul(e, difference, out=x).sum(-1)
    # e^y - e^x as e^x (e^(y-x) - 1): subtracting the rounded exponentials would lose all of a small KL.
    excess = torch.neg(difference, out=x).expm1_().mul_(e).sum(-1)
    return torch.stack((m, e.sum(-1), n, excess, divergence, cross, *more))


def divergence_sums(student: Tensor, teacher: Tensor, *, both: bool) -> Tensor:
    """[6 or 8, C]: m, Z = sum e^x, n, F = sum (e^y - e^x), D = sum e^x (x - y), A = sum e^x x, and with `both`
    E = sum e^y (y - x), B = sum e^y y."""
    dtype = accumulation_dtype(student.dtype)
    sums = torch.zeros(8 if both else 6, student.shape[0], dtype=dtype, device=student.device)
    if student.shape[1] == 0:
        sums[0] = sums[2] = EMPTY_SHARD_MAX
        return sums
    for block in _blocks(student):
        copies = (logits[block].to(dtype, copy=True) for logits in (student, teacher))
        sums[:, block] = _divergence_block(*copies, both=both)
    return sums


def divergence_gradient(student: Tensor, teacher: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """out_j = e^x (r0 (x - y) + r1) + r2 e^y with rows [5, C] = m, n, r0, r1, r2; `out` may be `student`."""
    for block in _blocks(student):
        m, n, r0, r1, r2 = rows[:, block, None].unbind(0)
        x = student[block].to(rows.dtype, copy=True).sub_(m).clamp_(min=LOWEST)
        y = teacher[block].to(rows.dtype, copy=True).sub_(n).clamp_(min=LOWEST)
        gradient = (x - y).mul_(r0).add_(r1).mul_(x.exp_())
        out[block] = gradient.addcmul_(y.exp_(), r2) if r2.any() else gradient
    return out


def jsd_sums(student: Tensor, teacher: Tensor, rows: Tensor, beta: float) -> Tensor:
    """[2, C]: sum p (log p - log m), sum q (log q - log m); m = beta q + (1 - beta) p; rows [2, C] = global log-sum-exp
    of student and teacher."""
    sums = torch.zeros(2, student.shape[0], dtype=rows.dtype, device=student.device)
    if student.shape[1] == 0:
        return sums
    for block in _blocks(student):
        log_p, log_q = _log_probabilities(student, teacher, rows, block)
        common, difference = _over_mix(log_p, log_q, beta)
        sums[0, block] = log_p.exp_().mul_(common - difference.clamp(min=0.0)).sum(-1)
        sums[1, block] = log_q.exp_().mul_(common.add_(difference.clamp_(max=0.0))).sum(-1)
    return sums


def jsd_gradient(student: Tensor, teacher: Tensor, rows: Tensor, beta: float, out: Tensor) -> Tensor:
    """out_j = scale (1 - beta) p (log p - log m - K_P), rows [4, C] = lse student, lse teacher, K_P = KL(p || m),
    scale; `out` may be `student`."""
    for block in _blocks(student):
        log_p, log_q = _log_probabilities(student, teacher, rows, block)
        common, difference = _over_mix(log_p, log_q, beta)
        difference = common.sub_(difference.clamp_(min=0.0)).sub_(rows[2, block, None])
        out[block] = difference.mul_(log_p.exp_()).mul_((1.0 - beta) * rows[3, block, None])
    return out


def token_sums(logits: Tensor, ids: Tensor, owned: Tensor) -> Tensor:
    """[4, C]: m, Z, A, and z of the token `ids` [C] (local), 0 where another shard owns it (`owned` [C] is False)."""
    dtype = accumulation_dtype(logits.dtype)
    sums = torch.zeros(4, logits.shape[0], dtype=dtype, device=logits.device)
    if logits.shape[1] == 0:
        sums[0] = EMPTY_SHARD_MAX
        return sums
    for block in _blocks(logits):
        sums[:, block] = _token_block(logits[block].to(dtype, copy=True), ids[block], owned[block])
    return sums


def token_gradient(logits: Tensor, ids: Tensor, owned: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """out_j = r0 e^x + r1 1[owned and j = id] with rows [3, C] = m, r0, r1; `out` may be `logits`."""
    for block in _blocks(logits):
        m, r0, r1 = rows[:, block, None].unbind(0)
        gradient = logits[block].to(rows.dtype, copy=True).sub_(m).exp_().mul_(r0)
        out[block] = gradient.scatter_add_(1, ids[block, None], r1 * owned[block, None])
    return out


def _token_block(logits: Tensor, ids: Tensor, owned: Tensor) -> Tensor:
    """`token_sums` of a few rows in the accumulation dtype, not empty. Overwrites logits."""
    m = logits.amax(-1).clamp_(min=EMPTY_SHARD_MAX)
    chosen = torch.where(owned, logits.gather(1, ids[:, None])[:, 0], 0.0)
    x = logits.sub_(m[:, None]).clamp_(min=LOWEST)
    e = x.exp()
    return torch.stack((m, e.sum(-1), x.mul_(e).sum(-1), chosen))


def _blocks(logits: Tensor) -> Iterator[slice]:
    count, columns = logits.shape
    if columns == 0:
        return
    size = max(1, BLOCK_ELEMENTS // columns) if logits.device.type == "cpu" else max(1, count)
    for start in range(0, count, size):
        yield slice(start, start + size)


def _log_probabilities(student: Tensor, teacher: Tensor, rows: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    log_p = student[block].to(rows.dtype, copy=True).sub_(rows[0, block, None]).clamp_(min=LOWEST)
    log_q = teacher[block].to(rows.dtype, copy=True).sub_(rows[1, block, None]).clamp_(min=LOWEST)
    return log_p, log_q


def _over_mix(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(l, d) with d = log q - log p, log p - log m = l - max(d, 0) and log q - log m = l + min(d, 0): for d of any
    size, as nothing is added to a d that is to be taken off again, and vanishing with it."""
    d = log_q - log_p
    shrunk = d.abs().neg_().expm1_()  # in (-1, 0]: of q / p where q < p, of p / q elsewhere
    above, below = (torch.full((), each, dtype=d.dtype, device=d.device) for each in (1.0 - beta, beta))
    return torch.where(d > 0, above, below).mul_(shrunk).log1p_().neg_(), d
