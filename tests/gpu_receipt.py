# SPDX-License-Identifier: MIT
"""Proof that the whole test suite ran on a GPU for just this tree.

    python tests/gpu_receipt.py run     run all tests; if they pass, write tests/gpu_receipt.json
    python tests/gpu_receipt.py check   say whether the receipt belongs to this tree (never fails)

The digest covers csrc/, quantgemm/ and tests/: sources only, the receipt itself left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RECEIPT = ROOT / "tests" / "gpu_receipt.json"
SUFFIXES = {".h", ".cuh", ".cpp", ".cu", ".py", ".pyi"}


def tree_digest() -> str:
    digest = hashlib.sha256()
    for folder in ("csrc", "quantgemm", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
                digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


class Counter:
    """A pytest plugin that counts outcomes, those of GPU tests apart."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0, "passed_on_gpu": 0}
        self.skip_reasons: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome == "skipped" or report.failed:
            self.counts[report.outcome] += 1
            if report.passed and "cuda" in report.keywords:
                self.counts["passed_on_gpu"] += 1
        if report.outcome == "skipped" and isinstance(report.longrepr, (tuple, list)):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            self.skip_reasons[reason] = self.skip_reasons.get(reason, 0) + 1


def run(pytest_args: list[str]) -> int:
    import quantgemm

    if not torch.cuda.is_available() or quantgemm.build_info().cuda is None:
        print("gpu-test: needs a CUDA device and a build with CUDA kernels", file=sys.stderr)
        return 1
    counter, digest = Counter(), tree_digest()
    status = pytest.main(["-q", str(ROOT / "tests"), *pytest_args], plugins=[counter])
    print(json.dumps(counter.counts))
    if status != 0 or counter.counts["passed_on_gpu"] == 0:
        print("gpu-test: no receipt written, the tests did not pass", file=sys.stderr)
        return int(status) or 1
    if pytest_args:
        print("gpu-test: no receipt written for a part of the tests")
        return 0
    build = quantgemm.build_info()
    receipt = {
        "digest": digest,
        "tests": counter.counts,
        "skipped_because": counter.skip_reasons,
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda_toolkit": build.cuda,
        "architectures": list(build.cuda_architectures),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    RECEIPT.write_text(json.dumps(receipt, indent=2) + "\n")
    print(f"gpu-test: wrote {RECEIPT.relative_to(ROOT)}")
    return 0


def check() -> int:
    if not RECEIPT.exists():
        print("GPU RECEIPT: none. The GPU tests have not been run: `make gpu-test` on a GPU.")
        return 0
    receipt = json.loads(RECEIPT.read_text())
    ran = f"{receipt['tests']['passed_on_gpu']} GPU tests on {receipt['device']}, {receipt['date']}"
    if receipt["digest"] == tree_digest():
        print(f"GPU RECEIPT: matches this tree ({ran}).")
    else:
        print(f"GPU RECEIPT: DOES NOT MATCH THIS TREE ({ran}, for other sources).")
        print("             Run `make gpu-test` on a GPU and commit the receipt.")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "check"])
    parser.add_argument("pytest_args", nargs="*", help="for a partial run: -k, -x, …")
    arguments, extra = parser.parse_known_args()
    sys.exit(check() if arguments.action == "check" else run(arguments.pytest_args + extra))
