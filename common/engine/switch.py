"""The net of a model and its adapters: which one is in force, and its recorded step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.engine.replay import Replay, record
from common.model.layers import causal_of

if TYPE_CHECKING:
    from common.inference.answerer import Answerer


class Switch:
    """Sets an Answerer's net to its adapters, by peft's names; None is the base. For one thread."""

    def __init__(self, answer: Answerer) -> None:
        self.net = causal_of(answer.net)
        self.peft = None if answer.net is self.net else answer.net
        self.adapter: str | None = "" if self.peft else None  # in force; "" is nothing yet
        self.replays: dict[str | None, Replay | None] = {}  # by adapter

    def use(self, adapter: str | None) -> None:
        """Set the net to an adapter."""
        if self.peft is None or adapter == self.adapter:
            return
        if adapter is None:
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(adapter, inference_mode=True)
        self.adapter = adapter

    def replay(self) -> Replay | None:
        """Steps of the net as it is set, recorded when they are first wanted."""
        if self.adapter not in self.replays:
            self.replays[self.adapter] = record(self.net)
        return self.replays[self.adapter]
