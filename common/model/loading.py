"""Base model, tokenizer and adapter: loaded, attached, shown, and checked after saving."""

import hashlib
import importlib.util
import math
import os
import re
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from common import distributed
from common.config import LORA
from common.errors import UserError

IDLE = re.compile("lora_B|lora_embedding_A")  # what starts at zero: where it still is, the layer does nothing
REPACKING = "support_avx512bf16_for_cpu"  # bitsandbytes 0.50 rounds 4-bit weights anew on a CPU that has bfloat16
EDGE = 1 << 20  # bytes hashed at each end of a weight file: a whole 70B checkpoint would take minutes


def device():
    """The device one process uses: its CUDA card, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(name):
    """torch dtype of the knob `dtype`. auto: bfloat16 on a GPU that has it, or float32; never float16 unasked.

    Not chosen by timing: one command would then compute differently from run to run (benchmarks/README.md).
    """
    if name != "auto":
        return getattr(torch, name)
    has_bf16 = device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float32


def load_tokenizer(path, prompt):
    """The tokenizer of a folder or hub id, with the family's chat template where it has none of its own.

    UserError where there is none, or it lacks a token the template needs.
    """
    tokenizer = _loaded(AutoTokenizer, path, "分词器 tokenizer")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = prompt.CHAT_TEMPLATE
    try:
        prompt.stop_ids(tokenizer, "chat")
    except ValueError as problem:
        raise UserError(f"{path}: {problem}; is it a model of this family?") from None
    return tokenizer


def load_base(path, dtype, bits=0):
    """The base model in evaluation mode; `dtype` is the knob's value.

    It is on this process's device, but where each process will hold a part of it: then it is on the CPU, or in parts.
    bits: 4 (nf4, its constants quantised too; QLoRA, Dettmers et al. 2023, arXiv 2305.14314) or 8 (LLM.int8, Dettmers
    et al. 2022, arXiv 2208.07339) load the linear layers quantised, the head left as it is; 0 does not.
    """
    kind, stored = resolve_dtype(dtype), _stored_bits(path)
    if stored not in (0, bits):
        raise UserError(
            f"{path}: 已量化为 {stored} 位 is quantised to {stored} bits already: --tuning qlora "
            f"--quantization_bit {stored}, or its unquantised original (export needs that one)"
        )
    if not bits:
        model = _loaded(AutoModelForCausalLM, path, "模型 model", dtype=kind)
        return (model if distributed.shards_weights() else model.to(device())).eval()
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError('--tuning qlora 需要 needs bitsandbytes: pip install "bitsandbytes>=0.50,<0.51"')
    options = {} if stored else {"quantization_config": _quantisation(bits, kind)}
    model = _loaded(AutoModelForCausalLM, path, "模型 model", dtype=kind, device_map={"": device()}, **options)
    for module in model.modules():
        if hasattr(module, REPACKING):  # other weights, in evaluation and from then on, and not of every size
            setattr(module, REPACKING, False)
    return model.eval()


def _quantisation(bits, kind):
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=kind, **double)


def _stored_bits(path):
    """Bits to which bitsandbytes has quantised the model at `path`, or 0; UserError where it takes more than text."""
    config = _loaded(AutoConfig, path, "模型 model")
    if config.get_text_config() is not config:
        raise UserError(
            f"{path}: 不是纯文本模型 not a model of text alone ({config.model_type}: images or sound beside it)"
        )
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") != "bitsandbytes":
        return 0
    return 4 if stored.get("load_in_4bit") else 8


def _loaded(auto_class, path, what, **kwargs):
    if str(path).startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
        raise UserError(f"{path}: 文件夹不存在 no such folder; check --path_model_pretrain")
    path = _from_modelscope(path) if _is_modelscope(path) else path
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except (OSError, ValueError, ImportError) as problem:  # the last: what a quantised checkpoint needs is missing
        reason = " ".join(str(problem).split())[:300]
        raise UserError(f"{path}: 无法加载{what} cannot be loaded: {reason}") from None


def _is_modelscope(path):
    return os.environ.get("USE_MODELSCOPE_HUB", "") in ("1", "true", "True") and not Path(path).expanduser().is_dir()


def _from_modelscope(path):
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


def load_tuned(trained, folder, dtype):
    """The tuned model in `folder`, as `trained` (of answer.open_run) says: base and adapter, or a whole model."""
    if trained["tuning"] not in LORA:
        return load_base(folder, dtype)
    _check_adapter_is_there(folder)  # before a large base is loaded for nothing
    return attach(load_base(trained["path_model_pretrain"], dtype, trained["bits"]), folder)


def _check_adapter_is_there(folder):
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{folder}: 没有适配器 there is no adapter; train first, or give --model_save_dir or --base")


def attach(base, folder, name="default"):
    """`base` with the adapter saved in `folder` under peft's `name`; UserError where a key is missing or left over.

    base: a model, or a PeftModel that gets one more adapter.
    """
    _check_adapter_is_there(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft only warns of missing keys; the comparison below refuses them
        try:
            if isinstance(base, PeftModel):
                base.load_adapter(folder, adapter_name=name)
                model = base
            else:
                model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        except (RuntimeError, ValueError) as problem:
            reason = " ".join(str(problem).split())[:200]
            raise UserError(f"{folder}: 适配器与模型不符 the adapter does not fit: {reason}") from None
    _compare(_adapter_state(model, name=name), load_file(_weights(folder)), folder)
    return model.eval()


def merge_reasons(model):
    """Why engines that only add LoRA to linear layers (vLLM) cannot serve this adapter beside its base; [] if none."""
    config, causal = model.peft_config["default"], model.get_base_model()
    changed = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    return [
        reason
        for reason, holds in (
            ("modules_to_save", bool(config.modules_to_save)),
            ("DoRA", config.use_dora),
            ("LoRA on embeddings or head", any(isinstance(module, BaseTunerLayer) for module in changed)),
        )
        if holds
    ]


def whole_state(model):
    """{name: tensor on the CPU} of what is saved of a model of which each process holds a part; all call it together.

    That is all that is trained of one with an adapter, and all of a model tuned without one, in the base's dtype.
    """
    if hasattr(model, "peft_config"):
        return {name: distributed.whole(p) for name, p in model.named_parameters() if p.requires_grad}
    return {name: distributed.whole(p).to(model.config.dtype) for name, p in model.named_parameters()}


def verify_adapter(model, folder, state=None):
    """Reopen what was just saved: the same keys and values as in memory, and no LoRA layer that does nothing.

    state: `whole_state(model)`, where the model itself may hold a part only.
    """
    saved = load_file(_weights(folder))
    _compare(_adapter_state(model, state), saved, folder)
    idle = [name for name, tensor in saved.items() if IDLE.search(name) and not tensor.any()]
    if idle:
        raise UserError(
            f"{folder}: 适配器不起作用 the adapter does nothing: {len(idle)} lora_B are zero, e.g. {idle[0]}"
        )


def verify_whole(model, folder, state=None):
    """Reopen a whole model just saved: each tensor is as in memory, and none is missing but those tied to another.

    state: `whole_state(model)`, where the model itself may hold a part only.
    """
    state, saved, different = state or model.state_dict(), set(), []
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = set(tensors.keys())
            saved |= names
            different += [n for n in names if n not in state or not torch.equal(state[n].cpu(), tensors.get_tensor(n))]
    places = {state[name].data_ptr() for name in saved & state.keys()}
    missing = [name for name in state.keys() - saved if state[name].data_ptr() not in places]
    if different or missing:
        raise UserError(
            f"{folder}: 保存的模型与内存中的不同 the saved model differs from the trained one: "
            f"{len(different)} 不同 different, {len(missing)} 缺少 missing, e.g. {sorted(different + missing)[0]}"
        )


def _adapter_state(model, state=None, name="default"):
    return get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)


def _weights(folder):
    return str(Path(folder) / "adapter_model.safetensors")


def _compare(expected, saved, folder):
    missing, surplus = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    different = [name for name in expected.keys() & saved.keys() if not torch.equal(expected[name].cpu(), saved[name])]
    for what, names in (("缺少 missing", missing), ("多余 unexpected", surplus), ("不同 different", sorted(different))):
        if names:
            raise UserError(
                f"{folder}: 适配器与模型不符 the adapter does not fit: {len(names)} {what}, e.g. {names[0]}"
            )


def base_hash(path):
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


def linear_layers(model):
    """{name: [(full name, shape [out, in])]} of the linear layers LoRA can attach to, the output head left out."""
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            found.setdefault(name.rpartition(".")[2], []).append((name, (module.out_features, module.in_features)))
    return found


def show_targets(model):
    """Print the linear layers LoRA can attach to."""
    print("可训练的线性层 linear layers for --target_modules (name, [out, in], count):")
    for name, layers in linear_layers(model).items():
        shapes = " ".join(sorted({str(list(shape)) for _, shape in layers}))
        print(f"  {name:<16} {shapes}  × {len(layers)}")


def show_parameters(model):
    """Print name, shape, dtype and trainability of each kind of parameter, and the trainable share."""
    kinds = {}
    for name, parameter in model.named_parameters():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        key = (kind, _shape(parameter), str(parameter.dtype).removeprefix("torch."), parameter.requires_grad)
        kinds[key] = kinds.get(key, 0) + 1
    for (kind, shape, dtype, trained), count in kinds.items():
        print(f"  {'训练 train' if trained else '冻结 frozen'} {kind} {list(shape)} {dtype} × {count}")
    trained, total = parameter_counts(model)
    print(f"可训练参数 trainable params: {trained:,} / {total:,} = {trained / total:.4%}")


def parameter_counts(model):
    """(trainable, all) parameters; two that 4 bits each put into one byte are two."""
    sizes = [(math.prod(_shape(p)), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _shape(parameter):
    """Its whole shape, also where this process holds a part (ZeRO-3 leaves an empty tensor), or 4 bits share a byte."""
    quantised = getattr(parameter, "quant_state", None)
    return tuple(quantised.shape if quantised else getattr(parameter, "ds_shape", parameter.shape))
