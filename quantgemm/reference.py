# SPDX-License-Identifier: MIT
"""Speculative verification written to be read: a Python loop, and the same in vectorised PyTorch.

Both take the arguments of `torch.ops.quantgemm.spec_verify` and return its first four tensors.
Given probabilities and the same noise, all three implementations agree bit for bit; given logits,
these two compute the distributions in float64. Trees and blocks are in `quantgemm.reference_modes`.

A drafted token d with q(d) > 0 is accepted iff u·q(d) < p(d). The first that is not is replaced by
a draw from max(p - q, 0); if none is refused, one more token is drawn from p. Draws use integer
weights rint(x·2^44): the token is the first whose prefix sum exceeds floor(v·W / 2^64).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantgemm import ops
from quantgemm.formats import format_by_id

__all__ = [
    "BAD_PARAMETER",
    "BAD_PARENT",
    "BAD_ROWS",
    "BAD_TOKEN",
    "BAD_UNIFORM",
    "BAD_VALUE",
    "EMPTY_RESIDUAL",
    "NO_MASS",
    "gemm_q8_reference",
    "philox",
    "rejection_sample_loop",
    "rejection_sample_vectorized",
    "truncated_softmax",
]

BAD_TOKEN, BAD_VALUE, NO_MASS, BAD_PARAMETER = 1, 2, 4, 8
EMPTY_RESIDUAL, BAD_ROWS, BAD_UNIFORM, BAD_PARENT = 16, 32, 64, 128
DRAFT_DOMAIN, ACCEPT_DOMAIN, TOKEN_DOMAIN, BLOCK_DOMAIN = 0, 1, 2, 3

Tensor = torch.Tensor
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
_MASK32 = 0xFFFFFFFF


def philox(seed: int, position: int, domain: int, turn: int = 0) -> int:
    """Philox4x32-10: the 64 random bits of a (seed, position, domain, turn)."""
    c = [position & _MASK32, position >> 32 & _MASK32, domain, turn]
    k = [seed & _MASK32, seed >> 32 & _MASK32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & _MASK32, a >> 32 ^ c[3] ^ k[1], a & _MASK32]
        k = [k[0] + 0x9E3779B9 & _MASK32, k[1] + 0xBB67AE85 & _MASK32]
    return c[1] << 32 | c[0]


def truncated_softmax(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """float64 distribution of one row: temperature, then top-k, then top-p, then min-p.

    Each of them keeps all values from a threshold up, so ties at the edge stay together.
    """
    x = logits.double()
    x = x.where(~x.isnan(), -math.inf).clamp(max=torch.finfo(torch.float32).max)
    top = x.max()
    if top == -math.inf:
        return torch.zeros_like(x)
    weights = ((x - top) / temperature).exp()
    if 0 < top_k < len(x):
        weights = weights * (x >= x.topk(top_k).values[-1])
    if top_p < 1:
        ordered = weights.sort(descending=True).values
        above = ordered.cumsum(0) - ordered  # mass of the larger ones
        kept = (above < top_p * ordered.sum()) | (torch.arange(len(x), device=x.device) == 0)
        weights = weights * (weights >= ordered[kept][-1])
    weights = weights * (weights >= min(min_p, 1.0))
    return weights / weights.sum()


@dataclass
class Arguments:
    """Those of `torch.ops.quantgemm.spec_verify`."""

    target: Tensor
    draft_tokens: Tensor
    cu_rows: Tensor
    draft: Tensor | None = None
    target_probs: bool = False
    draft_probs: bool = False
    draft_lse: Tensor | None = None
    draft_cutoff: Tensor | None = None
    target_to_draft: Tensor | None = None
    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    seed: Tensor | None = None
    position: Tensor | None = None
    uniforms: Tensor | None = None
    parents: Tensor | None = None

    def outputs(self) -> Outputs:
        """tokens, count, logprobs and status, empty so far"""
        batch, most = self.draft_tokens.shape
        return (
            self.draft_tokens.new_full((batch, most + 1), -1),
            self.draft_tokens.new_zeros(batch),
            torch.zeros(batch, most + 1, device=self.target.device),
            torch.zeros(batch, dtype=torch.int32, device=self.target.device),
        )


class SequenceView:
    """What the loops see of one sequence; collects its status bits."""

    def __init__(self, given: Arguments, b: int) -> None:
        self.given, self.b, self.bits = given, b, 0
        self.vocab = given.target.shape[1]
        heat = 1.0 if given.temperature is None else float(given.temperature[b])
        if not (0 <= heat < math.inf):
            heat, self.bits = 0.0, BAD_PARAMETER
        self.greedy = heat == 0
        self.shape = (
            heat or 1.0,
            int(self._parameter(given.top_k, 0, 0, math.inf)),
            self._parameter(given.top_p, 1.0, 0, 1),
            self._parameter(given.min_p, 0.0, 0, 1),
        )
        first, last = int(given.cu_rows[b]), int(given.cu_rows[b + 1])
        most = given.draft_tokens.shape[1]
        good = 0 <= first < last <= len(given.target) and last - first <= most + 1
        self.first, self.drafts = first, last - first - 1 if good else -1
        self.bits |= 0 if good else BAD_ROWS

    def _parameter(self, values: Tensor | None, off: float, low: float, high: float) -> float:
        value = off if values is None else float(values[self.b])
        good = low <= value <= high
        self.bits |= 0 if good else BAD_PARAMETER
        return value if good else off

    def noise(self, column: int, offset: int, domain: int, turn: int = 0) -> int:
        """64 random bits: a column of the uniforms, or those of a counter."""
        given = self.given
        if given.uniforms is None:
            assert given.seed is not None and given.position is not None
            at = int(given.position[self.b]) + offset
            return philox(int(given.seed[self.b]), at, domain, turn)
        u = float(given.uniforms[self.b, column])
        if not 0 <= u < 1:
            self.bits |= BAD_UNIFORM
            return (1 << 64) - 1 if u >= 1 else 0
        return int(u * 2**53) << 11

    def uniform(self, column: int, offset: int, domain: int, turn: int = 0) -> float:
        """For a test of acceptance: 24 bits."""
        return (self.noise(column, offset, domain, turn) >> 40) / 2**24

    def token(self, k: int) -> int:
        """The drafted one; -1 if there is none."""
        token = int(self.given.draft_tokens[self.b, k]) if k < self.drafts else -1
        if -1 <= token < self.vocab:
            return token
        self.bits |= BAD_TOKEN
        return -1

    def row(self, k: int) -> Tensor:
        return self.given.target[self.first + k]

    def _law(self, row: Tensor, is_probs: bool) -> Tensor:
        if is_probs:
            return row.float().nan_to_num(0, 1, 0).clamp(0, 1)
        return truncated_softmax(row, *self.shape).float()

    def p(self, k: int) -> Tensor:
        return self._law(self.row(k), self.given.target_probs)

    def q(self, k: int, token: int) -> Tensor:
        """The law that draft k was drawn from, over the target's vocabulary."""
        given = self.given
        if given.draft is None:
            return torch.nn.functional.one_hot(given.draft_tokens[self.b, k], self.vocab).float()
        row = given.draft[self.b, k]
        if given.draft_lse is not None:
            scaled = row.double() / self.shape[0] - given.draft_lse[self.b, k].double()
            q = scaled.exp().clamp(max=1).float()
            if given.draft_cutoff is not None:
                q = q * (row.float() >= given.draft_cutoff[self.b, k])
        else:
            q = self._law(row, given.draft_probs)
        to_draft = given.target_to_draft
        here = token if to_draft is None else int(to_draft[token])
        if 0 <= here < len(row):
            self.bits |= _bad_values(row[here], given.draft_probs)
        return _over_target(q, self.vocab, to_draft)

    def check_p(self, k: int) -> None:
        self.bits |= _bad_values(self.row(k), self.given.target_probs)

    def check_p_token(self, k: int, token: int) -> None:
        self.bits |= _bad_values(self.row(k)[token], self.given.target_probs)

    def check_q(self, k: int) -> None:
        given = self.given
        if given.draft is None or given.target_to_draft is not None or given.draft_lse is not None:
            return
        self.bits |= _bad_values(given.draft[self.b, k, : self.vocab], given.draft_probs)

    def argmax(self, k: int) -> tuple[int, bool]:
        """The lowest of the largest values, and whether it has any mass."""
        self.check_p(k)
        is_probs = self.given.target_probs
        fill = 0.0 if is_probs else -math.inf
        values = self.row(k).float()
        values = values.where(values > fill, fill)
        values = values.clamp(max=1.0 if is_probs else torch.finfo(torch.float32).max)
        best = int((values == values.max()).nonzero()[0])
        return best, float(values[best]) > fill

    def draw(self, weights: Tensor, p: Tensor, k: int, accepted: int) -> tuple[int, float]:
        """The token that ends the step and its logprob; p and k are its row's."""
        fixed = _fixed_point(weights)
        total = int(fixed.sum())
        if total == 0:
            self.bits |= NO_MASS
            return self.argmax(k)[0], 0.0
        most = self.given.draft_tokens.shape[1]
        goal = self.noise(most, accepted, TOKEN_DOMAIN) * total >> 64
        token = int((fixed.cumsum(0) > goal).nonzero()[0])
        return token, float(p[token].log())


