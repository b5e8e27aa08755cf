# SPDX-License-Identifier: MIT
"""The output follows the target's distribution, and planted faults are noticed.

The joint law of three drafted positions over three tokens has 120 outcomes of exactly known
probability; drafts come from our own sampler with the seed and positions of the verification, so
noise shared between drafting and verifying shows. Fixed seeds, α = 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from conftest import DEVICES

from quantgemm import ops

Tensor = torch.Tensor
V, K = 3, 3
# position-dependent laws of the target (K + 1 rows) and the draft (K rows)
P = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.05, 0.05, 0.9], [0.3, 0.3, 0.4]])
Q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.45, 0.45], [0.3, 0.6, 0.1]])


def exact_law(p: Tensor, q: Tensor) -> dict[tuple[int, ...], float]:
    law = {}
    p, q = p.double(), q.double()
    for n in range(1, len(p) + 1):
        for outcome in product(range(p.shape[1]), repeat=n):
            mass = 1.0
            for k, token in enumerate(outcome[:-1]):
                mass *= float(torch.minimum(p[k], q[k])[token])
            last = p[n - 1] - q[n - 1] if n < len(p) else p[n - 1]
            law[outcome] = mass * max(float(last[outcome[-1]]), 0.0)
    assert abs(sum(law.values()) - 1) < 1e-6
    return law


def critical_value(cells: int) -> float:
    """χ² quantile at 1 - 1e-6, Wilson and Hilferty's approximation."""
    d = cells - 1
    return d * (1 - 2 / (9 * d) + 4.753 * math.sqrt(2 / (9 * d))) ** 3


def chi_square(observed: Tensor, expected: Tensor) -> tuple[float, int]:
    """Cells with little expectation are pooled; outside the support nothing may be seen."""
    assert not observed[expected == 0].any(), "an outcome of probability zero"
    large = expected >= 25
    o, e = observed[large].double(), expected[large]
    rest = (observed[~large].sum().double(), expected[~large].sum())
    if rest[1] > 0:
        o, e = torch.cat([o, rest[0][None]]), torch.cat([e, rest[1][None]])
    return float(((o - e) ** 2 / e.clamp(min=1e-9)).sum()), len(e)


def fits(tokens: Tensor, law: dict[tuple[int, ...], float], vocab: int, columns: int) -> bool:
    """tokens [N, columns] with -1 after the last, against the law."""
    base = vocab + 1
    powers = base ** torch.arange(columns, device=tokens.device)
    codes = ((tokens + 1) * powers).sum(1).bincount(minlength=base**columns).cpu()
    expected = torch.zeros(base**columns, dtype=torch.float64)
    for outcome, mass in law.items():
        expected[sum((t + 1) * base**i for i, t in enumerate(outcome))] = mass * len(tokens)
    if codes[expected == 0].any():
        return False
    statistic, cells = chi_square(codes, expected)
    return statistic < critical_value(cells)


def noise(count: int, many: str, device: str) -> tuple[Tensor, Tensor]:
    order = torch.arange(count, device=device)
    other = torch.full_like(order, 12345)
    return (order, other) if many == "seeds" else (other, order * 8)


Call = Callable[..., tuple[Tensor, ...]]


def draw_drafts(seed: Tensor, position: Tensor, q: Tensor, op: Call = ops.draft_sample) -> Tensor:
    """One token per sequence and position, from log q."""
    columns = [
        op(q[k].log().expand(len(seed), -1), seed=seed, position=position + k)[0]
        for k in range(len(q))
    ]
    return torch.stack(columns, 1)


