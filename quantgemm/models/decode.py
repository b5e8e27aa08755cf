# SPDX-License-Identifier: MIT
"""compile_decode: a model's step of one token as a CUDA graph, so that the host does not bound it.

    decoder = compile_decode(model, max_tokens=4096)
    tokens = decoder.generate(prompt_ids, max_new_tokens=128)

A step of a transformers model is some thousand small kernels, which Python starts more slowly than
a GPU runs them. They are recorded once per batch size, on buffers that stay where they are, and
started again as one. Keys and values lie in a `SparseKVCache`, as they are or quantised.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from quantgemm import ops
from quantgemm.integrations.transformers_cache import quantized_cache
from quantgemm.later import rotations_wait
from quantgemm.models.angles import RotaryTables
from quantgemm.models.fuse import fuse_steps
from quantgemm.nn import alike_rows
from quantgemm.read_ahead import ReadAhead
from quantgemm.sampling import SamplingConfig

__all__ = ["Decoder", "compile_decode"]

# Tokens that the GPU may be ahead of the host, which must see each to know whether the text ends.
AHEAD = 2
# Tokens of a text that attention takes in one step.
AT_ONCE = 16
# Tokens of all texts whose products are those of one token each.
ALIKE = 8


def compile_decode(
    model: Any,
    max_tokens: int = 4096,
    kv: str | None = None,
    batch_sizes: Sequence[int] = (),
    **options: Any,
) -> Decoder:
    """A `Decoder` for a transformers model of float16 or bfloat16 with full attention everywhere.

    max_tokens: prompt and answer together; memory for them is taken at once. kv: None keeps keys
    and values as they are, else a format of `SparseKVCache` (options: its window, sinks,
    key_format, value_format, sparsity, centre). batch_sizes: those to record now, others when they
    are first used.

    The model attends through quantgemm from now on where it is given such a cache, and its RMS
    norms, gated products, q, k and v, and rotary embeddings are one kernel each where that changes
    nothing but roundings, and what a layer adds to a product is added inside of it (`fuse_steps`,
    which moves the bytes of q, k and v; the rotary embedding for all models of its module, bit for
    bit). A recorded product brings the next weights nearer (`ReadAhead`). On the CPU there are
    no graphs, and all else is the same. A recorded step reads the weights where they are: do not
    move, pack or replace them afterwards.
    """
    decoder = Decoder(model, max_tokens, kv, options)
    for batch in batch_sizes:
        decoder.prepare(batch)
    return decoder


class Decoder:
    """Generates text with steps that were recorded; one batch of prompts at a time."""

    def __init__(
        self, model: Any, max_tokens: int, kv: str | None, options: dict[str, Any]
    ) -> None:
        if model.dtype not in (torch.float16, torch.bfloat16):
            raise TypeError(f"model: expected torch.float16 or torch.bfloat16, got {model.dtype}")
        limit = model.config.get_text_config().max_position_embeddings
        if not 1 <= max_tokens <= limit:
            raise ValueError(f"max_tokens: expected 1 to {limit}, the context, got {max_tokens}")
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):
            kind = rope["rope_type"]
            raise NotImplementedError(
                f"model: its rotary embedding ({kind}) depends on the length of the text, which a "
                "recorded step cannot look at"
            )
        if kv is None and options:
            raise ValueError(f"{next(iter(options))}: only with kv, a format of keys and values")
        self.model, self.max_tokens, self.kv, self.options = model, max_tokens, kv, options
        self._texts: dict[int, _Texts] = {}

    def prepare(self, batch: int, tokens: int = 1) -> None:
        """Takes the memory for so many sequences, and records their step of so many tokens."""
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        most = min(AT_ONCE, self.max_tokens)
        if not 1 <= tokens <= most:
            raise ValueError(f"tokens: expected 1 to {most}, got {tokens}")
        if tokens > 1 and self.kv:
            raise NotImplementedError(
                f"tokens: expected 1 where keys and values are {self.kv}, got {tokens}: what is "
                "packed could not be forgotten"
            )
        if batch not in self._texts:
            # A window over all tokens leaves nothing to pack.
            options = self.options if self.kv else {"window": self.max_tokens, "sinks": 0}
            cache = quantized_cache(
                self.model, self.kv or "dense4", max_tokens=self.max_tokens, batch=batch, **options
            )
            fuse_steps(self.model)
            self._texts[batch] = _Texts(self.model, cache, batch)
        self._texts[batch].prepare(tokens)

    @property
    def kv_bytes(self) -> int:
        """Of all caches."""
        return sum(texts.store.num_bytes for texts in self._texts.values())

    def read(self, prompts: torch.Tensor) -> torch.Tensor:
        """Begins a text: ids ``[batch, tokens]`` to the logits ``[batch, vocab]`` behind them."""
        if prompts.dim() != 2 or not prompts.numel():
            raise ValueError(f"prompts: expected ids [batch, tokens], got {list(prompts.shape)}")
        if prompts.shape[1] > self.max_tokens:
            count = prompts.shape[1]
            raise ValueError(f"prompts: expected at most {self.max_tokens} tokens, got {count}")
        self.prepare(prompts.shape[0])
        return self._texts[prompts.shape[0]].begin(prompts)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Goes on: ids ``[batch]``, logits ``[batch, vocab]`` until the next step.

        Or several tokens of each text at once: ids ``[batch, tokens]``, logits ``[batch, tokens,
        vocab]``, those behind each token. Each number of tokens is recorded when it first comes.
        """
        texts = self._texts.get(tokens.shape[0]) if tokens.dim() in (1, 2) else None
        if texts is None or not texts.tokens_read or not tokens.numel():
            shape = list(tokens.shape)
            raise ValueError(
                "tokens: expected ids [batch] or [batch, tokens] of a text that read() began, "
                f"got {shape}"
            )
        ids = tokens if tokens.dim() == 2 else tokens[:, None]
        if texts.tokens_read + ids.shape[1] > self.max_tokens:
            raise ValueError(
                f"tokens: the cache is full, it holds {self.max_tokens} tokens; "
                f"{texts.tokens_read} are there, got {ids.shape[1]} more"
            )
        self.prepare(texts.batch, ids.shape[1])
        logits = texts.go_on(ids)
        return logits if tokens.dim() == 2 else logits[:, 0]

    def forget(self, tokens: int, batch: int = 1) -> None:
        """Takes back the last `tokens` of each text, as refused drafts want it; does not wait."""
        texts = self._texts.get(batch)
        read = 0 if texts is None else texts.tokens_read
        if texts is None or not 0 <= tokens < max(read, 1):
            raise ValueError(f"tokens: expected 0 to {max(read - 1, 0)}, got {tokens}")
        if tokens and self.kv:
            raise NotImplementedError(f"kv: expected None to forget tokens, got {self.kv!r}")
        if tokens:
            texts.forget(tokens)

    def generate(
        self,
        prompts: torch.Tensor,
        max_new_tokens: int = 64,
        config: SamplingConfig | None = None,
        eos_token_id: int | Collection[int] | None = None,
        on_tokens: Callable[[int, list[int]], None] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt: those of `speculative_generate` without drafts, but faster.

        prompts: ids ``[tokens]`` or, equally long ones, ``[batch, tokens]``. eos_token_id: tokens
        that end a text, its own model's if None. on_tokens: told a text's number and its new token.
        """
        prompts = prompts[None] if prompts.dim() == 1 else prompts
        config = config or SamplingConfig()
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}")
        if prompts.dim() == 2 and prompts.shape[1] + max_new_tokens > self.max_tokens + 1:
            count = f"{prompts.shape[1]} + {max_new_tokens}"
            raise ValueError(
                f"max_new_tokens: the cache holds {self.max_tokens} tokens, got {count}"
            )
        if eos_token_id is None:
            eos_token_id = self.model.generation_config.eos_token_id or ()
        ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
        batch, device = prompts.shape[0], prompts.device
        texts: list[list[int]] = [[] for _ in range(batch)]
        done = [False] * batch
        drawing = config.tensors(batch, device)
        seeds = config.seed * 1_000_003 + torch.arange(batch, device=device)
        position = torch.full((batch,), prompts.shape[1], device=device)
        underway: deque[_Draw] = deque()

        def take() -> None:
            for b, token in enumerate(underway.popleft().tokens()):
                if not done[b]:
                    texts[b].append(token)
                    done[b] = token in ends
                    if on_tokens is not None:
                        on_tokens(b, [token])

        with torch.no_grad():
            drawn = None
            for _ in range(max_new_tokens):
                logits = self.read(prompts) if drawn is None else self.step(drawn)
                drawn = ops.sample(
                    logits,
                    **drawing,  # type: ignore[arg-type]
                    seed=seeds,
                    position=position,
                )[0]
                position += 1
                underway.append(_Draw(drawn))
                if len(underway) > AHEAD:
                    take()
                if all(done):
                    break
            while underway:
                take()
        return texts


class _Draw:
    """Tokens on their way to the host."""

    def __init__(self, drawn: torch.Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        self.values = drawn
        if drawn.is_cuda:
            self.values = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
            self.values.copy_(drawn, non_blocking=True)
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record(torch.cuda.current_stream(drawn.device))

    def tokens(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()  # type: ignore[no-any-return]


class _Texts:
    """A batch of texts that grow: their keys and values, and the steps by which they do."""

    def __init__(self, model: Any, cache: Any, batch: int) -> None:
        self.model, self.cache, self.batch, self.tokens_read = model, cache, batch, 0
        self.store = cache.layers[0].store  # of all layers
        # A step may go beyond what may stay, while it is recorded.
        self.angles = RotaryTables(model, self.store.max_tokens + AT_ONCE)
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self.steps: dict[int, _Step] = {}

    def prepare(self, count: int) -> _Step:
        """The step of `count` tokens; a text that has begun stays as it is."""
        if count not in self.steps:
            lens, positions = self.store.lens.clone(), self.positions.clone()

            def restore() -> None:
                self.store.lens.copy_(lens)
                self.positions.copy_(positions)
                for layer in self.cache.layers:
                    layer.count(self.tokens_read - layer.tokens)

            step = _Step(self, count)
            if self.positions.is_cuda:
                try:
                    step.record(restore)
                except BaseException:
                    restore()
                    raise
            self.steps[count] = step
        return self.steps[count]

    def begin(self, prompts: torch.Tensor) -> torch.Tensor:
        self.cache.reset()
        self.tokens_read = 0  # until the prompt has been read
        self.positions.fill_(prompts.shape[1])
        with torch.no_grad():
            out = self.model(prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.tokens_read = prompts.shape[1]
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def go_on(self, tokens: torch.Tensor) -> torch.Tensor:
        step = self.prepare(tokens.shape[1])
        step.ids.copy_(tokens)
        self.tokens_read += tokens.shape[1]
        if step.graph is None:
            with torch.no_grad():
                return step.run()
        step.graph.replay()
        for layer in self.cache.layers:
            layer.count(tokens.shape[1])
        return step.logits

    def forget(self, count: int) -> None:
        self.store.lens -= count
        for layer in self.cache.layers:
            layer.count(-count)
        self.positions -= count
        self.tokens_read -= count


class _Step:
    """`count` tokens of each text: buffers, and on a GPU the graph that reads them."""

    def __init__(self, texts: _Texts, count: int) -> None:
        self.texts, device = texts, texts.positions.device
        self.ids = torch.zeros(texts.batch, count, dtype=torch.int64, device=device)
        self.places = torch.arange(count, device=device)
        # Of four dimensions, so that transformers makes none; nobody reads it.
        self.mask = None if count == 1 else torch.ones(1, 1, count, 1, device=device).bool()
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> torch.Tensor:
        """Logits ``[batch, count, vocab]``."""
        texts = self.texts
        for layer in texts.cache.layers:
            layer.is_step = True
        try:
            # A token's bits are the same with drafts behind it.
            alike = alike_rows() if self.ids.numel() <= ALIKE else nullcontext()
            with texts.angles, rotations_wait(), alike:
                out = texts.model(
                    self.ids,
                    attention_mask=self.mask,
                    position_ids=texts.positions + self.places,
                    past_key_values=texts.cache,
                    use_cache=True,
                )
        finally:
            for layer in texts.cache.layers:
                layer.is_step = False
        texts.positions += len(self.places)
        logits: torch.Tensor = out.logits
        return logits

    def record(self, restore: Callable[[], None]) -> None:
        """restore: undoes what a run does to the texts."""

        def run() -> torch.Tensor:
            # The slots behind max_tokens have room for what is not to stay.
            for layer in self.texts.cache.layers:
                layer.count(-min(len(self.places), layer.tokens))
            return self.run()

        device = self.ids.device
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.no_grad(), torch.cuda.device(device), ReadAhead():
            with torch.cuda.stream(side):
                for _ in range(2):  # what is set up at a first call must not be recorded
                    run()
                    restore()
            torch.cuda.current_stream().wait_stream(side)
            # What the graph reads lives as long as the graph.
            self.weights = [weight.detach() for weight in self.texts.model.parameters()]
            self.graph = torch.cuda.CUDAGraph()
            with _no_collection(), torch.cuda.graph(self.graph, stream=side):
                self.logits = run()
            restore()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may hold a graph, and destroying one ends a capture with an error."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
