# SPDX-License-Identifier: MIT
"""Verification of trees and of blocks written to be read: Python loops, and vectorised PyTorch.

All take the arguments of `torch.ops.quantgemm.spec_verify` (tensors of trees with `parents`). Those
for trees return its five tensors, those for blocks its first four. Given probabilities and the same
noise they agree bit for bit with the compiled ones.

Tree: w = p and z = 1 at a node. A child d drawn from q is accepted iff u·z·q(d) < w(d); a refused
one leaves w = max(w - z·q, 0) to its siblings, of mass z = Σ w. When no child is left the token is
drawn from w.

Block (arXiv 2403.10444): s_0 = 1 and s_k = min(s_{k-1}·p(d_k)/q(d_k), 1). With R_k the mass of
max(s_k·p - q, 0) behind k drafts, k drafts pass iff u < R_k / (R_k + 1 - s_k), all of them iff
u < s_K. The most that pass are kept, and the next token is drawn from that residual.
"""

from __future__ import annotations

from typing import Any

import torch

from quantgemm import reference as ref
from quantgemm.reference import Arguments, Outputs, SequenceView, Tensor

__all__ = [
    "verify_block_loop",
    "verify_block_vectorized",
    "verify_tree_loop",
    "verify_tree_vectorized",
]


def _left_after(weights: Tensor, share: Tensor) -> Tensor:
    """max(w - share, 0); where that is nothing the caller keeps w"""
    return (weights - share).clamp(min=0)


def _mass(fixed: Tensor) -> Tensor:
    """Of weights in fixed point, along the last dimension, as float32."""
    return (fixed.sum(-1, keepdim=True).double() * 2.0**-44).float()


def verify_tree_loop(*args: Any, **named: Any) -> tuple[Tensor, ...]:
    """One node after another; looks at the device for each."""
    given = Arguments(*args, **named)
    assert given.parents is not None
    tokens, count, logprobs, status = outputs = given.outputs()
    nodes = torch.full_like(given.draft_tokens, -1)
    for b in range(len(tokens)):
        s = SequenceView(given, b)
        parents = given.parents[b, : max(s.drafts, 0)].tolist()
        if not all(-1 <= parent < s.drafts for parent in parents):
            s.bits |= ref.BAD_PARENT
        node, depth = -1, 0
        while s.drafts >= 0:
            children = [i for i, parent in enumerate(parents) if parent == node]
            row, accepted, logprob = node + 1, -1, 0.0
            if s.greedy:
                best, has_mass = s.argmax(row)
                accepted = next((i for i in children if s.token(i) == best), -1)
            else:
                p = weights = s.p(row)
                mass = p.new_ones(1)
                for turn, child in enumerate(children):
                    token = s.token(child)
                    if token < 0:
                        continue
                    share = s.q(child, token) * mass
                    s.check_p_token(row, token)
                    u = s.uniform(child, depth, ref.ACCEPT_DOMAIN, turn)
                    if share[token] > 0 and u * float(share[token]) < float(weights[token]):
                        accepted, logprob = child, float(p[token].log())
                        break
                    s.check_p(row)
                    s.check_q(child)
                    left = _left_after(weights, share)
                    if given.draft is None:
                        left[token] = 0
                    if ref._fixed_point(left).sum() == 0:
                        s.bits |= ref.EMPTY_RESIDUAL
                    else:
                        weights, mass = left, _mass(ref._fixed_point(left))
            if accepted >= 0:
                tokens[b, depth], logprobs[b, depth] = given.draft_tokens[b, accepted], logprob
                nodes[b, depth] = node = accepted
                depth += 1
                continue
            if s.greedy:
                s.bits |= 0 if has_mass else ref.NO_MASS
                tokens[b, depth] = best
            else:
                s.check_p(row)
                tokens[b, depth], logprobs[b, depth] = s.draw(weights, p, row, depth)
            count[b] = depth + 1
            break
        status[b] = s.bits
    return (*outputs, nodes)


