# SPDX-License-Identifier: MIT
"""Trees and blocks follow the target's law; planted faults are noticed.

Three tokens; the target's and the draft's laws depend on the whole text. The law of a step (tokens
and their number) is worked out exactly over all possible drafts, shown to continue to the target's
own law, and compared with what the compiled op does: χ², α = 1e-6, fixed seeds. Drafts come from
our own sampler with the seed and positions of the verification. Mutants are the vectorised
reference with one expression changed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from conftest import DEVICES
from test_sampling_laws import V, exact_law, fits, noise

from quantgemm import ops
from quantgemm import reference_modes as modes

Tensor = torch.Tensor
Path = tuple[int, ...]
DEPTH = 3
# Two alternatives at first; two behind the first of them, one behind the second, one deeper still.
PARENTS = [-1, 0, -1, 0, 2, 1]
CHAIN = [-1, 0, 1]
POWERS = V ** torch.arange(DEPTH + 1)


@cache
def laws() -> tuple[Tensor, Tensor]:
    """p and q [V^DEPTH-ish, V] by the code of a text; a few zeros among them."""
    g = torch.Generator().manual_seed(11)
    p = (torch.randn(60, V, generator=g) * 1.2).softmax(1)
    q = (p.log() + 0.9 * torch.randn(60, V, generator=g)).softmax(1)
    p[7, 1] = q[5, 2] = 0
    return p / p.sum(1, True), q / q.sum(1, True)


def code(text: Path) -> int:
    """A number for a text of up to DEPTH tokens."""
    return sum((t + 1) * 4**i for i, t in enumerate(text)) % 60


def p_of(text: Path) -> Tensor:
    return laws()[0][code(text)].double()


def q_of(text: Path) -> Tensor:
    return laws()[1][code(text)].double()


def test_texts_have_codes_of_their_own_where_it_matters() -> None:
    texts = [t for n in range(DEPTH + 1) for t in product(range(V), repeat=n)]
    assert len({code(t) for t in texts}) > 25  # a few share a law, which does no harm


def text_of(node: int, drafts: tuple[int, ...], parents: list[int]) -> Path:
    return () if node < 0 else (*text_of(parents[node], drafts, parents), drafts[node])


Law = dict[Path, float]


def tree_step(
    drafts: tuple[int, ...], parents: list[int], node: int, done: Path, law: Law, mass: float
):
    """Adds what verification of these drafts gives, from a node on."""
    w, left = p_of(done), mass
    for child in (i for i, parent in enumerate(parents) if parent == node):
        q, z = q_of(done), w.sum()
        accept = min(1.0, float(w[drafts[child]] / (z * q[drafts[child]])))
        tree_step(drafts, parents, child, (*done, drafts[child]), law, left * accept)
        left *= 1 - accept
        if left <= 1e-15:
            return
        w = (w - z * q).clamp(min=0)
    for token in range(V):
        outcome = (*done, token)
        law[outcome] = law.get(outcome, 0.0) + left * float(w[token] / w.sum())


def block_step(drafts: tuple[int, ...], law: Law, mass: float) -> None:
    count, shares = len(drafts), [1.0]
    for k, d in enumerate(drafts):
        shares.append(min(1.0, shares[-1] * float(p_of(drafts[:k])[d] / q_of(drafts[:k])[d])))
    left = mass
    for k in range(count, -1, -1):
        p = p_of(drafts[:k])
        w = p if k == count else (shares[k] * p - q_of(drafts[:k])).clamp(min=0)
        rest = float(w.sum())
        passes = shares[k] if k == count else rest / (rest + 1 - shares[k]) if rest > 0 else 0.0
        passes = 1.0 if k == 0 else passes
        for token in range(V):
            outcome = (*drafts[:k], token)
            if left * passes > 1e-15:
                law[outcome] = law.get(outcome, 0.0) + left * passes * float(w[token]) / rest
        left *= 1 - passes


@cache
def step_law(mode: str) -> Law:
    """Of (tokens of a step), over all drafts."""
    parents, law = (PARENTS if mode == "tree" else CHAIN), {}
    for drafts in product(range(V), repeat=len(parents)):
        mass = 1.0
        for i, d in enumerate(drafts):
            mass *= float(q_of(text_of(parents[i], drafts, parents))[d])
        if mass == 0:
            continue
        if mode == "tree":
            tree_step(drafts, parents, -1, (), law, mass)
        else:
            block_step(drafts, law, mass)
    return law


@pytest.mark.parametrize("mode", ["tree", "block"])
def test_steps_continue_to_the_targets_law(mode: str) -> None:
    """The theorem, on this example: no statistics."""
    law = step_law(mode)
    assert abs(sum(law.values()) - 1) < 1e-6
    for text in product(range(V), repeat=DEPTH + 1):
        want = math.prod(float(p_of(text[:k])[t]) for k, t in enumerate(text))
        got = 0.0
        for n in range(1, DEPTH + 2):
            rest = math.prod(float(p_of(text[:k])[text[k]]) for k in range(n, DEPTH + 1))
            got += law.get(text[:n], 0.0) * rest
        assert abs(got - want) < 1e-6


def mean_length(law: Law) -> float:
    return sum(len(outcome) * mass for outcome, mass in law.items())


def test_blocks_and_trees_keep_more_than_chains() -> None:
    chain: Law = {}
    for drafts in product(range(V), repeat=DEPTH):
        mass = math.prod(float(q_of(drafts[:k])[d]) for k, d in enumerate(drafts))
        if mass > 0:
            tree_step(drafts, CHAIN, -1, (), chain, mass)
    assert mean_length(step_law("block")) > mean_length(chain) + 0.01
    assert mean_length(step_law("tree")) > mean_length(chain) + 0.01


def rows_of(mode: str, seed: Tensor, position: Tensor, shared: bool = False) -> dict[str, Any]:
    """Drafts from our sampler and the rows that belong to them. shared: siblings' noise is one."""
    parents = PARENTS if mode == "tree" else CHAIN
    p, q = (t.to(seed.device) for t in laws())
    count = len(seed)
    codes = [torch.zeros(count, dtype=torch.int64, device=seed.device)]
    depths, turns, drafts, q_rows = [0], [], [], []
    for i, parent in enumerate(parents):
        at = codes[parent + 1]
        depth = depths[parent + 1]
        turn = 0 if shared else parents[:i].count(parent)
        rows = q[at % 60]
        offset, turn = (depth, turn) if mode == "tree" else (0, 0 if shared else i)
        token = ops.draft_sample(rows.log(), seed=seed, position=position + offset, turn=turn)[0]
        drafts.append(token), q_rows.append(rows), turns.append(turn)
        codes.append(at + (token + 1) * 4**depth)
        depths.append(depth + 1)
    case: dict[str, Any] = {
        "target": p[torch.stack(codes, 1) % 60].flatten(0, 1),
        "draft_tokens": torch.stack(drafts, 1),
        "cu_rows": torch.arange(count + 1, device=seed.device) * (len(parents) + 1),
        "draft": torch.stack(q_rows, 1),
        "target_probs": True,
        "draft_probs": True,
        "seed": seed,
        "position": position,
    }
    if mode == "tree":
        case["parents"] = torch.tensor(parents, device=seed.device).expand(count, -1)
    return case


