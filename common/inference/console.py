"""The console chat of predict.py, on any object with `stream(turns, sampling, base)`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from common.conversation import render
from common.conversation.turns import Turn
from common.inference.answerer import Sampling, fitted, prompt_limit
from common.inference.tuned import context_of, trained_with
from common.model import loading
from common.runs.adopted import find_manifest

if TYPE_CHECKING:
    from common.config import PredictFlags, SFTConfig
    from common.conversation.family import Family
    from common.inference.answerer import Answerer
    from common.inference.remote import Remote

HELP = "输入 CLEAR 清空对话 clears the history, EXIT 或 Ctrl-D 退出 leaves, Ctrl-C 停止当前回答 stops an answer"


def chat(answer: Answerer | Remote, sampling: Sampling, flags: PredictFlags, ask: Callable[[str], str] = input) -> None:
    """Ask, stream the answer, remember both; until EXIT or the end of the input."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # half a character, left by a backspace, is no reason to leave
    print(HELP)
    history: list[Turn] = []
    while (question := _question(ask)) is not None:
        if question.strip().upper() == "CLEAR":
            history = []
            print("对话已清空 history cleared")
        elif question.strip():
            asked = [*history, Turn("user", question)]
            history = [*asked, Turn("assistant", _show(answer, [*_system(flags.system), *asked], sampling, flags.base))]


def ask_once(answer: Answerer | Remote, sampling: Sampling, flags: PredictFlags) -> None:
    """Print the answer to `flags.query`; with `flags.compare` the base's above the tuned model's."""
    turns = [*_system(flags.system), Turn("user", flags.query)]
    if flags.compare:
        print("基座 base: ", answer([turns], sampling, base=True)[0].text)
        print("微调 tuned:", end=" ")
    (found,) = answer([turns], sampling, base=flags.base and not flags.compare)
    print(found.text)
    _show_cut(found.cut_to)


def print_prompt(cfg: SFTConfig, prompt: Family, question: str, system: str = "") -> None:
    """Print text and ids of the prompt for `question` as one JSON object; only the tokenizer is loaded."""
    trained = trained_with(cfg, find_manifest(cfg.model_save_dir), base=True)
    tokenizer = loading.load_tokenizer(trained.path_model_pretrain, prompt, trained.thinking)
    turns = [*_system(system), Turn("user", question)]
    limit = prompt_limit(trained.max_length_q, context_of(cfg, trained), cfg.max_new_tokens)
    ids, cut_to = fitted(tokenizer, prompt, turns, trained.prompt_style, limit)
    _show_cut(cut_to)
    text = render.shown(tokenizer, ids)
    print(json.dumps({"text": text, "input_ids": ids}, ensure_ascii=False))


def _system(text: str) -> list[Turn]:
    return [Turn("system", text)] if text else []


def _question(ask: Callable[[str], str]) -> str | None:
    """What the user typed; None to leave."""
    while True:
        try:
            question = ask("请输入:")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n" + HELP)
            continue
        return None if question.strip().upper() == "EXIT" else question


def _show(answer: Answerer | Remote, turns: Sequence[Turn], sampling: Sampling, base: bool) -> str:
    """Stream one answer to the screen and return it; Ctrl-C keeps what there is."""
    print("请稍等...")
    _show_cut(answer.cut_to(turns, sampling.max_new_tokens))
    started = time.time()
    parts = []
    stream = answer.stream(turns, sampling, base=base)
    try:
        for part in stream:
            print(part, end="", flush=True)
            parts.append(part)
    except KeyboardInterrupt:
        stream.close()
        print(" [已停止 stopped]", end="")
    print(f"\n{time.time() - started:.2f} 秒 seconds")
    return "".join(parts)


def _show_cut(limit: int) -> None:
    """Say on stderr that a prompt was cut to `limit` tokens; nothing for 0."""
    if limit:
        print(
            f"提示已截断到 the prompt was cut to {limit} tokens: 先去掉最早的几轮，再截断问题中间 "
            "the oldest turns go, then the middle of the question",
            file=sys.stderr,
        )
