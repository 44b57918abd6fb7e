"""Tokenizer and base model, plain or quantised, from a folder or a hub id."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from common import cores, distributed, garbage
from common.conversation import thinking
from common.device import device, resolve_dtype
from common.errors import UserError, is_out_of_memory
from common.launch import rank
from common.model import folders, weights
from common.model.complete import check_finite, check_names, report_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.conversation.family import Family

# names that a text model has in the files of a model of images or sound too, and its own: old layout, and today's
TEXT_NAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
REPACKING = "support_avx512bf16_for_cpu"  # bitsandbytes 0.50 rounds 4-bit weights anew on a CPU that has bfloat16
EDGE = 1 << 20  # bytes hashed at each end of a weight file: a whole 70B checkpoint would take minutes
UNMADE = re.compile("not implemented for '(Byte|Char)'")  # of torch, for a quantised weight made at random


def load_tokenizer(path: str | Path, prompt: Family, mode: str = "auto") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with the family's chat template where it has none of its own.

    mode: of --thinking; the template is switched to it. UserError where there is none, it lacks a token the template
    needs, does not fit the model, the model is for other recipes, or the template has no such mode.
    """
    folders.check_folder(path, ("config.json", *folders.TOKENIZER_FILES))
    weights.check_tokenizer(path)
    config = _config_of(path)
    if config.get("model_type") not in CONFIG_MAPPING:  # transformers would guess
        folders.check_family(None, path, config, prompt)
    try:
        tokenizer = _loaded(AutoTokenizer, path, "分词器 tokenizer")
    except UserError:
        folders.check_tokenizer(path)  # transformers names a key that it missed, not the file
        raise
    own = tokenizer.chat_template
    if own is None:
        tokenizer.chat_template = prompt.template_for(tokenizer)
    folders.check_template(tokenizer, path)
    folders.check_family(tokenizer, path, config, prompt, own)
    _check_vocabulary(tokenizer, path)
    thinking.set_mode(tokenizer, mode, path)
    garbage.look_as_usual()  # all libraries are imported
    return tokenizer


def _config_of(path: str | Path) -> dict[str, Any]:
    """What config.json of a folder or hub id says, whether its model is known here or not; {} where none is read."""
    source = _from_modelscope(str(path)) if _is_modelscope(path) else path
    try:
        return PreTrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError):  # said when the config is loaded
        return {}


def pad_id_of(tokenizer: PreTrainedTokenizerBase, otherwise: int) -> int:
    """The id that fills up a batch: the tokenizer's own, or the id `otherwise` where it has none."""
    return otherwise if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """UserError where the model of which this is the tokenizer has not a row for each id; a folder may have none."""
    rows = _said_by_config(path, "vocab_size")
    if rows is not None:
        folders.check_vocabulary(tokenizer, rows, path)


def context_of(path: str | Path) -> int:
    """Most tokens of a prompt and its answer, as the config of a folder or hub id says; 0 where it does not."""
    return _said_by_config(path, "max_position_embeddings") or 0


def _said_by_config(path: str | Path, name: str) -> int | None:
    """A value of a model's config, of its part for text; None where it has no such value, or the folder no config."""
    if Path(path).expanduser().is_dir() and not (Path(path).expanduser() / "config.json").is_file():
        return None
    return getattr(_loaded(AutoConfig, path, "模型 model").get_text_config(), name, None)