def run(mode: str, case: dict[str, Any]) -> tuple[Tensor, ...]:
    return ops.spec_verify_tree(**case) if mode == "tree" else ops.spec_verify(**case, block=True)


def follows(mode: str, tokens: Tensor) -> bool:
    return fits(tokens[:, : DEPTH + 1], step_law(mode), V, DEPTH + 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("many", ["seeds", "positions"])
@pytest.mark.parametrize("mode", ["tree", "block"])
def test_joint_law(mode: str, many: str, device: str) -> None:
    count = 2**19 if device == "cpu" else 2**22
    tokens, length, _, status, *_ = run(mode, rows_of(mode, *noise(count, many, device)))
    assert not status.any() and follows(mode, tokens)
    deviation = length.double().std() / math.sqrt(count)
    assert abs(length.double().mean() - mean_length(step_law(mode))) < 5 * deviation


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("one_hot", ["tree", "block"])
def test_joint_law_of_one_hot_drafts(one_hot: str, device: str) -> None:
    """Fixed drafts: the first token's law is the target's, whatever they are."""
    count = 2**18
    seed, position = noise(count, "seeds", device)
    case = rows_of(one_hot, seed, position)
    parents = PARENTS if one_hot == "tree" else CHAIN
    drafts = (2, 0, 1, 1, 0, 2) if one_hot == "tree" else (2, 0, 1)
    codes = [code(text_of(i, drafts, parents)) for i in range(-1, len(parents))]
    case |= {"draft": None, "draft_probs": False}
    case["draft_tokens"] = torch.tensor(drafts, device=device).expand(count, -1)
    case["target"] = laws()[0][codes].to(device).repeat(count, 1)
    tokens, length = run(one_hot, case)[:2]
    first = {(t,): float(p_of(())[t]) for t in range(V)}
    assert fits(tokens[:, :1], first, V, 1) and (length > 1).any()
    second: Law = {}
    kept = tokens[length > 1]
    for d in {t for (t,) in first if (kept[:, 0] == t).any()}:
        second = {(d, t): float(p_of((d,))[t]) for t in range(V)}
        chosen = kept[kept[:, 0] == d]
        assert fits(chosen[:, :2], second, V, 2)


@pytest.mark.parametrize(("mode", "by_place"), [("tree", False), ("block", False), ("block", True)])
def test_steps_in_a_row_use_no_noise_twice(mode: str, by_place: bool) -> None:
    """Each step begins where the last one ended: the law of four tokens is the target's.

    Noise that two steps looked at shows as a dependence between them; so it does for the drafts of
    a block if their noise belongs to their place in the text, as a chain's may.
    """
    count = 2**19
    seed, position = noise(count, "seeds", "cpu")
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    tokens = torch.full((count, 2 * DEPTH + 2), -1)
    start = torch.zeros(count, dtype=torch.int64)
    parents = [-1, -1, 0, 0] if mode == "tree" else CHAIN
    k = len(parents)
    for _ in range(4):
        depth = [0, 0, 1, 1] if mode == "tree" else [0] * 3
        turn = [0, 1, 0, 1] if mode == "tree" else [0, 1, 2]
        if by_place:
            depth, turn = [0, 1, 2], [0] * 3
        rows, at = q.log().expand(count, -1), position + start
        drafts = [
            ops.draft_sample(rows, seed=seed, position=at + d, turn=t)[0]
            for d, t in zip(depth, turn, strict=True)
        ]
        case: dict[str, Any] = {
            "target": p.expand(count * (k + 1), -1),
            "draft_tokens": torch.stack(drafts, 1),
            "cu_rows": torch.arange(count + 1) * (k + 1),
            "draft": q.expand(count, k, -1),
            "target_probs": True,
            "draft_probs": True,
            "seed": seed,
            "position": at,
        }
        if mode == "tree":
            case["parents"] = torch.tensor(parents).expand(count, -1)
        new, length = run(mode, case)[:2]
        slots = torch.arange(k + 1)
        columns = (start[:, None] + slots).clamp(max=tokens.shape[1] - 1)
        fresh = slots < length[:, None]
        tokens = tokens.scatter(1, columns, torch.where(fresh, new, tokens.gather(1, columns)))
        start = (start + length).clamp(max=tokens.shape[1] - k - 1)
    law = {t: math.prod(float(p[x]) for x in t) for t in product(range(V), repeat=4)}
    assert fits(tokens[:, :4], law, V, 4) != by_place


# ---- mutants ----
MUTANTS = [
    # A sibling is compared with p instead of with what the refused ones left.
    (
        "tree",
        "u * refusal.double() < p_token.double()",
        "u * refusal.double() < _row(rows.p, node + 1).gather(1, token).double()",
    ),
    ("tree", "share = _row(rows.q, safe) * mass", "share = _row(rows.q, safe)"),  # not normalised
    ("tree", "left.where(refused, weights)", "weights"),  # nothing is taken
    ("tree", "_row(rows.p, safe + 1), left", "_row(rows.p, safe), left"),  # a row too early
    (
        "tree",
        "rows.noise(safe, depth, ref.ACCEPT_DOMAIN, turn)",
        "rows.noise(safe, depth, ref.ACCEPT_DOMAIN, turn * 0)",
    ),
    (
        "tree",
        "rows.noise(safe, depth, ref.ACCEPT_DOMAIN, turn)",
        "rows.noise(safe, depth, ref.TOKEN_DOMAIN, turn)",
    ),
    ("tree", "torch.where(accepted, 1.0, _mass", "torch.where(accepted, mass, _mass"),
    ("block", "torch.where(is_residual & ~empty, left, p)", "p"),  # resampled from p
    ("block", "rows.p[:, :most] * share[:, :most, None]", "rows.p[:, :most]"),
    ("block", ".float().clamp(max=1)", ".float()"),
    ("block", "u * (mass + (1 - share.double())) < mass", "u < share.double()"),
    (
        "block",
        "rows.noise(column, torch.zeros_like(column), ref.BLOCK_DOMAIN, column)",
        "rows.noise(column, torch.zeros_like(column), ref.BLOCK_DOMAIN, column * 0)",
    ),
    (
        "block",
        "(passes * slots).max(1, keepdim=True).values",
        "passes[:, 1:].long().cumprod(1).sum(1, keepdim=True)",
    ),
]
COUNT = 2**17


def mutate(mode: str, old: str, new: str) -> Callable[..., tuple[Tensor, ...]]:
    original = modes.verify_tree_vectorized if mode == "tree" else modes.verify_block_vectorized
    source = inspect.getsource(original)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in the source"
    scope = dict(vars(modes))
    exec(source.replace(old, new), scope)
    return scope[original.__name__]


@pytest.mark.parametrize(
    ("mode", "old", "new"), [*MUTANTS, ("tree", "u *", "u *"), ("block", "u *", "u *")]
)
def test_mutants_are_noticed(mode: str, old: str, new: str) -> None:
    """And the reference as it is, unharmed by the surgery, is not (the last two)."""
    case = rows_of(mode, *noise(COUNT, "seeds", "cpu"))
    assert follows(mode, mutate(mode, old, new)(**case)[0]) == (old == new)


@pytest.mark.parametrize("mode", ["tree", "block"])
def test_drafts_that_share_noise_are_noticed(mode: str) -> None:
    """Siblings drawn with the same noise are the same token; the drafts of a block are coupled."""
    case = rows_of(mode, *noise(COUNT, "seeds", "cpu"), shared=True)
    assert not follows(mode, run(mode, case)[0])


def test_a_tree_without_siblings_has_the_chains_law() -> None:
    p, q = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]), torch.tensor([[0.5, 0.3, 0.2]])
    count = 2**17
    seed, position = noise(count, "seeds", "cpu")
    drafts = ops.draft_sample(q.log().expand(count, -1), seed=seed, position=position)[0]
    tokens = ops.spec_verify_tree(
        p.repeat(count, 1),
        drafts[:, None],
        torch.full((count, 1), -1),
        torch.arange(count + 1) * 2,
        q.expand(count, 1, -1),
        True,
        True,
        seed=seed,
        position=position,
    )[0]
    assert fits(tokens, exact_law(p, q), V, 2)
