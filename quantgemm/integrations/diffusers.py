# SPDX-License-Identifier: MIT
"""Our kernels in the linear layers that diffusers makes of GGUF files.

    from quantgemm.integrations import diffusers as gguf_in_diffusers

    gguf_in_diffusers.enable()
    transformer = FluxTransformer2DModel.from_single_file(
        "flux1-dev-Q4_K.gguf", quantization_config=GGUFQuantizationConfig(torch.bfloat16)
    )

The layers, their packed weights, LoRA side paths and offload hooks stay diffusers' own; only what a
forward pass computes is ours, instead of decoding all weights with torch operations each time.
"""

from __future__ import annotations

from typing import Any

import torch

from quantgemm.integrations.common import Patch, linear, module_of, serves
from quantgemm.plan import check_algo

__all__ = ["disable", "enable", "is_enabled"]

_ADVICE = "quantgemm.replace_linear quantises the layers of any model"
_WANTED = {"GGUFLinear": ("forward", "forward_native"), "GGUFParameter": ("as_tensor",)}

_patch = Patch()


def enable(algo: str = "auto") -> None:
    """Makes diffusers' GGUF layers use quantgemm, in this process, until `disable`.

    algo: what `ops.gemm` is asked for: ``auto`` never rounds activations, ``auto_q8`` may. Works
    for models that are loaded already. Types that quantgemm does not have keep diffusers' own way.
    """
    check_algo(algo)
    utils = module_of("diffusers", "diffusers.quantizers.gguf.utils", _WANTED, _ADVICE)
    disable()
    decode_and_multiply = utils.GGUFLinear.forward_native

    def forward(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        """inputs ``[..., in_features]`` to ``[..., out_features]`` of the layer's compute_dtype."""
        qtype = getattr(self.weight, "quant_type", None)
        if qtype is None or not serves(int(qtype)):
            result: torch.Tensor = decode_and_multiply(self, inputs)
            return result
        blocks = self.weight.as_tensor().view(torch.uint8)
        return linear(inputs.to(self.compute_dtype), blocks, int(qtype), self.bias, algo)

    _patch.set(utils.GGUFLinear, "forward", forward)


def disable() -> None:
    """Gives diffusers back what `enable` replaced."""
    _patch.undo()


def is_enabled() -> bool:
    return bool(_patch)
