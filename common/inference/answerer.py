"""The seam between a model and its users: turns in, answer text out, for console, evaluation and service alike."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from common.conversation import render
from common.conversation.answer_form import tools_of
from common.conversation.turns import FormatError
from common.errors import UserError
from common.inference.answer_parts import Parts, Reading, kept_of, pieces, reading_of
from common.inference.prefix_cache import PrefixCache
from common.inference.text import Wording, decode
from common.model.layers import causal_of
from common.model.loading import pad_id_of
from common.model.loss import without_routers
from common.versions import repetition_penalty

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family
    from common.conversation.turns import Call, Turn
    from common.inference.answer_parts import Streamed


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. Greedy unless `do_sample`."""

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1

    @classmethod
    def of(cls, cfg: SFTConfig, **changes: Any) -> Sampling:
        """The sampling a config asks for, with `changes`."""
        return cls(**{name: getattr(cfg, name) for name in cls.__dataclass_fields__} | changes)


class Answer(NamedTuple):
    """One generated answer. `stop` is "stop" (it ended itself) or "length" (it was cut off).

    cut_to: the limit in tokens to which its prompt had to be cut; 0 where nothing was. thought, calls: what was thought
    before the text, and the tools called behind it.
    """

    text: str
    stop: str
    tokens: int
    cut_to: int = 0
    thought: str = ""
    calls: tuple[Call, ...] = ()

    @property
    def unanswered(self) -> bool:
        """Whether it is all thought."""
        return bool(self.thought) and not self.text and not self.calls


class Answerer:
    """Answers conversations with one model; safe to call from several threads, one generation at a time."""

    def __init__(
        self,
        net: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Family,
        style: str,
        max_length_q: int,
        load_base: Callable[[], PreTrainedModel] | None = None,
        context: int = 0,
    ) -> None:
        """load_base: gives the base of a `net` that has no adapter to switch off, when it is first asked for.

        max_length_q, context: as in `prompt_limit`.
        """
        self.net = net
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.style = style
        self.max_length_q = max_length_q
        self.context = context
        self.load_base = load_base
        self.base_net: PreTrainedModel | None = None
        self.stop_ids = prompt.stop_ids(tokenizer, style)
        self.form = prompt.answer_form(tokenizer, style)
        self.kept = kept_of(tokenizer, self.form)
        self.pad_id = pad_id_of(tokenizer, self.stop_ids[0])
        self.watch: Callable[[int], None] | None = None  # told of each step of a batch: new tokens of a row so far
        self.lock = threading.Lock()
        self.prefixes = PrefixCache(causal_of(net))  # of streamed answers, and of what prompts share
        _forget_generation_config(net)

    def fitted_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The ids the model is asked with, cut to `max_length_q`; UserError where that is impossible."""
        return self._fitted(turns, self.max_length_q)[0]

    def cut_to(self, turns: Sequence[Turn], new_tokens: int) -> int:
        """The limit to which the prompt is cut where `new_tokens` may be generated; 0 where nothing of it is."""
        return self._fitted(turns, prompt_limit(self.max_length_q, self.context, new_tokens))[1]

    def __call__(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling, base: bool = False) -> list[Answer]:
        """Answers (in order) to conversations, each a list of Turns that ends with a question, in one batch.

        base: without the adapter. Sampling draws from torch's global generator.
        """
        limit = prompt_limit(self.max_length_q, self.context, sampling.max_new_tokens)
        prompts = [self._fitted(turns, limit) for turns in conversations]
        rows = self.generate([ids for ids, _ in prompts], sampling, base)
        asked = zip(rows, prompts, conversations, strict=True)
        return [self._answer(row, cut_to, self.reading(ids, tools_of(turns))) for row, (ids, cut_to), turns in asked]

    def stream(self, turns: Sequence[Turn], sampling: Sampling, base: bool = False) -> Generator[Streamed, None, None]:
        """Yield the pieces of one answer as they are generated: text, Thoughts, Calls.

        Closing the generator stops the generation.
        """
        if sampling.num_beams > 1:  # beams change their minds: there is nothing to show before the end
            found = self([turns], sampling, base)[0]
            yield from pieces(Parts(thought=found.thought))
            yield found.text
            yield from found.calls
            return
        ids, _ = self._fitted(turns, prompt_limit(self.max_length_q, self.context, sampling.max_new_tokens))
        reading = self.reading(ids, tools_of(turns))
        streamer = _Pieces(Wording(self.tokenizer, self.prompt.clean, (), reading, self.kept), self.stop_ids)
        work = threading.Thread(target=streamer.run, args=(self.generate, [ids], sampling, base, streamer), daemon=True)
        work.start()
        try:
            yield from streamer
        finally:
            streamer.cancelled = True
            work.join()

    def reading(self, ids: Sequence[int], tools: str) -> Reading | None:
        """Reads the answer to the prompt `ids`; None where there is nothing to be read in it but text."""
        return reading_of(self.tokenizer, self.form, ids, tools)

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sampling, base: bool = False, streamer: _Pieces | None = None
    ) -> list[list[int]]:
        """New ids of each prompt (a list of ids), pads and all; the prompts are padded on the left for the batch."""
        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(row)) + row for row in prompts], device=self.net.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self.net.device)
        criteria = [streamer.stopped] if streamer else [_Told(self.watch, width)] if self.watch else None
        with self.lock, torch.inference_mode(), self.chosen(base) as net:
            output = self.prefixes.generate(
                net,
                base,
                prompts if sampling.num_beams == 1 and (streamer or len(prompts) > 1) else None,
                input_ids=ids,
                attention_mask=mask,
                generation_config=self.generation_config(replace(sampling, repetition_penalty=1.0)),
                logits_processor=repetition_penalty(sampling.repetition_penalty, mask),
                streamer=streamer,
                stopping_criteria=criteria,
                **without_routers(net),
            )
        return output[:, width:].tolist()

    @contextlib.contextmanager
    def chosen(self, base: bool) -> Iterator[PreTrainedModel | PeftModel]:
        """The net that answers: the tuned one, its adapter switched off for `base`, or the base loaded beside it."""
        if base and hasattr(self.net, "disable_adapter"):
            with self.net.disable_adapter():
                yield self.net
        elif base and self.load_base:
            if self.base_net is None:
                self.base_net = self.load_base()
                _forget_generation_config(self.base_net)
            yield self.base_net
        else:
            yield self.net

    def generation_config(self, sampling: Sampling) -> GenerationConfig:
        """transformers' settings for a Sampling."""
        drawn = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.do_sample,
            num_beams=sampling.num_beams,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
            use_cache=True,
            **(drawn if sampling.do_sample else {}),
        )

    def _fitted(self, turns: Sequence[Turn], limit: int) -> tuple[list[int], int]:
        return fitted(self.tokenizer, self.prompt, turns, self.style, limit)

    def _answer(self, ids: list[int], cut_to: int, reading: Reading | None) -> Answer:
        """The Answer that generated ids are: up to the first stop id."""
        ends = [number for number, id_ in enumerate(ids) if id_ in self.stop_ids]
        kept = ids[: ends[0]] if ends else ids
        text = decode(self.tokenizer, kept, self.kept)
        thought, text, calls = reading.more(text, ended=True) if reading else Parts(text=text)
        return Answer(self.prompt.clean(text), "stop" if ends else "length", len(kept), cut_to, thought, calls)


