"""What a model is made of: its linear layers, its parameters, and how they are shown."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from common.peft_names import LoraConfig, LoraLayer, convert_peft_config_for_transformers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# an indexer chooses the ids that are attended to; of the coefs the model reads the weight itself while it is trained
UNREACHED = frozenset(("indexer", "correction_coefs"))
NEW = re.compile(r"\.(lora_\w+|modules_to_save|trainable_tokens_delta)\.")  # in names of weights that peft adds


def causal_of(net: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The causal model itself: what is in peft's wrapper, or `net` where it has none."""
    return net.get_base_model() if hasattr(net, "get_base_model") else net


def short_name(name: str) -> str:
    """The last part of a module's name; of one in a list that of the list too: decoder layers have numbers as well."""
    *_, before, last = ["", *name.split(".")]
    return f"{before}.{last}" if last.isdigit() else last


def linear_layers(model: PreTrainedModel | PeftModel) -> dict[str, list[tuple[str, tuple[int, int]]]]:
    """{name: [(full name, shape [out, in])]} of the linear layers LoRA can attach to, the output head left out.

    So are those of UNREACHED: no gradient of the loss reaches LoRA there.
    """
    head = model.get_output_embeddings()
    found: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and UNREACHED.isdisjoint(name.split(".")):
            found.setdefault(short_name(name), []).append((name, (module.out_features, module.in_features)))
    return found


def layers_reached(model: PreTrainedModel, names: Collection[str]) -> tuple[int, int]:
    """(decoder layers in which a module has one of these names, or ends with one; all decoder layers)."""
    layers = model.get_decoder().layers
    if "all-linear" in names:
        return len(layers), len(layers)
    ends = tuple(f".{name}" for name in names)
    within = {module: name for name, module in model.named_modules() if f".{name}".endswith(ends)}
    return sum(any(module in within for module in layer.modules()) for layer in layers), len(layers)


def fused_experts(model: PreTrainedModel, names: Collection[str]) -> list[str]:
    """Names of the tensors that each hold all experts' weights, which peft adapts where modules of `names` are wanted.

    Where it does, these names stand for the experts alone: a dense layer's gate_proj beside them is not adapted.
    """
    config = LoraConfig(target_modules=list(names))
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # not all that one tensor holds is wanted: get_peft_model refuses it too, and is reported
        return []
    return sorted(config.target_parameters or ())


def names_in_experts(model: PreTrainedModel) -> set[str]:
    """Names that linear layers of experts have in its files, where it holds all experts in a tensor that peft adapts.

    No module has these names; a model may have them beside, in dense layers or experts for all.
    """
    if not any(".experts." in name for name, _ in model.named_parameters()):
        return set()
    fused = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)]
    patterns = [pattern for one in fused for pattern in one.source_patterns if ".experts." in pattern]
    names = {pattern.removesuffix(".weight").rpartition(".")[2] for pattern in patterns}
    return names if names and fused_experts(model, names) else set()


def show_targets(model: PreTrainedModel | PeftModel) -> None:
    """Print the linear layers LoRA can attach to."""
    print("可训练的线性层 linear layers for --target_modules (name, [out, in], count):")
    for name, layers in linear_layers(model).items():
        shapes = " ".join(sorted({str(list(shape)) for _, shape in layers}))
        print(f"  {name:<16} {shapes}  × {len(layers)}")
    if experts := names_in_experts(causal_of(model)):
        print(f"  专家共用的张量里 in tensors that experts share: {' '.join(sorted(experts))}")


def show_parameters(model: torch.nn.Module) -> None:
    """Print name, shape, dtype and trainability of each kind of parameter, and the trainable share."""
    kinds: dict[tuple[str, tuple[int, ...], str, bool], int] = {}
    for name, parameter in model.named_parameters():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        key = (kind, _shape(parameter), str(parameter.dtype).removeprefix("torch."), parameter.requires_grad)
        kinds[key] = kinds.get(key, 0) + 1
    for (kind, shape, dtype, learns), count in kinds.items():
        print(f"  {'训练 train' if learns else '冻结 frozen'} {kind} {list(shape)} {dtype} × {count}")
    trained, total = parameter_counts(model)
    print(f"可训练参数 trainable params: {trained:,} / {total:,} = {trained / total:.4%}")
    if hasattr(model, "peft_config"):
        show_reach(model)


def show_reach(net: PeftModel) -> None:
    """Print in one line on which modules LoRA is, their share of the model's weights, and what the others are.

    Those of modules_to_save, which are trained as a whole, and single trained rows are among the others.
    """
    adapted = {name: module for name, module in net.named_modules() if isinstance(module, LoraLayer)}
    names = {getattr(module, "parameter_name", short_name(name)) for name, module in adapted.items()}
    reached = {id(_base_weight(module)) for module in adapted.values()}
    sizes = dict.fromkeys(("", "embeddings", "head", "experts", "linear", "norms", "other"), 0)
    head, seen = causal_of(net).get_output_embeddings(), set()
    for name, module in net.named_modules():
        for own, weight in module.named_parameters(recurse=False):
            if NEW.search(f"{name}.{own}") or id(weight) in seen:
                continue
            seen.add(id(weight))
            sizes["" if id(weight) in reached else _kind(name, module, head)] += math.prod(_shape(weight))
    whole = sum(sizes.values())
    rest = ", ".join(f"{kind} {_percent(size / whole)}" for kind, size in sizes.items() if kind and size)
    print(
        f"LoRA: {' '.join(sorted(names))} 覆盖权重的 reaches {_percent(sizes[''] / whole)} of the weights; "
        f"其余 the rest: {rest}"
    )


def _base_weight(module: LoraLayer) -> torch.nn.Parameter:
    """What LoRA adapts there: the weight of a layer, or a tensor of all experts."""
    return module.get_param() if hasattr(module, "get_param") else module.get_base_layer().weight


def _kind(name: str, module: torch.nn.Module, head: torch.nn.Module) -> str:
    """Of weights that LoRA does not reach, by the module that holds them."""
    if isinstance(module, torch.nn.Embedding):
        return "embeddings"
    if module in head.modules():
        return "head"
    if "experts" in name.split("."):
        return "experts"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    return "norms" if "norm" in type(module).__name__.lower() else "other"


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0.001 <= share <= 0.999 or share in (0, 1) else f"{share:.2%}"


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; two that 4 bits each put into one byte are two."""
    sizes = [(math.prod(_shape(p)), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Its whole shape, also where this process holds a part (ZeRO-3 leaves an empty tensor), or 4 bits share a byte."""
    quantised = getattr(parameter, "quant_state", None)
    return tuple(quantised.shape if quantised else getattr(parameter, "ds_shape", parameter.shape))
