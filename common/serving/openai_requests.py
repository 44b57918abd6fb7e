"""Bodies of OpenAI's chat/completions and completions, read into Asks for the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from common.engine.request import Ask
from common.errors import RowError
from common.inference.answer_parts import asked_open
from common.inference.answerer import Sampling
from common.serving.failures import RequestRefusedError
from common.serving.openai_messages import read_messages, read_tools
from common.serving.validation import Field, check_value, excerpt, is_unicode, read_fields

if TYPE_CHECKING:
    from common.conversation.answer_form import AnswerForm
    from common.engine.batcher import Batcher

MOST_ANSWERS = 16  # prompts × n
SAMPLING = {
    "model": Field(str, "", about="a name of /v1/models; the served run if left out"),
    "max_tokens": Field(int, None, 1, 1 << 20, "most tokens of the answer"),
    "temperature": Field(float, None, 0, 100, "0: greedy"),
    "top_p": Field(float, None, 0, 1, "nucleus"),
    "top_k": Field(int, None, -1, 1 << 20, "candidates; 0 or -1: all"),
    "min_p": Field(float, None, 0, 1, "candidates below this share of the highest chance are left out; 0: none"),
    "presence_penalty": Field(float, 0.0, -2, 2, "taken off pieces that have occurred in the answer"),
    "frequency_penalty": Field(float, 0.0, -2, 2, "the same, for each time"),
    "repetition_penalty": Field(float, None, 0.01, 10, "above 1: fewer repetitions of prompt and answer"),
    "seed": Field(int, None, -(2**63), 2**63 - 1, "the same seed draws the same answer"),
    "n": Field(int, 1, 1, 8, "answers"),
    "stream": Field(bool, False, about="server-sent events, the last one [DONE]"),
    "stream_options": Field(dict, None, about='{"include_usage": true}: a last chunk with the token counts'),
    "user": Field(str, "", about="ignored"),
}
CHAT = SAMPLING | {
    "messages": Field(list, None, about='[{"role": "system|user|assistant|tool", "content": text}]'),
    "tools": Field(list, None, about='[{"type": "function", "function": {"name", "description", "parameters"}}]'),
    "max_completion_tokens": Field(int, None, 1, 1 << 20, "as max_tokens"),
    "logprobs": Field(bool, False, about="log probability of each piece"),
    "top_logprobs": Field(int, 0, 0, 20, "and of the most probable ones in its place"),
    "enable_thinking": Field(bool, None, about="thought before the answer, where the chat template can switch it"),
    "chat_template_kwargs": Field(dict, None, about='{"enable_thinking": true or false}'),
    "reasoning_effort": Field(str, None, about='as enable_thinking: "none" is false, any other true'),
}
COMPLETION = SAMPLING | {
    "logprobs": Field(int, None, 0, 20, "log probabilities, with so many alternatives"),
    "skip_special_tokens": Field(bool, True, about="false: special tokens stay in the text"),
}
# fields with the values that change nothing here; any other value is refused, but where the body has such a field
ONLY: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "enable_thinking": (False,),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
}
CHOICES = {"tools": "tool_choice", "functions": "function_call"}  # what is offered: the field whose "none" forbids it
IGNORED = "metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls".split()


class Wanted(NamedTuple):
    """A body read: the model's name, one Ask an answer, n of them a prompt, and how to hand them over."""

    model: str
    asks: list[Ask]
    n: int
    stream: bool
    include_usage: bool
    chat: bool


