# SPDX-License-Identifier: MIT
"""load_model: a GGUF file as a transformers model on the file's own quantised blocks.

    model = quantgemm.load_model("model.gguf")
    tokenizer = quantgemm.load_tokenizer("model.gguf")

The model is made on the meta device, every tensor is found and checked, and only then is the first
one read: a file that does not fit is an error before any memory is used.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from quantgemm.build import build_info
from quantgemm.experts import ExpertLinear, QuantExpertLinear, QuantExperts
from quantgemm.gguf import GGUFError, GGUFFile, GGUFTensor, open_gguf
from quantgemm.gguf.errors import shorten
from quantgemm.gguf.reader import PART_NAME
from quantgemm.models.architectures import (
    ARCHITECTURES,
    MIXTURES,
    Architecture,
    configuration,
    is_mixture,
)
from quantgemm.models.extras import import_transformers
from quantgemm.models.hyperparameters import Hyperparameters
from quantgemm.nn import PackedModule, QuantEmbedding, QuantLinear
from quantgemm.plan import can_pack, check_algo, explain_gemm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MATRICES = (nn.Linear, nn.Embedding, ExpertLinear)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# Tokens that end a turn. Files name some of them in keys, older ones only by their text.
END_KEYS = ("eos", "eot", "eom")
END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
CONTROL = 3  # in tokenizer.ggml.token_type


class ScaledQuantEmbedding(QuantEmbedding):
    """A table whose rows are multiplied by a number, rounded to `dtype` as transformers rounds."""

    embed_scale: torch.Tensor

    def set_scale(self, scale: float) -> ScaledQuantEmbedding:
        value = torch.tensor(scale, device=self.weight.device)
        self.register_buffer("embed_scale", value, persistent=False)
        return self

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 or int32 ``[...]`` to ``[..., embedding_dim]``."""
        return super().forward(ids) * self.embed_scale.to(self.dtype)


@dataclass(frozen=True)
class _Place:
    """A parameter of the model and the tensor that it comes from."""

    parameter: str
    shape: tuple[int, ...]
    tensor: GGUFTensor
    stays_packed: bool
    heads: int  # how many heads' rows are interleaved; 0 for none
    offset: float  # to take away from the numbers

    def nbytes(self, dtype: torch.dtype) -> int:
        """On the device."""
        if self.stays_packed:
            return self.tensor.nbytes
        return (
            self.tensor.nbytes
            // self.tensor.format.block_bytes
            * (self.tensor.format.block_elems * dtype.itemsize)
        )


def load_model(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    algo: str = "auto",
    progress: bool | None = None,
    packed: bool | None = None,
) -> Any:
    """A transformers model, in evaluation mode, from a GGUF file or a directory that has one.

    Quantised matrices become `QuantLinear` and `QuantEmbedding` on the file's own blocks; a head
    tied to the embedding has the same bytes. On the CPU they are the mapped file, which is read as
    it is used; on a GPU they are copied there tensor by tensor. A mixture's experts are three
    stacks in a `QuantExperts`. All else, norms and biases and
    matrices that the file keeps as numbers, is converted to dtype, that of the activations.

    path: any part of a split file will do. device: None is the current GPU where the package can
    use one, else the CPU. algo: of every `QuantLinear`, as in `ops.gemm`; "auto_q8" may round
    activations to int8. progress: a bar; None shows it on terminals. packed: layers whose type has
    a packed form take it (`QuantLinear.pack`), which needs algo "auto"; None does so where it is
    faster, in 16 bits on compute capability 9.0, and for experts on any GPU and with any algo.

    Errors: GGUFError (a ValueError) for what the file lacks or has otherwise than its architecture
    wants, NotImplementedError for another architecture, torch.OutOfMemoryError, ImportError without
    transformers. docs/models.md lists the architectures.
    """
    transformers = import_transformers()
    if dtype not in DTYPES:
        expected = "torch.float32, torch.float16 or torch.bfloat16"
        raise TypeError(f"dtype: expected {expected}, got {dtype}")
    check_algo(algo)
    place = _device(device)
    if packed and algo != "auto":
        raise ValueError(f"packed: only with algo 'auto', got {algo!r}")
    packs: tuple[type[PackedModule], ...] = (PackedModule,) if packed else ()
    if packed is None and place.type == "cuda":
        packs = (QuantExpertLinear,)  # rows would have the host count each expert's tokens
        if algo == "auto" and dtype != torch.float32 and _packs_faster(place):
            packs = (PackedModule,)
    file = open_gguf(resolve_model_path(path))
    hparams = Hyperparameters(file)
    architecture = _architecture(hparams)
    model = _empty_model(transformers, architecture, hparams, dtype)
    plan = _plan(model, file, architecture, model.config)
    _check_memory(file, plan, place, dtype)
    try:
        _fill(model, plan, architecture, place, dtype, progress, packs)
        for module in model.modules():
            if isinstance(module, PackedModule) and not module.is_packed:
                module.algo = algo
        _restore_buffers(model, file, place)
    except torch.OutOfMemoryError as error:
        needed = sum(p.nbytes(dtype) for p in plan)
        raise _out_of_memory(file, needed, place, f"{error}") from error
    if left := [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]:
        version = transformers.__version__
        raise NotImplementedError(
            f"transformers {version} has tensors in {architecture.model} that this package does "
            f"not know: {_some(left)}"
        )
    _set_generation(transformers, model, hparams)
    return model.eval()


