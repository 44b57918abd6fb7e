"""A whole model as one GGUF file, which llama.cpp, Ollama and LM Studio open; read back and compared.

Hyperparameters, tensors and tokenizer go by llama.cpp's names (the package gguf has them); what llama.cpp takes for
granted of a model type is in the family's GGUF, and a model that is otherwise is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from common.errors import UserError
from common.export import gguf_tokenizer, older, proof
from common.export.gguf_tensors import Part, head_sizes, of_layers, parts
from common.export.proof import say
from common.inference.remote import LONGEST

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from common.conversation.family import Family, Gguf
    from common.export.proof import Expected, Tuned

TYPES = {"f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "f32": Type.F32}
FILE_TYPES = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "f32": "ALL_F32"}
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.int8, "f32": torch.float32}
BLOCK = 32  # values that share a scale in q8_0
WHOLE = tuple(f"{one}.weight" for one in ("_norm", "ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d"))  # always fp32
SIZES = {  # what a config may say: gguf.GGUFWriter writes it by add_ and this
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "head_count",
    "num_key_value_heads": "head_count_kv",
    "rms_norm_eps": "layer_norm_rms_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "linear_conv_kernel_dim": "ssm_conv_kernel",
    "linear_key_head_dim": "ssm_state_size",
    "linear_num_key_heads": "ssm_group_count",
    "linear_num_value_heads": "ssm_time_step_rank",
    "top_k_experts": "expert_used_count",
}
ROPE = set("rope_type rope_theta factor partial_rotary_factor original_max_position_embeddings".split())
ROPE |= {"mrope_section", "mrope_interleaved"}
LINEAR, SLIDING = "linear_attention", "sliding_attention"


def check(config: PreTrainedConfig, prompt: Family) -> Gguf:
    """The Gguf of a model's type; UserError where llama.cpp has none, or computes such a model otherwise."""
    kind = prompt.GGUF.get(config.model_type)
    if kind is None:
        known = ", ".join(prompt.GGUF) or "none of this family 这个家族没有"
        raise UserError(f"--format gguf: 没有 {config.model_type} is not written as GGUF here; known: {known}")
    for wrong in _otherwise(config.to_dict(), kind):
        raise UserError(
            f"--format gguf: llama.cpp 不这样计算 {config.model_type} llama.cpp computes it otherwise: {wrong}; "
            "export as safetensors, without --format"
        )
    return kind


def check_all(config: PreTrainedConfig, tuned: Tuned, prompt: Family) -> None:
    """UserError where `check` or `gguf_tokenizer.read` has one."""
    check(config, prompt)
    words_of(tuned, config.vocab_size, prompt)


