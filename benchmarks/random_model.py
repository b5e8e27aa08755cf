# SPDX-License-Identifier: MIT
"""A GGUF file of a known model's shape and random weights, to measure speed and memory with.

    python benchmarks/random_model.py random-8b.gguf               # the mixture of Q4_K_M files
    python benchmarks/random_model.py small.gguf --type Q8_0 --layers 2
    python benchmarks/random_model.py moe.gguf --model qwen3-30b-a3b --type Q4_K
    quantgemm bench random-8b.gguf -p 512,2048 -n 128

Quantised on a GPU where there is one. What it says is noise; there is no tokenizer in it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from quantgemm import GGUFWriter, build_info, ops
from quantgemm.formats import format_by_name

MIXTURE = "Q4_K_M"


@dataclass(frozen=True)
class Sizes:
    """Of a model. experts: how many a layer has, of which each token is given `used`."""

    architecture: str
    layers: int
    hidden: int
    feed: int
    heads: int
    kv_heads: int
    vocab: int
    theta: float
    head_dim: int = 128
    experts: int = 0
    used: int = 0
    expert_feed: int = 0


MODELS = {
    "llama-3-8b": Sizes("llama", 32, 4096, 14336, 32, 8, 128256, 5e5),
    "qwen3-30b-a3b": Sizes(
        "qwen3moe", 48, 2048, 6144, 32, 4, 151936, 1e6, experts=128, used=8, expert_feed=768
    ),
}


def types(sizes: Sizes, kind: str, layers: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each matrix. Q4_K_M gives some of the sensitive ones Q6_K."""
    main = "Q4_K" if kind == MIXTURE else kind
    better = "Q6_K" if kind == MIXTURE else kind
    hidden = sizes.hidden
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "token_embd.weight": ((sizes.vocab, hidden), main),
        "output.weight": ((sizes.vocab, hidden), better),
    }
    stack, end, inner = (), "", sizes.feed
    if sizes.experts:
        stack, end, inner = (sizes.experts,), "_exps", sizes.expert_feed
    for i in range(layers):
        eighth = layers // 8
        sensitive = i < eighth or i >= 7 * eighth or (i - eighth) % 3 == 2
        some = better if sensitive else main
        shapes = {
            "attn_q": ((sizes.heads * sizes.head_dim, hidden), main),
            "attn_k": ((sizes.kv_heads * sizes.head_dim, hidden), main),
            "attn_v": ((sizes.kv_heads * sizes.head_dim, hidden), some),
            "attn_output": ((hidden, sizes.heads * sizes.head_dim), main),
            f"ffn_gate{end}": ((*stack, inner, hidden), main),
            f"ffn_up{end}": ((*stack, inner, hidden), main),
            f"ffn_down{end}": ((*stack, hidden, inner), some),
        }
        found |= {f"blk.{i}.{name}.weight": value for name, value in shapes.items()}
    return found


def vectors(sizes: Sizes, layers: int) -> dict[str, tuple[int, ...]]:
    """Norms and routers, which stay numbers."""
    found: dict[str, tuple[int, ...]] = {"output_norm.weight": (sizes.hidden,)}
    for i in range(layers):
        own: dict[str, tuple[int, ...]] = dict.fromkeys(("attn_norm", "ffn_norm"), (sizes.hidden,))
        if sizes.architecture.startswith("qwen3"):
            own |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), (sizes.head_dim,))
        if sizes.experts:
            own["ffn_gate_inp"] = (sizes.experts, sizes.hidden)
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in own.items()}
    return found


def write(path: Path, sizes: Sizes, kind: str, layers: int, context: int) -> None:
    own = {
        "block_count": layers,
        "context_length": context,
        "embedding_length": sizes.hidden,
        "feed_forward_length": sizes.feed,
        "attention.head_count": sizes.heads,
        "attention.head_count_kv": sizes.kv_heads,
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": sizes.head_dim,
        "rope.freq_base": sizes.theta,
    }
    if sizes.experts:
        own |= {
            "expert_count": sizes.experts,
            "expert_used_count": sizes.used,
            "expert_feed_forward_length": sizes.expert_feed,
        }
    metadata = {
        "general.architecture": sizes.architecture,
        "general.name": f"random weights, {kind}",
        **{f"{sizes.architecture}.{key}": value for key, value in own.items()},
    }
    on_gpu = build_info().cuda is not None and torch.cuda.is_available()
    generator = torch.Generator("cuda" if on_gpu else "cpu").manual_seed(0)
    numbers, matrices = vectors(sizes, layers), types(sizes, kind, layers)
    with GGUFWriter(path, metadata) as writer:
        for name, shape in numbers.items():
            writer.declare(name, shape, "F32")
        for name, (shape, qtype) in matrices.items():
            writer.declare(name, shape, qtype)
        for name, shape in numbers.items():
            is_router = len(shape) > 1
            writer.write(name, torch.randn(shape) if is_router else torch.ones(shape))
        for name, (shape, qtype) in tqdm(matrices.items(), unit="tensor"):
            *rows, cols = shape
            for part in torch.arange(math.prod(rows)).split(16384):
                x = torch.randn(len(part), cols, device=generator.device, generator=generator)
                blocks = ops.quantize(x.mul_(cols**-0.5), format_by_name(qtype).type_id)
                writer.write(name, blocks.cpu())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--type", default=MIXTURE, help=f"default: {MIXTURE}")
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b", help=", ".join(MODELS))
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--context", type=int, default=8192, help="default: 8192")
    args = parser.parse_args()
    sizes = MODELS[args.model]
    write(args.out, sizes, args.type, args.layers or sizes.layers, args.context)


if __name__ == "__main__":
    main()
