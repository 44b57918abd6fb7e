"""An Answerer elsewhere: any server of OpenAI's completions (ours, vLLM, SGLang, llama.cpp), asked with our prompts."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from common.conversation import render
from common.conversation.answer_form import tools_of
from common.errors import UserError
from common.inference.answer_parts import Parts, kept_of, pieces, reading_of
from common.inference.answerer import Answer, Sampling, fitted, prompt_limit
from common.inference.text import Cleaning
from common.inference.tuned import context_of, trained_with
from common.model import loading
from common.runs import adopted

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from transformers import PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family
    from common.conversation.turns import Turn
    from common.inference.answer_parts import Streamed

TOGETHER = 16  # requests at once
LONGEST = 1 << 16  # ids of a text, for a server that must be told how many
BUSY = (429, 503)  # worth another try
CLOSED = (401, 403, 404, *BUSY)  # whatever is asked


class Remote:
    """Called like an Answerer. Prompts go as token ids; as text where a server takes no ids.

    url: up to and with /v1. The key is taken from the environment's OPENAI_API_KEY. max_length_q, context: as in
    `prompt_limit`. UserError where nobody answers.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Family,
        style: str,
        max_length_q: int,
        context: int = 0,
    ) -> None:
        self.url = url.rstrip("/")
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.style = style
        self.max_length_q = max_length_q
        self.context = context
        self.form = prompt.answer_form(tokenizer, style)
        self.kept = kept_of(tokenizer, self.form)  # marks that a server would leave out
        self.as_text = False  # the server has refused ids
        self.names: list[str] = []  # of the models it serves
        self.owners: set[str] = set()  # what it says it is, in the same list
        try:
            with self._open("/models") as response:
                models = json.load(response)["data"]
            self.names, self.owners = [one["id"] for one in models], {one.get("owned_by") for one in models}
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        if not self.names:
            raise UserError(f"--base_url {url}: 没有模型 no model is served there; the URL ends with /v1")
        self.origin = f"{self.url} {self.names[0]}"  # what predictions made by it are remembered under

    def __call__(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling, base: bool = False) -> list[Answer]:
        """Answers (in order) to conversations, each a list of Turns that ends with a question; some at once."""
        with ThreadPoolExecutor(TOGETHER) as pool:
            return list(pool.map(lambda turns: self._answer(turns, sampling, base), conversations))

    def stream(self, turns: Sequence[Turn], sampling: Sampling, base: bool = False) -> Generator[Streamed, None, None]:
        """Yield the pieces of one answer as they come: text, Thoughts, Calls.

        Closing the generator leaves the server.
        """
        ids, _ = self._fitted(turns, sampling.max_new_tokens)
        cleaning, reading = Cleaning(self.prompt.clean), reading_of(self.tokenizer, self.form, ids, tools_of(turns))

        def read(text: str, ended: bool = False) -> Parts:
            thought, text, calls = reading.more(text, ended) if reading else Parts(text=text)
            return Parts(thought, cleaning.more(text, ended), calls)

        with self._completed(ids, sampling, base, stream=True) as response:
            over = False
            for line in response:
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                over = over or data == b"[DONE]"
                if over or not data:
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise UserError(f"{self.url}: {event['error'].get('message', event['error'])}")
                yield from pieces(read(event["choices"][0]["text"] if event["choices"] else ""))
            if not over:
                raise EOFError("no [DONE]")
        yield from pieces(read("", ended=True))

    def cut_to(self, turns: Sequence[Turn], new_tokens: int) -> int:
        """The limit to which the prompt is cut where `new_tokens` may be generated; 0 where nothing of it is."""
        return self._fitted(turns, new_tokens)[1]

    def _fitted(self, turns: Sequence[Turn], new_tokens: int) -> tuple[list[int], int]:
        limit = prompt_limit(self.max_length_q, self.context, new_tokens)
        return fitted(self.tokenizer, self.prompt, turns, self.style, limit)

    def _answer(self, turns: Sequence[Turn], sampling: Sampling, base: bool) -> Answer:
        ids, cut_to = self._fitted(turns, sampling.max_new_tokens)
        with self._completed(ids, sampling, base) as response:
            found = json.load(response)
        choice, tokens = found["choices"][0], (found.get("usage") or {}).get("completion_tokens", 0)
        reading = reading_of(self.tokenizer, self.form, ids, tools_of(turns))
        thought, text, calls = reading.more(choice["text"], ended=True) if reading else Parts(text=choice["text"])
        return Answer(self.prompt.clean(text), choice["finish_reason"] or "stop", tokens, cut_to, thought, calls)

    @contextmanager
    def _completed(
        self, ids: list[int], sampling: Sampling, base: bool, stream: bool = False
    ) -> Iterator[HTTPResponse]:
        """The response to a completion of a prompt, to be read to its end; UnreachableError where it has none."""
        with self._complete(ids, sampling, base, stream) as response:
            try:
                yield response
            except (HTTPException, EOFError, OSError, ValueError) as problem:
                why = f"--base_url {self.url}: 回答中断 the answer broke off: {problem!r}"
                raise UnreachableError(why) from None

    def _complete(self, ids: list[int], sampling: Sampling, base: bool, stream: bool = False) -> HTTPResponse:
        """The open response to a completion of a prompt."""
        body = self._body(sampling, base) | {"stream": stream}
        refused: _RefusedError | None = None
        if not self.as_text:
            try:
                return self._open("/completions", body | {"prompt": ids})
            except _RefusedError as problem:
                refused = problem
        whole = ids[1:] if ids[0] == self.tokenizer.bos_token_id else ids  # a server puts it before a text
        response = self._open("/completions", body | {"prompt": render.shown(self.tokenizer, whole)}, refused)
        if refused:
            self.as_text = True
            print(f"{self.url}: 不接受 token id，改发文字 takes no token ids; prompts go as text: {refused}")
        return response

    def _body(self, sampling: Sampling, base: bool) -> dict[str, Any]:
        """The body of a completion, without its prompt; UserError where the server cannot do it."""
        if sampling.num_beams > 1:
            raise UserError("--num_beams: 服务端没有 a server has no beam search; leave it out")
        if base and "base" not in self.names:
            raise UserError(f"--base_url {self.url}: 没有 serves no model called base: {', '.join(self.names)}")
        body: dict[str, Any] = {
            "model": "base" if base else self.names[0],
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0,
            "repetition_penalty": sampling.repetition_penalty,  # also 1: what is left out has a server's own value
        }
        if sampling.do_sample:
            body |= {name: getattr(sampling, name) for name in ("temperature", "top_p", "min_p")}
            body["top_k"] = sampling.top_k or -1  # all, as every server says it
        if "llamacpp" in self.owners:  # it has another name for the penalty, and would look at the last 64 ids only
            body |= {"repeat_penalty": body.pop("repetition_penalty"), "repeat_last_n": LONGEST}
        if self.kept:
            body["skip_special_tokens"] = False
        return body

    def _open(
        self, path: str, body: dict[str, Any] | None = None, refused: _RefusedError | None = None, tries: int = 8
    ) -> HTTPResponse:
        """The open response; asks again where the server is busy. _RefusedError where it does not take the body.

        refused: why it has not taken an earlier body; then a second refusal is a UserError that tells the first.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode() if body else None
        try:
            return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=600)
        except urllib.error.HTTPError as problem:
            with problem:
                said = problem.read(2000).decode("utf-8", "replace")
            if problem.code in BUSY and tries:
                wait = problem.headers.get("Retry-After", "")
                time.sleep(min(int(wait), 10) if wait.isdecimal() else 1)  # a date is a way to say it too
                return self._open(path, body, refused, tries - 1)
            if problem.code in (400, 422) and body and not refused:
                raise _RefusedError(said) from None
            kind = UnreachableError if problem.code in CLOSED else UserError
            raise kind(f"--base_url {self.url}{path}: {problem.code}: {refused or said}") from None
        except (OSError, ValueError) as problem:
            raise UnreachableError(f"--base_url {self.url}: 无法连接 nobody answers there: {problem}") from None


class UnreachableError(UserError):
    """The server answers nothing, whatever it is asked."""


class _RefusedError(UserError):
    """The server does not take this body."""


def load(cfg: SFTConfig, prompt: Family, url: str) -> Remote:
    """The Remote at `url`; tokenizer, prompt style and context are those of the run in `cfg.model_save_dir`."""
    trained = trained_with(cfg, adopted.find_manifest(cfg.model_save_dir), base=True)
    tokenizer = loading.load_tokenizer(trained.path_model_pretrain, prompt, trained.thinking)
    return Remote(url, tokenizer, prompt, trained.prompt_style, trained.max_length_q, context_of(cfg, trained))