def _otherwise(config: dict[str, Any], kind: Gguf) -> Iterator[str]:
    """What of a config llama.cpp does not read from a file of this kind."""
    scalar, heads = config.get("query_pre_attn_scalar"), config["num_attention_heads"]
    wide = config["num_hidden_layers"] == kind.wide
    if scalar is not None and scalar != (config["hidden_size"] // heads if wide else head_sizes(config)[1]):
        yield f"query_pre_attn_scalar {scalar}"
    types = config.get("layer_types") or []
    windows = kind.mixed or (kind.period and older.sliding_period(config))
    if (SLIDING in types and not windows) or (LINEAR in types and not older.sliding_period(config, LINEAR)):
        yield f"layer_types {types}"
    if _turns_otherwise(config.get("rope_parameters") or {}, kind):
        yield f"rope_parameters {config['rope_parameters']}"
    if kind.tied and not config["tie_word_embeddings"]:
        yield "tie_word_embeddings false"
    if config.get("use_bidirectional_attention") not in (None, False, "vision"):  # vision: text is read as ever
        yield f"use_bidirectional_attention {config['use_bidirectional_attention']}"
    known = {"norm_topk_prob": kind.normed, "decoder_sparse_step": 1, "mlp_only_layers": []}
    known["linear_value_head_dim"] = config.get("linear_key_head_dim")
    if config.get("hidden_size_per_layer_input"):
        known["vocab_size_per_layer_input"] = config["vocab_size"]
    for name, value in known.items():
        if config.get(name, value) != value:
            yield f"{name} {config[name]}"


def _turns_otherwise(rope: dict[str, Any], kind: Gguf) -> bool:
    """Whether positions are told otherwise than llama.cpp does."""
    whole, local = rope.get("full_attention", rope), rope.get(SLIDING, {})
    if local.get("rope_type", "default") != "default" or "partial_rotary_factor" in local:
        return True
    known = ROPE - {"factor"} if kind.mixed else ROPE
    types = ("default", "proportional") if kind.mixed else ("default", "linear", "yarn")
    return whole.get("rope_type", "default") not in types or bool(whole.keys() - known)


def write(whole: PreTrainedModel, expected: Expected, file: Path, name: str, prompt: Family) -> str:
    """Write `whole`, in fp32, as weights of the type `name`; read it back, compare it, return the verdict in words.

    The tensors that were read back are in `whole` afterwards. UserError as in `check`, `gguf_tokenizer.read` and
    `proof.compare`, and where a tensor is not as near as its type allows.
    """
    tuned, kind = expected.tuned, check(whole.config, prompt)
    writer = gguf.GGUFWriter(file, kind.arch)
    writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[name]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_name(file.stem)
    _add_shape(writer, whole.config.to_dict(), kind)
    _add_tokenizer(writer, whole, tuned, prompt)
    if tuned.penalty != 1:  # what llama.cpp answers with unless a request says otherwise
        writer.add_sampling_penalty_repeat(tuned.penalty)
        writer.add_sampling_penalty_last_n(LONGEST)  # else of the last 64 ids only
    tensors = dict(parts(whole, kind))
    _write_tensors(writer, tensors, TYPES[name])
    say("读回 reading back: 与训练后的模型比较 and comparing with the tuned model")
    _read_back(file, tensors)
    return proof.compare(whole, expected, DTYPES[name])


def _write_tensors(writer: gguf.GGUFWriter, tensors: dict[str, Part], wanted: Type) -> None:
    """Write one tensor after the other, each as the type `wanted` where it can be."""
    types = {label: _type(label, part.of, wanted) for label, part in tensors.items()}
    for label, part in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(part.of.shape, types[label])
        plain = {Type.F32: np.float32, Type.F16: np.float16}.get(types[label])
        size = int(np.prod(shape))
        dtype, shape = (np.dtype(plain), tuple(part.of.shape)) if plain else (np.dtype(np.uint8), shape)
        writer.add_tensor_info(label, shape, dtype, size, raw_dtype=types[label])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for label, part in tensors.items():
        writer.write_tensor_data(gguf.quants.quantize(part.make(), types[label]))
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any], kind: Gguf) -> None:
    """Write sizes, positions and windows of a model."""
    head, head_of_window = head_sizes(config)
    sizes = config | _sizes_of_layers(config) if kind.mixed else config
    for name, label in SIZES.items():
        if sizes.get(name):
            getattr(writer, f"add_{label}")(sizes[name])
    writer.add_key_length(head)
    writer.add_value_length(head)
    rope = config["rope_parameters"]
    if kind.mixed:
        _add_layers(writer, config, head_of_window)
    else:
        _add_rope(writer, rope.get("full_attention", rope), head)
    if LINEAR in (config.get("layer_types") or []):
        writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
        writer.add_full_attention_interval(older.sliding_period(config, LINEAR))
        # pairs that turn by each axis of a picture, which in a text are all one
        pairs = int(head * rope.get("partial_rotary_factor", 1)) // 2
        thirds = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]
        writer.add_rope_dimension_sections([*rope.get("mrope_section", thirds), 0])
    if kind.period and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
        if (period := older.sliding_period(config)) != kind.period:
            writer.add_sliding_window_pattern(period)
        local = rope.get(SLIDING, rope)["rope_theta"]
        if local != (kind.local or rope.get("full_attention", rope)["rope_theta"]):
            writer.add_rope_freq_base_swa(local)


