# SPDX-License-Identifier: MIT
"""speculative_generate: the target's own tokens when greedy, the target's law when sampling."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("top_k", [0, 3])
def test_sampling_follows_the_target(top_k: int, block: bool) -> None:
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


def tiny_llama(seed: int, layers: int = 2) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


class Watched:
    """Counts the tokens of every call of a module."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens.append((args[0] if args else kwargs["input_ids"]).shape[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["similar", "other", "ngram"])
@pytest.mark.parametrize("block", [False, True])
def test_transformers_greedy_with_a_cache(block: bool, kind: str, device: str) -> None:
    target = tiny_llama(1).to(device)
    drafts: dict[str, Any] = {"other": tiny_llama(2, 1), "ngram": NgramDraft()}
    if kind == "similar":
        drafts["similar"] = tiny_llama(1)
        with torch.no_grad():
            for weight in drafts["similar"].parameters():
                weight += 0.02 * torch.randn_like(weight)
    draft = drafts[kind] if kind == "ngram" else drafts[kind].to(device)
    prompts = [torch.randint(0, 97, (n,), device=device) for n in (17, 1, 40)]
    want = []
    for prompt in prompts:
        out = target.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            do_sample=False,
            max_new_tokens=30,
        )
        want.append(out[0, len(prompt) :].tolist())
    watched, drafting = Watched(target), None if kind == "ngram" else Watched(draft)
    greedy = SamplingConfig(temperature=0)
    result = speculative_generate(target, draft, prompts, 30, 3, greedy, block=block)
    assert result.tokens == want
    # The prompts once, then never more than the drafts and the token before them.
    first = [3 if drafting else len(draft.propose(p.tolist(), 3)) for p in prompts]
    assert watched.tokens[:3] == [len(p) + n for p, n in zip(prompts, first, strict=True)]
    assert max(watched.tokens[3:]) <= 4
    assert len(watched.tokens) == result.statistics.steps
    if drafting:
        assert drafting.tokens[:3] == [len(p) for p in prompts]
        assert max(drafting.tokens[3:]) <= 2
    if kind == "similar":
        assert result.statistics.tokens_per_step > 1.5


def test_the_cache_changes_no_sampled_token() -> None:
    target, draft = tiny_llama(1), tiny_llama(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.05 * torch.randn_like(weight)
    prompts = [torch.tensor([5, 9, 1])]
    config = SamplingConfig(temperature=0.9, top_k=20, seed=3)
    for block in (False, True):
        with_cache, without = (
            speculative_generate(
                target, draft, prompts, 15, 3, config, block=block, use_cache=use_cache
            )
            for use_cache in (True, False)
        )
        assert with_cache.tokens == without.tokens
        plain = speculative_generate(
            lambda ids: target(ids), lambda ids: draft(ids), prompts, 15, 3, config, block=block
        )
        assert plain.tokens == without.tokens


def test_tokens_are_told_as_they_come_and_any_of_several_ends() -> None:
    target = Markov(1)
    prompts = [torch.tensor([3, 4]), torch.tensor([7])]
    config = SamplingConfig(temperature=0)
    free = speculative_generate(target, NgramDraft(), prompts, 30, config=config).tokens
    ends = (free[0][10], free[1][5], VOCAB + 7)
    told: dict[int, list[int]] = {0: [], 1: []}
    result = speculative_generate(
        target,
        NgramDraft(),
        prompts,
        30,
        config=config,
        eos_token_id=ends,
        on_tokens=lambda b, new: told[b].extend(new),
    )
    for b in (0, 1):
        first = next(i for i, token in enumerate(free[b]) if token in ends)
        assert result.tokens[b] == free[b][: first + 1] == told[b]


def test_no_drafts_is_ordinary_sampling() -> None:
    target = Markov(1)
    config = SamplingConfig(temperature=0)
    want = speculative_generate(target, noisy(target), torch.tensor([3]), 20, config=config)
    calls = target.calls
    alone = speculative_generate(target, NgramDraft(), torch.tensor([3]), 20, 0, config)
    assert alone.tokens == want.tokens
    assert target.calls - calls == alone.statistics.steps == 20