def load_base(path: str | Path, dtype: str, bits: int = 0, attention: str = "auto") -> PreTrainedModel:
    """The base model in evaluation mode; `dtype` and `attention` are the values of the knobs.

    UserError where it cannot be loaded, or its files lack a weight, hold others, or values that are no numbers.

    It is on this process's device, except where each process will hold a part of it: then on the CPU, or in parts.
    bits: 4 (nf4, its constants quantised too; QLoRA, Dettmers et al. 2023, arXiv 2305.14314) or 8 (LLM.int8, Dettmers
    et al. 2022, arXiv 2208.07339) load the linear layers quantised, the head left as it is; 0 does not.
    """
    cores.share()
    folders.check_folder(path)
    kind, stored = resolve_dtype(dtype), _stored_bits(path)
    if stored not in (0, bits):
        raise UserError(
            f"{path}: 已量化为 {stored} 位 is quantised to {stored} bits already: --tuning qlora "
            f"--quantization_bit {stored}, or its unquantised original (export needs that one)"
        )
    weights.check_model(path)
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    if attention == "flash_attention_2":
        _check_flash(kind)
    if not bits:
        model = load_whole(path, dtype=kind, **options)
        if not (distributed.shards_weights() and rank()):  # nothing lies there yet
            check_finite(model, path)
        return (model if distributed.shards_weights() else model.to(device())).eval()
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError('--tuning qlora 需要 needs bitsandbytes: pip install "bitsandbytes>=0.50,<0.51"')
    options |= {} if stored else {"quantization_config": _quantisation(bits, kind)}
    model = load_whole(path, dtype=kind, device_map={"": device()}, **options)
    _tell_of_experts(model, path, bits)
    for module in model.modules():
        if hasattr(module, REPACKING):  # other weights, in evaluation and from then on, and not of every size
            setattr(module, REPACKING, False)
    return model.eval()


def _tell_of_experts(model: PreTrainedModel, path: str | Path, bits: int) -> None:
    """A line on stderr where experts share tensors: bitsandbytes quantises linear layers, and leaves these."""
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name and weight.dim() == 3]
    if experts and not rank():
        size = sum(weight.numel() * weight.element_size() for weight in experts) / 2**20
        kind = str(experts[0].dtype).removeprefix("torch.")
        told = f"the experts share tensors and are not quantised to {bits} bits: {size:,.1f} MiB in {kind}"
        print(f"{path}: 专家不量化 {told}", file=sys.stderr)


def _check_flash(kind: torch.dtype) -> None:
    """UserError where flash attention cannot compute in `kind`, or is not installed."""
    if kind == torch.float32:
        raise UserError(
            "--attn_implementation flash_attention_2: 不能用 float32 does not compute in float32: --dtype bfloat16 or "
            "float16, or --attn_implementation sdpa"
        )
    if not any(map(importlib.util.find_spec, ("flash_attn", "kernels"))):  # transformers takes either
        raise UserError(
            "--attn_implementation flash_attention_2 需要 needs flash-attn: pip install flash-attn "
            "--no-build-isolation; sdpa 不用安装 needs nothing"
        )


def load_whole(path: str | Path, **options: Any) -> PreTrainedModel:
    """The model at `path` as transformers loads it with `options`; UserError where its files do not fit it.

    Of a model of images or sound too only the text model is loaded, as one of text alone, and a line says what is not.
    """
    config = _loaded(AutoConfig, path, "模型 model")
    whole = _whole_of(config, path)
    if whole:
        options |= {"config": _of_text(config), "key_mapping": TEXT_NAMES}
    with report_hidden():
        asked = {"output_loading_info": True, "ignore_mismatched_sizes": True} | options
        model, info = _loaded(AutoModelForCausalLM, path, "模型 model", **asked)
    if whole:
        # transformers would give what is saved the names these files have
        model._weight_conversions = [one for one in model._weight_conversions if isinstance(one, WeightConverter)]
        info["unexpected_keys"] = _leave_out(whole, info["unexpected_keys"], path)
    check_names(model, info, path)
    return model


def _whole_of(config: PreTrainedConfig, path: str | Path) -> PreTrainedModel | None:
    """The model, without weights, of which the text model is a part; None for a model of text alone.

    UserError where transformers knows no such text model by itself.
    """
    text = config.get_text_config()
    if text is config:
        return None
    if type(config) not in MODEL_MAPPING or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{path}: 不是纯文本模型 not a model of text alone ({config.model_type}), and its text model "
            f"({text.model_type}) cannot be loaded without the rest"
        )
    with torch.device("meta"):
        return MODEL_MAPPING[type(config)](copy.deepcopy(config))


