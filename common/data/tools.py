"""Tools on offer and their calls, as files write them: objects or JSON text, OpenAI's form or bare functions."""

from __future__ import annotations

import json
from typing import Any

from common.conversation.turns import Call, FormatError, Turn
from common.data.fields import Fields, as_text, parsed


def opened(row: Fields, text: str) -> list[Turn]:
    """The system turn of a row with the system text `text` and the tools on offer under `tools`; [] without either.

    Tools are a list of functions, or its JSON text; any other text is put behind the system text.
    """
    value = row.get("tools")
    tools = _functions(parsed(value) if isinstance(value, str) else value)
    if tools:
        return [Turn("system", text, tools=as_text(_json(tools), "tools"))]
    if isinstance(value, list) and value:
        raise FormatError("tool-call", f"tools 应为函数的列表 must be a list of functions, found {str(value)[:60]!r}")
    told = row.text("tools", required=False)
    text = "\n".join(part for part in (text, "" if told.strip() == "[]" else told) if part.strip())
    return [Turn("system", text)] if text else []


def calls_of(message: Fields) -> tuple[tuple[Call, ...], tuple[str, ...]]:
    """(calls, their ids) under a message's `tool_calls`; ids are () where not all calls have one."""
    calls, ids = [], []
    for call in message.objects("tool_calls", "function", frozenset({"id", "type", "function", "index"})):
        call.read |= {"type", "index"}
        function = call.get("function") or call.row
        found = _call(function)
        if found is None:
            raise FormatError(
                "tool-call", f"{message.name}.tool_calls: 应有 name 和 arguments expected, found {str(call.row)[:60]!r}"
            )
        if function is call.row:
            call.read |= {"name", "arguments"}
        calls.append(found)
        ids.append(call.text("id", required=False))
    return tuple(calls), tuple(ids) if all(ids) else ()


def calls_in(text: str) -> tuple[Call, ...]:
    """The calls that a text is: JSON of {name, arguments} or a list of them; () where it is none."""
    value = parsed(text)
    values = value if isinstance(value, list) else [value]
    calls = [_call(value) for value in values]
    return tuple(call for call in calls if call) if all(calls) else ()


def _call(value: Any) -> Call | None:
    """One call of {name, arguments}, also within `function`; None where it is none."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"].strip():
        return None
    given = value.get("arguments", value.get("parameters")) or {}
    arguments = parsed(given) if isinstance(given, str) else given
    if not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return None
    return Call(as_text(value["name"], "name"), as_text(text, "arguments"))


def _functions(value: Any) -> list[dict[str, Any]]:
    """The functions of a list of tools, each as OpenAI writes one; [] where the value is no such list."""
    if not isinstance(value, list):
        return []
    bare = [tool.get("function", tool) if isinstance(tool, dict) else None for tool in value]
    if not all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in bare):
        return []
    return [
        tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": tool} for tool in value
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
