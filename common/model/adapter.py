"""A tuned model: the base with an adapter attached, or a whole model of its own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors.torch import load_file

from common.config import LORA
from common.errors import UserError
from common.knobs import DORA_8
from common.model.folders import read_object
from common.model.layers import causal_of
from common.model.loading import load_base
from common.model.token_rows import mend
from common.model.verify import adapter_state, compare_adapter
from common.model.weights import check_adapter, readable
from common.peft_names import BaseTunerLayer, LoraConfig, PeftModel, without_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.config import SFTConfig


class TrainedWith(NamedTuple):
    """What a tuned model's users must know of its run: how it is asked, and over which base it was made.

    path_model_pretrain: folder or hub id of the base. bits: of the base's quantised weights, 0 where they are not.
    Keys of predictions are hashes of these fields in this order: a new order would make every earlier one anew.
    """

    prompt_style: str
    max_length_q: int
    path_model_pretrain: str
    tuning: str
    bits: int
    thinking: str = "auto"

    @classmethod
    def asked_for(cls, cfg: SFTConfig) -> TrainedWith:
        """What a config says, where no run says it."""
        return cls(cfg.prompt_style, cfg.max_length_q, cfg.base, cfg.tuning, cfg.bits, cfg.thinking)


def load_tuned(
    trained: TrainedWith, folder: str | Path, dtype: str, attention: str = "auto"
) -> PreTrainedModel | PeftModel:
    """The tuned model in `folder`, as `trained` says: base and adapter, or a whole model."""
    if trained.tuning not in LORA:
        return load_base(folder, dtype, trained.bits, attention)
    check_adapter(folder)  # before a large base is loaded for nothing
    if config_of(folder).use_dora and trained.bits == 8:
        raise UserError(f"{folder}: {DORA_8}")
    return attach(load_base(trained.path_model_pretrain, dtype, trained.bits, attention), folder)


def attach(
    base: PreTrainedModel | PeftModel, folder: str | Path, name: str = "default", dropout: float | None = None
) -> PeftModel:
    """`base` with the adapter saved in `folder` under peft's `name`.

    UserError where its file is damaged, or a key is missing or left over.

    base: a model, or a PeftModel that gets one more adapter. dropout: that of an adapter that will be trained on; None:
    it only answers.
    """
    file, config = check_adapter(folder), config_of(folder)
    if dropout is not None:
        config.lora_dropout, config.base_model_name_or_path = dropout, base.name_or_path
    with readable(file), warnings.catch_warnings(), without_bitsandbytes():
        warnings.simplefilter("ignore")  # peft only warns of missing keys; the comparison below refuses them
        try:
            if isinstance(base, PeftModel):
                base.load_adapter(folder, adapter_name=name)
                model = base
            else:
                model = PeftModel.from_pretrained(
                    base, folder, adapter_name=name, config=config, is_trainable=dropout is not None
                )
        except (RuntimeError, ValueError, TypeError, LookupError) as problem:
            raise _misfit(folder, problem) from None
    compare_adapter(adapter_state(model, name=name), load_file(file), folder)
    mend(model)
    return model.eval()


def config_of(folder: str | Path) -> LoraConfig:
    """peft's config of the adapter in `folder`; UserError where it is no LoRA."""
    kind = read_object(Path(folder) / "adapter_config.json").get("peft_type", "of no peft_type")
    if kind != "LORA":
        raise UserError(f"{folder}: 只支持 LoRA only LoRA adapters are used, this is {kind}")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of keys that a newer peft wrote: the weights are compared when they are loaded
        try:
            return LoraConfig.from_pretrained(folder)
        except (ValueError, TypeError) as problem:
            raise _misfit(folder, problem) from None


def modules_of(config: LoraConfig, name: str) -> tuple[str, ...]:
    """An adapter's `target_modules` or `modules_to_save` in order of their names; a pattern stands alone."""
    names = getattr(config, name) or ()
    return (names,) if isinstance(names, str) else tuple(sorted(names))


def _misfit(folder: str | Path, problem: Exception) -> UserError:
    reason = " ".join(str(problem).split())[:200]
    return UserError(f"{folder}: 适配器与模型不符 the adapter does not fit: {reason}")


@contextlib.contextmanager
def saved_alone(net: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within, `net.save_pretrained` saves of an adapter no more than what was trained.

    With LoRA on the embeddings peft would put a copy of the base's own into every file.
    """
    if not isinstance(net, PeftModel):
        yield
        return
    net.save_pretrained = partial(net.save_pretrained, save_embedding_layers=False)
    try:
        yield
    finally:
        del net.save_pretrained


def merge_reasons(model: PeftModel) -> list[str]:
    """Why engines that only add LoRA to linear layers (vLLM) cannot serve this adapter beside its base; [] if none."""
    config, causal = model.peft_config["default"], causal_of(model)
    changed = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    return [
        reason
        for reason, holds in (
            ("modules_to_save", bool(config.modules_to_save)),
            ("trained token rows", bool(config.trainable_token_indices)),
            ("LoRA on experts", bool(getattr(config, "target_parameters", None))),
            ("DoRA", config.use_dora),
            ("LoRA on embeddings or head", any(isinstance(module, BaseTunerLayer) for module in changed)),
        )
        if holds
    ]