def _of_text(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model's part for text, with what the whole model's says of head and quantisation."""
    text = config.get_text_config()
    text.tie_word_embeddings = config.tie_word_embeddings
    if getattr(config, "quantization_config", None):
        text.quantization_config = config.quantization_config
    return text


def _leave_out(whole: PreTrainedModel, names: Iterable[str], path: str | Path) -> list[str]:
    """Those of `names`, of weights in its files, that no part of `whole` beside its text model has.

    A line says which parts these are, on stderr: stdout may be for an answer alone.
    """
    config, kind = whole.config, type(whole.config.get_text_config())
    parts = {name: part for name, part in whole.named_children() if type(getattr(part, "config", None)) is not kind}
    count = sum(parameter.numel() for part in parts.values() for parameter in part.parameters())
    size = count * (config.dtype or config.get_text_config().dtype or torch.float32).itemsize / 2**20
    if not rank():
        print(
            f"{path}: 只加载和训练语言模型 only its text model is loaded and trained; 不加载 left out: "
            f"{', '.join(parts)} ({count:,} 个参数 weights, {size:,.1f} MiB)",
            file=sys.stderr,
        )
    starts = tuple(f"{start}{part}." for part in parts for start in ("", "model."))
    renamings = [one for one in get_model_conversion_mapping(whole) if isinstance(one, WeightRenaming)]
    return [name for name in names if not _renamed(name, renamings).startswith(starts)]


def _renamed(name: str, renamings: Sequence[WeightRenaming]) -> str:
    for one in renamings:
        name, _ = one.rename_source_key(name)
    return name


def _quantisation(bits: int, kind: torch.dtype) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=kind, **double)


def _stored_bits(path: str | Path) -> int:
    """Bits to which bitsandbytes has quantised the model at `path`, or 0."""
    stored = getattr(_loaded(AutoConfig, path, "模型 model"), "quantization_config", None) or {}
    if stored.get("quant_method") != "bitsandbytes":
        return 0
    return 4 if stored.get("load_in_4bit") else 8


def _loaded(auto_class: Any, path: str | Path, what: str, **kwargs: Any) -> Any:
    source = _from_modelscope(str(path)) if _is_modelscope(path) else path
    try:
        return auto_class.from_pretrained(source, **kwargs)
    except Exception as problem:  # damaged files raise errors of half a dozen libraries
        if is_out_of_memory(problem):
            raise
        reason = " ".join(str(problem).split())[:300] or type(problem).__name__
        if UNMADE.search(reason):
            raise UserError(f"{path}: 缺少权重 weights are missing in its files, {reason}; {weights.AGAIN}") from None
        raise UserError(f"{path}: 无法加载{what} cannot be loaded: {reason}") from None


def _is_modelscope(path: str | Path) -> bool:
    return os.environ.get("USE_MODELSCOPE_HUB", "") in ("1", "true", "True") and not Path(path).expanduser().is_dir()


def _from_modelscope(path: str) -> str:
    """The folder of a ModelScope id, downloaded by its package where it is not in its cache."""
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise UserError(
            f"{path}: USE_MODELSCOPE_HUB 需要 needs the package modelscope: pip install modelscope"
        ) from None
    try:
        return snapshot_download(path)
    except Exception as problem:  # its own, requests' and urllib3's errors share no base class
        reason = " ".join(str(problem).split())[:300]
        raise UserError(f"{path}: 无法从 ModelScope 下载 cannot be downloaded from ModelScope: {reason}") from None


def base_hash(path: str | Path) -> str:
    """sha256 (hex) of a folder's config and weight files: names, sizes and both ends of each; "" for others."""
    folder = Path(path)
    configs = ("config.json", "adapter_config.json")
    if not any((folder / name).is_file() for name in configs):
        return ""
    digest = hashlib.sha256()
    for file in sorted(file for kind in ("*.safetensors", "*.bin", *configs) for file in folder.glob(kind)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read(EDGE))
    return digest.hexdigest()
