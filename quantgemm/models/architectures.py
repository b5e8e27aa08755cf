# SPDX-License-Identifier: MIT
"""What a GGUF architecture is in transformers: its classes, its configuration and its names.

An entry of ARCHITECTURES is data: which class, which tensor is which parameter, what the file
stores otherwise than transformers does. `extra` is the one function of an entry, for values of the
configuration that have to be computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantgemm.models.hyperparameters import Hyperparameters

# Values of the configuration and their keys; all architectures here have these.
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}

# Modules of a layer and the names of their tensors: model.layers.N.X is blk.N.Y.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
SHARED_EXPERT = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
NORMS_AROUND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

# Tensors that are no parameters: factors on the frequencies of the rotary embedding.
ROPE_FACTORS = ("rope_freqs.weight",)
LONG_ROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    model, config: names of classes in transformers. layer: modules of a layer by their tensors.
    interleaved: tensors whose rows the file keeps in the order of llama's own rotary embedding.
    norm_offset: what the file has added to the weights of norms. scaled_embedding: whether rows of
    the embedding are multiplied by √hidden_size. unused: tensors that are no parameters.
    has_experts: whether it is a mixture of experts.
    """

    model: str
    config: str
    layer: Mapping[str, str] = field(default_factory=lambda: LAYER)
    interleaved: tuple[str, ...] = ()
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    unused: tuple[str, ...] = ()
    has_experts: bool = False
    extra: Callable[[Hyperparameters, Config], Config] = lambda hparams, config: {}

    def tensor_of(self, parameter: str) -> str | None:
        """'model.layers.3.mlp.up_proj.weight' -> 'blk.3.ffn_up.weight'; None if there is none."""
        module, _, kind = parameter.rpartition(".")
        if module in TOP:
            return f"{TOP[module]}.{kind}"
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        if match is None or match[2] not in self.layer:
            return None
        return f"blk.{match[1]}.{self.layer[match[2]]}.{kind}"


def is_mixture(hparams: Hyperparameters) -> bool:
    return hparams.has("expert_count") and hparams.integer("expert_count", least=0) > 0