def verify_block_loop(*args: Any, **named: Any) -> Outputs:
    """One position after another; looks at the device for each."""
    given = Arguments(*args, **named)
    tokens, count, logprobs, status = outputs = given.outputs()
    for b in range(len(tokens)):
        s = SequenceView(given, b)
        if s.drafts < 0 or s.greedy:  # greedy: the longest prefix of argmaxes
            ref.judge_chain(s, tokens[b], logprobs[b], count[b : b + 1])
            status[b] = s.bits
            continue
        shares = [torch.ones(1)]
        length = 0
        while (token := s.token(length)) >= 0:
            p, q = s.p(length)[token].double(), s.q(length, token)[token].double()
            s.check_p_token(length, token)
            logprobs[b, length] = p.float().log()
            share = (shares[-1].double() * p / q).float().clamp(max=1)
            shares.append(share if q > 0 else torch.zeros(1))
            length += 1
        for k in range(length, -1, -1):
            p = s.p(k)
            u = s.uniform(k - 1, 0, ref.BLOCK_DOMAIN, k - 1) if k else 0.0
            if k == length:
                if k and not u < float(shares[k]):
                    continue
                weights = p
            else:
                s.check_q(k)
                weights = _left_after(p * shares[k].to(p.device), s.q(k, s.token(k)))
                mass = int(ref._fixed_point(weights).sum()) / 2**44
                if k and not u * (mass + (1 - float(shares[k]))) < mass:
                    s.check_p(k)
                    continue
                if mass == 0:
                    s.bits |= ref.EMPTY_RESIDUAL
                    weights = p
            s.check_p(k)
            tokens[b, :k], logprobs[b, k:] = given.draft_tokens[b, :k], 0
            tokens[b, k], logprobs[b, k] = s.draw(weights, p, k, k)
            count[b] = k + 1
            break
        status[b] = s.bits
    return outputs


