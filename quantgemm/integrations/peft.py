# SPDX-License-Identifier: MIT
"""LoRA training over quantised weights with peft.

    from quantgemm.integrations.peft import over_quantized

    model, _ = quantgemm.replace_linear(model, "Q4_K")
    config = over_quantized(LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(model, config)

The quantised weights are frozen; gradients flow through them to the side paths and to x. Side paths
stay beside the weights: merging would have to quantise again, and is refused.
"""

from __future__ import annotations

import warnings
from typing import Any

from quantgemm.integrations.common import module_of
from quantgemm.nn import QuantEmbedding, QuantLinear

__all__ = ["over_quantized"]

_ADVICE = "0.10 and newer are known to work"


def over_quantized(config: Any) -> Any:
    """The same LoraConfig, which now also knows QuantLinear. QuantEmbedding is refused by name."""
    layer = module_of("peft", "peft.tuners.lora.layer", {"Linear": ("merge",)}, _ADVICE)
    if not hasattr(config, "_register_custom_module"):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    if getattr(config, "use_dora", False):
        raise NotImplementedError(
            "use_dora: expected False, got True: DoRA scales the columns of the weights "
            "themselves, which are quantised"
        )
    config._register_custom_module(
        {QuantLinear: _lora_class(layer.Linear), QuantEmbedding: _refuse_embedding}
    )
    return config


def _refuse_embedding(target: Any, *_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        f"target_modules: expected QuantLinear layers, got a {type(target).__name__}: "
        f"leave it out of target_modules"
    )


def _lora_class(base: Any) -> Any:
    class LoraQuantLinear(base):  # type: ignore[misc]
        """peft's LoRA layer around a QuantLinear: y = base(x) + scale · B(A(x))."""

        def __init__(self, base_layer: Any, adapter_name: str, **kwargs: Any) -> None:
            with warnings.catch_warnings():  # peft finds the sizes, and warns that it guessed
                warnings.filterwarnings("ignore", "Unsupported layer type")
                super().__init__(base_layer, adapter_name, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise NotImplementedError(
                f"merge: the weights are {self.get_base_layer().format.name} blocks, which have no "
                f"room for a side path; keep it unmerged, or merge into "
                f"torch.nn.Linear(...) with weight = layer.dequantize() and quantise again"
            )

        def unmerge(self) -> None:
            return None  # nothing ever is

    return LoraQuantLinear
