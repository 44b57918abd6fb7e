"""How a family's models write thought and calls in an answer: marks around them, and how a call is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from common.conversation.turns import Call, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Parameters = Mapping[str, Mapping[str, Any]]  # of each tool on offer: {its name: {parameter: JSON schema}}
NO_MARKS = ("", "")


class AnswerForm(NamedTuple):
    """Marks of an answer, as texts; those that are empty never occur.

    thought: around a thought, at the start of an answer. call: around a call. read_calls(text, parameters) gives the
    calls that a text between the marks of a call is; () or ValueError where it is none; None where the chat template
    takes no tools. bare: where a call has no marks, a pattern that every beginning of one matches, and read_calls reads
    a whole answer. tokens: control tokens among the marks, kept in the text though a tokenizer leaves them out.
    switch: the chat template asks otherwise with `enable_thinking` than without.
    """

    thought: tuple[str, str] = NO_MARKS
    call: tuple[str, str] = NO_MARKS
    read_calls: Callable[[str, Parameters], Sequence[Call]] | None = None
    bare: re.Pattern[str] | None = None
    tokens: tuple[str, ...] = ()
    switch: bool = False


TEXT_ALONE = AnswerForm()  # of answers that are text, whatever is in it


def own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a tokenizer's own chat template, of all where it has several by name; "" where it has none."""
    template = tokenizer.chat_template or ""
    return "\n".join(template.values()) if isinstance(template, dict) else template


def knows(tokenizer: PreTrainedTokenizerBase, mark: str) -> bool:
    """Whether a mark is a token of the tokenizer's, or its chat template writes it."""
    return mark in tokenizer.get_added_vocab() or mark in own_template(tokenizer)


def tools_of(turns: Sequence[Turn]) -> str:
    """The tools on offer at the end of a conversation, a JSON list as text; "" where there are none."""
    return next((turn.tools for turn in reversed(turns) if turn.tools), "")


def parameters_of(tools: str) -> dict[str, dict[str, Any]]:
    """Parameters of tools given as a JSON list, OpenAI's or functions alone; what has no name is left out."""
    listed = json.loads(tools) if tools else []
    functions = [tool.get("function", tool) for tool in listed if isinstance(tool, dict)]
    named = (one for one in functions if isinstance(one, dict) and isinstance(one.get("name"), str))
    return {one["name"]: _properties(one) for one in named}


def _properties(function: Mapping[str, Any]) -> dict[str, Any]:
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else {}


def call_of(name: str, arguments: Mapping[str, Any]) -> Call:
    """The Call of a tool; ValueError where an argument is no JSON, or half a character is in it."""
    call = Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    "".join(call).encode()  # what JSON escapes may be a lone surrogate, which no answer can hold
    return call


def json_calls(text: str, parameters: Parameters) -> Sequence[Call]:
    """The call that a JSON object of name and arguments is; the arguments may be an object's text."""
    found = json.loads(text)
    name = found.get("name") if isinstance(found, dict) else None
    arguments = found.get("arguments", {}) if name else None
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return [call_of(name, arguments)] if isinstance(name, str) and isinstance(arguments, dict) else ()


def typed_call(name: str, texts: Mapping[str, str], parameters: Parameters) -> Call:
    """The Call of arguments written without quotes: text where the tool's schema says so, JSON where it is any."""
    schemas = parameters.get(name, {})
    return call_of(name, {key: _typed(text, schemas.get(key)) for key, text in texts.items()})


def _typed(text: str, schema: object) -> Any:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string" or isinstance(kind, list) and "string" in kind and text != "null":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def as_openai(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Calls as OpenAI's `tool_calls`, without ids."""
    return [{"type": "function", "function": call._asdict()} for call in calls]


def written(text: str, calls: Sequence[Call]) -> str:
    """An answer with its calls as one text to compare: each call is a line, a JSON object with its keys in order."""
    lines = [_line(call) for call in calls]
    return "\n".join([text, *lines] if text else lines)


def _line(call: Call) -> str:
    try:
        arguments = json.loads(call.arguments)
    except (ValueError, RecursionError):
        arguments = call.arguments
    name, inside = (json.dumps(value, ensure_ascii=False, sort_keys=True) for value in (call.name, arguments))
    return f'{{"name": {name}, "arguments": {inside}}}'
