"""A run's LoRA adapter as GGUF, which llama.cpp adds to a GGUF of its base; read back and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
from safetensors.torch import load_file

from common.errors import UserError
from common.export import gguf_file
from common.export.gguf_tensors import ARCHS, axis_of_heads, label_of, order_of_heads
from common.model.adapter import config_of
from common.model.layers import causal_of
from common.model.weights import adapter_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from common.conversation.family import Family, Gguf
    from common.export.proof import Tuned

PREFIX = "base_model.model."
HALVES = {".lora_A.weight": ".weight.lora_a", ".lora_B.weight": ".weight.lora_b"}  # peft's names: llama.cpp's
SHARED = {".lora_A.weight": 1, ".lora_B.weight": 0}  # the axis that a half has in common with its weight


def check(tuned: Tuned, run: Path, kind: Gguf) -> None:
    """UserError where the run in the folder `run` has no adapter, or one that llama.cpp would not add as it is.

    kind: of the base.
    """
    if not tuned.rank:
        raise UserError("--format gguf-lora: 这个训练没有适配器 the run has no adapter: use --format gguf")
    config = config_of(run)
    patterns = ["ranks of its own for some layers"] * bool(config.rank_pattern or config.alpha_pattern)
    if reasons := [*tuned.merge_reasons, *patterns]:
        raise UserError(
            "--format gguf-lora: 适配器不只是线性层上的 LoRA the adapter is more than LoRA on linear layers: "
            f"{', '.join(reasons)}; use --format gguf"
        )
    labels = {label.partition(".weight.")[0] for label in _tensors(run, kind, causal_of(tuned.net).config)}
    if without := sorted(labels.intersection(kind.no_lora)):
        raise UserError(
            f"--format gguf-lora: llama.cpp 不加这里的适配器 llama.cpp adds no adapter to {', '.join(without)}; "
            "use --format gguf"
        )


def write(tuned: Tuned, run: Path, file: Path, name: str, prompt: Family) -> str:
    """Write the adapter in the folder `run` as weights of the type `name`, read it back; the verdict in words."""
    model, config, kind = causal_of(tuned.net).config, config_of(run), gguf_file.TYPES[name]
    model_kind = gguf_file.check(model, prompt)
    tensors = _tensors(run, model_kind, model)
    writer = gguf.GGUFWriter(file, model_kind.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp's scale is alpha / rank; rsLoRA's is alpha / sqrt(rank)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config.lora_alpha * (config.r**0.5 if config.use_rslora else 1))
    for label, tensor in tensors.items():
        writer.add_tensor(label, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for found in gguf.GGUFReader(file).tensors:
        source, data = tensors.pop(found.name), np.asarray(found.data)
        read = gguf.quants.dequantize(data, found.tensor_type).reshape(source.shape)
        if not (np.abs(read - source) <= gguf_file.rounding(source, found.tensor_type)).all():
            raise UserError(f"{file.name}: {found.name} 与写入的不同 differs from what was written")
    if tensors:
        raise UserError(f"{file.name}: 张量不全 tensors are lost: {sorted(tensors)[:3]}")
    return "张量一致 tensors are equal; 没有问 llama.cpp was not asked: it needs a GGUF of the base"


def _tensors(run: Path, kind: Gguf, config: PreTrainedConfig) -> dict[str, np.ndarray]:
    """{llama.cpp's name: fp32 values [rank, in] or [out, rank]} of the adapter in the folder `run`."""
    names, found = gguf.get_tensor_name_map(ARCHS[kind.arch], config.num_hidden_layers), {}
    for name, tensor in load_file(adapter_file(run)).items():
        half = next(half for half in HALVES if name.endswith(half))
        label = label_of(name.removeprefix(PREFIX).removesuffix(half), names, kind)
        if (axis := axis_of_heads(config, label)) == SHARED[half]:
            tensor = tensor.index_select(axis, order_of_heads(config, label, tensor.shape[axis]))
        found[label.removesuffix(".weight") + HALVES[half]] = tensor.float().numpy()
    return found
