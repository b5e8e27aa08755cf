# SPDX-License-Identifier: MIT
"""A GGUF file of Llama-3-8B's shape and random weights, to measure speed and memory with.

    python benchmarks/random_model.py random-8b.gguf               # the mixture of Q4_K_M files
    python benchmarks/random_model.py small.gguf --type Q8_0 --layers 2
    quantgemm bench random-8b.gguf -p 512,2048 -n 128

Quantised on a GPU where there is one. What it says is noise; there is no tokenizer in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from quantgemm import GGUFWriter, build_info, ops
from quantgemm.formats import format_by_name

HIDDEN, FEED, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
MIXTURE = "Q4_K_M"


def types(kind: str, layers: int) -> dict[str, tuple[tuple[int, int], str]]:
    """Shape and type of each matrix. Q4_K_M gives some of the sensitive ones Q6_K."""
    main = "Q4_K" if kind == MIXTURE else kind
    better = "Q6_K" if kind == MIXTURE else kind
    found = {
        "token_embd.weight": ((VOCAB, HIDDEN), main),
        "output.weight": ((VOCAB, HIDDEN), better),
    }
    for i in range(layers):
        eighth = layers // 8
        sensitive = i < eighth or i >= 7 * eighth or (i - eighth) % 3 == 2
        some = better if sensitive else main
        shapes = {
            "attn_q": ((HEADS * HEAD_DIM, HIDDEN), main),
            "attn_k": ((KV_HEADS * HEAD_DIM, HIDDEN), main),
            "attn_v": ((KV_HEADS * HEAD_DIM, HIDDEN), some),
            "attn_output": ((HIDDEN, HEADS * HEAD_DIM), main),
            "ffn_gate": ((FEED, HIDDEN), main),
            "ffn_up": ((FEED, HIDDEN), main),
            "ffn_down": ((HIDDEN, FEED), some),
        }
        found |= {f"blk.{i}.{name}.weight": value for name, value in shapes.items()}
    return found


def write(path: Path, kind: str, layers: int, context: int) -> None:
    metadata = {
        "general.architecture": "llama",
        "general.name": f"random weights, {kind}",
        "llama.block_count": layers,
        "llama.context_length": context,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FEED,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 500_000.0,
    }
    on_gpu = build_info().cuda is not None and torch.cuda.is_available()
    generator = torch.Generator("cuda" if on_gpu else "cpu").manual_seed(0)
    matrices = types(kind, layers)
    norms = ["output_norm.weight"]
    norms += [f"blk.{i}.{name}.weight" for i in range(layers) for name in ("attn_norm", "ffn_norm")]
    with GGUFWriter(path, metadata) as writer:
        for name in norms:
            writer.declare(name, (HIDDEN,), "F32")
        for name, (shape, qtype) in matrices.items():
            writer.declare(name, shape, qtype)
        for name in norms:
            writer.write(name, torch.ones(HIDDEN))
        for name, ((rows, cols), qtype) in tqdm(matrices.items(), unit="tensor"):
            for part in torch.arange(rows).split(16384):
                x = torch.randn(len(part), cols, device=generator.device, generator=generator)
                blocks = ops.quantize(x.mul_(cols**-0.5), format_by_name(qtype).type_id)
                writer.write(name, blocks.cpu())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--type", default=MIXTURE, help=f"default: {MIXTURE}")
    parser.add_argument("--layers", type=int, default=32, help="default: 32")
    parser.add_argument("--context", type=int, default=8192, help="default: 8192")
    args = parser.parse_args()
    write(args.out, args.type, args.layers, args.context)


if __name__ == "__main__":
    main()
