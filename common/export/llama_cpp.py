"""A GGUF file asked in llama.cpp itself, where the package xllamacpp has it: tokenizer, template and greedy answers."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.elsewhere import asking
from common.errors import UserError
from common.export import proof

if TYPE_CHECKING:
    from common.export.proof import Expected, Tuned

Ask = Callable[[str, dict[str, Any]], dict[str, Any]]
PACKAGE = "xllamacpp"
TEXTS = 200
FAULT = re.compile("error|assert", re.IGNORECASE)  # in a line of its log
AWKWARD = (
    *(
        "  两个空格  ",
        "制表\t符",
        "一行\n\n\n四行",
        "\r\n",
        "1234567890",
        "3.14",
        "　全角　",
        "Hello, world!",
        "don't",
        "É è ü",
    ),
    *(
        "表情🦙👍🏽",
        "한국어 日本語",
        "∑∫√",
        "a_b-c/d\\e",
        "print('x')  # y",
        "<b>粗</b>",
        "。，！？",
        "…",
        "ＡＢＣ",
        "नमस्ते",
    ),
)


def installed() -> bool:
    """Whether there is a llama.cpp to ask."""
    return importlib.util.find_spec(PACKAGE) is not None


def prove(file: Path, expected: Expected, limit: float) -> str:
    """How the file answers in llama.cpp, in words.

    limit: share of the largest logit within which two ids are a tie. UserError where its tokenizer gives other ids, its
    template another prompt, or an answer parts from the run's at a step that was no tie.
    """
    tuned = expected.tuned
    longest = max(map(len, tuned.prompts)) + proof.NEW_TOKENS
    with served(file, longest + 8) as ask:
        _check_tokenizer(ask, tuned)
        _check_template(ask, tuned)
        same = 0
        for ids, new, logits in zip(tuned.prompts, expected.answers, expected.logits, strict=True):
            found = greedy(ask, ids)
            same += proof.same_answer(found, new, logits, limit * float(logits.abs().max()))
    equal = f"贪心回答一致 greedy answers equal {same}/{len(expected.answers)}"
    return f"{TEXTS} 段文字的编号一致 texts give the same ids, {equal}"


def greedy(ask: Ask, ids: list[int]) -> list[int]:
    """The ids llama.cpp answers a prompt with, greedily, as `proof.greedy`."""
    body = {
        "prompt": ids,
        "n_predict": proof.NEW_TOKENS,
        "temperature": 0,
        "repeat_penalty": 1,  # a file may have another of its own
        "return_tokens": True,
        "cache_prompt": False,
    }
    return ask("/completion", body)["tokens"]


def sample_texts(tuned: Tuned) -> list[str]:
    """TEXTS texts: those the run is proven on, awkward ones, and pieces of the vocabulary in random order."""
    tokenizer, chance = tuned.tokenizer, random.Random(0)
    asked = [turn.text for turns in tuned.questions for turn in turns]
    special = set(tokenizer.added_tokens_decoder)
    ids = [number for number in range(len(tokenizer)) if number not in special]
    mixed = [tokenizer.decode(chance.choices(ids, k=chance.randint(2, 24))) for _ in range(TEXTS)]
    # llama.cpp writes no character in another way first, as some tokenizers do
    return [unicodedata.normalize("NFC", text) for text in [*asked, *AWKWARD, *mixed][:TEXTS]]


def _check_tokenizer(ask: Ask, tuned: Tuned) -> None:
    for text in sample_texts(tuned):
        found = ask("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        own = tuned.tokenizer(text, add_special_tokens=False).input_ids
        if found != own:
            raise UserError(
                f"llama.cpp 的分词不同 llama.cpp makes other ids of {text[:40]!r}: {found[:12]}, not {own[:12]}; "
                "export as safetensors, without --format"
            )


def _check_template(ask: Ask, tuned: Tuned) -> None:
    """UserError where the file's chat template, as llama.cpp renders it, does not give the run's prompts."""
    if tuned.tokenizer.chat_template is None:
        return
    for turns, ids in zip(tuned.questions, tuned.prompts, strict=True):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        text = ask("/apply-template", {"messages": messages})["prompt"]
        found = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        if found != ids and len(found) <= len(ids):  # a longer one was cut by the run
            raise UserError(
                f"llama.cpp 的提示不同 llama.cpp renders another prompt for {turns[-1].text[:40]!r}: {text[:200]!r}; "
                "export as safetensors, without --format"
            )


@contextmanager
def served(file: Path, context: int) -> Iterator[Ask]:
    """A function that asks a llama.cpp server with the file, by path and body; UserError where it does not open."""
    words = [sys.executable, asking.LLAMA_SERVER, file, context, torch.get_num_threads()]
    pipe, limit = subprocess.PIPE, asking.limit_for(file.stat().st_size)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        server = subprocess.Popen(
            [str(word) for word in words], stdin=pipe, stdout=pipe, stderr=log, text=True, start_new_session=True
        )
        assert server.stdin and server.stdout
        begun, late = time.monotonic(), threading.Timer(limit, asking.stop, [server])
        late.start()  # stopped, it ends the reading of its output
        try:
            address = next((line.strip() for line in server.stdout if line.startswith("http")), "")
            if not address:
                log.seek(0)
                said = [line for line in log.read().splitlines() if FAULT.search(line)]
                if time.monotonic() - begun >= limit:
                    said.append(f"{limit:.0f} 秒后仍没有回答 still no answer after {limit:.0f} s")
                raise UserError(f"llama.cpp 打不开 llama.cpp does not open {file.name}: {''.join(said[:1])[:300]}")
            late.cancel()
            yield partial(_ask, address, limit)
        finally:
            late.cancel()
            server.stdin.close()
            asking.stop(server)
            server.stdout.close()


def _ask(address: str, limit: float, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the server says; UserError where it is gone, or says nothing for `limit` seconds."""
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(address + path, json.dumps(body).encode(), head)
    try:
        with urllib.request.urlopen(request, timeout=limit) as response:
            return json.load(response)
    except OSError as problem:
        raise UserError(
            f"llama.cpp 没有回答 llama.cpp gave no answer to {path} (within {limit:.0f} s): {problem}; nothing was "
            "written; export as safetensors, without --format"
        ) from None