def read_chat(body: dict[str, Any], batcher: Batcher, defaults: Sampling) -> Wanted:
    """The Wanted of a chat/completions body; defaults: the service's Sampling."""
    form = batcher.answer.form
    tools = read_tools(body, form)
    given = _read_body(body, CHAT, ("messages",))
    if given["top_logprobs"] and not given["logprobs"]:
        raise RequestRefusedError("top_logprobs 需要 needs logprobs: true", param="top_logprobs", code="invalid_value")
    given["max_tokens"] = given["max_completion_tokens"] or given["max_tokens"]
    thinking = _read_thinking(given, form)
    turns = read_messages(given["messages"], form, tools)
    try:
        ids = batcher.encoder.whole_ids(turns, thinking)
    except RowError as problem:  # the model's chat template does not take them
        raise RequestRefusedError(f"messages: {problem}", param="messages", code="invalid_message") from None
    if thinking is False and asked_open(batcher.tokenizer, form, ids):
        raise _no_thinking("enable_thinking", "这个模型总会思考 this model always thinks; leave it out")
    logprobs = given["top_logprobs"] if given["logprobs"] else None
    wanted = _wanted(given, body, [ids], batcher, defaults, logprobs, chat=True)
    return wanted._replace(asks=[replace(ask, tools=tools) for ask in wanted.asks])


def read_completion(body: dict[str, Any], batcher: Batcher, defaults: Sampling) -> Wanted:
    """The Wanted of a completions body."""
    given = _read_body(body, COMPLETION, ("prompt",))
    prompts = _read_prompts(body.get("prompt"), batcher)
    wanted = _wanted(given, body, prompts, batcher, defaults, given["logprobs"], chat=False)
    return wanted._replace(asks=[replace(ask, special=not given["skip_special_tokens"]) for ask in wanted.asks])


def _read_thinking(given: dict[str, Any], form: AnswerForm) -> bool | None:
    """Whether a body wants thought before the answer, None where it does not say."""
    options = given["chat_template_kwargs"] or {}
    if other := [name for name in options if name != "enable_thinking"]:
        why = f"{excerpt(other[0])} 不支持 is not supported here; leave it out"
        raise _no_thinking("chat_template_kwargs", why)
    inside = check_value("chat_template_kwargs.enable_thinking", options.get("enable_thinking", False), Field(bool))
    said = {given["enable_thinking"], _effort(given, form)} - {None} | ({inside} if options else set())
    if len(said) > 1:
        why = "几处不一致 enable_thinking, chat_template_kwargs and reasoning_effort say different things; send one"
        raise _no_thinking("enable_thinking", why)
    thinking = next(iter(said), None)
    if thinking and not form.switch:
        name = "chat_template_kwargs" if options else "enable_thinking"
        raise _no_thinking(name, "不支持 is not supported by this model's chat template; leave it out, or send false")
    return thinking


def _effort(given: dict[str, Any], form: AnswerForm) -> bool | None:
    """What reasoning_effort says of thinking; None where more or less of it would change nothing."""
    effort = given["reasoning_effort"]
    if effort == "none":
        return False
    return True if effort and form.switch else None


def _no_thinking(name: str, why: str) -> RequestRefusedError:
    return RequestRefusedError(f"{name}: {why}", param=name, code="unsupported_parameter")


def _read_prompts(prompt: Any, batcher: Batcher) -> list[list[int]]:
    """Lists of ids of a `prompt`: a text, a list of texts, a list of ids, or a list of lists of ids."""
    many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    prompts = prompt if many else [prompt]
    if len(prompts) > MOST_ANSWERS:
        raise RequestRefusedError(
            f"prompt: 最多 at most {MOST_ANSWERS}, found {len(prompts)}", param="prompt", code="out_of_range"
        )
    return [_read_prompt(one, batcher) for one in prompts]


def _read_prompt(prompt: Any, batcher: Batcher) -> list[int]:
    if isinstance(prompt, str) and prompt and is_unicode(prompt):
        return batcher.encoder.text_ids(prompt)
    if isinstance(prompt, list) and prompt and all(type(id_) is int for id_ in prompt):
        problem = batcher.encoder.problem_of(prompt)
        if problem is None:
            return prompt
        raise RequestRefusedError(f"prompt: {problem}", param="prompt", code="invalid_prompt")
    raise RequestRefusedError(
        f"prompt 应为非空的文字或 token id must be text or token ids that are not empty, found {excerpt(prompt)}",
        param="prompt",
        code="invalid_type",
    )


