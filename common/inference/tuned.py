"""A run's folder, opened to answer: base and prompt style are the run's own, a prompt's limit is the base's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from common.cores import apart
from common.errors import UserError
from common.inference.answerer import Answerer
from common.inference.products import quicken
from common.model import adapter, loading
from common.model.adapter import TrainedWith
from common.runs import adopted
from common.runs.manifest import check_fits
from common.runs.places import check_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family

QUANTISED = "--quantization_bit 4|8 以该位数回答 answers in 4 or 8 bits with any run"


def load(cfg: SFTConfig, prompt: Family, base: bool = False, once: bool = False) -> Answerer:
    """The Answerer of the run in `cfg.model_save_dir`, or with `base` of its base model alone. Errors: `open_run`.

    once: for one short answer, which comes sooner without the seconds that make later ones faster.
    """
    _, trained, tokenizer = open_run(cfg, prompt, base)
    if "seed" in cfg.given:
        torch.manual_seed(cfg.seed)

    def load_base() -> PreTrainedModel:
        return made(loading.load_base(trained.path_model_pretrain, cfg.dtype, trained.bits, attention))

    made: Callable[[Any], Any] = (lambda net: net) if once else quicken
    folder, attention = cfg.model_save_dir, cfg.attn_implementation
    net = apart(lambda: load_base() if base else made(adapter.load_tuned(trained, folder, cfg.dtype, attention)))
    context = context_of(cfg, trained)
    return Answerer(net, tokenizer, prompt, trained.prompt_style, trained.max_length_q, load_base, context)


def open_run(
    cfg: SFTConfig, prompt: Family, base: bool = False
) -> tuple[dict[str, Any], TrainedWith, PreTrainedTokenizerBase]:
    """(manifest, TrainedWith, tokenizer) of the run in `cfg.model_save_dir`.

    base: its base model is enough; the manifest is {} where there is no run. Base model, prompt style, thinking and
    lengths are the run's own; UserError where the user asks for others, or where base, tokenizer or template are no
    longer the ones trained with.
    """
    manifest = adopted.find_manifest(cfg.model_save_dir)
    alone = not base and adopted.adapter_base(cfg.model_save_dir) is not None
    if manifest is None and not base and not alone:
        raise UserError(f"{cfg.model_save_dir}: 还没有训练结果 no trained run here; run train.py first, or give --base")
    if manifest is not None and manifest["state"] != "finished" and not base:
        raise UserError(
            f"{cfg.model_save_dir}: 训练没有完成 the run is not finished; "
            "the same train.py command resumes it, --checkpoint last answers as it is so far"
        )
    trained = trained_with(cfg, manifest, base)
    tokenizer = loading.load_tokenizer(trained.path_model_pretrain, prompt, trained.thinking)
    if manifest is not None and (not base or trained.path_model_pretrain == manifest["base"]["path"]):
        check_fits(manifest, trained.path_model_pretrain, tokenizer, prompt)
    if alone:
        manifest = adopted.describe_adapter(cfg, trained.path_model_pretrain, tokenizer, prompt)
    if manifest is not None and not base:
        adopted.accept(cfg.model_save_dir, manifest)
    return manifest or {}, trained, tokenizer


def context_of(cfg: SFTConfig, trained: TrainedWith) -> int:
    """Most tokens of a prompt and its answer: the base's own; 0 where the user's --max_length_q is to limit prompts."""
    return 0 if "max_length_q" in cfg.given else loading.context_of(trained.path_model_pretrain)


def bits_of(config: dict[str, Any]) -> int:
    """Bits of the quantised base that a manifest's config tells of, 0 where it is not quantised."""
    return config["quantization_bit"] if config.get("tuning") == "qlora" else 0


def _says_bits(name: str, cfg: SFTConfig) -> bool:
    """Whether the flag `name` is the tuning of a quantised base, whose bits are given: any run answers so."""
    return name == "tuning" and cfg.tuning == "qlora" and "quantization_bit" in cfg.given


def trained_with(cfg: SFTConfig, manifest: dict[str, Any] | None, base: bool) -> TrainedWith:
    """The TrainedWith of the run in `manifest`, or what the user asks for where there is none.

    UserError where the user asks for another base model, style, thinking or tuning; the same weights in another folder
    are the same base, and they may be quantised to other bits. base: the base model alone may be any.
    """
    asked = TrainedWith.asked_for(cfg)
    if manifest is None and "path_model_pretrain" not in cfg.given:
        asked = asked._replace(path_model_pretrain=adopted.adapter_base(cfg.model_save_dir) or cfg.base)
    if manifest is None or base and "path_model_pretrain" in cfg.given:
        check_base(asked.path_model_pretrain, cfg)
        return asked
    config = {"tuning": "lora", "thinking": "auto"} | manifest["config"]  # the first runs knew no other
    stored = manifest["base"]
    same_weights = cfg.base and stored["sha256"] and loading.base_hash(cfg.base) == stored["sha256"]
    trained = TrainedWith(
        prompt_style=config["prompt_style"],
        max_length_q=config["max_length_q"],
        path_model_pretrain=cfg.base if same_weights else stored["path"],
        tuning=config["tuning"],
        bits=cfg.bits if "quantization_bit" in cfg.given else bits_of(config),
        thinking=config["thinking"],
    )
    for name in ("path_model_pretrain", "prompt_style", "thinking", "tuning"):
        if name in cfg.given and getattr(asked, name) != getattr(trained, name) and not _says_bits(name, cfg):
            bits = f"{QUANTISED}; else " if (name, asked.tuning) == ("tuning", "qlora") else ""
            raise UserError(
                f"--{name} {getattr(asked, name)}: 训练时用的是 the run in {cfg.model_save_dir} was trained "
                f"with {getattr(trained, name)}; {bits}leave the flag out, or give another --model_save_dir"
            )
    return trained._replace(max_length_q=cfg.max_length_q) if "max_length_q" in cfg.given else trained
