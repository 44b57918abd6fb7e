"""What is trained: LoRA with its variants, over a plain or a quantised base, the whole model, or its last layers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file

from common import distributed
from common.config import LORA, SFTConfig
from common.device import resolve_dtype
from common.errors import UserError
from common.launch import rank
from common.model import adapter
from common.model.layers import fused_experts, layers_reached, linear_layers, names_in_experts, short_name
from common.model.template_tokens import rows_to_train
from common.model.token_rows import mend
from common.model.weights import readable
from common.peft_names import LoraConfig, get_peft_model, without_bitsandbytes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SAMPLE = 1024  # values of each trained tensor that are kept to tell whether it moved
PISSA_START = "pissa_start.safetensors"
ROWS_RATE = 5  # times the learning rate, for rows of control tokens: they have far to go, and rarely a say


Config = TypeVar("Config", bound=SFTConfig)  # a family's


class Start(NamedTuple):
    """How what is trained was before the first step; `settle` needs it."""

    samples: dict[str, torch.Tensor]  # {parameter: some of its values}
    pissa: dict[str, tuple[torch.Tensor, torch.Tensor]]  # {layer: (A [r, in], B [out, r])} of PiSSA, else {}


def fit_targets(cfg: Config, base: PreTrainedModel, parent: Path | None = None) -> Config:
    """`cfg` as `reach_all` and `without_dropout` fit it to the layers of `base`; a run's manifest keeps the result."""
    return without_dropout(reach_all(cfg, base, parent), base, parent)


def reach_all(cfg: Config, base: PreTrainedModel, parent: Path | None = None) -> Config:
    """`cfg` with all-linear where the family's own target_modules are not in every layer of `base`; a line says so.

    In a model of linear attention q, k and v are in one layer of four. What the user gave stays as it is, and so do the
    modules of the adapter in `parent`.
    """
    if cfg.tuning not in LORA or parent:
        return cfg
    reached, layers = layers_reached(base, cfg.target_modules)
    if reached == layers:
        return cfg
    told = f"{' '.join(cfg.target_modules)}: {layers} 层中只有 {reached} 层有 in {reached} of {layers} layers only"
    if "target_modules" in cfg.given:
        print(f"LoRA: {told}; --target_modules all-linear 可到每一层 reaches all")
        return cfg
    print(f"LoRA: {told}; 改用 taken instead: --target_modules all-linear")
    return replace(cfg, target_modules=("all-linear",))


def without_dropout(cfg: Config, base: PreTrainedModel, parent: Path | None = None) -> Config:
    """`cfg` with lora_dropout 0 where LoRA is on experts that share a tensor, for which peft has none; a line says so.

    parent: folder of the adapter whose weights are trained on. UserError where the user asks for dropout.
    """
    if cfg.tuning not in LORA or not cfg.lora_dropout:
        return cfg
    if parent:
        experts = sorted(adapter.config_of(parent).target_parameters or ())
    else:
        experts = fused_experts(base, named(base, cfg.target_modules))
    if not experts:
        return cfg
    if "lora_dropout" in cfg.given:
        raise UserError(
            f"--lora_dropout {cfg.lora_dropout:g}: 专家共用的张量上没有 there is none on tensors that experts share "
            f"({', '.join(experts)}): --lora_dropout 0, or --target_modules without the experts' layers"
        )
    print(f"LoRA: 专家也训练 on experts too ({', '.join(experts)}), 没有 dropout without dropout: --lora_dropout 0")
    return replace(cfg, lora_dropout=0.0)


def make_trainable(
    base: PreTrainedModel, cfg: SFTConfig, token_ids: Sequence[int] = (), parent: Path | None = None
) -> PreTrainedModel | PeftModel:
    """`base` with what `cfg.tuning` trains ready for it, everything else frozen.

    token_ids: whose rows of embedding and head are trained beside LoRA, see template_tokens.to_train. parent: folder of
    the adapter whose weights are trained on, of the shape that `cfg` says (lineage.inherit); its rows are its own.
    What is trained is fp32, also over a bf16 base: steps smaller than bf16 can tell apart would be lost.
    """
    torch.manual_seed(cfg.seed)
    if parent:
        net = _go_on(base, cfg, parent)
    else:
        prepare = {"full": _train_all, "freeze": _train_last_layers}.get(cfg.tuning)
        net = prepare(base, cfg) if prepare else _add_lora(base, cfg, token_ids)
    for parameter in _trained(net).values():
        if not hasattr(parameter, "ds_id"):  # DeepSpeed keeps fp32 by itself
            parameter.data = parameter.data.float()
    return net