def configuration(architecture: Architecture, hparams: Hyperparameters) -> Config:
    """The arguments of the configuration's class."""
    if is_mixture(hparams) and not architecture.has_experts:
        known = ", ".join(
            sorted({*MIXTURES, *(n for n, a in ARCHITECTURES.items() if a.has_experts)})
        )
        raise hparams.error(
            "expert_count",
            f"no mixture of experts is known of {hparams.architecture!r}",
            f"expected one of these: {known}",
        )
    config: Config = {name: hparams.integer(key) for name, key in SIZES.items()}
    if config["num_hidden_layers"] > len(hparams.tensors):  # before so many are made
        count = f"{config['num_hidden_layers']} layers, but {len(hparams.tensors)} tensors"
        raise hparams.error("block_count", count)
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = hparams.integer("attention.head_count_kv", heads)
    config["head_dim"] = hparams.integer("attention.key_length", config["hidden_size"] // heads)
    value_length = hparams.integer("attention.value_length", config["head_dim"])
    if value_length != config["head_dim"]:
        wanted = f"expected {config['head_dim']}, the length of keys, got {value_length}"
        raise hparams.error("attention.value_length", wanted)
    if heads % config["num_key_value_heads"]:
        kv = config["num_key_value_heads"]
        raise hparams.error("attention.head_count_kv", f"expected a divisor of {heads}, got {kv}")
    config["rms_norm_eps"] = hparams.number("attention.layer_norm_rms_epsilon")
    config["vocab_size"] = hparams.vocab_size()
    config["tie_word_embeddings"] = "output.weight" not in hparams.tensors
    config["rope_parameters"] = _rope(hparams)
    for name in ("bos", "eos", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        value = hparams.integer(key, least=0) if hparams.has(key) else None
        if value is not None and value >= config["vocab_size"]:
            raise hparams.error(key, f"expected one of {config['vocab_size']} tokens, got {value}")
        config[f"{name.replace('padding', 'pad')}_token_id"] = value
    return {**config, **architecture.extra(hparams, config)}


def _rope(hparams: Hyperparameters, theta: float = 10_000.0) -> Config:
    """How positions turn queries and keys."""
    rope: Config = {"rope_type": "default", "rope_theta": hparams.number("rope.freq_base", theta)}
    kind = hparams.text("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": hparams.number("rope.scaling.factor")}
    elif kind not in ("none", "longrope"):  # longrope's factors are tensors
        known = "expected none, linear, yarn or longrope"
        raise hparams.error("rope.scaling.type", f"{known}, got {kind!r}")
    if kind == "yarn":
        length = hparams.integer("rope.scaling.original_context_length")
        rope["original_max_position_embeddings"] = length
    return rope


def _whole_rotation(hparams: Hyperparameters, config: Config) -> None:
    """Only phi3's attention in transformers can turn a part of a head."""
    turned = hparams.integer("rope.dimension_count", config["head_dim"])
    if turned != config["head_dim"]:
        wanted = f"expected all {config['head_dim']} numbers of a head to be turned, got {turned}"
        raise hparams.error("rope.dimension_count", wanted)


def _llama(hparams: Hyperparameters, config: Config) -> Config:
    _whole_rotation(hparams, config)
    return {"attention_bias": "blk.0.attn_q.bias" in hparams.tensors}


def _qwen2(hparams: Hyperparameters, config: Config) -> Config:
    _whole_rotation(hparams, config)
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        wanted = f"expected {config['hidden_size']} / {config['num_attention_heads']}"
        raise hparams.error("attention.key_length", f"{wanted}, got {config['head_dim']}")
    return {}


def _qwen3(hparams: Hyperparameters, config: Config) -> Config:
    _whole_rotation(hparams, config)
    return {"attention_bias": "blk.0.attn_q.bias" in hparams.tensors}


def _experts(hparams: Hyperparameters, config: Config) -> Config:
    """How many there are, how many are chosen, and the width of one."""
    count, used = hparams.integer("expert_count"), hparams.integer("expert_used_count")
    if used > count:
        raise hparams.error("expert_used_count", f"expected at most {count}, got {used}")
    width = max(1, config["intermediate_size"] // used)  # files of before the key
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": hparams.integer("expert_feed_forward_length", width),
    }


def _mixtral(hparams: Hyperparameters, config: Config) -> Config:
    """Experts as wide as the feed-forward network of the other models."""
    _whole_rotation(hparams, config)
    experts = _experts(hparams, config)
    return {
        "num_local_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
    }


def _qwen2moe(hparams: Hyperparameters, config: Config) -> Config:
    width = config["intermediate_size"]
    return {
        **_qwen2(hparams, config),
        **_experts(hparams, config),
        "shared_expert_intermediate_size": hparams.integer(
            "expert_shared_feed_forward_length", width
        ),
        "norm_topk_prob": hparams.flag("expert_weights_norm", False),
        "qkv_bias": "blk.0.attn_q.bias" in hparams.tensors,
    }


def _qwen3moe(hparams: Hyperparameters, config: Config) -> Config:
    return {
        **_qwen3(hparams, config),
        **_experts(hparams, config),
        "norm_topk_prob": hparams.flag("expert_weights_norm", True),
    }


def _olmoe(hparams: Hyperparameters, config: Config) -> Config:
    """Norms of all heads together; what they are given may be cut to a range."""
    clamp = "attention.clamp_kqv"
    return {
        **_qwen2(hparams, config),
        **_experts(hparams, config),
        "attention_bias": "blk.0.attn_q.bias" in hparams.tensors,
        "clip_qkv": hparams.number(clamp) if hparams.has(clamp) else None,
        "norm_topk_prob": hparams.flag("expert_weights_norm", False),
    }


def _gemma(hparams: Hyperparameters, config: Config, largest: int) -> Config:
    """largest: layers of the one size, 27B, whose queries are scaled by hidden_size / heads."""
    _whole_rotation(hparams, config)
    scale = config["head_dim"]
    if config["num_hidden_layers"] == largest:
        scale = config["hidden_size"] // config["num_attention_heads"]
    return {"query_pre_attn_scalar": scale}


def _gemma2(hparams: Hyperparameters, config: Config) -> Config:
    return _gemma(hparams, config, largest=46) | {
        "sliding_window": hparams.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": hparams.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": hparams.number("final_logit_softcapping", 30.0),
    }


def _gemma3(hparams: Hyperparameters, config: Config) -> Config:
    """Every sixth layer sees all positions, the others a window and turn by a base of their own."""
    layers = range(1, config["num_hidden_layers"] + 1)
    return _gemma(hparams, config, largest=62) | {
        "sliding_window": hparams.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if i % 6 else "full_attention" for i in layers],
        "rope_parameters": {
            "full_attention": _rope(hparams, 1_000_000.0),
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": hparams.number("rope.freq_base_swa", 10_000.0),
            },
        },
    }


