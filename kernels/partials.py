"""How the row sums of all vocabulary shards become exact softmax statistics and coefficients of gradients.

`rows_torch` defines the sums Z, F, D, A, E, B about a shard's own maxima m, n. Moved to the global maxima,
    KL(p || q) = D/Z + log(1 + F/Z)       KL(q || p) = E/(Z+F) - log(1 + F/Z)
    entropy(p) = log Z - A/Z              entropy(q) = log(Z+F) - B/(Z+F)
These forms keep their relative accuracy as KL -> 0, where log-sum-exp differences have lost theirs: all terms
shrink with x - y, and logit offsets cancel inside it. If p is nearly uniform over a huge vocabulary and q a
spike, F/Z approaches -1 and 1 + F/Z is off by up to 1e-7 Z/(Z+F), relative: negligible unless Z/(Z+F) > 1e3.

float64 costs nothing at [ranks, sums, T], and the fixed order of ranks gives every rank the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.objective import Objective
from kernels.rows_torch import EMPTY_SHARD_MAX, LOWEST

PACKETS = 8
"""Parts whose sums are kept before they are merged: those of all slabs would grow as [slabs, sums, tokens]."""

STATS = 4
"""Extra sums with statistics: z and t of the token (0 where another shard owns it), global ids of both maxima."""


def _moved(own: Tensor, joint: Tensor) -> Tensor:
    """How far x moves from a part's own maximum to the joint one: as in x, at most to `LOWEST`.

    A part that excludes all its tokens has no maximum, but x = LOWEST for each of them already: it does not move.
    """
    return torch.where(own <= 0.5 * EMPTY_SHARD_MAX, 0.0, (own - joint).clamp(min=LOWEST))


def combine(packets: Tensor) -> Tensor:
    """[parts, k, T] sums of parts of the vocabulary -> [k, T] of their union about its maxima, in float64.

    k: 6 or 8 sums, then perhaps `STATS`. Parts come in the order of the vocabulary.
    """
    if len(packets) == 1:
        return packets[0].double()
    m, partition, n, excess, divergence, cross, *more = packets.double().unbind(1)
    student_max, teacher_max = m.amax(0), n.amax(0)
    a, b = (m - student_max).exp(), (n - teacher_max).exp()
    dm, dn = _moved(m, student_max), _moved(n, teacher_max)
    result = [
        student_max,
        (a * partition).sum(0),
        teacher_max,
        (b * excess + (b - a) * partition).sum(0),
        (a * (divergence + (dm - dn) * partition)).sum(0),
        (a * (cross + dm * partition)).sum(0),
    ]
    if len(more) in (2, 2 + STATS):
        teacher_partition = partition + excess
        result.append((b * (more[0] + (dn - dm) * teacher_partition)).sum(0))
        result.append((b * (more[1] + dn * teacher_partition)).sum(0))
    if len(more) >= STATS:
        z, t, student_id, teacher_id = more[-STATS:]
        result += [z.sum(0), t.sum(0)]
        # argmax takes the first of equals: the lowest id wins, as in torch.
        result += [ids.gather(0, tops.argmax(0)[None])[0] for ids, tops in ((student_id, m), (teacher_id, n))]
    return torch.stack(result)


@dataclass(frozen=True, slots=True)
class Joined:
    """Sums [k, T] about the global maxima, float64, equal on every rank to the last bit."""

    sums: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log of the teacher's partition function over the student's, each about its own maximum."""
        return (self.sums[3] / self.sums[1]).log1p()

    @property
    def mean_difference(self) -> Tensor:
        """E_p[x - y]"""
        return self.sums[4] / self.sums[1]

    @property
    def log_partition(self) -> Tensor:
        return self.sums[1].log()

    @property
    def teacher_partition(self) -> Tensor:
        return self.sums[1] + self.sums[3]

    def reverse_kl(self) -> Tensor:
        return self.mean_difference + self.log_ratio

    def forward_kl(self) -> Tensor:
        return self.sums[6] / self.teacher_partition - self.log_ratio

    def student_entropy(self) -> Tensor:
        return self.log_partition - self.sums[5] / self.sums[1]

    def teacher_entropy(self) -> Tensor:
        return self.teacher_partition.log() - self.sums[7] / self.teacher_partition

    def lse(self) -> Tensor:
        """[2, T] log-sum-exp of student and teacher."""
        return torch.stack((self.sums[0] + self.log_partition, self.sums[2] + self.teacher_partition.log()))

    def value(self, objective: Objective) -> Tensor:
        """[T] float64; not for jsd, which takes a second look at the logits."""
        if objective.kind == "reverse_kl":
            return self.reverse_kl()
        if objective.kind == "forward_kl":
            return self.forward_kl()
        return objective.alpha * self.forward_kl() + (1.0 - objective.alpha) * self.reverse_kl()

    def gradient_rows(self, objective: Objective, upstream: Tensor) -> Tensor:
        """[5, T] float64 for `divergence_gradient`: m, n, r0, r1, r2.

        reverse: g p (x - y - E_p[x - y]); forward: g (p - q). No normaliser of the teacher is in the first, and
        nothing in it cancels when student and teacher agree.
        """
        alpha = {"reverse_kl": 0.0, "forward_kl": 1.0}.get(objective.kind, objective.alpha)
        p = upstream.double() / (objective.temperature * self.sums[1])
        q = upstream.double() / (objective.temperature * self.teacher_partition) if alpha else torch.zeros_like(p)
        r0 = (1.0 - alpha) * p
        r1 = alpha * p - r0 * self.mean_difference
        return torch.stack((self.sums[0], self.sums[2], r0, r1, -alpha * q))


def combine_tokens(packets: Tensor, has_top: bool) -> Tensor:
    """[parts, 3 + k (+ 1), T] (m, Z, A, z of k tokens, perhaps the global id of the maximum) -> of their union about
    its maximum, in float64. A z is 0 in all parts but the one that holds the token."""
    if len(packets) == 1:
        return packets[0].double()
    m, partition, cross, *chosen = packets.double().unbind(1)
    maximum = m.amax(0)
    dm = m - maximum
    a = dm.exp()
    result = [maximum, (a * partition).sum(0), (a * (cross + dm * partition)).sum(0)]
    tops = [chosen.pop()] if has_top else []
    result += [z.sum(0) for z in chosen]
    result += [ids.gather(0, m.argmax(0)[None])[0] for ids in tops]
    return torch.stack(result)
