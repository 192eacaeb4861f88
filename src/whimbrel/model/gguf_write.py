"""A model as one GGUF file that llama.cpp runs: Llama, Qwen3 and Nemotron-H. Needs the package `gguf` (extra `gguf`).

The mapping is our own, from `ModelConfig` alone, so a dense hybrid is written as one whatever its config.json says of
experts. Tensors are read, turned and written one at a time. Matrices take the wanted type; norms, biases, the
convolution and Mamba's A, D and dt stay float32, as llama.cpp's own converter keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whimbrel.errors import UserError, nearest, need
from whimbrel.events import Report, silent
from whimbrel.files import atomic_write
from whimbrel.model import checkpoint, gguf
from whimbrel.model.config import ATTENTION, FEED_FORWARD, MAMBA, ModelConfig
from whimbrel.model.gguf_tokenizer import tokenizer_fields
from whimbrel.model.positions import frequencies

TYPES = {"f32": ("F32", 0), "f16": ("F16", 1), "q8_0": ("Q8_0", 7), "q4_0": ("Q4_0", 2)}
"""What `--type` says -> the type of the matrices, and llama.cpp's number for such a file."""
BLOCK = 32
"""Weights that share a scale in q8_0 and q4_0; matrices whose rows are no multiple stay float16."""


def write(source: str | Path, file: str | Path, kind: str = "f16", report: Report = silent) -> Path:
    """Write the model of a folder, .gguf file, fetched name or hub id, whole or not at all; returns the file.

    kind: f32, f16, q8_0, or q4_0 (whose head is q8_0, tied or not: there four bits cost most). Vocabulary and chat
    template come from the model's folder; without one the file has none. `UserError` names what GGUF cannot hold.
    """
    package, file = need("gguf", extra="gguf"), Path(file)
    if kind not in TYPES:
        raise UserError(f"type is {kind!r}; {nearest(kind, TYPES)} (set --type to one of {', '.join(TYPES)})")
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file, such as {file / 'model.gguf'}")
    path = checkpoint.resolve(source)
    config = checkpoint.load_config(path)
    if (form := checkpoint.load_form(path)) is not None:
        raise UserError(
            f"{path} holds {form.name} already; name the model that it was made from, and --type q8_0 or q4_0"
        )
    _check(config)
    weights, table = checkpoint.opened(path, config)
    tensors = _made(config) | {
        name: (weights.shapes[table[ours]], partial(weights.read, table[ours]))
        for ours, name in gguf.names(config).items()
    }
    types = {
        name: package.GGMLQuantizationType[_type(name, shape, config, kind)] for name, (shape, _) in tensors.items()
    }
    said = _metadata(config, kind) | {"general.name": path.stem} | tokenizer_fields(path, config, report)
    with atomic_write(file, "wb") as beside:
        writer = package.GGUFWriter(beside.name, config.family)
        for key, value in said.items():
            _add(writer, key, value)
        for name, (shape, _) in tensors.items():
            there = gguf.to_file(name, torch.empty(shape, device="meta"), config).shape
            size = math.prod(package.quant_shape_to_byte_shape(there, types[name]))
            writer.add_tensor_info(name, there, np.dtype(np.float32), size, raw_dtype=types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (name, (_, read)) in enumerate(tensors.items(), start=1):
            values = gguf.to_file(name, read().float(), config).contiguous().numpy()
            writer.write_tensor_data(package.quantize(values, types[name]))
            report({"event": "progress", "done": done, "total": len(tensors), "unit": "tensors", "text": file.name})
        writer.close()
    return file


def _check(config: ModelConfig) -> None:
    """Refuse what llama.cpp has no place for."""
    family = config.family
    if family not in gguf.ARCHITECTURES:
        raise UserError(f"family is {family!r}; models written as GGUF are {', '.join(gguf.ARCHITECTURES)}")
    usual: dict[str, Any] = {}
    if family == "nemotron_h":
        usual = {"mamba_bias": False, "time_step_limit": (0.0, math.inf)}
    elif family == "qwen3":
        usual = {"attention_bias": False, "rope_scaling": None}
    for name, value in usual.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{name} is {getattr(config, name)}, which llama.cpp does not compute for {family}; "
                f"only {name} {value} can be written as GGUF"
            )
    if family == "nemotron_h" and not {MAMBA, ATTENTION} <= set(config.pattern):
        raise UserError(f"pattern is {config.pattern}; llama.cpp's nemotron_h needs both Mamba-2 (M) and attention (*)")


def _made(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """Tensors that llama.cpp wants and no folder has, by name: shape, and how to get it."""
    made: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
    if config.rope_scaling is not None:
        cpu = torch.device("cpu")
        factors_R = frequencies(replace(config, rope_scaling=None), cpu) / frequencies(config, cpu)
        made[gguf.ROPE_FACTORS] = (tuple(factors_R.shape), lambda: factors_R)
    if not config.conv_bias:
        shape = (config.conv_channels,)
        made |= {f"blk.{i}.ssm_conv1d.bias": (shape, partial(torch.zeros, shape)) for i in config.indices(MAMBA)}
    return made


def _type(name: str, shape: tuple[int, ...], config: ModelConfig, kind: str) -> str:
    """The type of a tensor in a file whose matrices are of this kind."""
    if len(shape) != 2:
        return "F32"
    head = "token_embd.weight" if config.tie_embeddings else "output.weight"
    if kind in ("q8_0", "q4_0") and shape[1] % BLOCK:
        return "F16"
    return "Q8_0" if kind == "q4_0" and name == head else TYPES[kind][0]


def _metadata(config: ModelConfig, kind: str) -> dict[str, Any]:
    """What the file says of the network. A hybrid's layers are told apart by their widths: both 0 is Mamba."""
    hybrid = config.family == "nemotron_h"
    said: dict[str, Any] = {
        "block_count": config.layers if hybrid else config.layers // 2,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.head_count": config.num_attention_heads,  # never a list: layer 0's would be taken for all
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if hybrid:
        said |= {
            "attention.layer_norm_epsilon": config.norm_eps,
            "attention.head_count_kv": [config.num_key_value_heads * (c == ATTENTION) for c in config.pattern],
            "feed_forward_length": [config.intermediate_size * (c == FEED_FORWARD) for c in config.pattern],
            "ssm.conv_kernel": config.conv_kernel,
            "ssm.inner_size": config.mamba_inner,
            "ssm.state_size": config.ssm_state_size,
            "ssm.time_step_rank": config.mamba_num_heads,
            "ssm.group_count": config.n_groups,
        }
    else:
        said |= {
            "attention.head_count_kv": config.num_key_value_heads,
            "feed_forward_length": config.intermediate_size,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": config.rope_theta,
        }
    said = {f"{config.family}.{key}": value for key, value in said.items()}
    return said | {"general.type": "model", "general.file_type": TYPES[kind][1], "general.quantization_version": 2}


def _add(writer: Any, key: str, value: Any) -> None:
    """One entry of the metadata, in the type that llama.cpp expects of such a value."""
    kinds: Mapping[type, str] = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)
