"""Row sums of one vocabulary shard, and how the sums of all shards become exact softmax statistics.

With z the student's logits, t the teacher's, m = max z, n = max t over the shard, x = z - m, y = t - n:
    Z = sum e^x    F = sum (e^y - e^x)    D = sum e^x (x - y)    A = sum e^x x
Every sum is about the shard's own maxima and moves to the global ones when shards are merged. Then
    KL(p || q) = D/Z + log(1 + F/Z)        entropy(p) = log Z - A/Z
The first form keeps its relative accuracy as KL -> 0, where log-sum-exp differences have lost theirs: both
terms shrink with x - y, and logit offsets cancel inside it. If p is nearly uniform over a huge vocabulary and
q a spike, F/Z approaches -1 and the value (not the gradient) is off by up to 1e-7 * Z / (Z + F).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FAR_BELOW_MAX = -60.0
"""e^-60 is nothing beside the 1 that the maximum adds to Z, and e^60 is still finite in fp32."""

EMPTY_SHARD_MAX = -1e30
"""Lower than any logit, yet finite: infinities would turn 0 * inf into NaN when shards are merged."""


class DivergenceTerms(NamedTuple):
    """One chunk's share: `sums` goes into the packet; the others rebuild the gradient without the logits."""

    sums: Tensor
    """[6, C]: m, Z, n, F, D, A"""
    exponentials: Tensor
    """[C, rows] e^x"""
    differences: Tensor
    """[C, rows] x - y"""


def divergence_terms(student: Tensor, teacher: Tensor) -> DivergenceTerms:
    """Sums over [C, rows] logits of one shard. Overwrites both arguments."""
    if student.shape[1] == 0:
        sums = student.new_zeros(6, student.shape[0])
        sums[0] = sums[2] = EMPTY_SHARD_MAX
        return DivergenceTerms(sums, student, teacher)
    m, n = student.amax(-1), teacher.amax(-1)
    # The clamp lets expm1 below stay finite where the student finds impossible what the teacher likes.
    x = student.sub_(m[:, None]).clamp_(min=FAR_BELOW_MAX)
    difference = torch.sub(x, teacher.sub_(n[:, None]), out=teacher)
    e = x.exp()
    cross = x.mul_(e).sum(-1)
    divergence = torch.mul(e, difference, out=x).sum(-1)
    # e^y - e^x as e^x (e^(y-x) - 1): subtracting the rounded exponentials would lose all of a small KL.
    excess = torch.neg(difference, out=x).expm1_().mul_(e).sum(-1)
    return DivergenceTerms(torch.stack((m, e.sum(-1), n, excess, divergence, cross)), e, difference)


class Merged(NamedTuple):
    """Of T rows over the whole vocabulary, equal on every rank to the last bit."""

    value: Tensor
    """[T] the divergence, or the log-prob of the token."""
    entropy: Tensor
    """[T] of the student."""
    rows: Tensor
    """What turns a shard's terms into its logits' gradients, see the functions below; this rank's own."""


def merge_divergence(packets: Tensor, own: Tensor) -> Merged:
    """[ranks, 6, T] of all ranks and [6, T] of this one -> KL, entropy and rows [4, T].

    rows: m and n of this shard, e^(m - max z) / Z, E_p[x - y] as seen from this shard's maxima; so that
    dz_j = g p_j (log p_j - log q_j - KL) = g rows[2] e^x ((x - y) - rows[3]).
    No normaliser of the teacher is in it, and nothing that cancels when student and teacher agree.
    """
    # float64 costs nothing at [ranks, 6, T], and lets e^y - e^x be formed by subtraction.
    m, partition, n, excess, divergence, cross = packets.double().unbind(1)
    student_max, teacher_max = m.amax(0), n.amax(0)
    dm, dn = m - student_max, n - teacher_max
    a, b = dm.exp(), dn.exp()
    z = (a * partition).sum(0)
    f = (b * excess + (b - a) * partition).sum(0)
    mean = (a * (divergence + (dm - dn) * partition)).sum(0) / z
    entropy = z.log() - (a * (cross + dm * partition)).sum(0) / z
    own_m, own_n = own[0].double(), own[2].double()
    shift = own_m - student_max
    rows = torch.stack((own_m, own_n, shift.exp() / z, mean - shift + (own_n - teacher_max)))
    kind = own.dtype
    return Merged((mean + (f / z).log1p()).to(kind), entropy.to(kind), rows.to(kind))


class TokenTerms(NamedTuple):
    """One chunk's share for the log-prob of a token."""

    sums: Tensor
    """[4, C]: m, Z, A, z of the token (0 where another shard owns it)"""
    exponentials: Tensor
    """[C, rows] e^x"""


def token_terms(logits: Tensor, rows: Tensor, owned: Tensor) -> TokenTerms:
    """Sums over [C, rows] logits; `rows` [C]: the token, valid where `owned` [C]. Overwrites logits."""
    if logits.shape[1] == 0:
        sums = logits.new_zeros(4, logits.shape[0])
        sums[0] = EMPTY_SHARD_MAX
        return TokenTerms(sums, logits)
    m = logits.amax(-1)
    chosen = logits.gather(1, rows[:, None])[:, 0] * owned
    x = logits.sub_(m[:, None])
    e = x.exp()
    return TokenTerms(torch.stack((m, e.sum(-1), x.mul_(e).sum(-1), chosen)), e)


def merge_token(packets: Tensor, own: Tensor) -> Merged:
    """[ranks, 4, T] of all ranks and [4, T] of this one -> log-prob, entropy and rows [2, T].

    rows: m of this shard and e^(m - max z) / Z, so that p_j = rows[1] e^x.
    """
    m, partition, cross, chosen = packets.double().unbind(1)
    maximum = m.amax(0)
    dm = m - maximum
    a = dm.exp()
    z = (a * partition).sum(0)
    log_z = z.log()
    entropy = log_z - (a * (cross + dm * partition)).sum(0) / z
    own_m = own[0].double()
    rows = torch.stack((own_m, (own_m - maximum).exp() / z))
    kind = own.dtype
    return Merged((chosen.sum(0) - maximum - log_z).to(kind), entropy.to(kind), rows.to(kind))
