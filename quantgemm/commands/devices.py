# SPDX-License-Identifier: MIT
"""--device: what it may be, and what it is when it is not given."""

from __future__ import annotations

import argparse
import re

import torch

from quantgemm.build import build_info
from quantgemm.commands.output import CommandError

HELP = "cpu, cuda or cuda:N (default: cuda where there is one, else cpu)"


def device_argument(text: str) -> torch.device:
    """For argparse."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return torch.device(text)


def why_no_cuda() -> str | None:
    """What keeps this process from using a GPU; None if nothing does."""
    if build_info().cuda is None:
        return "this build of quantgemm has no CUDA kernels"
    if not torch.cuda.is_available():
        what = "is a CPU build" if torch.version.cuda is None else "sees no CUDA device"
        return f"torch {torch.__version__} {what}"
    return None


def choose_device(asked: torch.device | None) -> tuple[torch.device, str]:
    """The device to use, and a line that names it (and says why, if it is the CPU by default)."""
    missing = why_no_cuda()
    if asked is None and missing:
        return torch.device("cpu"), f"device: cpu ({missing})"
    device = asked or torch.device("cuda")
    if device.type == "cpu":
        return device, "device: cpu"
    if missing:
        raise CommandError(f"--device {device}: {missing}")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        known = ", ".join(f"cuda:{i}" for i in range(count))
        raise CommandError(f"--device {device}: no such device, expected one of {known}")
    device = torch.device("cuda", index)
    return device, f"device: {device} ({torch.cuda.get_device_name(device)})"