def resolve_model_path(path: str | os.PathLike[str]) -> Path:
    """The GGUF file meant: the path itself, or the one model in a directory."""
    given = Path(path)
    if not given.is_dir():
        return given
    names = sorted(p.name for p in given.glob("*.gguf"))
    first = [n for n in names if (m := PART_NAME.fullmatch(n)) is None or int(m["no"]) == 1]
    if len(first) != 1:
        found = f"{len(first)}: {_some(first)}" if first else "none"
        raise GGUFError(
            f"expected one GGUF model in the directory, found {found}",
            path=given,
            suggestion="name the file itself" if first else "name a file that ends in .gguf",
        )
    return given / first[0]


# ------------------------------------------------------------------------------ what is wanted


def _device(device: torch.device | str | None) -> torch.device:
    usable = build_info().cuda is not None and torch.cuda.is_available()
    if device is None:
        return torch.device("cuda" if usable else "cpu")
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    if place.type == "cuda" and not usable:
        why = "torch finds no GPU" if build_info().cuda else "this build has no CUDA kernels"
        raise ValueError(f"device: got {device}, but {why}")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device}, but there are {torch.cuda.device_count()}")
    return place


def _packs_faster(device: torch.device) -> bool:
    """Whether packed weights are the faster ones there: with this build's kernels for 9.0a."""
    plan = explain_gemm(64, 64, 256, "Q4_K", device, torch.bfloat16, packed=True)
    return plan.algo == "wgmma"


def _architecture(hparams: Hyperparameters) -> Architecture:
    name = hparams.architecture
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise NotImplementedError(
            f"{hparams.file.path}: architecture {shorten(name)} is not supported, "
            f"these are: {known}"
        )
    return MIXTURES[name] if name in MIXTURES and is_mixture(hparams) else ARCHITECTURES[name]


def _empty_model(
    transformers: Any, architecture: Architecture, hparams: Hyperparameters, dtype: torch.dtype
) -> Any:
    """The model without memory."""
    values = configuration(architecture, hparams)
    # A value of None is given on only where the configuration would otherwise make one up.
    values = {k: v for k, v in values.items() if v is not None or k.endswith("token_id")}
    try:
        config = getattr(transformers, architecture.config)(**values)
        config.dtype = dtype
        config.name_or_path = str(hparams.file.path)
        with torch.device("meta"):
            model = getattr(transformers, architecture.model)(config)
            if architecture.has_experts:
                _split_experts(model)
            return model
    except Exception as error:  # each version of transformers has its own kinds
        raise GGUFError(
            f"transformers {transformers.__version__} refuses the configuration: {error}",
            path=hparams.file.path,
            suggestion="the file's metadata is damaged, or the model is of a kind not known here",
        ) from error


def _split_experts(model: nn.Module) -> None:
    """Gives each of a file's three tensors a place: transformers has gate and up as one."""
    for name, module in list(model.named_modules()):
        if name.endswith(".mlp.experts"):
            experts, hidden, inner = module.down_proj.shape
            gate, up = (ExpertLinear(experts, hidden, inner) for _ in range(2))
            _replace(model, name, QuantExperts(gate, up, ExpertLinear(experts, inner, hidden)))