def hasten_rows(optimizer: torch.optim.Optimizer, net: torch.nn.Module) -> None:
    """Let the rows of control tokens learn ROWS_RATE times as fast as the rest, without decay, which pulls to zero."""
    rows = {id(p): p for name, p in _trained(net).items() if "trainable_tokens_delta" in name}
    if rows:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in rows]
        rate = ROWS_RATE * optimizer.defaults["lr"]
        optimizer.add_param_group({"params": list(rows.values()), "lr": rate, "weight_decay": 0.0})


def start_of(net: PreTrainedModel | PeftModel, cfg: SFTConfig) -> Start:
    """The Start of what `make_trainable` has made; PiSSA's is kept in a file of the run's folder until `settle`.

    UserError where a run that is resumed started from another PiSSA.
    """
    samples = {name: _sample(parameter) for name, parameter in _trained(net).items()}
    return Start(samples, _pissa_start(net, Path(cfg.model_save_dir) / PISSA_START) if cfg.use_pissa else {})


def settle(net: PreTrainedModel | PeftModel, cfg: SFTConfig, start: Start) -> None:
    """Bring a trained net into the state it is saved in: PiSSA as plain LoRA, trained base weights in the base's dtype.

    UserError where no weight has moved: every step was too small, or nothing was learned. Of a model in parts nothing
    is changed here: its parts are put together when it is saved.
    """
    if distributed.is_sharded(net):
        return
    dtype, trained = resolve_dtype(cfg.dtype), _trained(net)
    for name, parameter in trained.items():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    if all(torch.equal(start.samples[name].to(w.dtype), _sample(w)) for name, w in trained.items()):
        raise UserError(
            f"没有学到东西 nothing was learned: no trained weight differs from its start in {dtype}; "
            "raise --learning_rate, or train for more steps"
        )
    if cfg.use_pissa:
        _pissa_to_lora(net, start.pissa)
        (Path(cfg.model_save_dir) / PISSA_START).unlink(missing_ok=True)


def named(model: PreTrainedModel, words: Iterable[str]) -> list[str]:
    """Module names for `words`: names stay, all-linear, all-embedding and all-norm become the names they stand for.

    Those of experts that share a tensor (names_in_experts) are names too. The output head is no part of all-linear: it
    is given by its name. UserError where a name fits no module.
    """
    experts, modules = names_in_experts(model), dict(model.named_modules())
    linear = set(linear_layers(model)) | experts
    kinds: dict[str, set[str]] = {"all-linear": linear, "all-embedding": set(), "all-norm": set()}
    for name, module in modules.items():
        if isinstance(module, torch.nn.Embedding):
            kinds["all-embedding"].add(short_name(name))
        elif "norm" in type(module).__name__.lower():
            kinds["all-norm"].add(short_name(name))
    for word in words:
        if word not in {*kinds, *experts} and not any(f".{name}".endswith(f".{word}") for name in modules):
            raise UserError(f"{word}: 没有这个模块 no such module in the model; --print_targets 列出 lists them")
    return sorted(set().union(*(kinds.get(word, {word}) for word in words)))


def _train_all(base: PreTrainedModel, cfg: SFTConfig) -> PreTrainedModel:
    return base.requires_grad_(True)


def _train_last_layers(base: PreTrainedModel, cfg: SFTConfig) -> PreTrainedModel:
    layers, count = base.get_decoder().layers, cfg.freeze_trainable_layers
    if count > len(layers):
        raise UserError(f"--freeze_trainable_layers {count}: 模型只有 the model has only {len(layers)} layers")
    base.requires_grad_(False)
    layers[-count:].requires_grad_(True)
    return base


