# SPDX-License-Identifier: MIT
"""`SparseKVCache` under transformers' generate: keys and values in 2 or 4 bits, attention on them.

    from quantgemm.integrations.transformers_cache import quantized_cache

    cache = quantized_cache(model, "dense4", max_tokens=8192)
    model.generate(**inputs, past_key_values=cache)

A prompt attends to its own keys and values as they are, and they are packed behind it; every
further token attends to the packed ones in one kernel. Sequences of a batch are equally long: a
mask for padding is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from quantgemm.integrations.common import module_of
from quantgemm.kv import SparseKVCache
from quantgemm.later import computed, rotation_of

__all__ = ["quantized_cache"]

NAME = "quantgemm"  # among transformers' attention functions
_ADVICE = "4.56 and newer have what this needs"


def quantized_cache(
    model: Any, format: str = "dense4", *, max_tokens: int, batch: int = 1, **options: Any
) -> Any:
    """A transformers Cache for this model, which from now on attends through quantgemm.

    format, and options window, sinks, key_format, value_format, sparsity, centre: as for
    `SparseKVCache`. max_tokens: prompt and answer together. Attention without such a cache is
    torch's, as before.
    """
    config = model.config.get_text_config()
    if unsuited := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        raise NotImplementedError(
            f"model: expected full attention in all layers, got {', '.join(unsuited)}"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache_utils = module_of(
        "transformers", "transformers.cache_utils", {"Cache": (), "CacheLayerMixin": ()}, _ADVICE
    )
    layer_class = _layer_class(cache_utils.CacheLayerMixin)

    count = config.num_hidden_layers
    store = SparseKVCache(
        count,
        kv_heads,
        head_dim,
        format,
        max_tokens=max_tokens,
        batch=batch,
        device=model.device,
        dtype=model.dtype,
        **options,
    )
    layers = [layer_class(store, index, index + 1 == count) for index in range(count)]
    _register()
    model.set_attn_implementation(NAME)
    return cache_utils.Cache(layers=layers)


def _layer_class(base: Any) -> Any:
    class QuantizedLayer(base):  # type: ignore[misc]
        """One layer's keys and values, and how many tokens the host knows of.

        All layers share a store. Its lengths are those before a forward until the last layer.
        """

        is_sliding = False
        is_compileable = False

        def __init__(self, store: SparseKVCache, index: int, is_last: bool) -> None:
            super().__init__()
            self.store, self.index, self.is_last, self.tokens = store, index, is_last, 0
            self.is_step = False  # several tokens attend to those before them in one kernel too
            self.is_initialized = True

        def lazy_initialization(self, *_: Any) -> None:
            return None

        def update(
            self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """keys, values ``[batch, heads, tokens, head_dim]``; returned for `attend` to find."""
            keys.quantgemm_layer = self  # type: ignore[attr-defined]
            return keys, values

        def attend_and_keep(
            self,
            query: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            mask: torch.Tensor | None,
            scale: float | None,
        ) -> torch.Tensor:
            """query ``[batch, query heads, tokens, head_dim]``; the same shape back."""
            tokens, before = keys.shape[2], self.tokens
            if keys.shape[0] != self.store.batch:
                raise ValueError(
                    f"past_key_values: the cache is for batch {self.store.batch}, "
                    f"got {keys.shape[0]} sequences"
                )
            if tokens == 1 and mask is not None:
                raise NotImplementedError(
                    "attention_mask: expected none for a quantised cache, got one: sequences "
                    "of a batch must be equally long, and attention full"
                )
            past = []
            if (
                before and tokens > 1 and not self.is_step
            ):  # a further part of a prompt; a single token never unpacks
                past = [self.store.dense(self.index, i) for i in range(self.store.batch)]
            rotation = rotation_of(query, keys) if tokens == 1 or self.is_step else None
            if rotation:
                query, keys, *angles = rotation.take()
                query = self.store.append_rotated(self.index, query, keys, values, *angles)
            else:
                query, keys = computed(query), computed(keys)
                self.store.append(self.index, keys, values)
            if self.is_last:
                self.store.advance(tokens)
            self.tokens += tokens
            if tokens == 1 or self.is_step:
                appended = 0 if self.is_last else tokens
                return self.store.attend(self.index, query, scale, appended)[0]
            if past:
                old = [torch.stack(side).to(keys.dtype) for side in zip(*past, strict=True)]
                keys, values = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)
                if mask is None:
                    end = torch.arange(before, before + tokens, device=keys.device)
                    mask = torch.arange(before + tokens, device=keys.device) <= end[:, None]
            attention = torch.nn.functional.scaled_dot_product_attention
            return attention(
                query, keys, values, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )

        def count(self, tokens: int) -> None:
            """So many tokens were kept by a CUDA graph, which the host did not see.

            Less than 0: so many were taken from `store.lens` again.
            """
            self.tokens += tokens
            if self.is_last:
                self.store.count(tokens)

        def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
            new = query_length if isinstance(query_length, int) else query_length.shape[0]
            return self.tokens + new, 0

        def get_seq_length(self, *_: Any) -> int:
            return self.tokens

        def get_max_length(self) -> int:
            return self.store.max_tokens

        get_max_cache_shape = get_max_length

        def reset(self) -> None:
            self.tokens = 0
            for sequence in range(self.store.batch if self.is_last else 0):
                self.store.reset(sequence)

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            if self.is_last:
                self.store.reorder(beam_idx.tolist())

    return QuantizedLayer


def _register() -> None:
    models = module_of(
        "transformers", "transformers.modeling_utils", {"ALL_ATTENTION_FUNCTIONS": ()}, _ADVICE
    )
    masks = module_of(
        "transformers",
        "transformers.masking_utils",
        {"ALL_MASK_ATTENTION_FUNCTIONS": (), "sdpa_mask": ()},
        _ADVICE,
    )
    plain = models.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Tensors ``[batch, heads, tokens, head_dim]``; returns ``[batch, tokens, heads, …]``."""
        layer = getattr(key, "quantgemm_layer", None)
        if layer is None:
            both: tuple[torch.Tensor, None] = plain(
                module, query, key, value, attention_mask, scaling=scaling, **options
            )
            return both
        out = layer.attend_and_keep(query, key, value, attention_mask, scaling)
        return out.transpose(1, 2).contiguous(), None

    def mask(**options: Any) -> torch.Tensor | None:
        """transformers' own, which makes one for a single token too while a graph is captured."""
        has_gpu = torch.cuda.is_available()
        if has_gpu and torch.cuda.is_current_stream_capturing() and _lone_token(options):
            return None
        made: torch.Tensor | None = masks.sdpa_mask(**options)
        return made

    models.ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    masks.ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


def _lone_token(options: dict[str, Any]) -> bool:
    """Whether a mask is asked for that would hide nothing: one token, which sees all before it."""
    length = options.get("q_length")
    if length is None:  # older versions
        length = len(options.get("cache_position", ()))
    hides = options.get("attention_mask") is not None or options.get("local_size") is not None
    return length == 1 and not hides and options.get("allow_is_causal_skip", True)
