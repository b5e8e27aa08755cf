# SPDX-License-Identifier: MIT
"""The native key-value cache: pages of 64 quantised tokens, pruned or not, the latest ones as
they are.

    cache = SparseKVCache(num_layers, num_kv_heads, head_dim, format="dense4", max_tokens=8192)
    cache.append(layer, k, v)  # [batch, num_kv_heads, tokens, head_dim]
    cache.advance(tokens)  # after the last layer
    out, lse = cache.attend(layer, query)  # query [batch, query heads, head_dim]

Appending and attending never wait for the GPU: lengths live on the device, and the host only keeps
an upper bound of them to say when the cache is full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quantgemm.kv.pages import FORMATS, PAGE, page_bytes, pages_together, unpack_pages
from quantgemm.ops import register_fake, rotary

Tensor = torch.Tensor


def sparse_kv_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    recent_keys: Tensor,
    recent_values: Tensor,
    lens: Tensor,
    means: Tensor | None,
    sinks: int,
    window: int,
    key_format: str,
    value_format: str,
    keep: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each sequence's last token: query ``[batch, query heads, head_dim]``.

    Or of the last tokens, each of which sees those before it and itself: query ``[batch, query
    heads, tokens, head_dim]``, no more tokens than 16 and the window (one more with sinks).
    lens: int64 ``[batch]``, tokens of each sequence, on the device. Returns out like query and
    lse float32 ``[batch, query heads(, tokens)]``; an empty sequence gives zeros and minus
    infinity. The other tensors are those of a `SparseKVCache`. On CUDA formats of one kind have
    kernels of their own, those of different kinds one for all pairs.
    """
    return torch.ops.quantgemm.sparse_kv_attention(  # type: ignore[no-any-return]
        query,
        key_pages,
        value_pages,
        page_table,
        recent_keys,
        recent_values,
        lens,
        means,
        sinks,
        window,
        key_format,
        value_format,
        keep,
        scale,
    )


@register_fake("quantgemm::sparse_kv_attention")
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float32)


@register_fake("quantgemm::sparse_kv_append_rotated")
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@register_fake("quantgemm::sparse_kv_append")
def _(*_: Any) -> None:
    return None