def _plan(
    model: nn.Module, file: GGUFFile, architecture: Architecture, config: Any
) -> list[_Place]:
    """A tensor for each parameter, all of them checked; order: that of the model."""
    tied = bool(config.tie_word_embeddings)
    unused = set(file.tensors) - set(architecture.unused)
    missing: list[str] = []
    plan: list[_Place] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if tied and name == f"{HEAD}.weight":
            continue
        source = architecture.tensor_of(name)
        tensor = file.tensors.get(source or "")
        if source is None or tensor is None:
            missing.append(f"{source or '?'} ({name})")
            continue
        unused.discard(source)
        # A matrix of one row may be a row: the gate of a shared expert.
        row = parameter.shape[1:] if parameter.shape[:1] == (1,) else parameter.shape
        if tensor.shape not in (parameter.shape, row):
            raise GGUFError(
                f"shape {list(tensor.shape)}, expected {list(parameter.shape)} for {name}",
                path=file.path,
                tensor=source,
                suggestion="the metadata and the tensors are not of the same model",
            )
        module, _, kind = name.rpartition(".")
        owner = model.get_submodule(module)
        is_matrix = kind == "weight" and isinstance(owner, MATRICES)
        stem = source.split(".")[-2]
        heads = 0
        if stem in architecture.interleaved:
            is_query = stem == architecture.interleaved[0]
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
        offset = architecture.norm_offset if stem.endswith("norm") else 0.0
        packed = is_matrix and not tensor.format.is_plain
        plan.append(_Place(name, tuple(parameter.shape), tensor, packed, heads, offset))
    if missing:
        raise GGUFError(
            f"{len(missing)} of {len(missing) + len(plan)} tensors are missing: {_some(missing)}",
            path=file.path,
            suggestion="a part is missing, or the model is of a kind that is not known here",
        )
    if unused:
        raise GGUFError(
            f"{len(unused)} tensors have no place in {architecture.model}: {_some(sorted(unused))}",
            path=file.path,
            suggestion="the model is of a kind that is not known here",
        )
    return plan


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_memory(
    file: GGUFFile, plan: list[_Place], device: torch.device, dtype: torch.dtype
) -> None:
    free = free_memory(device)
    needed = sum(p.nbytes(dtype) for p in plan)
    needed += max((p.nbytes(dtype) for p in plan if p.heads), default=0)  # while rows move
    if free is not None and needed > free:
        raise _out_of_memory(file, needed, device, f"{free / 2**30:.2f} GiB are free")


def free_memory(device: torch.device) -> int | None:
    """Bytes that torch can still have there; None on the CPU, where weights stay in the file."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _out_of_memory(
    file: GGUFFile, needed: int, device: torch.device, what: str
) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"the weights of {file.path.name} need {needed / 2**30:.2f} GiB on {device}, {what}: "
        "free some, use device='cpu', or a smaller type (quantgemm quantize)"
    )


# ------------------------------------------------------------------------------ filling


def _fill(
    model: Any,
    plan: list[_Place],
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool | None,
    packs: tuple[type[PackedModule], ...],
) -> None:
    """packs: layers that are packed as they come, where their type has a packed form."""
    hidden = None if progress is None else not progress
    total = sum(p.tensor.nbytes for p in plan)
    if packs:  # for a moment a tensor is there twice: the largest ones while there is room
        plan = sorted(plan, key=lambda p: -p.tensor.nbytes)
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=hidden) as bar:
        for place in plan:
            module, _, kind = place.parameter.rpartition(".")
            values = _load(place, device, dtype)
            old = model.get_submodule(module)
            if place.stays_packed:
                layer = _on_blocks(old, values, place, architecture, dtype)
                if isinstance(layer, packs) and can_pack(layer.format):
                    layer.pack()
                _replace(model, module, layer)
            else:
                old._parameters[kind] = nn.Parameter(values)
            if device.type != "cpu":
                place.tensor.release()
            bar.update(place.tensor.nbytes)
            del values  # before the next ones come
    if model.config.tie_word_embeddings:
        table = model.get_submodule(EMBEDDING)
        if isinstance(table, QuantEmbedding):
            _replace(model, HEAD, table.as_linear())
        else:
            model.get_submodule(HEAD).weight = table.weight


def _load(place: _Place, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Blocks, uint8 ``[rows, row_bytes]``, or numbers of dtype, on the device."""
    tensor = place.tensor
    if place.stays_packed:
        values = tensor.blocks.view(*place.shape[:-1], -1).to(device)
    elif place.offset:
        values = (tensor.dequantize(torch.float32, device) - place.offset).to(dtype)
    else:
        values = tensor.dequantize(dtype, device).view(place.shape)
    return deinterleave(values, place.heads) if place.heads else values


def deinterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows ``[heads · d, ...]`` of queries or keys, from the file's order to transformers'.

    Llama's own code turns neighbours, rows 2 i and 2 i + 1 of a head; transformers turns row i and
    row i + d / 2. A row of a quantised matrix is whole blocks, so moving rows touches no block.
    """
    shape = (heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return rows.view(shape).transpose(1, 2).reshape(rows.shape)


def _on_blocks(
    old: nn.Module,
    blocks: torch.Tensor,
    place: _Place,
    architecture: Architecture,
    dtype: torch.dtype,
) -> nn.Module:
    qtype = place.tensor.qtype
    if isinstance(old, nn.Linear):
        return QuantLinear.from_blocks(blocks, qtype, old.bias)
    if isinstance(old, ExpertLinear):
        return QuantExpertLinear.from_blocks(blocks, qtype)
    assert isinstance(old, nn.Embedding)
    if architecture.scaled_embedding:
        table = ScaledQuantEmbedding.from_blocks(blocks, qtype, old.padding_idx, dtype)
        assert isinstance(table, ScaledQuantEmbedding)
        return table.set_scale(old.embedding_dim**0.5)
    return QuantEmbedding.from_blocks(blocks, qtype, old.padding_idx, dtype)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def _restore_buffers(model: Any, file: GGUFFile, device: torch.device) -> None:
    """Buffers are computed, not loaded: those of rotary embeddings from the configuration."""
    for name, module in list(model.named_modules()):
        lost = [n for n, b in module.named_buffers(recurse=False) if b.is_meta]
        if lost == ["embed_scale"]:
            module.embed_scale = torch.tensor(module.embedding_dim**0.5, device=device)
        elif lost and hasattr(module, "config"):
            _replace(model, name, type(module)(module.config).to(device))
    if "rope_freqs.weight" in file.tensors:
        factors = file.tensors["rope_freqs.weight"].dequantize(device=device)
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if re.fullmatch(r"(original_)?inv_freq", name):
                    _check_factors(file, factors, buffer)
                    setattr(module, name, buffer / factors)


def _check_factors(file: GGUFFile, factors: torch.Tensor, frequencies: torch.Tensor) -> None:
    if factors.shape != frequencies.shape:
        raise GGUFError(
            f"shape {list(factors.shape)}, expected {list(frequencies.shape)}, one per frequency",
            path=file.path,
            tensor="rope_freqs.weight",
        )


def _set_generation(transformers: Any, model: Any, hparams: Hyperparameters) -> None:
    """What ends a text, for `generate`."""
    config = model.config
    ends = end_tokens(hparams)
    pad = ends[0] if config.pad_token_id is None and ends else config.pad_token_id
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=ends or None, pad_token_id=pad
    )


def end_tokens(hparams: Hyperparameters) -> list[int]:
    """Ids of the tokens after which nothing more is to be said, the file's own choice first."""
    ends = []
    for name in END_KEYS:
        key = f"tokenizer.ggml.{name}_token_id"
        if hparams.has(key):
            ends.append(hparams.integer(key, least=0))
    metadata = hparams.file.metadata
    if "tokenizer.ggml.tokens" in metadata and "tokenizer.ggml.token_type" in metadata:
        kinds = metadata["tokenizer.ggml.token_type"]
        controls = {
            token: i
            for i, (token, kind) in enumerate(
                zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False)
            )
            if kind == CONTROL
        }
        ends += [controls[text] for text in END_TEXTS if text in controls]
    return list(dict.fromkeys(ends))
