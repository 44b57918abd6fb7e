"""Conversations and texts as prompt ids, and ids as tokens, for many threads over one tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from common.conversation import render
from common.conversation.thinking import switched
from common.engine.kv_batch import prompt_positions
from common.inference.text import BYTE
from common.model.layers import causal_of

if TYPE_CHECKING:
    from common.conversation.turns import Turn
    from common.inference.answerer import Answerer


class PromptEncoder:
    """Encodes prompts for one Answerer's model; all methods may be called from any thread.

    One thread encodes for all: it changes settings of the tokenizer for a moment, and the tokenizer keeps words, up to
    50 MiB, for each thread.
    """

    def __init__(self, answer: Answerer) -> None:
        self.answer = answer
        self.tokenizer = answer.tokenizer
        self.net = causal_of(answer.net)
        self.lock = threading.Lock()  # guards `thread`
        self.thread = _thread()
        self.anchor = render.encode_text(answer.tokenizer, "a")  # a piece shows its blank only after another piece

    def whole_ids(self, turns: Sequence[Turn], thinking: bool | None = None) -> list[int]:
        """Ids that ask for the answer to `turns`; nothing is cut.

        thinking: on or off where a request says so; None: as the model was trained.
        """
        return self._encoded(self._whole_ids, turns, thinking)

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without a template: what the tokenizer puts around one, and control tokens in it stay text."""
        return self._encoded(partial(self.tokenizer.encode, split_special_tokens=True), text)

    def rest(self) -> None:
        """Let go of the words that the tokenizer keeps: they go with the thread."""
        with self.lock:
            self.thread.shutdown()
            self.thread = _thread()

    def problem_of(self, ids: list[int]) -> str | None:
        """Why the model cannot read these ids as a prompt, or None."""
        size = self.net.config.get_text_config().vocab_size
        wrong = [id_ for id_ in ids if not 0 <= id_ < size]
        if wrong:
            return f"{str(wrong[0])[:20]}: 不是 is not a token id of this model, 0 to {size - 1}"
        try:
            row = torch.tensor([ids])
            getattr(self.net, "prompt_positions", prompt_positions)(row, torch.ones_like(row))
        except ValueError as problem:
            return str(problem)
        return None

    def token(self, id_: int) -> tuple[str, list[int] | None]:
        """(text, UTF-8 bytes) of one id within a text; the bytes of half a character are None."""
        text = self.tokenizer.decode([*self.anchor, id_])[len(self.tokenizer.decode(self.anchor)) :]
        piece = self.tokenizer.convert_ids_to_tokens(id_) or ""
        if byte := BYTE.fullmatch(piece):
            return piece, [int(byte[1], 16)]
        return text or piece, None if "\ufffd" in text else list((text or piece).encode())

    def _encoded(self, encode: Callable[..., list[int]], *given: Any) -> list[int]:
        with self.lock:
            ids = self.thread.submit(encode, *given)
        return ids.result()

    def _whole_ids(self, turns: Sequence[Turn], thinking: bool | None) -> list[int]:
        with switched(self.tokenizer, thinking):
            return render.joined(self.answer.prompt.render(self.tokenizer, turns, self.answer.style))


def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "encoder")
