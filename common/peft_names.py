"""What is used of peft, imported here alone: in such a way that it does not import bitsandbytes for models without it.

peft imports bitsandbytes wherever that is installed, which compiles functions at its import: seconds, and hundreds of
MiB, of torch._inductor. A model that has layers of it was loaded by it, so it is imported already where peft needs it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from transformers.utils import is_bitsandbytes_available

BITSANDBYTES = "bitsandbytes"


@contextlib.contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Within, peft takes bitsandbytes for not installed, unless this process has imported it already.

    For whatever gives peft a model: it asks then which kinds of layers there may be.
    """
    if BITSANDBYTES in sys.modules:
        yield
        return
    is_bitsandbytes_available()  # transformers keeps its answer for the whole process: it has to be the true one
    _forget()
    sys.modules[BITSANDBYTES] = None  # type: ignore[assignment]  # for Python: there is no such module
    try:
        yield
    finally:
        del sys.modules[BITSANDBYTES]
        _forget()


def _forget() -> None:
    """Let peft look anew whether there is bitsandbytes: it keeps its answers."""
    if asked := sys.modules.get("peft.import_utils"):
        asked.is_bnb_available.cache_clear()
        asked.is_bnb_4bit_available.cache_clear()


with without_bitsandbytes():
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import TrainableTokensWrapper
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

__all__ = [
    "BaseTunerLayer",
    "LoraConfig",
    "LoraLayer",
    "LoraLinear",
    "ModulesToSaveWrapper",
    "PeftModel",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
    "convert_peft_config_for_transformers",
    "get_peft_model",
    "get_peft_model_state_dict",
    "without_bitsandbytes",
]