def rejection_sample_loop(
    target: Tensor,
    draft_tokens: Tensor,
    cu_rows: Tensor,
    draft: Tensor | None = None,
    target_probs: bool = False,
    draft_probs: bool = False,
    draft_lse: Tensor | None = None,
    draft_cutoff: Tensor | None = None,
    target_to_draft: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> Outputs:
    """One sequence after another, one token after another; looks at the device for each."""
    given = Arguments(
        target,
        draft_tokens,
        cu_rows,
        draft,
        target_probs,
        draft_probs,
        draft_lse,
        draft_cutoff,
        target_to_draft,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        uniforms,
    )
    tokens, count, logprobs, status = outputs = given.outputs()
    for b in range(len(tokens)):
        s = SequenceView(given, b)
        judge_chain(s, tokens[b], logprobs[b], count[b : b + 1])
        status[b] = s.bits
    return outputs


def judge_chain(s: SequenceView, tokens: Tensor, logprobs: Tensor, count: Tensor) -> None:
    """One sequence, into tokens and logprobs [K+1] and count [1]."""
    for k in range(s.drafts + 1):
        token, count[0] = s.token(k), k + 1
        if s.greedy:
            tokens[k], has_mass = s.argmax(k)
            if token == tokens[k]:
                continue
            s.bits |= 0 if has_mass else NO_MASS
            return
        p = weights = s.p(k)
        if token >= 0:
            q = s.q(k, token)
            s.check_p_token(k, token)
            u = s.uniform(k, k, ACCEPT_DOMAIN)
            if q[token] > 0 and u * float(q[token]) < float(p[token]):
                tokens[k], logprobs[k] = token, p[token].log()
                continue
            s.check_q(k)
            weights = p - q
            if _fixed_point(weights).sum() == 0:
                s.bits |= EMPTY_RESIDUAL
                weights = p
        s.check_p(k)
        tokens[k], logprobs[k] = s.draw(weights, p, k, k)
        return


def _bad_values(x: Tensor, is_probs: bool) -> int:
    good = (x >= 0) & (x < math.inf) if is_probs else x < math.inf
    return 0 if bool(good.all()) else BAD_VALUE


def _fixed_point(x: Tensor) -> Tensor:
    return (x.clamp(min=0).double() * 2**44).round().long()


def _over_target(q: Tensor, vocab: int, target_to_draft: Tensor | None) -> Tensor:
    """q [..., draft_vocab] at the ids of the target's vocabulary: [..., vocab]"""
    if target_to_draft is None:
        return torch.nn.functional.pad(q, (0, max(0, vocab - q.shape[-1])))[..., :vocab]
    inside = (target_to_draft >= 0) & (target_to_draft < q.shape[-1])
    return q[..., target_to_draft.clamp(0, q.shape[-1] - 1)] * inside


def rejection_sample_vectorized(
    target: Tensor,
    draft_tokens: Tensor,
    cu_rows: Tensor,
    draft: Tensor | None = None,
    target_probs: bool = False,
    draft_probs: bool = False,
    draft_lse: Tensor | None = None,
    draft_cutoff: Tensor | None = None,
    target_to_draft: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    uniforms: Tensor | None = None,
) -> Outputs:
    """The whole batch at once, without looking at the device: can be captured in a CUDA graph.

    Status reports BAD_TOKEN, EMPTY_RESIDUAL, NO_MASS and BAD_VALUE; rows, parameters and uniforms
    are taken to be good.
    """
    batch, most = draft_tokens.shape
    vocab, device = target.shape[1], target.device
    slots = torch.arange(most + 1, device=device)
    num_drafts = (cu_rows[1:] - cu_rows[:-1] - 1)[:, None]
    rows = (cu_rows[:-1, None] + slots).clamp(max=len(target) - 1)  # [B, K+1]
    ids = torch.cat([draft_tokens, draft_tokens.new_full((batch, 1), -1)], 1)
    ids = ids.where(slots < num_drafts, -1)
    has_draft = (ids >= 0) & (ids < vocab)
    safe_ids = ids.clamp(0, vocab - 1)

    # Values and laws of the drafted tokens; whole rows only where logits must be normalised.
    options = (temperature, top_k, top_p, min_p)
    if target_probs:
        p_rows = target
        p_token = _probability(target[rows, safe_ids])
    else:
        p_rows = _softmax_rows(target[rows], *options).flatten(0, 1)
        p_token = p_rows.view(batch, most + 1, vocab).gather(2, safe_ids[..., None]).squeeze(2)
        rows = torch.arange(batch * (most + 1), device=device).view(batch, most + 1)
    q_rows = None
    q_token = torch.ones_like(p_token)
    if draft is not None:
        if draft_probs:
            q_rows = draft
        elif draft_lse is not None:
            heat = (
                torch.ones_like(draft_lse[:, :1]) if temperature is None else temperature[:, None]
            )
            heat = heat.where(heat > 0, 1)[..., None].double()
            q_rows = (
                (draft.double() / heat - draft_lse[..., None].double()).exp().clamp(max=1).float()
            )
            if draft_cutoff is not None:
                q_rows = q_rows * (draft.float() >= draft_cutoff[..., None])
        else:
            q_rows = _softmax_rows(draft, *options)
        here = safe_ids if target_to_draft is None else target_to_draft[safe_ids]
        inside = (here >= 0) & (here < q_rows.shape[2])
        column = here.clamp(0, q_rows.shape[2] - 1)[:, :most, None]
        q_token = _probability(q_rows.gather(2, column).squeeze(2)) * inside[:, :most]
        q_token = torch.nn.functional.pad(q_token, (0, 1))

    # Judge all positions; a sequence stops at the first that does not accept.
    accept_noise, token_noise = _noise(batch, most, slots, seed, position, uniforms)
    u = (accept_noise >> 40 & 0xFFFFFF).double() / 2**24
    accepted = has_draft & (q_token > 0) & (u * q_token.double() < p_token.double())
    greedy = None if temperature is None else temperature == 0
    if greedy is not None:
        best_rows = _argmax(target, target_probs)[
            (cu_rows[:-1, None] + slots).clamp(max=len(target) - 1)
        ]
        accepted = torch.where(greedy[:, None], ids == best_rows, accepted)
    stop = accepted.long().cumprod(1).sum(1, keepdim=True)  # [B, 1]

    # Draw from the stopping row.
    p = _probability(p_rows[rows.gather(1, stop).squeeze(1)])
    refused = has_draft.gather(1, stop)
    if draft is None:
        q = (torch.arange(vocab, device=device) == safe_ids.gather(1, stop)).float()
    else:
        assert q_rows is not None
        sequence = torch.arange(batch, device=device)
        q = (
            q_rows[sequence, stop.squeeze(1).clamp(max=max(most - 1, 0))]
            if most
            else p.new_zeros(p.shape)
        )
        q = _over_target(_probability(q), vocab, target_to_draft)
    weights = _fixed_point(p - q * refused)
    empty = weights.sum(1, keepdim=True) == 0
    weights = torch.where(empty & refused, _fixed_point(p), weights)
    prefix = weights.cumsum(1)
    total = prefix[:, -1:]
    goal = _multiply_high(token_noise.gather(1, stop), total)
    token = (prefix <= goal).sum(1, keepdim=True).clamp(max=vocab - 1)
    no_mass = total == 0
    stop_rows = (cu_rows[:-1, None] + stop).clamp(max=len(target) - 1).squeeze(1)
    best = _argmax(target[stop_rows], target_probs)[:, None]
    token = torch.where(no_mass, best, token)
    logprob = p.gather(1, token).log().where(~no_mass, 0.0)
    if greedy is not None:
        token = torch.where(greedy[:, None], best, token)
        logprob = logprob.where(~greedy[:, None], 0.0)

    tokens = torch.where(slots < stop, ids, torch.where(slots == stop, token, -1))
    logprobs = torch.where(slots < stop, p_token.log(), torch.where(slots == stop, logprob, 0.0))
    if greedy is not None:
        logprobs = logprobs.where(~greedy[:, None], 0.0)
    bad = (ids < -1) | (ids >= vocab)
    status = (bad & (slots <= stop)).any(1) * BAD_TOKEN
    sampled = torch.ones_like(no_mass) if greedy is None else ~greedy[:, None]
    status = status + (empty & refused & sampled).squeeze(1) * EMPTY_RESIDUAL
    status = status + (no_mass & sampled).squeeze(1) * NO_MASS
    unfit = target[stop_rows]
    unfit = ~((unfit >= 0) & (unfit < math.inf)) if target_probs else ~(unfit < math.inf)
    status = status + unfit.any(1) * BAD_VALUE
    return tokens, stop.squeeze(1) + 1, logprobs, status.int()


def _probability(x: Tensor) -> Tensor:
    x = x.float()
    return x.where(x > 0, 0.0).clamp(max=1)


def _argmax(rows: Tensor, is_probs: bool) -> Tensor:
    x = rows.float()
    x = x.where(x > 0, 0.0).clamp(max=1) if is_probs else x.where(~x.isnan(), -math.inf)
    top = x.max(-1, keepdim=True).values
    index = torch.arange(x.shape[-1], device=x.device)
    return index.where(x == top, x.shape[-1]).min(-1).values


def _softmax_rows(
    rows: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> Tensor:
    """`truncated_softmax` of rows [B, K, V], in float32 at the end."""

    def column(values: Tensor) -> Tensor:
        return values[:, None, None]

    x = rows.double()
    x = x.where(~x.isnan(), -math.inf).clamp(max=torch.finfo(torch.float32).max)
    top = x.max(-1, keepdim=True).values
    heat = 1.0 if temperature is None else column(temperature.where(temperature > 0, 1).double())
    weights = ((x - top.clamp(min=-3e38)) / heat).exp()
    if top_k is not None:
        vocab = x.shape[-1]
        k = column(top_k).where((column(top_k) > 0) & (column(top_k) < vocab), vocab)
        ordered = x.sort(-1, descending=True).values
        weights = weights * (x >= ordered.gather(-1, (k - 1).expand(*x.shape[:-1], 1)))
    if top_p is not None:
        ordered = weights.sort(-1, descending=True).values
        above = ordered.cumsum(-1) - ordered
        kept = above < column(top_p).double() * ordered.sum(-1, keepdim=True)
        kept = kept | (column(top_p) >= 1)
        least = ordered.where(kept, math.inf).min(-1, keepdim=True).values
        weights = weights * (weights >= torch.minimum(least, ordered[..., :1]))
    if min_p is not None:
        weights = weights * (weights >= column(min_p))
    total = weights.sum(-1, keepdim=True)
    return (weights / total.where(total > 0, 1)).float()


def _noise(
    batch: int,
    most: int,
    slots: Tensor,
    seed: Tensor | None,
    position: Tensor | None,
    uniforms: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """64 random bits for accepting and for drawing at each position, int64 [B, K+1] each."""
    if uniforms is not None:
        bits = (uniforms * 2**53).long() << 11
        return bits, bits[:, most:].expand(batch, most + 1)
    assert seed is not None and position is not None
    at = position[:, None] + slots
    return _philox_rows(seed[:, None], at, ACCEPT_DOMAIN), _philox_rows(
        seed[:, None], at, TOKEN_DOMAIN
    )


def _philox_rows(seed: Tensor, position: Tensor, domain: int, turn: Tensor | None = None) -> Tensor:
    c0, c1 = position & _MASK32, position >> 32 & _MASK32
    c2, c3 = torch.full_like(c0, domain), torch.zeros_like(c0) if turn is None else turn
    k0, k1 = seed & _MASK32, seed >> 32 & _MASK32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits, whatever the sign
        c0, c1, c2, c3 = (
            (b >> 32 & _MASK32) ^ c1 ^ k0,
            b & _MASK32,
            (a >> 32 & _MASK32) ^ c3 ^ k1,
            a & _MASK32,
        )
        k0, k1 = k0 + 0x9E3779B9 & _MASK32, k1 + 0xBB67AE85 & _MASK32
    return c1 << 32 | c0


def _multiply_high(v: Tensor, total: Tensor) -> Tensor:
    """floor(v·total / 2^64), v as an unsigned number, total below 2^63; 16 bits at a time."""
    high, low = torch.zeros_like(total), torch.zeros_like(total)
    for shift in (0, 16, 32, 48):
        digit = v >> shift & 0xFFFF
        low = low + digit * (total & _MASK32)
        high = high + digit * (total >> 32) + (low >> 32)
        low = (low & _MASK32) >> 16 | (high & 0xFFFF) << 16
        high = high >> 16
    return high << 32 | low


def gemm_q8_reference(x: Tensor, w: Tensor, qtype: int) -> tuple[Tensor, Tensor]:
    """What `gemm` computes with activations rounded to int8, in float64.

    Per group of weights and of 32 activations ``s_w·s_a·Σ q_w·q_a + o_w·Σ s_a·q_a``. Returns y
    ``[..., n]``, and the sum of the magnitudes of its terms, to which the rounding errors of a
    float32 sum are proportional.
    """
    fmt, cols = format_by_id(qtype), x.shape[-1]
    rows = ops.quantize_activations(x)
    scales = rows[..., cols : cols + cols // 4].contiguous().view(torch.float32)[..., ::2]
    quantised = rows[..., :cols].view(torch.int8).double()
    quantised = quantised * scales.double().repeat_interleave(32, -1)

    blocks = w.cpu().numpy().reshape(-1, fmt.block_bytes)

    def per_weight(groups: Any) -> Tensor:
        values = torch.from_numpy(np.repeat(groups.reshape(-1), fmt.group).astype(np.float64))
        return values.reshape(w.shape[0], cols).to(x.device)

    codes = torch.from_numpy(fmt.codes(blocks).astype(np.float64)).reshape(w.shape[0], cols)
    scaled = codes.to(x.device) * per_weight(fmt.scales(blocks))
    y, terms = quantised @ scaled.T, quantised.abs() @ scaled.abs().T
    if fmt.has_offset:
        offsets = per_weight(fmt.offsets(blocks))
        y, terms = y + quantised @ offsets.T, terms + quantised.abs() @ offsets.abs().T
    return y, terms
