"""What was saved is reopened and compared with what is in memory, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

from common import distributed
from common.errors import UserError
from common.model.weights import adapter_file, readable
from common.peft_names import get_peft_model_state_dict

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

IDLE = re.compile("lora_B|lora_embedding_A")  # what starts at zero: where it still is, the layer does nothing


def whole_state(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """{name: tensor on the CPU} of what is saved of a model of which each process holds a part; all call it together.

    That is all that is trained of one with an adapter, and all of a model tuned without one, in the base's dtype.
    """
    if hasattr(model, "peft_config"):
        return {name: distributed.whole(p) for name, p in model.named_parameters() if p.requires_grad}
    return {name: distributed.whole(p).to(model.config.dtype) for name, p in model.named_parameters()}


def verify_adapter(model: PeftModel, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Reopen what was just saved: the same keys and values as in memory, and no LoRA layer that does nothing.

    state: `whole_state(model)`, where the model itself may hold a part only.
    """
    file = adapter_file(folder)
    with readable(file):
        saved = load_file(file)
    compare_adapter(adapter_state(model, state), saved, folder)
    idle = [name for name, tensor in saved.items() if IDLE.search(name) and not tensor.any()]
    if idle:
        raise UserError(
            f"{folder}: 适配器不起作用 the adapter does nothing: {len(idle)} lora_B are zero, e.g. {idle[0]}"
        )


def verify_whole(model: PreTrainedModel, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Reopen a whole model just saved: each tensor is as in memory, and none is missing except those tied to another.

    state: `whole_state(model)`, where the model itself may hold a part only.
    """
    state = revert_weight_conversion(model, state or model.state_dict())  # by the names that are saved
    saved: set[str] = set()
    different: list[str] = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        with readable(file), safe_open(file, "pt") as tensors:
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


def adapter_state(
    model: PeftModel, state: Mapping[str, torch.Tensor] | None = None, name: str = "default"
) -> dict[str, torch.Tensor]:
    """{key in its file: tensor} of the adapter `name`, as it is in memory, or in `state`."""
    return get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=False)


def compare_adapter(
    expected: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], folder: str | Path
) -> None:
    """UserError naming a tensor that is missing in `saved`, left over, or another one than in `expected`.

    Those of `expected` may lie in fewer bits: modules trained in full, loaded to answer over a base in 16 bits.
    """
    missing, surplus = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    both = [(name, expected[name], saved[name]) for name in expected.keys() & saved.keys()]
    different = [name for name, one, other in both if not torch.equal(one.cpu(), other.to(one.dtype))]
    for what, names in (("缺少 missing", missing), ("多余 unexpected", surplus), ("不同 different", sorted(different))):
        if names:
            raise UserError(
                f"{folder}: 适配器与模型不符 the adapter does not fit: {len(names)} {what}, e.g. {names[0]}"
            )
