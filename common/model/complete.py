"""Whether a model's files held all its weights and nothing else: names, shapes and finite numbers, after loading."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRAPPED = "base_model.model."  # how peft begins the names of a model that an adapter is attached to
# buffers that older files hold, and what bitsandbytes keeps beside a quantised weight; transformers leaves out by
# itself what a model's class declares, and heads that are tied
EXPECTED = re.compile(
    r"(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|(^|\.)position_ids)$"
    r"|\.(SCB|weight_format|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\w+)$"
)
AGAIN = "download the folder again, or give the model these weights were saved from"


@contextlib.contextmanager
def report_hidden() -> Iterator[None]:
    """Within, transformers does not print its table of names that do not fit: `check_names` says it in one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)  # its level has to stay: at WARNING and above transformers 5.23 warns of shards
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def check_names(net: PreTrainedModel, info: Mapping[str, Any], path: str | Path) -> None:
    """UserError where weights of `net` were missing in the files at `path`, left over, or of another shape.

    info: what from_pretrained(output_loading_info=True, ignore_mismatched_sizes=True) returned beside `net`. Weights
    that were missing are random in `net`.
    """
    tied = getattr(net, "all_tied_weights_keys", {})  # each is listed by the name of the weight it shares
    missing = sorted(name for name in info["missing_keys"] if name not in tied and not EXPECTED.search(name))
    surplus = sorted(name for name in info["unexpected_keys"] if not EXPECTED.search(name))
    mismatched = sorted((name, tuple(there), tuple(wanted)) for name, there, wanted in info["mismatched_keys"])
    told = [f"{len(names)} {what}, e.g. {names[0]}" for what, names in _kinds(missing, surplus) if names]
    if mismatched:
        name, there, wanted = mismatched[0]
        shapes = f"{list(there)}, config.json says {list(wanted)}"
        told.append(f"{len(mismatched)} 形状不同 of another shape, e.g. {name}: {shapes}")
    if told:
        remedy = _remedy(net, missing, surplus, [name for name, _, _ in mismatched])
        raise UserError(f"{path}: 权重与模型不符 the weights do not fit the model: {'; '.join(told)}; {remedy}")


def _kinds(missing: list[str], surplus: list[str]) -> list[tuple[str, list[str]]]:
    return [("缺少 missing", missing), ("多余 unexpected", surplus)]


def _remedy(net: PreTrainedModel, missing: list[str], surplus: list[str], mismatched: list[str]) -> str:
    """What these names look like, and the way out."""
    if any(WRAPPED in name or "lora_" in name for name in surplus):
        return (
            f"像是适配器或 peft 包着的模型 looks like an adapter's or a peft-wrapped save ({WRAPPED}…): save the "
            "model that peft's merge_and_unload() returns, or give the base here and the adapter as --model_save_dir"
        )
    prefix = _prefix(missing, surplus)
    if prefix:
        return (
            f"名字都以 {prefix} 开头 all names begin with {prefix}, as of a model that was wrapped: save it unwrapped"
        )
    head = _head(net)
    if missing == [head] and not surplus:
        return (
            f"config.json 说输出层不与嵌入共享 says tie_word_embeddings false, so {head} has to be there: {AGAIN}; "
            "only where the original ties them, write true"
        )
    ends = {head, next((n for n, p in net.named_parameters() if p is net.get_input_embeddings().weight), "")}
    if mismatched and set(mismatched) <= ends:
        return (
            "词表与权重不符 config.json's vocab_size does not fit the weights: restore config.json, or save the model "
            "after resize_token_embeddings"
        )
    return AGAIN


def _prefix(missing: list[str], surplus: list[str]) -> str:
    """What all names in the files begin with, where without it they are the missing ones; or ""."""
    parts = os.path.commonprefix(surplus).split(".")[:-1]
    tried = (".".join([*parts[:count], ""]) for count in range(1, len(parts) + 1))
    return next((text for text in tried if missing and set(missing) <= {name[len(text) :] for name in surplus}), "")


def _head(net: PreTrainedModel) -> str:
    """The name of the weight that gives the logits, or "" where there is none."""
    head = net.get_output_embeddings()
    return next((f"{name}.weight" for name, module in net.named_modules() if module is head), "")


def check_finite(net: torch.nn.Module, path: str | Path) -> None:
    """UserError where a parameter of `net` holds NaN or inf; those of which nothing lies here are not looked at.

    One pass in each parameter's own dtype, which allocates nothing: 0.2 to 0.5 s a GB on one CPU core.
    """
    with torch.no_grad():
        named = [(name, p) for name, p in net.named_parameters() if p.is_floating_point() and not p.is_meta]
        broken = [name for name, p in named if p.numel() and not _is_finite(p)]
    if broken:
        raise UserError(
            f"{path}: 权重里有 NaN 或 inf the weights hold NaN or inf: {len(broken)} of {len(named)}, e.g. {broken[0]}"
            "; the training that wrote them diverged, or a dtype was too small: download or save the model again"
        )


def _is_finite(parameter: torch.Tensor) -> bool:
    """Whether all values are finite; NaN carries over to both ends of `aminmax`."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(parameter))
