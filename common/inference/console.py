"""The console chat of predict.py, on any object with `stream(turns, sampling, base)`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from common.conversation import render
from common.conversation.turns import Call, Turn
from common.inference.answer_parts import Thought
from common.inference.answerer import Sampling, fitted, prompt_limit
from common.inference.tuned import context_of, trained_with
from common.model import loading
from common.runs.adopted import find_manifest

if TYPE_CHECKING:
    from common.config import PredictFlags, SFTConfig
    from common.conversation.family import Family
    from common.inference.answerer import Answer, Answerer
    from common.inference.remote import Remote

HELP = "输入 CLEAR 清空对话 clears the history, EXIT 或 Ctrl-D 退出 leaves, Ctrl-C 停止当前回答 stops an answer"
THINKING, THOUGHT = "[思考 thinking]", "[回答 answer]"
UNANSWERED = "[只有思考，没有回答 thought alone, no answer: give a larger --max_new_tokens]"


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
            history = [*asked, _show(answer, [*_system(flags.system), *asked], sampling, flags.base)]


def ask_once(answer: Answerer | Remote, sampling: Sampling, flags: PredictFlags) -> None:
    """Print the answer to `flags.query`; with `flags.compare` the base's above the tuned model's."""
    turns = [*_system(flags.system), Turn("user", flags.query)]
    if flags.compare:
        _print_answer(answer([turns], sampling, base=True)[0], "基座 base:  ")
    (found,) = answer([turns], sampling, base=flags.base and not flags.compare)
    _print_answer(found, "微调 tuned: " if flags.compare else "")
    _show_cut(found.cut_to)


def _print_answer(found: Answer, title: str) -> None:
    """Text and calls of a whole answer on stdout, what was thought on stderr."""
    if found.thought:
        print(f"{title}{THINKING}\n{found.thought}", file=sys.stderr)
    if found.unanswered:
        print(UNANSWERED, file=sys.stderr)
    print(title + "\n".join([found.text, *map(_as_line, found.calls)] if found.text else map(_as_line, found.calls)))


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


def _show(answer: Answerer | Remote, turns: Sequence[Turn], sampling: Sampling, base: bool) -> Turn:
    """Stream one answer to the screen and return it; Ctrl-C keeps what there is."""
    print("请稍等...")
    _show_cut(answer.cut_to(turns, sampling.max_new_tokens))
    started = time.time()
    thought, text, calls = "", "", []
    stream = answer.stream(turns, sampling, base=base)
    try:
        for part in stream:
            if isinstance(part, Thought):
                print(part.text if thought else f"{THINKING}\n{part.text}", end="", flush=True)
                thought += part.text
            elif isinstance(part, Call):
                print(f"\n{_as_line(part)}", end="", flush=True)
                calls.append(part)
            else:
                print(part if text or not thought else f"\n{THOUGHT}\n{part}", end="", flush=True)
                text += part
        if thought and not text and not calls:
            print(f"\n{UNANSWERED}", end="")
    except KeyboardInterrupt:
        stream.close()
        print(" [已停止 stopped]", end="")
    print(f"\n{time.time() - started:.2f} 秒 seconds")
    return Turn("assistant", text, thought=thought, calls=tuple(calls))


def _as_line(call: Call) -> str:
    return f"调用 call: {call.name} {call.arguments}"


def _show_cut(limit: int) -> None:
    """Say on stderr that a prompt was cut to `limit` tokens; nothing for 0."""
    if limit:
        print(
            f"提示已截断到 the prompt was cut to {limit} tokens: 先去掉最早的几轮，再截断问题中间 "
            "the oldest turns go, then the middle of the question",
            file=sys.stderr,
        )
