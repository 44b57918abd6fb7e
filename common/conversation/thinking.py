"""Whether a model thinks before it answers: read off its chat template, and set in it as --thinking says.

The mode is a property of the template, so that training, asking and an exported folder cannot differ: the switch is put
before it as a default, which a caller's own enable_thinking overrides.

    auto  the template as it is
    keep  the switch on, and the condition by which thoughts of earlier rounds are dropped replaced by true
    none  the switch off; thoughts are left out of what is rendered
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SWITCH = "{{%- set enable_thinking = enable_thinking | default({}) %}}"
ON, OFF = SWITCH.format("true"), SWITCH.format("false")
ONLY_LAST = re.compile(r"loop\.index0 > \w+\.last_\w+")  # whether a message is behind the last question
ASKED = {"role": "user", "content": "?"}
ANSWERED = [{"role": "assistant", "content": "!", "reasoning_content": thought} for thought in ("first-", "last-")]


def set_mode(tokenizer: PreTrainedTokenizerBase, mode: str, path: object) -> None:
    """Make the tokenizer's chat template think as `mode` says: auto, keep or none.

    path: what an error calls the model. UserError where the template has no such form.
    """
    template = tokenizer.chat_template
    if mode == "auto" or template is None:
        return
    if isinstance(template, dict):
        raise UserError(f"--thinking {mode}: {path}: 有几个聊天模板 has several chat templates: {', '.join(template)}")
    if mode == "none":
        if thinks(tokenizer) and not switches(tokenizer):
            raise UserError(f"--thinking none: {path}: 不能关闭思考 its chat template has no form without thinking")
        tokenizer.chat_template = OFF + template
        return
    if not thinks(tokenizer):
        raise UserError(f"--thinking keep: {path}: 聊天模板没有思考 its chat template shows no thought; leave it out")
    tokenizer.chat_template = ON + ONLY_LAST.sub("true", template)
    shown = _shown(tokenizer, [ASKED, ANSWERED[0], ASKED, ANSWERED[1]])
    if not all(answer["reasoning_content"] in shown for answer in ANSWERED):
        tokenizer.chat_template = template
        raise UserError(f"--thinking keep: {path}: 略去以前的思考 its template drops thoughts of earlier rounds")


@contextmanager
def switched(tokenizer: PreTrainedTokenizerBase, on: bool | None) -> Iterator[None]:
    """Within it the tokenizer's template thinks, or not; None: as it is. One thread at a time may do this."""
    template = tokenizer.chat_template
    if on is not None and isinstance(template, str):
        tokenizer.chat_template = (ON if on else OFF) + template
    try:
        yield
    finally:
        tokenizer.chat_template = template


def thinks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template shows a thought, or asks otherwise with thinking than without."""
    return _thinks(tokenizer, str(tokenizer.chat_template))


def switches(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template asks with thinking and without, and otherwise."""
    on, off = _asking(tokenizer, True), _asking(tokenizer, False)
    return "" not in (on, off) and on != off


def leaves_out(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether thoughts are left out, because the template is switched to a form without them."""
    return str(tokenizer.chat_template).startswith(OFF)


@lru_cache(maxsize=16)
def _thinks(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    if tokenizer.chat_template is None:
        return False
    shows = ANSWERED[1]["reasoning_content"] in _shown(tokenizer, [ASKED, ANSWERED[1]])
    return shows or switches(tokenizer)


def _asking(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> str:
    return _shown(tokenizer, [ASKED], add_generation_prompt=True, enable_thinking=thinking)


def _shown(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    """The messages as the template shows them; "" where it refuses them."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception:  # raise_exception in a template, or an error of its own
        return ""