def prompt_limit(max_length_q: int, context: int, new_tokens: int) -> int:
    """Most tokens of a prompt: what `context` leaves beside `new_tokens` for the answer, and at least `max_length_q`.

    context: most tokens of a prompt and its answer together; 0: `max_length_q` alone is the limit.
    """
    return max(max_length_q, context - new_tokens)


def fitted(
    tokenizer: PreTrainedTokenizerBase, prompt: Family, turns: Sequence[Turn], style: str, limit: int
) -> tuple[list[int], int]:
    """(ids that ask for the answer to `turns`, at most `limit` of them; `limit` where they were cut to it, else 0).

    UserError where that is impossible.
    """
    try:
        ids, cut = render.prompt_ids(tokenizer, prompt, turns, style, limit)
    except render.TooLongError:
        raise UserError(
            f"提问放不下 not even one character of the question fits in {limit} tokens: shorten the system text, or "
            "give a smaller --max_new_tokens or a larger --max_length_q"
        ) from None
    except FormatError as problem:
        raise UserError(problem.reason) from None
    return ids, limit if cut else 0


def _forget_generation_config(net: PreTrainedModel | PeftModel) -> None:
    """Empty the checkpoint's own generation config: what it asks for would mix with a Sampling."""
    causal_of(net).generation_config = GenerationConfig()


class _Told:
    """A stopping criterion that stops nothing: it tells `watch` how many tokens there are beside `width` of prompt."""

    def __init__(self, watch: Callable[[int], None], width: int) -> None:
        self.watch = watch
        self.width = width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.watch(input_ids.shape[1] - self.width)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _Pieces(BaseStreamer):
    """Hands generated text from `generate`'s thread to an iterator, whole characters only."""

    def __init__(self, words: Wording, stop_ids: list[int]) -> None:
        self.words = words
        self.stop_ids = stop_ids
        self.prompt_seen = False
        self.cancelled = False  # the reader is gone
        self.ready = threading.Condition()  # guards what follows
        self.parts: list[Streamed] = []
        self.done = False
        self.error: BaseException | None = None

    def run(self, generate: Callable[..., Any], *arguments: Any) -> None:
        """What the generating thread does: call `generate`, then hand over what is left of the text."""
        try:
            generate(*arguments)
            self._hand_over(self.words.more(ended=True))
        except BaseException as error:  # carried over to the reader's thread, which raises it
            self.error = error
        finally:
            with self.ready:
                self.done = True
                self.ready.notify()

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt's ids, and then with each new id."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.words.ids += [id_ for id_ in value.flatten().tolist() if id_ not in self.stop_ids]
        self._hand_over(self.words.more())

    def _hand_over(self, text: str) -> None:
        thought, calls = self.words.aside()
        if new := list(pieces(Parts(thought, text, calls))):
            with self.ready:
                self.parts += new
                self.ready.notify()

    def end(self) -> None:
        """Called by `generate` at its end; `run` says when it is over, also after an error."""

    def stopped(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """A stopping criterion, bool [B]: whether the reader is gone."""
        return torch.full((input_ids.shape[0],), self.cancelled, device=input_ids.device)

    def __iter__(self) -> Iterator[Streamed]:
        """The parts, as they come; raises what `generate` raised."""
        while True:
            with self.ready:
                self.ready.wait_for(lambda: self.parts or self.done)
                parts, self.parts = self.parts, []
                over = self.done
            yield from parts
            if over:
                break
        if self.error:
            raise self.error