def _phi3(hparams: Hyperparameters, config: Config) -> Config:
    """Long context: one factor per frequency, in two tensors of the file."""
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        wanted = f"expected {config['hidden_size']} / {config['num_attention_heads']}"
        raise hparams.error("attention.key_length", f"{wanted}, got {config['head_dim']}")
    turned = hparams.integer("rope.dimension_count", config["head_dim"])
    rope = config["rope_parameters"] | {"partial_rotary_factor": turned / config["head_dim"]}
    length = hparams.integer(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    factors = {
        "short_factor": "rope_factors_short.weight",
        "long_factor": "rope_factors_long.weight",
    }
    if all(name in hparams.tensors for name in factors.values()):
        rope["rope_type"] = "longrope"
        for key, name in factors.items():
            rope[key] = hparams.tensors[name].dequantize().tolist()
        if hparams.has("rope.scaling.attn_factor"):
            rope["attention_factor"] = hparams.number("rope.scaling.attn_factor")
    window = "attention.sliding_window"
    has_window = hparams.has(window) and hparams.integer(window, least=0) > 0
    return {
        "head_dim": None,
        "rope_parameters": rope,
        "original_max_position_embeddings": length,
        "sliding_window": hparams.integer(window) if has_window else None,
    }


ARCHITECTURES = {
    "llama": Architecture(  # also Mistral and SmolLM, whose files say llama
        "LlamaForCausalLM",
        "LlamaConfig",
        interleaved=("attn_q", "attn_k"),
        unused=ROPE_FACTORS,
        extra=_llama,
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", unused=ROPE_FACTORS, extra=_qwen2),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        layer={**LAYER, **HEAD_NORMS},
        unused=ROPE_FACTORS,
        extra=_qwen3,
    ),
    "qwen2moe": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        layer={**LAYER, **EXPERTS, **SHARED_EXPERT},
        unused=ROPE_FACTORS,
        has_experts=True,
        extra=_qwen2moe,
    ),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        layer={**LAYER, **HEAD_NORMS, **EXPERTS},
        unused=ROPE_FACTORS,
        has_experts=True,
        extra=_qwen3moe,
    ),
    "olmoe": Architecture(
        "OlmoeForCausalLM",
        "OlmoeConfig",
        layer={**LAYER, **HEAD_NORMS, **EXPERTS},
        unused=ROPE_FACTORS,
        has_experts=True,
        extra=_olmoe,
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        layer={**LAYER, **NORMS_AROUND},
        norm_offset=1.0,
        scaled_embedding=True,
        extra=_gemma2,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        layer={**LAYER, **NORMS_AROUND, **HEAD_NORMS},
        norm_offset=1.0,
        scaled_embedding=True,
        extra=_gemma3,
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        "Phi3Config",
        layer={**LAYER, "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
        unused=tuple(LONG_ROPE.values()),
        extra=_phi3,
    ),
}

# Architectures that have experts where the file says so, and are then other classes.
MIXTURES = {
    "llama": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        layer={**LAYER, **EXPERTS},
        interleaved=("attn_q", "attn_k"),
        unused=ROPE_FACTORS,
        has_experts=True,
        extra=_mixtral,
    ),
}
