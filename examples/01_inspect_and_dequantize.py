# SPDX-License-Identifier: MIT
"""Look into a GGUF file and get torch tensors out of it.

    python examples/01_inspect_and_dequantize.py model.gguf

Without a file it makes a small one first. Needs only the package; uses a GPU if there is one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

import quantgemm
from quantgemm import QType, ops


def make_small_model(path: Path) -> None:
    """save_gguf takes plain torch tensors, and quantized blocks together with their type."""
    torch.manual_seed(0)
    attention, embedding = torch.randn(256, 512), torch.randn(1000, 512)
    tensors = {
        "token_embd.weight": (ops.quantize(embedding, QType.Q8_0), "Q8_0"),
        "blk.0.attn_q.weight": (ops.quantize(attention, QType.Q4_0), "Q4_0"),
        "blk.0.attn_norm.weight": torch.ones(512),
    }
    quantgemm.save_gguf(path, tensors, {"general.architecture": "llama", "general.name": "tiny"})


def inspect(path: Path) -> None:
    # Opening reads the header only: the weights stay in the file until they are touched.
    with quantgemm.open_gguf(path) as file:
        print(f"{file.path.name}: GGUF version {file.version}, {len(file.tensors)} tensors")
        for key in list(file.metadata)[:10]:
            print(f"  {key} = {str(file.metadata[key])[:60]}")
        for tensor in list(file.tensors.values())[:10]:
            size = f"{tensor.nbytes / 2**20:.2f} MiB"
            print(f"  {tensor.name:40} {tensor.format.name:8} {list(tensor.shape)!s:20} {size}")
        if not file.tensors:
            return

        # Numbers: decoded exactly as ggml does, on the device and in the dtype you ask for.
        quantized = [t for t in file.tensors.values() if not t.format.is_plain]
        tensor = (quantized or list(file.tensors.values()))[0]
        device = "cuda" if quantgemm.build_info().cuda and torch.cuda.is_available() else "cpu"
        weight = tensor.dequantize(torch.bfloat16, device)
        print(f"\n{tensor.name} -> {weight.dtype} {list(weight.shape)} on {weight.device}")
        print(f"  mean {weight.float().mean():+.5f}, standard deviation {weight.float().std():.5f}")

        # The same in two steps: the blocks as they are in the file (no copy), then the op.
        blocks = tensor.blocks
        print(f"  blocks: {blocks.dtype} {list(blocks.shape)}, the mapped file itself")
        again = ops.dequantize(blocks.to(device), tensor.qtype, torch.bfloat16)
        assert torch.equal(again.reshape(weight.shape), weight) or weight.isnan().any()


def main() -> None:
    if len(sys.argv) > 1:
        inspect(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.gguf"
        make_small_model(path)
        inspect(path)


if __name__ == "__main__":
    main()
