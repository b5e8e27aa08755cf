# SPDX-License-Identifier: MIT
"""Speculative generation: a small model (or the text itself) drafts, the target verifies.

    result = speculative_generate(target, draft, prompt_ids, max_new_tokens=64)
    result.tokens, result.statistics.tokens_per_step

`target` and `draft` are callables from ids ``[1, n]`` to logits ``[1, n, vocab]``, transformers
models with the same tokenizer, or what `compile_decode` makes of such: CUDA graphs then read the
drafts. Whatever the draft does, the output follows the target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from quantgemm import ops
from quantgemm.ops import invert_vocabulary_map

__all__ = [
    "GenerationResult",
    "NgramDraft",
    "SamplingConfig",
    "SpeculationStatistics",
    "invert_vocabulary_map",
    "speculative_generate",
]

Tensor = torch.Tensor


@runtime_checkable
class Steps(Protocol):
    """What `compile_decode` makes of a model: see `quantgemm.models.Decoder`."""

    max_tokens: int
    kv: str | None

    def prepare(self, batch: int, tokens: int = 1) -> None: ...
    def read(self, prompts: Tensor) -> Tensor: ...
    def step(self, tokens: Tensor) -> Tensor: ...
    def forget(self, tokens: int) -> None: ...


Model = Callable[[Tensor], Any] | Steps


@dataclass(frozen=True)
class SamplingConfig:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def tensors(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """The parameters as the ops take them; what is off is left out."""
        given: dict[str, tuple[float, torch.dtype]] = {}
        if self.temperature != 1:
            given["temperature"] = (self.temperature, torch.float32)
        if self.top_k:
            given["top_k"] = (self.top_k, torch.int64)
        if self.top_p != 1:
            given["top_p"] = (self.top_p, torch.float32)
        if self.min_p:
            given["min_p"] = (self.min_p, torch.float32)
        return {
            name: torch.full((rows,), value, dtype=dtype, device=device)
            for name, (value, dtype) in given.items()
        }


@dataclass(frozen=True)
class NgramDraft:
    """Drafts what followed the last tokens the last time they stood in the text: no model needed.

    Tries the `longest` last tokens first, then fewer, down to `shortest`.
    """

    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise ValueError(
                f"shortest: expected 1 <= shortest <= longest, got {self.shortest}, {self.longest}"
            )

    def propose(self, ids: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow `ids`."""
        for length in range(min(self.longest, len(ids) - 1), self.shortest - 1, -1):
            tail = list(ids[len(ids) - length :])
            for start in range(len(ids) - length - 1, -1, -1):
                if list(ids[start : start + length]) == tail:
                    return list(ids[start + length : start + length + count])
        return []


@dataclass
class SpeculationStatistics:
    """What the drafts were worth."""

    steps: int = 0
    """calls of the target, one per sequence and step"""
    emitted: int = 0
    drafted: list[int] = field(default_factory=list)
    """per position of a draft: how often there was one"""
    accepted: list[int] = field(default_factory=list)
    """per position: how often it was accepted"""

    @property
    def tokens_per_step(self) -> float:
        return self.emitted / self.steps if self.steps else 0.0

    @property
    def mean_accepted_length(self) -> float:
        return sum(self.accepted) / self.steps if self.steps else 0.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Of the drafts at a position, how many were accepted."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]

    def add(self, drafted: int, accepted: int, emitted: int) -> None:
        self.steps += 1
        self.emitted += emitted
        for k in range(drafted):
            self.drafted[k] += 1
            self.accepted[k] += k < accepted


@dataclass(frozen=True)
class GenerationResult:
    tokens: list[list[int]]
    """new tokens of each prompt"""
    statistics: SpeculationStatistics