def _add_layers(writer: gguf.GGUFWriter, config: dict[str, Any], head_of_window: int) -> None:
    """Write what differs by layer: windows, heads, positions, and who reads the keys of an earlier layer."""
    writer.add_shared_kv_layers(config.get("num_kv_shared_layers") or 0)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == SLIDING for kind in config["layer_types"]])
    writer.add_embedding_length_per_layer_input(config.get("hidden_size_per_layer_input") or 0)
    writer.add_key_length_swa(head_of_window)
    writer.add_value_length_swa(head_of_window)
    writer.add_rope_dimension_count_swa(head_of_window)
    writer.add_rope_freq_base_swa(config["rope_parameters"][SLIDING]["rope_theta"])
    writer.add_rope_dimension_count(head_sizes(config)[0])
    writer.add_rope_freq_base(config["rope_parameters"]["full_attention"]["rope_theta"])


def _sizes_of_layers(config: dict[str, Any]) -> dict[str, list[int]]:
    """Those of SIZES that are one number a layer."""
    wide = config["num_kv_shared_layers"] if config.get("use_double_wide_mlp") else 0
    size, heads = config["intermediate_size"], config["num_key_value_heads"]
    return {
        "num_key_value_heads": of_layers(config, "num_key_value_heads", heads),
        "intermediate_size": [size] * (config["num_hidden_layers"] - wide) + [2 * size] * wide,
    }


def _add_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], head: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        writer.add_rope_dimension_count(int(head * rope["partial_rotary_factor"]))
    if rope.get("rope_type", "default") == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def words_of(tuned: Tuned, rows: int, prompt: Family) -> gguf_tokenizer.Vocabulary:
    """The run's tokenizer as llama.cpp reads one, for an embedding of so many rows; UserError where it cannot."""
    return gguf_tokenizer.read(tuned.tokenizer, rows, prompt.GGUF_WORDS, tuned.manifest["base"]["path"])


def _add_tokenizer(writer: gguf.GGUFWriter, whole: PreTrainedModel, tuned: Tuned, prompt: Family) -> None:
    words = words_of(tuned, whole.get_input_embeddings().weight.shape[0], prompt)
    begins = tuned.tokenizer.bos_token_id is not None and tuned.prompts[0][0] == tuned.tokenizer.bos_token_id
    gguf_tokenizer.add(writer, words, tuned.tokenizer, tuned.stop_ids, begins)


def _type(label: str, tensor: torch.Tensor, wanted: Type) -> Type:
    """The type a tensor is written in: norms, biases and routers whole, rows that fit no block in f16."""
    if tensor.dim() == 1 or label.endswith(WHOLE):
        return Type.F32
    return Type.F16 if wanted == Type.Q8_0 and tensor.shape[-1] % BLOCK else wanted


def _read_back(file: Path, tensors: dict[str, Part]) -> None:
    """Put the file's tensors in place of those they were made of; UserError where one is lost or further off."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    if found.keys() != tensors.keys():
        raise UserError(f"{file.name}: 张量不全 tensors are lost: {sorted(found.keys() ^ tensors.keys())[:3]}")
    for label, part in tensors.items():
        source = part.make()
        read = gguf.quants.dequantize(found[label].data, found[label].tensor_type).reshape(source.shape)
        if not (np.abs(read - source) <= rounding(source, found[label].tensor_type)).all():
            raise UserError(f"{file.name}: {label} 与写入的不同 differs from what was written; try --gguf_type f32")
        part.put_back(read)


def limit_of(file: Path) -> float:
    """Share of the largest logit within which two ids are a tie for a file's weights; float32's for unknown ones."""
    kind = gguf.GGUFReader(file).fields["general.file_type"].contents()
    names = [name for name, label in FILE_TYPES.items() if getattr(gguf.LlamaFileType, label) == kind]
    return proof.TOLERANCE[DTYPES[names[0]] if names else torch.float32]


def rounding(source: np.ndarray, kind: Type) -> np.ndarray:
    """How far each value may be from its source in a type: half a step of it, and of q8_0 its scale's in f16 too."""
    size = np.abs(source)
    if kind == Type.F32:
        return np.zeros_like(size)
    if kind == Type.Q8_0:
        largest = size.reshape(-1, BLOCK).max(axis=1, keepdims=True)
        return np.broadcast_to(largest * (0.5 / 127 + 2**-11) * 1.001 + 2**-24 * 128, (largest.size, BLOCK)).reshape(
            size.shape
        )
    return size * 2.0 ** (-11 if kind == Type.F16 else -8) + 2.0**-25
