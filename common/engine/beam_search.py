"""A beam search that takes turns with the batcher: transformers' generate in a thread, held after each step."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from common.model.loss import without_routers

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from common.engine.request import Row


class Beams(threading.Thread):
    """Generates the answer to `row` (one of the batcher's); `step` lets it go on for one step."""

    def __init__(self, net: PreTrainedModel, row: Row, config: GenerationConfig) -> None:
        super().__init__(daemon=True)
        self.net = net
        self.row = row
        self.config = config
        self.may_go_on = threading.Semaphore(0)
        self.has_stopped = threading.Semaphore(0)  # after a step, or at the end
        self.over = False
        self.ids: list[int] = []  # the answer, once it is over
        self.error: Exception | None = None
        self.start()

    def step(self) -> bool:
        """Let it do one step; True when it is over, with `ids` or `error`."""
        self.may_go_on.release()
        self.has_stopped.acquire()
        return self.over

    def run(self) -> None:
        """The thread; not to be called."""
        self.may_go_on.acquire()
        try:
            ids = torch.tensor([self.row.ask.ids], device=self.net.device)
            with torch.inference_mode():
                output = self.net.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self.config,
                    stopping_criteria=[self._pause],
                    **without_routers(self.net),
                )
            self.ids = output[0, ids.shape[1] :].tolist()
        except Exception as error:  # carried over to the batcher, which reports it
            self.error = error
        finally:
            self.over = True
            self.has_stopped.release()

    def _pause(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """A stopping criterion, bool [B]: hands the model back, waits for its turn, and ends where nobody listens."""
        self.has_stopped.release()
        self.may_go_on.acquire()
        return torch.full((len(input_ids),), self.row.ticket.cancelled, device=input_ids.device)