def speculative_generate(
    target: Model,
    draft: Model | NgramDraft,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int = 64,
    num_drafts: int = 4,
    config: SamplingConfig | None = None,
    eos_token_id: int | Collection[int] | None = None,
    draft_to_target: Tensor | None = None,
    block: bool = False,
    use_cache: bool = True,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> GenerationResult:
    """Tokens of the target's distribution, several per call of the target.

    prompts: ids ``[n]``, or a list of such; draft_to_target: for a draft model with a smaller
    vocabulary; block: judge the drafts of a step as a whole (see `ops.spec_verify`). The models are
    called for one sequence at a time; all sequences are verified together. eos_token_id: one or
    several tokens that end a sequence. on_tokens: told a sequence's number and its new tokens as
    they come. num_drafts 0 is ordinary sampling.

    A transformers model keeps its keys and values between the steps and reads only what is new:
    at most num_drafts + 1 tokens per step. use_cache=False is for architectures whose cache cannot
    be cut back to the accepted tokens. Other callables get the whole text each time. A `Decoder` of
    `compile_decode` takes one prompt.
    """
    config = config or SamplingConfig()
    prompts = [prompts] if isinstance(prompts, Tensor) else list(prompts)
    if num_drafts < 0 or max_new_tokens < 0:
        raise ValueError(
            f"num_drafts, max_new_tokens: expected 0 or more, got {num_drafts}, {max_new_tokens}"
        )
    for prompt in prompts:
        if prompt.dim() != 1 or len(prompt) == 0:
            raise ValueError(f"prompts: expected ids of shape [n], got {list(prompt.shape)}")
    stats = SpeculationStatistics(drafted=[0] * num_drafts, accepted=[0] * num_drafts)
    ids = [prompt.tolist() for prompt in prompts]
    ends = [len(i) + max_new_tokens for i in ids]
    active = [b for b in range(len(ids)) if max_new_tokens > 0]
    ending = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    readers = [_reader(target, len(ids), use_cache, num_drafts + 1)]
    if not isinstance(draft, NgramDraft):
        readers.append(_reader(draft, len(ids), use_cache, 1))
    while active:
        device = prompts[0].device
        round_ = _Round(config, [ids[b] for b in active], active, device, draft_to_target, block)
        count = min(num_drafts, max(ends[b] - len(ids[b]) for b in active) - 1)
        if isinstance(draft, NgramDraft):
            round_.look_up(draft, count)
        else:
            round_.draft_with(readers[1], count)
        for b, new, drafted in zip(active, *round_.verify(readers[0]), strict=True):
            accepted = len(new) - 1
            end = next((i for i, token in enumerate(new) if token in ending), None)
            if end is not None:
                new = new[: end + 1]
                ends[b] = len(ids[b]) + len(new)
            new = new[: ends[b] - len(ids[b])]
            stats.add(drafted, accepted, len(new))
            ids[b] += new
            if on_tokens is not None:
                on_tokens(b, new)
        active = [b for b in active if len(ids[b]) < ends[b]]
    tokens = [i[len(prompt) :] for i, prompt in zip(ids, prompts, strict=True)]
    return GenerationResult(tokens, stats)


def _reader(model: Model, sequences: int, use_cache: bool, tokens: int) -> _Reader | _StepReader:
    """tokens: how many the reader is to read at once, once a text has begun."""
    if isinstance(model, Steps):
        return _StepReader(model, sequences, tokens)
    return _Reader(model, sequences, use_cache)


class _StepReader:
    """Reads by recorded steps: of one token, or of `most`, the last ones perhaps for nothing."""

    def __init__(self, decoder: Steps, sequences: int, most: int) -> None:
        if sequences != 1:
            raise ValueError(f"prompts: expected one for a compiled model, got {sequences}")
        if decoder.kv is not None:
            raise ValueError(
                f"a compiled model: expected keys and values as they are, got kv={decoder.kv!r}: "
                "refused drafts could not be forgotten"
            )
        self.decoder, self.most = decoder, min(most, decoder.max_tokens)
        self.read: list[int] = []
        decoder.prepare(1, self.most)

    def logits(self, b: int, ids: list[int], rows: int, device: torch.device) -> Tensor:
        """[rows, vocab] that follow the last `rows` tokens of the text."""
        known = min(_common_prefix(self.read, ids), len(ids) - rows)
        made: list[Tensor] = []
        with torch.no_grad():
            if known <= 0:
                known = len(ids) - rows + 1
                made.append(self.decoder.read(torch.tensor([ids[:known]], device=device)))
            else:
                self.decoder.forget(len(self.read) - known)
            while known < len(ids):
                most = self.most if known + self.most <= self.decoder.max_tokens else 1
                new = ids[known : known + most]
                count = 1 if len(new) == 1 else most
                padded = new + new[-1:] * (count - len(new))
                logits = self.decoder.step(torch.tensor([padded], device=device))[0, : len(new)]
                made.append(logits.clone())  # the next step writes there
                self.decoder.forget(count - len(new))
                known += len(new)
        self.read = list(ids)
        return torch.cat(made)[-rows:]


class _Reader:
    """A model that reads texts which grow, and now and then lose their end."""

    def __init__(self, model: Callable[[Tensor], Any], sequences: int, use_cache: bool) -> None:
        self.model = model
        is_transformers = hasattr(model, "generate") and hasattr(model, "config")
        self.caches: list[Any] | None = None
        self.read: list[list[int]] = [[] for _ in range(sequences)]  # what the caches hold
        if is_transformers and use_cache:
            from transformers import DynamicCache

            self.caches = [DynamicCache() for _ in range(sequences)]
        # A head over a vocabulary of 128 000 is the largest product of all: only the rows wanted.
        self.few_rows = (
            is_transformers
            and "logits_to_keep" in inspect.signature(getattr(model, "forward", model)).parameters
        )

    def logits(self, b: int, ids: list[int], rows: int, device: torch.device) -> Tensor:
        """[rows, vocab] that follow the last `rows` tokens of a sequence's text."""
        known = 0
        more: dict[str, Any] = {}
        if self.caches is not None:
            known = min(_common_prefix(self.read[b], ids), len(ids) - rows)
            if known < len(self.read[b]):
                self.caches[b].crop(known - len(self.read[b]))  # negative: so many fewer
            more = {"past_key_values": self.caches[b], "use_cache": True}
            self.read[b] = list(ids)
        new = torch.tensor([ids[known:]], device=device)
        if self.few_rows:
            more["logits_to_keep"] = rows
        with torch.no_grad():
            out = self.model(new, **more)
        logits = getattr(out, "logits", out)
        expected = (1, rows if self.few_rows else new.shape[1])
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != expected:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"model: expected logits of shape [1, {expected[1]}, vocab], got {shape}"
            )
        return logits[0, -rows:]


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class _Round:
    """One step of all active sequences: drafts, then verification."""

    def __init__(
        self,
        config: SamplingConfig,
        ids: list[list[int]],
        sequences: list[int],
        device: torch.device,
        draft_to_target: Tensor | None,
        block: bool,
    ) -> None:
        self.config, self.ids, self.device, self.sequences = config, ids, device, sequences
        self.map, self.block = draft_to_target, block
        # A token's noise belongs to its place in the text, so it does not depend on the steps;
        # that of a block's drafts belongs to the step.
        self.seeds = torch.tensor([config.seed * 1_000_003 + b for b in sequences], device=device)
        self.positions = torch.tensor([len(i) for i in ids], device=device)
        self.drafts: list[list[int]] = [[] for _ in ids]
        self.given: dict[str, Tensor] = {}

    def texts(self) -> list[tuple[int, list[int]]]:
        """Each sequence's number, and its text with the drafts so far."""
        together = zip(self.sequences, self.ids, self.drafts, strict=True)
        return [(b, i + d) for b, i, d in together]

    def look_up(self, ngram: NgramDraft, count: int) -> None:
        self.drafts = [ngram.propose(i, count) for i in self.ids]

    def draft_with(self, model: _Reader | _StepReader, count: int) -> None:
        rows, lse, cutoff = [], [], []
        for k in range(count):
            logits = torch.cat([model.logits(b, i, 1, self.device) for b, i in self.texts()])
            drawn = ops.draft_sample(
                logits,
                **self.config.tensors(len(logits), self.device),  # type: ignore[arg-type]
                seed=self.seeds,
                position=self.positions + (0 if self.block else k),
                turn=k if self.block else 0,
            )
            tokens = drawn[0] if self.map is None else self.map[drawn[0]]
            for d, token in zip(self.drafts, tokens.tolist(), strict=True):
                d.append(token)
            rows.append(logits)
            lse.append(drawn[1])
            cutoff.append(drawn[2])
        if count:
            self.given = {
                "draft": torch.stack(rows, 1),
                "draft_lse": torch.stack(lse, 1),
                "draft_cutoff": torch.stack(cutoff, 1),
            }

    def verify(self, target: _Reader | _StepReader) -> tuple[list[list[int]], list[int]]:
        """New tokens of each sequence, and how many were drafted."""
        lengths = [len(d) for d in self.drafts]
        texts = zip(self.texts(), lengths, strict=True)
        rows = [target.logits(b, i, n + 1, self.device) for (b, i), n in texts]
        logits, most = torch.cat(rows), max(lengths)
        padded = [d + [-1] * (most - len(d)) for d in self.drafts]
        given = dict(self.given)
        if "draft" in given:
            given["draft"] = given["draft"].to(logits.dtype)
            if self.map is not None:
                given["draft_to_target"] = self.map
        starts = torch.tensor([0, *(n + 1 for n in lengths)], device=self.device).cumsum(0)
        tokens, count, _, _ = ops.spec_verify(
            logits,
            torch.tensor(padded, dtype=torch.int64, device=self.device).view(len(lengths), most),
            starts,
            **given,  # type: ignore[arg-type]
            **self.config.tensors(len(lengths), self.device),  # type: ignore[arg-type]
            seed=self.seeds,
            position=self.positions,
            block=self.block,
        )
        kept = zip(tokens.tolist(), count.tolist(), strict=True)
        return [row[:n] for row, n in kept], lengths