def _add_lora(base: PreTrainedModel, cfg: SFTConfig, token_ids: Sequence[int]) -> PeftModel:
    """`base` with fresh LoRA layers on `cfg.target_modules`; besides only `cfg.modules_to_save` and rows are trained.

    LoRA: Hu et al. 2021, arXiv 2106.09685. rsLoRA: Kalajdzievski 2023, arXiv 2312.03732. DoRA: Liu et al. 2024, arXiv
    2402.09353. PiSSA: Meng et al. 2024, arXiv 2404.02948.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        use_rslora=cfg.use_rslora,
        use_dora=cfg.use_dora,
        init_lora_weights="pissa_niter_16" if cfg.use_pissa else True,
        target_modules=named(base, cfg.target_modules),
        modules_to_save=named(base, cfg.modules_to_save) or None,
        trainable_token_indices=rows_to_train(base, token_ids),
    )
    _check_shared(base, cfg)
    if cfg.use_pissa:
        _check_pissa(base, config)
    try:
        with warnings.catch_warnings(), without_bitsandbytes():
            warnings.filterwarnings("ignore", "Model has .tie_word_embeddings")  # export unties what was changed
            net = get_peft_model(base, config)
    except ValueError as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(
            f"--target_modules {' '.join(cfg.target_modules)}: {reason}; --print_targets 列出 lists them"
        ) from None
    mend(net)
    return net


def _go_on(base: PreTrainedModel, cfg: SFTConfig, parent: Path) -> PeftModel:
    """`base` with the LoRA layers saved in `parent`, as they are; UserError where the user asks for other modules."""
    _check_shared(base, cfg)
    config = adapter.config_of(parent)
    for name in sorted(cfg.given & {"target_modules", "modules_to_save"}):
        theirs = adapter.modules_of(config, name)
        if set(named(base, getattr(cfg, name))) != set(theirs):
            raise UserError(
                f"--{name} {' '.join(getattr(cfg, name))}: 适配器的是 the adapter in {parent} has "
                f"{' '.join(theirs) or 'none'}; leave the flag out, or train without --adapter_name_or_path"
            )
    rows = "true" if config.trainable_token_indices else "false"
    if "train_template_tokens" in cfg.given and cfg.train_template_tokens not in ("auto", rows):
        raise UserError(
            f"--train_template_tokens {cfg.train_template_tokens}: 适配器的是 of the adapter in {parent} it is {rows}; "
            "leave the flag out, or train without --adapter_name_or_path"
        )
    return adapter.attach(base, parent, dropout=cfg.lora_dropout)


def _check_shared(base: PreTrainedModel, cfg: SFTConfig) -> None:
    """UserError where FSDP2 would have to split weights that two modules share."""
    if cfg.modules_to_save and base.config.tie_word_embeddings and distributed.strategy(cfg) == "FSDP2":
        raise UserError(
            f"--modules_to_save {' '.join(cfg.modules_to_save)}: FSDP2 不能拆分共享的权重 cannot split weights that "
            "embedding and head share; use DDP or configs/deepspeed/zero3.json"
        )


def _check_pissa(base: PreTrainedModel, config: LoraConfig) -> None:
    """UserError where PiSSA cannot split a target: it takes linear layers, and changes their weights."""
    if distributed.shards_weights():
        raise UserError(
            "--use_pissa: 权重分片时不能用 splits whole weights: not with FSDP2 or ZeRO-3, whose processes hold parts"
        )
    linear = linear_layers(base)
    other = [name for name in config.target_modules if name not in linear]
    if other:
        raise UserError(
            f"--use_pissa: {' '.join(other)} 不是线性层或是输出层 is no linear layer, or the head: "
            "PiSSA splits a weight of the base, which others may share; leave it out of --target_modules"
        )


def _pissa_start(net: PeftModel, file: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{layer: (A, B)} that PiSSA starts from; kept in `file` too, so that a resumed run is known to start alike."""
    layers = [(name, module) for name, module in net.named_modules() if hasattr(module, "lora_A")]
    start = {name: tuple(w.detach().clone() for w in _factors(module)) for name, module in layers}
    tensors = {f"{name}.{part}": w for name, pair in start.items() for part, w in zip("AB", pair, strict=True)}
    if file.exists():
        with readable(file):
            earlier = load_file(file)
        if not all(torch.allclose(earlier[name], w.cpu(), atol=1e-6) for name, w in tensors.items()):
            raise UserError(
                f"{file}: PiSSA 的起点与那次训练不同 starts elsewhere than the run to be resumed (another machine?); "
                "--resume never 重新开始 starts anew"
            )
    elif rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: w.cpu().contiguous() for name, w in tensors.items()}, f"{file}.part")
        os.replace(f"{file}.part", file)
    return start


def _pissa_to_lora(net: PeftModel, start: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Make a trained PiSSA adapter a plain LoRA of twice the rank over the base as it was.

    The base holds W - s B0 A0 and the adapter s B A, so W wants s (B A - B0 A0) = s [B | -B0] [A ; A0].
    """
    config = net.peft_config["default"]
    for name, (first_a, first_b) in start.items():
        layer = net.get_submodule(name)
        base, scale = layer.get_base_layer().weight, layer.scaling["default"]
        base.data = (base.data.float() + scale * first_b @ first_a).to(base.dtype)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        a.weight = torch.nn.Parameter(torch.cat([a.weight.data, first_a]))
        b.weight = torch.nn.Parameter(torch.cat([b.weight.data, -first_b], dim=1))
        a.out_features = b.in_features = layer.r["default"] = 2 * config.r
    config.r, config.init_lora_weights = 2 * config.r, True
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2


def _factors(layer: torch.nn.Module) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _trained(net: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def _sample(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Up to about SAMPLE values spread over a tensor, a copy."""
    flat = parameter.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)].clone()
