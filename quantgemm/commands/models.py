# SPDX-License-Identifier: MIT
"""What `run` and `bench` share: loading a model for a command, and what it costs in memory."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch

from quantgemm.commands.devices import HELP as DEVICE_HELP
from quantgemm.commands.devices import device_argument
from quantgemm.commands.output import CommandError
from quantgemm.models import load_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a GGUF file, or a directory with one")
    parser.add_argument("--device", type=device_argument, help=DEVICE_HELP)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=None,
        help="of activations (default: bfloat16 on a GPU, float32 on the CPU)",
    )
    parser.add_argument(
        "--algo",
        choices=("auto", "auto_q8"),
        default="auto",
        help="auto_q8 may round activations to int8 (default: auto, which never does)",
    )


def load(path: str, device: torch.device, dtype: str | None, algo: str = "auto") -> Any:
    """The model, or a CommandError."""
    kind = DTYPES[dtype] if dtype else torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        return load_model(path, device, kind, algo)
    except (ImportError, NotImplementedError) as error:
        raise CommandError(str(error)) from error


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers, memory that they share counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def peak_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Bytes of the process on the host, mapped files included, and of torch on the device."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None, on_device
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024), on_device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def file_name(path: str) -> str:
    return os.path.basename(os.path.normpath(path))