class SparseKVCache:
    """Keys and values of all layers: sinks and the latest tokens as they are, the rest in pages.

    format: ``dense2`` or ``dense4``, codes of 2 or 4 bits with a scale and a shift for each channel
    of 128 keys and for each token of values; ``bitmap2``, ``bitmap4``, of each token the
    ``round((1 - sparsity)·head_dim)`` largest magnitudes with a scale alone; ``4of8_2``,
    ``4of8_4``, the four largest of each eight. key_format and value_format, any two of these,
    differ from it where given. window: tokens that stay as they are, at least; sinks: the first
    tokens, which always do. max_tokens: of a sequence, all pages are allocated for them at once.
    centre: a sequence's first portion of tokens says by how much each channel is off zero; what is
    stored is less by that, and attention adds it again, so that nothing but the rounding changes.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        format: str = "dense4",
        *,
        key_format: str | None = None,
        value_format: str | None = None,
        sparsity: float = 0.5,
        centre: bool = False,
        window: int = 128,
        sinks: int = 4,
        page: int = PAGE,
        max_tokens: int,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        key_format, value_format = key_format or format, value_format or format
        for name, chosen in (("key_format", key_format), ("value_format", value_format)):
            if chosen not in FORMATS:
                known = ", ".join(FORMATS)
                raise NotImplementedError(f"{name}: expected one of {known}, got {chosen!r}")
        if page != PAGE:
            raise NotImplementedError(f"page: expected {PAGE} tokens, got {page}")
        if head_dim not in (64, 128, 256):
            raise ValueError(f"head_dim: expected 64, 128 or 256, got {head_dim}")
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "batch": batch}
        sizes["max_tokens"] = max_tokens
        for name, size in (sizes | {"window": window, "sinks": sinks}).items():
            least = 1 if name in sizes else 0
            if size < least:
                raise ValueError(f"{name}: expected at least {least}, got {size}")
        keep = round((1 - sparsity) * head_dim) if 0 <= sparsity < 1 else 0
        if not keep:
            raise ValueError(
                f"sparsity: expected 0 or more, and 1 of {head_dim} channels left, got {sparsity}"
            )
        self.key_format, self.value_format, self.keep = key_format, value_format, keep
        self.window, self.sinks, self.max_tokens = window, sinks, max_tokens
        self.batch, self.head_dim, self.num_kv_heads = batch, head_dim, num_kv_heads
        together = pages_together(key_format)
        slots = sinks + ((window + PAGE - 1) // PAGE + together) * PAGE
        pages = max(0, max_tokens - sinks - window) // PAGE // together * together

        def new(*sizes: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        total = (num_layers, batch * pages, num_kv_heads)
        key_bytes = page_bytes(key_format, head_dim, keep, value=False)
        value_bytes = page_bytes(value_format, head_dim, keep, value=True)
        self.key_pages = new(*total, key_bytes, dtype=torch.uint8)
        self.value_pages = new(*total, value_bytes, dtype=torch.uint8)
        recent = (num_layers, batch, num_kv_heads, slots, head_dim)
        self.recent_keys, self.recent_values = new(*recent, dtype=dtype), new(*recent, dtype=dtype)
        self.lens = new(batch, dtype=torch.int64)
        self.page_table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(
            batch, pages
        )
        self.means: Tensor | None = None
        if centre:
            self.means = new(num_layers, 2, batch, num_kv_heads, head_dim, dtype=dtype)
        self._most = [0] * batch  # no sequence is longer than this
        self._behind: tuple[int, Tensor] | None = None  # lengths behind so many appended tokens

    def append(
        self, layer: int, keys: Tensor, values: Tensor, counts: Tensor | None = None
    ) -> None:
        """New tokens ``[batch, num_kv_heads, tokens, head_dim]`` behind those of each sequence.

        counts: int64 ``[batch]`` on the device, how many of the tokens a sequence takes, the first
        ones; None takes all. Lengths change with `advance`, once for all layers.
        """
        self._check_room(layer, keys)
        if self.means is not None and keys.dim() == 4 and keys.shape[2] > 1:
            self._measure(self.means[layer], keys, values, counts)
        here = self._arguments(layer, self.lens, counts)
        torch.ops.quantgemm.sparse_kv_append(keys, values, *here)

    def append_rotated(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """`append` of keys behind `ops.rotary`, which query goes through too; that is returned.

        One launch for up to 16 tokens, no more than the window, where nothing is centred and keys
        and values are in formats of one kind; else as many as both.
        """
        if self.means is not None:
            query, keys = rotary(query, keys, cos, sin)
            self.append(layer, keys, values)
            return query
        self._check_room(layer, keys)
        here = self._arguments(layer, self.lens)
        return torch.ops.quantgemm.sparse_kv_append_rotated(  # type: ignore[no-any-return]
            query, keys, values, cos, sin, *here
        )

    def _arguments(self, layer: int, lens: Tensor, *more: Tensor | None) -> tuple[Any, ...]:
        """The cache as ops take it; more: what an op wants behind the means."""
        return (
            self.key_pages[layer],
            self.value_pages[layer],
            self.page_table,
            self.recent_keys[layer],
            self.recent_values[layer],
            lens,
            None if self.means is None else self.means[layer],
            *more,
            self.sinks,
            self.window,
            self.key_format,
            self.value_format,
            self.keep,
        )

    def _check_room(self, layer: int, keys: Tensor) -> None:
        """Before tokens are appended to a layer, the first of which begins anew."""
        if keys.dim() == 4 and max(self._most) + keys.shape[2] > self.max_tokens:
            raise ValueError(
                f"keys: the cache holds {self.max_tokens} tokens of a sequence; up to "
                f"{max(self._most)} are there, got {keys.shape[2]} more"
            )
        if layer == 0:
            self._behind = None

    def _measure(self, means: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None) -> None:
        """The means of sequences that begin here. Any others would do, but for the rounding."""
        begins = self.lens == 0
        counts = None if counts is None else counts.clamp(0, keys.shape[2])
        for mean, x in zip(means, (keys, values), strict=True):
            if counts is None:
                new = x.mean(2, dtype=torch.float32)
            else:
                taken = torch.arange(x.shape[2], device=x.device) < counts[:, None]
                total = x.where(taken[:, None, :, None], 0).sum(2, dtype=torch.float32)
                new = total / counts[:, None, None]
            new = torch.nan_to_num(new, 0.0, 0.0, 0.0).to(mean.dtype)
            mean.copy_(new.where(begins[:, None, None], mean))

    def advance(self, tokens: int, counts: Tensor | None = None) -> None:
        """The tokens that all layers were given become part of the sequences."""
        self.lens += tokens if counts is None else counts.clamp(0, tokens)
        self.count(tokens)

    def count(self, tokens: int) -> None:
        """The host's part of `advance`: for a CUDA graph that has done the other one again."""
        self._changed({i: most + tokens for i, most in enumerate(self._most)})

    def _changed(self, most: dict[int, int]) -> None:
        """Lengths are others now: these sequences are no longer than so many tokens."""
        for sequence, tokens in most.items():
            self._most[sequence] = tokens
        self._behind = None

    def attend(
        self, layer: int, query: Tensor, scale: float | None = None, appended: int = 0
    ) -> tuple[Tensor, Tensor]:
        """`sparse_kv_attention` over the tokens so far; scale is ``1/sqrt(head_dim)`` if None.

        appended: tokens that the layer was given and `advance` has not been told of, which are
        attended to as well. The lengths with them are computed once for all layers.
        """
        lens = self.lens
        if appended:
            if self._behind is None or self._behind[0] != appended:
                self._behind = appended, self.lens + appended
            lens = self._behind[1]
        scale = self.head_dim**-0.5 if scale is None else scale
        return sparse_kv_attention(*(query, *self._arguments(layer, lens), scale))

    def reorder(self, order: Sequence[int]) -> None:
        """Sequence i becomes what sequence ``order[i]`` was, as beam search wants it; copies."""
        if len(order) != self.batch or not all(0 <= i < self.batch for i in order):
            raise ValueError(f"order: expected {self.batch} sequences, got {list(order)}")
        index = torch.tensor(order, device=self.lens.device)
        for recent in (self.recent_keys, self.recent_values):
            recent.copy_(recent[:, index])
        for pages in (self.key_pages, self.value_pages):
            old = pages[:, self.page_table[index].flatten().long()]
            pages[:, self.page_table.flatten().long()] = old
        if self.means is not None:
            self.means.copy_(self.means[:, :, index])
        self.lens.copy_(self.lens[index])
        self._changed({i: self._most[source] for i, source in enumerate(order)})

    def fork(self, source: int, target: int) -> None:
        """The sequence `target` becomes a copy of `source`."""
        for recent in (self.recent_keys, self.recent_values):
            recent[:, target] = recent[:, source]
        for pages in (self.key_pages, self.value_pages):
            pages[:, self.page_table[target].long()] = pages[:, self.page_table[source].long()]
        if self.means is not None:
            self.means[:, :, target] = self.means[:, :, source]
        self.lens[target] = self.lens[source]
        self._changed({target: self._most[source]})

    def crop(self, sequence: int, tokens: int) -> None:
        """Forgets all but the first `tokens`, as rejected drafts want it; waits for the GPU.

        Tokens that had been packed and belong to the window again keep what the packing made of
        them.
        """
        before = int(self.lens[sequence])
        if not 0 <= tokens <= before:
            raise ValueError(f"tokens: the sequence has {before}, got {tokens}")
        if tokens == 0:
            return self.reset(sequence)
        old, new = self._num_pages(before), self._num_pages(tokens)
        end = max(new * PAGE, min(old * PAGE, tokens - self.sinks))
        positions = torch.arange(new * PAGE, end)
        if len(positions) > 0:
            positions = positions.to(self.lens.device)
            slots = positions % (self.recent_keys.shape[3] - self.sinks) + self.sinks
            used = self.page_table[sequence, new:old].long()
            for stored, recent, form, value in self._stores():
                values = unpack_pages(stored[:, used], form, self.head_dim, self.keep, value)
                values = values.transpose(1, 2).flatten(2, 3)  # [layers, heads, tokens, head_dim]
                recent[:, sequence, :, slots] = values[:, :, : len(positions)].to(recent.dtype)
        self.lens[sequence] = tokens
        self._changed({sequence: tokens})

    def _num_pages(self, tokens: int) -> int:
        rest = max(0, tokens - self.sinks)
        pages = min(max(0, rest - self.window) // PAGE, self.page_table.shape[1])
        return pages - pages % pages_together(self.key_format)

    def _stores(self) -> tuple[tuple[Tensor, Tensor, str, bool], ...]:
        return (
            (self.key_pages, self.recent_keys, self.key_format, False),
            (self.value_pages, self.recent_values, self.value_format, True),
        )

    def reset(self, sequence: int) -> None:
        """Empties a sequence, so that another one can begin in its place."""
        self.lens[sequence] = 0
        self._changed({sequence: 0})
        if self.means is not None:
            self.means[:, :, sequence] = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, used or not."""
        tensors = [self.key_pages, self.value_pages, self.recent_keys, self.recent_values]
        tensors += [self.page_table, self.lens, *([] if self.means is None else [self.means])]
        return sum(t.numel() * t.element_size() for t in tensors)

    def dense(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """The keys and values that attention sees, float32 ``[num_kv_heads, tokens, head_dim]``.

        In plain PyTorch and waiting for the GPU: for tests and for learners.
        """
        tokens = int(self.lens[sequence])
        sinks = min(tokens, self.sinks)
        rest = tokens - sinks
        pages = self._num_pages(tokens)
        ring = self.recent_keys.shape[3] - self.sinks
        at = torch.arange(pages * PAGE, rest, device=self.lens.device) % ring + self.sinks
        used = self.page_table[sequence, :pages].long()
        both = []
        for stored, recent, form, value in self._stores():
            own = recent[layer, sequence].float()
            old = unpack_pages(stored[layer, used], form, self.head_dim, self.keep, value)
            old = old.transpose(0, 1).reshape(self.num_kv_heads, pages * PAGE, self.head_dim)
            both.append(torch.cat([own[:, :sinks], old, own[:, at]], 1))
            if self.means is not None:
                both[-1] += self.means[layer, int(value), sequence].float()[:, None]
        return both[0], both[1]