def verify(
    seed: Tensor, position: Tensor, drafts: Tensor, p: Tensor, q: Tensor, **more: Any
) -> tuple[Tensor, Tensor]:
    count, k = drafts.shape
    cu_rows = torch.arange(count + 1, device=seed.device) * (k + 1)
    given = {"seed": seed, "position": position} | more
    if given.get("uniforms") is not None:
        given |= {"seed": None, "position": None}
    tokens, length, _, status = ops.spec_verify(
        p.repeat(count, 1), drafts, cu_rows, q.expand(count, -1, -1), True, True, **given
    )
    assert not status.any()
    return tokens, length


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("many", ["seeds", "positions"])
def test_joint_law(many: str, device: str) -> None:
    count = 2**20 if device == "cpu" else 2**24
    p, q = P.to(device), Q.to(device)
    seed, position = noise(count, many, device)
    tokens, length = verify(seed, position, draw_drafts(seed, position, q), p, q)
    assert fits(tokens, exact_law(P, Q), V, K + 1)
    # mean accepted length within 5 standard errors of Σ_k Π Σ min(p, q)
    accepted = torch.minimum(P[:K], Q).sum(1).cumprod(0)
    mean, deviation = (length - 1).double().mean(), (length - 1).double().std()
    assert abs(mean - accepted.sum()) < 5 * deviation / math.sqrt(count)


# ---- mutants: the same experiment with a planted fault must not fit ----
MUTANT_COUNT = 2**17


def resample(seed: Tensor, position: Tensor, rows: Tensor) -> Tensor:
    """Independent tokens from rows [N, V] of probabilities."""
    cu_rows = torch.arange(len(rows) + 1)
    empty = torch.empty(len(rows), 0, dtype=torch.int64)
    given = {"seed": seed + 10**9, "position": position}
    return ops.spec_verify(rows, empty, cu_rows, target_probs=True, **given)[0][:, 0]


def replaced(tokens: Tensor, length: Tensor, new: Tensor) -> Tensor:
    """The token after the accepted ones replaced where a draft was refused."""
    refused = length <= K
    tokens = tokens.clone()
    rows = torch.arange(len(tokens))[refused]
    tokens[rows, length[refused] - 1] = new[refused]
    return tokens


def mutant_resamples_from_p(seed: Tensor, position: Tensor) -> Tensor:
    tokens, length = verify(seed, position, draw_drafts(seed, position, Q), P, Q)
    return replaced(tokens, length, resample(seed, position, P[length - 1]))


def mutant_draws_from_the_next_row(seed: Tensor, position: Tensor) -> Tensor:
    tokens, length = verify(seed, position, draw_drafts(seed, position, Q), P, Q)
    row = length.clamp(max=K - 1)
    residual = (P[row] - Q[row]).clamp(min=0)
    return replaced(tokens, length, resample(seed, position, residual / residual.sum(1, True)))


def mutant_shares_the_draft_noise(seed: Tensor, position: Tensor) -> Tensor:
    drafts = draw_drafts(seed, position, Q, ops.sample)  # the noise that verification draws with
    return verify(seed, position, drafts, P, Q)[0]


