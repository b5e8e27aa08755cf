# SPDX-License-Identifier: MIT
"""speculative_generate: the target's own tokens when greedy, the target's law when sampling."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICES

from quantgemm import ops
from quantgemm.sampling import (
    NgramDraft,
    SamplingConfig,
    invert_vocabulary_map,
    speculative_generate,
)

VOCAB = 40


class Markov:
    """Logits of the next token from a table over the last one."""

    def __init__(self, seed: int, sharpness: float = 3.0, device: str = "cpu") -> None:
        g = torch.Generator().manual_seed(seed)
        self.table = (torch.randn(VOCAB, VOCAB, generator=g) * sharpness).to(device)
        self.calls = 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.table[ids]


def noisy(model: Markov) -> Markov:
    other = Markov(99)
    other.table = model.table + 0.5 * Markov(100, 1.0).table.to(model.table.device)
    return other


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_greedy_is_the_target_alone(kind: str, device: str) -> None:
    target = Markov(1, device=device)
    draft = noisy(target) if kind == "model" else NgramDraft()
    prompts = [torch.tensor(p, device=device) for p in ([3, 4], [7], [1, 2, 1, 2, 1])]
    result = speculative_generate(
        target, draft, prompts, max_new_tokens=50, config=SamplingConfig(temperature=0)
    )
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        want, last = [], int(prompt[-1])
        for _ in range(50):
            last = int(target.table[last].argmax())
            want.append(last)
        assert tokens == want
    stats = result.statistics
    assert stats.steps == target.calls and stats.emitted == 150
    assert stats.tokens_per_step > 1.5 and len(stats.acceptance_per_position) == 4


@pytest.mark.parametrize("top_k", [0, 3])
def test_sampling_follows_the_target(top_k: int) -> None:
    """Second new token's law, over many sequences with noise of their own."""
    target = Markov(2, 1.0)
    draft = noisy(target)
    count = 6000
    config = SamplingConfig(temperature=0.8, top_k=top_k, seed=5)
    result = speculative_generate(
        target, draft, [torch.tensor([5])] * count, max_new_tokens=2, num_drafts=2, config=config
    )
    logits = target.table / 0.8
    if top_k:
        logits = logits.where(logits >= logits.topk(top_k).values[:, -1:], -math.inf)
    step = logits.double().softmax(1)
    for place, law in ((0, step[5]), (1, step[5] @ step)):
        seen = torch.tensor([t[place] for t in result.tokens]).bincount(minlength=VOCAB)
        assert not seen[law == 0].any()
        cells = law * count >= 5
        deviation = (seen[cells] - law[cells] * count).abs() / (law[cells] * count).sqrt()
        assert deviation.max() < 5
    assert 0.2 < result.statistics.acceptance_per_position[0] < 1


def test_the_number_of_drafts_changes_no_law_but_the_steps() -> None:
    target = Markov(4)
    for drafts in (0, 1, 6):
        result = speculative_generate(
            target, target, torch.tensor([1]), max_new_tokens=35, num_drafts=drafts
        )
        assert len(result.tokens[0]) == 35
        stats = result.statistics
        assert stats.steps == math.ceil(35 / (drafts + 1))  # q == p: everything is accepted
        if drafts:
            assert min(stats.acceptance_per_position) == 1


def test_smaller_draft_vocabulary_and_end_of_text() -> None:
    target = Markov(6)
    kept = torch.tensor([9, 0, 4, 17, 30, 2])
    to_draft = invert_vocabulary_map(kept, VOCAB)
    assert to_draft[kept].tolist() == list(range(6)) and (to_draft == -1).sum() == VOCAB - 6

    def draft(ids: torch.Tensor) -> SimpleNamespace:  # as a transformers model answers
        return SimpleNamespace(logits=target.table[ids][..., kept])

    greedy = SamplingConfig(temperature=0)
    alone = speculative_generate(target, NgramDraft(), torch.tensor([1]), 30, 0, greedy)
    mapped = speculative_generate(
        target, draft, torch.tensor([1]), 30, 3, greedy, draft_to_target=kept
    )
    assert mapped.tokens == alone.tokens
    end = alone.tokens[0][6]
    stopped = speculative_generate(target, draft, torch.tensor([1]), 30, 3, greedy, end, kept)
    assert stopped.tokens[0] == alone.tokens[0][: alone.tokens[0].index(end) + 1]


def test_ngram_draft() -> None:
    draft = NgramDraft(longest=2)
    assert draft.propose([1, 2, 3, 9, 1, 2], 2) == [3, 9]
    assert draft.propose([5, 2, 3, 1, 2], 9) == [3, 1, 2]  # one token matches
    assert draft.propose([1, 2, 3], 2) == [] and draft.propose([1], 2) == []
    with pytest.raises(ValueError, match="shortest"):
        NgramDraft(longest=1, shortest=2)


def test_mistakes() -> None:
    target = Markov(1)
    with pytest.raises(ValueError, match=r"prompts: expected ids of shape \[n\], got \[1, 2\]"):
        speculative_generate(target, NgramDraft(), [torch.tensor([[1, 2]])])
    with pytest.raises(ValueError, match="num_drafts"):
        speculative_generate(target, NgramDraft(), torch.tensor([1]), num_drafts=-1)
    with pytest.raises(ValueError, match=r"expected logits of shape \[1, 1, vocab\]"):
        speculative_generate(lambda ids: target.table[ids][0], NgramDraft(), torch.tensor([1]))


def test_sample_is_verification_without_drafts() -> None:
    logits = Markov(8).table
    seed, position = torch.arange(VOCAB), torch.arange(VOCAB) * 3
    tokens, logprobs, status = ops.sample(logits, seed=seed, position=position)
    empty = torch.empty(VOCAB, 0, dtype=torch.int64)
    again = ops.spec_verify(logits, empty, torch.arange(VOCAB + 1), seed=seed, position=position)
    assert torch.equal(again[0][:, 0], tokens) and torch.equal(again[2][:, 0], logprobs)
    drafts = ops.draft_sample(logits, seed=seed, position=position)[0]
    assert (drafts != tokens).any() and not status.any()
