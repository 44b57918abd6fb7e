"""Base model, tokenizer and adapter: loaded, attached, shown, and checked after saving."""

import hashlib
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError

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


def load_base(path, dtype):
    """The base model on this process's device, in evaluation mode; `dtype` is the knob's value."""
    model = _loaded(AutoModelForCausalLM, path, "模型 model", dtype=resolve_dtype(dtype))
    return model.to(device()).eval()


def _loaded(auto_class, path, what, **kwargs):
    if str(path).startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
        raise UserError(f"{path}: 文件夹不存在 no such folder; check --path_model_pretrain")
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise UserError(f"{path}: 无法加载{what} cannot be loaded: {reason}") from None


def add_lora(model, cfg):
    """`model` with fresh LoRA layers on `cfg.target_modules`, everything else frozen.

    LoRA weights stay fp32 over a bf16 base. LoRA: Hu et al. 2021, arXiv 2106.09685.
    """
    targets = "all-linear" if cfg.target_modules == ("all-linear",) else list(cfg.target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=targets,
        modules_to_save=list(cfg.modules_to_save) or None,
    )
    torch.manual_seed(cfg.seed)
    try:
        return get_peft_model(model, lora)
    except ValueError as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(
            f"--target_modules {' '.join(cfg.target_modules)}: {reason}; --print_targets 列出 lists them"
        ) from None


def load_tuned(base, folder):
    """`base` with the adapter saved in `folder`; UserError where a key is missing or left over."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{folder}: 没有适配器 there is no adapter; train first, or give --model_save_dir or --base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft only warns of missing keys; the comparison below refuses them
        model = PeftModel.from_pretrained(base, folder)
    _compare(get_peft_model_state_dict(model), load_file(_weights(folder)), folder)
    return model.eval()


def verify_adapter(model, folder):
    """Reopen what was just saved: the same keys and values as in memory, and no LoRA layer that does nothing."""
    saved = load_file(_weights(folder))
    _compare({k: v.cpu() for k, v in get_peft_model_state_dict(model).items()}, saved, folder)
    idle = [name for name, tensor in saved.items() if "lora_B" in name and not tensor.any()]
    if idle:
        raise UserError(
            f"{folder}: 适配器不起作用 the adapter does nothing: {len(idle)} lora_B are zero, e.g. {idle[0]}"
        )


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
    """sha256 (hex) of a local base's config and weight files: names, sizes and both ends of each; "" for hub ids."""
    folder = Path(path)
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
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
            found.setdefault(name.rpartition(".")[2], []).append((name, tuple(module.weight.shape)))
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
        key = (kind, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."), parameter.requires_grad)
        kinds[key] = kinds.get(key, 0) + 1
    for (kind, shape, dtype, trained), count in kinds.items():
        print(f"  {'训练 train' if trained else '冻结 frozen'} {kind} {list(shape)} {dtype} × {count}")
    trained, total = parameter_counts(model)
    print(f"可训练参数 trainable params: {trained:,} / {total:,} = {trained / total:.4%}")


def parameter_counts(model):
    """(trainable, all) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