class _Rows:
    """p and q of the whole batch; rows and parameters are taken to be good."""

    def __init__(self, given: Arguments) -> None:
        self.given = given
        batch, most = given.draft_tokens.shape
        self.vocab = given.target.shape[1]
        device = given.target.device
        options = (given.temperature, given.top_k, given.top_p, given.min_p)
        self.slots = torch.arange(most + 1, device=device)
        self.num_drafts = (given.cu_rows[1:] - given.cu_rows[:-1] - 1)[:, None]
        rows = (given.cu_rows[:-1, None] + self.slots).clamp(max=len(given.target) - 1)
        self.values = given.target[rows]  # [B, K+1, V]
        self.p = (
            ref._probability(self.values)
            if given.target_probs
            else ref._softmax_rows(self.values, *options)
        )
        inside = self.slots[:most] < self.num_drafts
        self.bad = ((given.draft_tokens < -1) | (given.draft_tokens >= self.vocab)) & inside
        self.has_draft = inside & (given.draft_tokens >= 0) & ~self.bad
        self.ids = given.draft_tokens.clamp(0, self.vocab - 1)
        if given.draft is None:
            self.q = torch.nn.functional.one_hot(self.ids, self.vocab).float()  # [B, K, V]
        else:
            if given.draft_probs:
                q = given.draft
            elif given.draft_lse is not None:
                heat = torch.ones(batch, 1, device=device)
                if given.temperature is not None:
                    heat = given.temperature.where(given.temperature > 0, 1)[:, None]
                scaled = given.draft.double() / heat[..., None].double()
                q = (scaled - given.draft_lse[..., None].double()).exp().clamp(max=1).float()
                if given.draft_cutoff is not None:
                    q = q * (given.draft.float() >= given.draft_cutoff[..., None])
            else:
                q = ref._softmax_rows(given.draft, *options)
            self.q = ref._over_target(ref._probability(q), self.vocab, given.target_to_draft)

    def greedy(self) -> Tensor | None:
        heat = self.given.temperature
        return None if heat is None else (heat == 0)[:, None]

    def noise(self, column: Tensor, offset: Tensor, domain: int, turn: Tensor) -> Tensor:
        """[B, n] of 64 bits"""
        given = self.given
        if given.uniforms is not None:
            return (given.uniforms.gather(1, column) * 2**53).long() << 11
        assert given.seed is not None and given.position is not None
        at = given.position[:, None] + offset
        return ref._philox_rows(given.seed[:, None], at, domain, turn)

    def draw(self, weights: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1]: the token, and whether there was no mass"""
        prefix = ref._fixed_point(weights).cumsum(1)
        total = prefix[:, -1:]
        most = self.given.draft_tokens.shape[1]
        column = torch.full_like(accepted, most)
        noise = self.noise(column, accepted, ref.TOKEN_DOMAIN, torch.zeros_like(accepted))
        goal = ref._multiply_high(noise, total)
        token = (prefix <= goal).sum(1, keepdim=True).clamp(max=self.vocab - 1)
        return token, total == 0


def _uniform(noise: Tensor) -> Tensor:
    return (noise >> 40 & 0xFFFFFF).double() / 2**24


def _row(rows: Tensor, k: Tensor) -> Tensor:
    """[B, n, V] at k [B, 1]: [B, V]"""
    return rows.gather(1, k[..., None].expand(-1, -1, rows.shape[2])).squeeze(1)


def verify_tree_vectorized(*args: Any, **named: Any) -> tuple[Tensor, ...]:
    """The whole batch at once, a node per step, without looking at the device.

    Status reports BAD_TOKEN, BAD_PARENT, EMPTY_RESIDUAL and NO_MASS.
    """
    given = Arguments(*args, **named)
    assert given.parents is not None
    rows = _Rows(given)
    tokens, count, logprobs, _ = given.outputs()
    batch, most = given.draft_tokens.shape
    nodes = torch.full_like(given.draft_tokens, -1)
    status = torch.zeros_like(count)[:, None]
    slots, parents = rows.slots[:most], given.parents
    exists = slots < rows.num_drafts
    good = (parents >= -1) & (parents < rows.num_drafts)
    status |= (exists & ~good).any(1, keepdim=True) * ref.BAD_PARENT

    node = torch.full_like(count, -1)[:, None]
    depth, turn, last = torch.zeros_like(node), torch.zeros_like(node), node
    weights, mass = rows.p[:, 0], torch.ones(batch, 1, device=rows.p.device)
    best = ref._argmax(rows.values, given.target_probs)  # [B, K+1]
    greedy = rows.greedy()
    for _ in range(most):
        # The next child of each sequence's node, `most` if there is none.
        child = slots.where(exists & (parents == node) & (slots > last), most)
        child = child.min(1, keepdim=True).values
        there = child < most
        safe = child.clamp(max=most - 1)
        token, is_good = rows.ids.gather(1, safe), there & rows.has_draft.gather(1, safe)
        status |= (there & rows.bad.gather(1, safe)) * ref.BAD_TOKEN
        share = _row(rows.q, safe) * mass
        u = _uniform(rows.noise(safe, depth, ref.ACCEPT_DOMAIN, turn))
        refusal, p_token = share.gather(1, token), weights.gather(1, token)
        accepted = (refusal > 0) & (u * refusal.double() < p_token.double())
        if greedy is not None:
            accepted = torch.where(greedy, token == best.gather(1, node + 1), accepted)
        accepted = accepted & is_good

        left = _left_after(weights, share)
        if given.draft is None:
            left = left.scatter(1, token, 0.0)
        fixed = ref._fixed_point(left)
        empty = fixed.sum(1, keepdim=True) == 0
        refused = is_good & ~accepted
        sampled = refused if greedy is None else refused & ~greedy
        status |= (sampled & empty) * ref.EMPTY_RESIDUAL
        refused = refused & ~empty

        p = _row(rows.p, node + 1)
        logprob = p.gather(1, token).log()
        tokens = tokens.scatter(1, depth, token.where(accepted, tokens.gather(1, depth)))
        logprobs = logprobs.scatter(1, depth, logprob.where(accepted, logprobs.gather(1, depth)))
        at = depth.clamp(max=most - 1)
        nodes = nodes.scatter(1, at, child.where(accepted, nodes.gather(1, at)))
        weights = torch.where(accepted, _row(rows.p, safe + 1), left.where(refused, weights))
        mass = torch.where(accepted, 1.0, _mass(fixed).where(refused, mass))
        last = torch.where(accepted, -1, child.where(there, last))
        turn = torch.where(accepted, 0, turn + 1)
        node, depth = torch.where(accepted, child, node), depth + accepted.long()

    token, no_mass = rows.draw(weights, depth)
    p, top = _row(rows.p, node + 1), best.gather(1, node + 1)
    token = torch.where(no_mass, top, token)
    logprob = p.gather(1, token).log().where(~no_mass, 0.0)
    if greedy is not None:
        token, no_mass = torch.where(greedy, top, token), no_mass & ~greedy
    tokens, logprobs = tokens.scatter(1, depth, token), logprobs.scatter(1, depth, logprob)
    if greedy is not None:
        logprobs = logprobs.where(~greedy, 0.0)
    status |= no_mass * ref.NO_MASS
    return tokens, depth.squeeze(1) + 1, logprobs, status.squeeze(1).int(), nodes


def verify_block_vectorized(*args: Any, **named: Any) -> Outputs:
    """The whole batch at once, without looking at the device.

    Status reports BAD_TOKEN, EMPTY_RESIDUAL and NO_MASS.
    """
    given = Arguments(*args, **named)
    rows = _Rows(given)
    batch, most = given.draft_tokens.shape
    slots, ids = rows.slots, rows.ids
    length = rows.has_draft.long().cumprod(1).sum(1, keepdim=True)
    p_token = rows.p[:, :most].gather(2, ids[..., None]).squeeze(2)
    q_token = rows.q.gather(2, ids[..., None]).squeeze(2)
    shares = [torch.ones(batch, device=rows.p.device)]
    for k in range(most):
        q = q_token[:, k].double()
        share = (shares[-1].double() * p_token[:, k].double() / q).float().clamp(max=1)
        shares.append(share.where(q > 0, 0.0))
    share = torch.stack(shares, 1)  # [B, K+1]

    residual = _left_after(rows.p[:, :most] * share[:, :most, None], rows.q)
    mass = ref._fixed_point(residual).sum(2).double() * 2.0**-44
    mass = torch.nn.functional.pad(mass, (0, 1))
    column = (slots - 1).clamp(min=0).expand(batch, -1)
    noise = rows.noise(column, torch.zeros_like(column), ref.BLOCK_DOMAIN, column)
    u = _uniform(noise)
    passes = torch.where(
        slots == length, u < share.double(), u * (mass + (1 - share.double())) < mass
    )
    passes = (passes | (slots == 0)) & (slots <= length)
    stop = (passes * slots).max(1, keepdim=True).values

    p = _row(rows.p, stop)
    weights = p
    is_residual = stop < length
    empty = torch.zeros_like(is_residual)
    if most:
        left = _row(residual, stop.clamp(max=most - 1))
        empty = is_residual & (ref._fixed_point(left).sum(1, keepdim=True) == 0)
        weights = torch.where(is_residual & ~empty, left, p)
    token, no_mass = rows.draw(weights, stop)
    best = ref._argmax(_row(rows.values, stop), given.target_probs)[:, None]
    token = torch.where(no_mass, best, token)
    logprob = p.gather(1, token).log().where(~no_mass, 0.0)

    pad = torch.nn.functional.pad
    tokens = torch.where(slots < stop, pad(ids, (0, 1)), torch.where(slots == stop, token, -1))
    logprobs = pad(p_token.log(), (0, 1))
    logprobs = torch.where(slots < stop, logprobs, torch.where(slots == stop, logprob, 0.0))
    stopped_by = pad(rows.bad, (0, 1)).gather(1, length)
    status = stopped_by * ref.BAD_TOKEN + empty * ref.EMPTY_RESIDUAL + no_mass * ref.NO_MASS
    count, bits = stop.squeeze(1) + 1, status.squeeze(1).int()
    greedy = rows.greedy()
    if greedy is None:
        return tokens, count, logprobs, bits
    chain = ref.rejection_sample_vectorized(*args, **named)
    flat = greedy.squeeze(1)
    return (
        torch.where(greedy, chain[0], tokens),
        torch.where(flat, chain[1], count),
        torch.where(greedy, chain[2], logprobs),
        torch.where(flat, chain[3], bits),
    )
