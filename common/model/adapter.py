"""A tuned model: the base with an adapter attached, or a whole model of its own."""

import warnings
from pathlib import Path

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from common.config import LORA
from common.errors import UserError
from common.model.layers import causal_of
from common.model.loading import load_base
from common.model.verify import adapter_file, adapter_state, compare_adapter


def load_tuned(trained, folder, dtype):
    """The tuned model in `folder`, as `trained` (of tuned.open_run) says: base and adapter, or a whole model."""
    if trained["tuning"] not in LORA:
        return load_base(folder, dtype)
    check_adapter_is_there(folder)  # before a large base is loaded for nothing
    return attach(load_base(trained["path_model_pretrain"], dtype, trained["bits"]), folder)


def check_adapter_is_there(folder):
    if not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{folder}: 没有适配器 there is no adapter; train first, or give --model_save_dir or --base")


def attach(base, folder, name="default"):
    """`base` with the adapter saved in `folder` under peft's `name`; UserError where a key is missing or left over.

    base: a model, or a PeftModel that gets one more adapter.
    """
    check_adapter_is_there(folder)
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
    compare_adapter(adapter_state(model, name=name), load_file(adapter_file(folder)), folder)
    return model.eval()


def merge_reasons(model):
    """Why engines that only add LoRA to linear layers (vLLM) cannot serve this adapter beside its base; [] if none."""
    config, causal = model.peft_config["default"], causal_of(model)
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
