# SPDX-License-Identifier: MIT
"""GGUF files as transformers models whose weights stay quantised: docs/models.md, docs/whisper.md.

`architectures` says what each architecture's metadata and names mean, `loader` builds the model,
`tokenizer` builds the tokenizer, `decode` records the steps of generation; `whisper` and its
neighbours do the same for speech. transformers, an optional extra, is imported when it is used.
"""

from quantgemm.models.architectures import ARCHITECTURES
from quantgemm.models.decode import Decoder, compile_decode
from quantgemm.models.loader import load_model, resolve_model_path
from quantgemm.models.tokenizer import load_tokenizer

__all__ = [
    "ARCHITECTURES",
    "Decoder",
    "compile_decode",
    "load_model",
    "load_tokenizer",
    "resolve_model_path",
]