def mutant_reuses_the_accepting_uniform(seed: Tensor, position: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(1)
    u = torch.rand(len(seed), 1, generator=g, dtype=torch.float64).expand(-1, K + 1)
    return verify(seed, position, draw_drafts(seed, position, Q), P, Q, uniforms=u.contiguous())[0]


def mutant_stale_q(seed: Tensor, position: Tensor) -> Tensor:
    return verify(seed, position, draw_drafts(seed, position, Q), P, Q.roll(1, 0))[0]


def mutant_bonus_from_the_last_draft_row(seed: Tensor, position: Tensor) -> Tensor:
    p = torch.cat([P[:K], P[K - 1 : K]])
    return verify(seed, position, draw_drafts(seed, position, Q), p, Q)[0]


MUTANTS = [value for name, value in list(globals().items()) if name.startswith("mutant_")]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
def test_mutants_are_noticed(mutant: Callable[[Tensor, Tensor], Tensor]) -> None:
    seed, position = noise(MUTANT_COUNT, "seeds", "cpu")
    assert not fits(mutant(seed, position), exact_law(P, Q), V, K + 1)


def test_the_experiment_without_a_fault_fits() -> None:
    """What makes the mutants' failures mean something: the same size, the same laws."""
    seed, position = noise(MUTANT_COUNT, "seeds", "cpu")
    tokens, length = verify(seed, position, draw_drafts(seed, position, Q), P, Q)
    assert fits(tokens, exact_law(P, Q), V, K + 1)
    residual = (P[:K] - Q).clamp(min=0)[(length - 1).clamp(max=K - 1)]
    again = replaced(tokens, length, resample(seed, position, residual / residual.sum(1, True)))
    assert fits(again, exact_law(P, Q), V, K + 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("faulty", [False, True])
def test_q_is_the_distribution_drafts_came_from(faulty: bool, device: str) -> None:
    """With top-k in the draft q is the truncated law; the untruncated one must not fit."""
    count, vocab = 2**18, 6
    g = torch.Generator().manual_seed(5)
    target = torch.randn(2, vocab, generator=g).to(device)
    draft = torch.randn(1, vocab, generator=g).to(device)
    seed, position = noise(count, "seeds", device)
    top_k = torch.full((count,), 3, device=device)
    rows = draft.expand(count, -1)
    drafts, lse, cutoff, probs, _ = ops.draft_sample(
        rows, top_k=top_k, seed=seed, position=position, return_probs=True
    )
    given = (
        {"draft_lse": torch.logsumexp(rows, 1)[:, None].contiguous()}
        if faulty
        else {"draft_lse": lse[:, None], "draft_cutoff": cutoff[:, None]}
    )
    tokens, _, _, _ = ops.spec_verify(
        target.repeat(count, 1),
        drafts[:, None],
        torch.arange(count + 1, device=device) * 2,
        rows[:, None],
        seed=seed,
        position=position,
        **given,
    )
    law = exact_law(target.softmax(1).cpu(), probs[:1].cpu())
    assert fits(tokens, law, vocab, 2) != faulty


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [8, 61, 64, 1000, 4097, 32000, 128256, 151936])
def test_marginals(vocab: int, device: str) -> None:
    """Many draws from one row, by a bonus and by a refused draft; zero off the support."""
    if device == "cpu" and vocab > 4097:
        pytest.skip("the same code as for smaller vocabularies; the GPU runs these")
    count = min(2**20, 2**33 // vocab) if device == "cuda" else 2**26 // vocab // 4 + 2**12
    g = torch.Generator().manual_seed(vocab)
    p = torch.randn(vocab, generator=g).mul(3).softmax(0)
    p[torch.rand(vocab, generator=g) < 0.3] = 0
    p /= p.sum()
    q = torch.randn(vocab, generator=g).mul(3).softmax(0)
    target = p.to(device).expand(count, vocab)  # one row in memory
    seed, position = noise(count, "positions", device)
    cu_rows = torch.arange(count + 1, device=device)
    empty = torch.empty(count, 0, dtype=torch.int64, device=device)
    tokens = ops.spec_verify(
        target, empty, cu_rows, target_probs=True, seed=seed, position=position
    )[0]
    statistic, cells = chi_square(tokens[:, 0].bincount(minlength=vocab).cpu(), p.double() * count)
    assert statistic < critical_value(cells)

    refused = int((p == 0).nonzero()[0])  # a draft that is never accepted
    half = count // 2
    tokens, length, _, _ = ops.spec_verify(
        target,
        torch.full((half, 1), refused, device=device),
        torch.arange(half + 1, device=device) * 2,
        q.to(device).expand(half, 1, vocab),
        True,
        True,
        seed=seed[:half],
        position=position[:half],
    )
    assert (length == 1).all()
    residual = (p - q).clamp(min=0).double()
    expected = residual / residual.sum() * half
    statistic, cells = chi_square(tokens[:, 0].bincount(minlength=vocab).cpu(), expected)
    assert statistic < critical_value(cells)
