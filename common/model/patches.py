"""Forwards of a model's modules replaced for a while, as long as it is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch

# what a module holds of its own while its forward is replaced: accelerate keeps the forward it has wrapped for autocast
HELD = ("forward", "_original_forward", "accepts_loss_kwargs")


@contextlib.contextmanager
def replaced(forwards: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within, each module's forward is the function given for it, `self` first; afterwards it is what it was before.

    A wrapper that accelerate has put around the function meanwhile goes with it.
    """
    before = {module: {name: vars(module)[name] for name in HELD if name in vars(module)} for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = MethodType(forward, module)
        yield
    finally:
        for module, held in before.items():
            for name in HELD:
                vars(module).pop(name, None)
            vars(module).update(held)
