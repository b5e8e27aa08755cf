# SPDX-License-Identifier: MIT
"""Quantise the linear layers of a model in place, look at what it costs, and train LoRA over it.

    python examples/02_quant_linear.py
    python examples/02_quant_linear.py --qtype Q6_K --width 4096 --device cuda --dtype bfloat16

The model is a stack of residual MLP blocks with random weights: enough to see every step.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn

import quantgemm
from quantgemm import QuantLinear, replace_linear


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, width] -> [tokens, width]"""
        result: torch.Tensor = x + self.down(nn.functional.silu(self.up(self.norm(x))))
        return result


class LoRA(nn.Module):
    """y = base(x) + x · aᵀ · bᵀ: a few trainable numbers beside a frozen layer."""

    def __init__(self, base: QuantLinear, rank: int, like: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features).to(like) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank).to(like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return result


def train_lora(model: nn.Module, x: torch.Tensor, target: torch.Tensor, steps: int) -> None:
    """Brings what the quantised model says back to what the original one said."""
    model.requires_grad_(False)
    for block in model.children():
        block.up, block.down = LoRA(block.up, 8, x), LoRA(block.down, 8, x)
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    for step in range(steps + 1):
        loss = nn.functional.mse_loss(model(x).float(), target)
        if step in (0, steps):
            print(f"  LoRA, {count} numbers, step {step}: loss {loss.item():.3e}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def allocated(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f"; the GPU holds {torch.cuda.memory_allocated(device) / 2**20:.1f} MiB"


def main() -> None:
    usable = quantgemm.build_info().cuda is not None and torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--qtype", default="Q4_K", help="a GGUF type (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--blocks", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="of LoRA (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if usable else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()

    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = nn.Sequential(*[Block(args.width) for _ in range(args.blocks)]).to(device, dtype)
    x = torch.randn(args.tokens, args.width).to(device, dtype)
    with torch.no_grad():
        want = model(x).float()
    print(f"{args.blocks} blocks of width {args.width}, {dtype} on {device}{allocated(device)}")

    # Every nn.Linear becomes a QuantLinear, on the device where it is; the report says so.
    model, report = replace_linear(model, args.qtype)
    print(f"{report}{allocated(device)}")
    print(model[0].up)
    print(model[0].up.explain(m=args.tokens, dtype=dtype))

    with torch.no_grad():
        error = (model(x).float() - want).norm() / want.norm()
    print(f"relative error of the output: {error:.2%}")

    # A checkpoint is plain tensors, each with its type beside it.
    state = copy.deepcopy(model.state_dict())
    print({key: tuple(value.shape) for key, value in state.items() if key.startswith("0.up")})

    # Gradients pass through the frozen weights to whatever trains beside them.
    train_lora(model, x, want, args.steps)


if __name__ == "__main__":
    main()
