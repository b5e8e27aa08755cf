# SPDX-License-Identifier: MIT
"""Random transformers models of a few thousand weights, and the GGUF files llama.cpp's converter
would make of them. Names come from PyPI `gguf`, which shares no code with quantgemm.models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

from quantgemm import QType, ops, save_gguf
from quantgemm.models.tokenizer import PATTERNS

LAYERS, HEADS, KV_HEADS, VOCAB = 3, 4, 2, 96

TEXT = "the theory of these blocks: a row of 32 weights shares one scale, and the scale is a half. "

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
THETA = {"rope_type": "default", "rope_theta": 20_000.0}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}

# What is tried: architecture in the file, model class, configuration class, configuration.
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", "LlamaConfig", {"rope_parameters": THETA}),
    "llama-tied": ("llama", "LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "llama-linear": (
        "llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "llama-yarn": (
        "llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-wide-heads": ("llama", "LlamaForCausalLM", "LlamaConfig", {"head_dim": 32}),
    "llama-biased": ("llama", "LlamaForCausalLM", "LlamaConfig", {"attention_bias": True}),
    "mistral": ("llama", "MistralForCausalLM", "MistralConfig", {"sliding_window": None}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", {"rope_parameters": THETA}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32}),
    "qwen3-tied": (
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {"head_dim": 32, "tie_word_embeddings": True},
    ),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    ),
    "gemma3": (
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "num_hidden_layers": 7,  # the sixth layer sees everything
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1_000_000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
    "phi3": ("phi3", "Phi3ForCausalLM", "Phi3Config", {"sliding_window": 16}),
    "phi3-partial": (  # as Phi 4 mini
        "phi3",
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "qwen3moe": (
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**EXPERTS, "head_dim": 32, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "qwen2moe": (
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**EXPERTS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "olmoe": ("olmoe", "OlmoeForCausalLM", "OlmoeConfig", EXPERTS),
    "olmoe-clipped": ("olmoe", "OlmoeForCausalLM", "OlmoeConfig", {**EXPERTS, "clip_qkv": 0.1}),
    "mixtral": (
        "llama",
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "rope_parameters": THETA},
    ),
    "phi3-long": (
        "phi3",
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
            },
        },
    ),
}


def make(case: str, seed: int = 0, **changed: Any) -> Any:
    """The model with random weights, its norms and biases too."""
    _, model, config, values = CASES[case]
    torch.manual_seed(seed)
    made = getattr(transformers, model)(
        getattr(transformers, config)(**{**SMALL, **values, **changed})
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            is_matrix = parameter.dim() > 1
            parameter.copy_(torch.randn_like(parameter) * (0.08 if is_matrix else 0.3))
            if "norm" in name and "gemma" not in case:
                parameter.add_(1)
    return made.eval()


def tensors_of(model: Any, case: str) -> dict[str, torch.Tensor]:
    """What a converter would write: names of the file, numbers in its order."""
    architecture = CASES[case][0]
    config = model.config
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers
    )
    found = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().clone()
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), values.chunk(2, 1), strict=True):
                stem = names.get_name(name.replace("gate_up", part))
                found[f"{stem}.weight"] = half.contiguous()
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        new = new if new.endswith(("weight", "bias")) else f"{new}.weight"
        if "shared_expert_gate" in name:
            values = values.squeeze(0)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, -1, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values += 1
        found[new] = values
    rope = getattr(config, "rope_parameters", {})
    if rope.get("rope_type") == "longrope":
        found["rope_factors_long.weight"] = torch.tensor(rope["long_factor"])
        found["rope_factors_short.weight"] = torch.tensor(rope["short_factor"])
    return found


def metadata_of(model: Any, case: str) -> dict[str, Any]:
    architecture, c = CASES[case][0], model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = c.rope_parameters
    rope = rope.get("full_attention", rope)
    own: dict[str, Any] = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        own |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        length = rope["original_max_position_embeddings"]
        own["rope.scaling.original_context_length"] = length
    if rope["rope_type"] == "longrope":
        own["rope.scaling.original_context_length"] = c.original_max_position_embeddings
    if getattr(c, "sliding_window", None):
        own["attention.sliding_window"] = c.sliding_window
    if hasattr(c, "num_experts_per_tok"):
        own["expert_count"] = getattr(c, "num_local_experts", None) or c.num_experts
        own["expert_used_count"] = c.num_experts_per_tok
    for key, name in {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        "attention.clamp_kqv": "clip_qkv",
    }.items():
        if getattr(c, name, None):
            own[key] = getattr(c, name)
    if architecture == "gemma2":
        own["attn_logit_softcapping"] = c.attn_logit_softcapping
        own["final_logit_softcapping"] = c.final_logit_softcapping
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        **{f"{architecture}.{key}": value for key, value in own.items()},
    }


def write(
    path: Path,
    model: Any,
    case: str,
    qtype: str = "F32",
    metadata: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **changed: Any,
) -> Path:
    """A file of the model, its matrices in qtype. changed: tensors to put in place of others."""
    tensors: dict[str, Any] = {}
    for name, values in (tensors_of(model, case) | changed).items():
        if name in drop:
            continue
        quantised = values.dim() > 1 and "gate_inp" not in name and qtype != "F32"
        tensors[name] = (ops.quantize(values, QType[qtype]), qtype) if quantised else values
    save_gguf(path, tensors, {**metadata_of(model, case), **(metadata or {})})
    return path


def quantise_in_place(model: Any, qtype: str) -> Any:
    """The twin: every matrix replaced by what its blocks decode to."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_router = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
            if parameter.dim() > 1 and not is_router:
                blocks = ops.quantize(parameter.detach(), QType[qtype])
                parameter.copy_(ops.dequantize(blocks, QType[qtype]))
    return model


def byte_level(pre: str = "smollm", **more: Any) -> tuple[Any, dict[str, Any]]:
    """A tokenizer trained here by the tokenizers library, and its keys in a file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    if pre == "llama-bpe":
        split = Regex(PATTERNS["llama-bpe"])
        first: Any = pre_tokenizers.Split(split, "isolated")
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        first = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    keys = {
        "ggml__model": "gpt2",
        "ggml__pre": pre,
        "ggml__tokens": vocabulary,
        "ggml__token_type": [3] * 3 + [1] * (len(vocabulary) - 3),
        "ggml__merges": merges,
        "ggml__bos_token_id": 1,
        "ggml__eos_token_id": 2,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }
    return tokenizer, {**keys, **more}