def _read_body(body: dict[str, Any], fields: Mapping[str, Field], others: tuple[str, ...]) -> dict[str, Any]:
    """The checked fields. Those of ONLY and IGNORED may be there too; a value that ONLY does not list is refused."""
    for name, allowed in ONLY.items():
        if name in fields:
            continue
        not_used = name in CHOICES and body.get(CHOICES[name]) == "none"
        if body.get(name) is not None and body[name] not in allowed and not not_used:
            good = " 或 or ".join(map(json.dumps, allowed))
            why = f"{name} 不支持 is not supported here; leave it out, or send {good}"
            raise RequestRefusedError(why, param=name, code="unsupported_parameter")
    return read_fields(body, fields, (*others, "stop", *ONLY, *IGNORED), null=True)


def _wanted(
    given: dict[str, Any],
    body: dict[str, Any],
    prompts: list[list[int]],
    batcher: Batcher,
    defaults: Sampling,
    logprobs: int | None,
    chat: bool,
) -> Wanted:
    usage = (given["stream_options"] or {}).get("include_usage")
    include_usage = usage is not None and check_value("stream_options.include_usage", usage, Field(bool))
    most = min(MOST_ANSWERS, batcher.slots + batcher.queue)  # more would be told to try again for ever
    if len(prompts) * given["n"] > most:
        raise RequestRefusedError(f"n × prompt 最多 at most {most}", param="n", code="out_of_range")
    sampling, stop = _sampling(given, defaults), _read_stop(body.get("stop"))
    asked = next((name for name in ("max_completion_tokens", "max_tokens") if given.get(name) is not None), "")
    asks = [
        Ask(
            ids,
            fitted(sampling, len(ids), batcher.context, asked),
            given["presence_penalty"],
            given["frequency_penalty"],
            None if given["seed"] is None else (given["seed"] + number) % 2**64,  # Random takes -1 for 1
            stop,
            logprobs,
            clean=chat,
            live=given["stream"],
        )
        for ids in prompts
        for number in range(given["n"])
    ]
    return Wanted(given["model"], asks, given["n"], given["stream"], include_usage, chat)


def fitted(sampling: Sampling, length: int, context: int, asked: str) -> Sampling:
    """`sampling`, shortened so that a prompt of `length` ids and its answer fit in `context`.

    asked: the field by which the client asked for this many tokens; "" where it did not, and then the answer is as long
    as there is room.
    RequestRefusedError, with the numbers, where there is no room.
    """
    room = context - length
    if room < 1 or asked and room < sampling.max_new_tokens:
        wanted = f" + {asked} {sampling.max_new_tokens}" if asked else ""
        raise RequestRefusedError(
            f"提示太长 the prompt is too long: {length} tokens{wanted}, 上限 the limit for both is {context}",
            param=asked if room > 0 else None,
            code="context_length_exceeded",
        )
    return replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))


def _sampling(given: dict[str, Any], defaults: Sampling) -> Sampling:
    """The Sampling asked for. temperature 0 is greedy; what is left out is the service's default."""
    names = {name: name for name in ("top_p", "min_p", "repetition_penalty")} | {"max_tokens": "max_new_tokens"}
    chosen = {ours: given[name] for name, ours in names.items() if given[name] is not None}
    if given["top_k"] is not None:
        chosen["top_k"] = max(given["top_k"], 0)
    if given["temperature"] is not None:
        chosen |= {"do_sample": given["temperature"] > 0, "temperature": given["temperature"] or 1.0}
    return Sampling(**vars(defaults) | {"num_beams": 1} | chosen)


def _read_stop(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    good = isinstance(stops, list) and len(stops) <= 8
    if not good or not all(isinstance(s, str) and 0 < len(s) <= 256 and is_unicode(s) for s in stops):
        raise RequestRefusedError(
            f"stop 应为 must be 1 to 8 texts of 1 to 256 characters, found {excerpt(stop)}",
            param="stop",
            code="invalid_value",
        )
    return tuple(stops)
