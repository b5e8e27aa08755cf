# SPDX-License-Identifier: MIT
"""Memory of a GGUF model in a process of its own: ours, and transformers' load, which decodes it.

    python benchmarks/model_memory.py MODEL.gguf

"own" is memory that the process alone holds, "file" pages of mapped files, which the system can
take back at any time, in MB. Numbers are what loading and then 16 greedy tokens added to a process
that has imported everything; the peak is of both together. Linux on the CPU, float32.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

WAYS = ("quantgemm", "transformers")
MB = 1e6


def memory() -> tuple[float, float]:
    """Own and file, MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, file = (1024 * int(lines[key].split()[0]) / MB for key in ("RssAnon", "RssFile"))
    return own, file


class Peak(threading.Thread):
    """Looks every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = (0.0, 0.0), False

    def run(self) -> None:
        while not self.done:
            self.most = max(self.most, memory(), key=sum)
            time.sleep(0.002)


def child(way: str, path: Path) -> None:
    import torch
    import transformers

    import quantgemm

    def load() -> Any:
        if way == "quantgemm":
            return quantgemm.load_model(path, "cpu", torch.float32, progress=False)
        make = transformers.AutoModelForCausalLM.from_pretrained
        return make(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

    torch.ones(64, 64) @ torch.ones(64, 64)
    transformers.utils.logging.disable_progress_bar()
    for name in ("LlamaForCausalLM", "AutoModelForCausalLM"):  # which imports them
        getattr(transformers, name)
    before = memory()
    peak = Peak()
    peak.start()
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    after = memory()
    ids = torch.tensor([[1, 2, 3, 4]])
    model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    used = memory()
    peak.done = True
    cells = [f"{seconds:.1f}"]
    for now in (after, used, peak.most):
        cells += [f"{max(0.0, now[i] - before[i]):.0f}" for i in (0, 1)]
    print(f"| {' | '.join([way, *cells])} |", flush=True)


def main() -> None:
    if len(sys.argv) == 3:
        return child(sys.argv[1], Path(sys.argv[2]))
    print(f"{Path(sys.argv[1]).name}: {Path(sys.argv[1]).stat().st_size / MB:.1f} MB\n")
    print("| load by | seconds | own | file | own, used | file, used | own, peak | file, peak |")
    print("| :-- | --: | --: | --: | --: | --: | --: | --: |", flush=True)
    for way in WAYS:
        subprocess.run([sys.executable, __file__, way, sys.argv[1]], check=True)
    return None


if __name__ == "__main__":
    main()
