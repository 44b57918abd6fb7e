"""OpenAI's messages and tools, read into Turns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from common.conversation.answer_form import TEXT_ALONE, AnswerForm, call_of
from common.conversation.turns import Call, FormatError, Turn, in_order
from common.data.utterances import CLOSE, thought_apart
from common.serving.failures import RequestRefusedError
from common.serving.validation import excerpt, is_unicode

if TYPE_CHECKING:
    from collections.abc import Mapping

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
THOUGHTS = ("reasoning_content", "reasoning")  # of an answer, the first that says something
ECHOED = ("id", "name", "refusal", "annotations", *THOUGHTS)  # of an answer that a client sends back
OWN = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}  # fields that only messages of a role have
TOOL_NAME = re.compile(r"[\w.-]{1,64}")
UNUSED = ("strict",)  # of a function: arguments are not forced into its schema


class Said(NamedTuple):
    """A message read: its Turn, and the ids of its calls, or of the call it is the result of."""

    turn: Turn
    ids: list[str]
    where: str


def read_messages(messages: Any, form: AnswerForm = TEXT_ALONE, tools: str = "") -> list[Turn]:
    """Turns, ending with a question or results of tools, of a list of messages, brought in order as a file's are.

    form: how the model's answers are written; of a model that does not think, thoughts sent back are passed over.
    tools: those on offer, a JSON list as text.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestRefusedError(
            "messages 应为非空列表 must be a list that is not empty", param="messages", code="invalid_type"
        )
    said = [_read_message(message, f"messages[{number}]", form) for number, message in enumerate(messages)]
    last = said[-1]
    if last.turn.role == "user" and not last.turn.text.strip():
        raise _bad_message(f"{last.where}.content", "是空的 is empty")
    turns = _with_results_in_order(said)
    try:
        ordered = list(in_order(turns, answered=False)[0])
    except FormatError as problem:
        raise _bad_message(last.where, problem.reason) from None
    return _offering(ordered, tools)


def read_tools(body: Mapping[str, Any], form: AnswerForm) -> str:
    """The tools that a body offers, a JSON list as text; "" where there are none, or `tool_choice` forbids them."""
    tools = body.get("tools")
    if not tools or body.get("tool_choice") == "none":
        return ""
    if form.read_calls is None:
        why = "tools: 模型的聊天模板不接受工具 the chat template of this model takes no tools; leave it out"
        raise RequestRefusedError(why, param="tools", code="unsupported_parameter")
    if not isinstance(tools, list):
        raise _bad("tools", f"应为列表 must be a list, found {excerpt(tools)}")
    if body.get("parallel_tool_calls") is False:
        why = "parallel_tool_calls: 不支持 false is not supported here: an answer may call several; leave it out"
        raise RequestRefusedError(why, param="parallel_tool_calls", code="unsupported_parameter")
    read = [_read_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    offered = json.dumps(read, ensure_ascii=False)
    if not is_unicode(offered):
        raise _bad("tools", "有半个字符 holds half a character (a lone surrogate)")
    return offered


def _read_tool(tool: Any, where: str) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict):
        raise _bad(where, f'应为 must be {{"type": "function", "function": {{…}}}}, found {excerpt(tool)}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise _bad(f"{where}.function.name", f"应为 must be 1 to 64 letters, digits, _ . -, found {excerpt(name)}")
    if parameters is not None and not isinstance(parameters, dict):
        raise _bad(f"{where}.function.parameters", f"应为 must be a JSON schema, found {excerpt(parameters)}")
    return {"type": "function", "function": {key: value for key, value in function.items() if key not in UNUSED}}


def _read_message(message: Any, where: str, form: AnswerForm) -> Said:
    if not isinstance(message, dict):
        raise _bad_message(where, f"应为对象 an object expected, found {excerpt(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise _bad_message(f"{where}.role", f"应为 must be one of {', '.join(ROLES)}, found {excerpt(role)}")
    for name, value in message.items():
        if name not in ("role", "content", *ECHOED, *OWN.get(role, ())) and value:
            raise _bad_message(f"{where}.{name[:64]}", "不支持 is not supported; leave it out")
    if "name" in message and not isinstance(message["name"], str | None):
        raise _bad_message(f"{where}.name", "应为文字 must be text")
    text = "" if content is None else _read_content(content, f"{where}.content")
    if role == "tool":
        return Said(Turn("tool", text), [_read_id(message.get("tool_call_id"), f"{where}.tool_call_id")], where)
    if role != "assistant":
        return Said(Turn(ROLES[role], text), [], where)
    calls, ids = _read_calls(message.get("tool_calls") or [], f"{where}.tool_calls", form)
    turn = Turn("assistant", text, thought=_read_thought(message, where, form), calls=calls)
    if form.thought[0] and CLOSE in text:
        try:
            turn = thought_apart(turn)
        except FormatError as problem:
            raise _bad_message(f"{where}.content", problem.reason) from None
    return Said(turn, ids, where)


def _read_thought(message: dict[str, Any], where: str, form: AnswerForm) -> str:
    """What an answer that is sent back had thought; "" where the model does not think."""
    name = next((name for name in THOUGHTS if message.get(name)), "")
    if not name or not form.thought[0]:
        return ""
    return _read_content(message[name], f"{where}.{name}")


def _read_calls(calls: Any, where: str, form: AnswerForm) -> tuple[tuple[Call, ...], list[str]]:
    """(Calls, their ids) of an answer that is sent back."""
    if calls and form.read_calls is None:
        raise _bad_message(
            where, "模型的聊天模板不接受工具 the chat template of this model takes no tools; leave it out"
        )
    if not isinstance(calls, list):
        raise _bad_message(where, f"应为列表 must be a list, found {excerpt(calls)}")
    read = [_read_call(call, f"{where}[{number}]") for number, call in enumerate(calls)]
    ids = [id_ for _, id_ in read]
    if len(set(ids)) < len(ids):
        raise _bad_message(where, "id 重复 an id occurs twice")
    return tuple(call for call, _ in read), ids


def _read_call(call: Any, where: str) -> tuple[Call, str]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise _bad_message(where, f'应为 must be {{"id", "type": "function", "function"}}, found {excerpt(call)}')
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise _bad_message(f"{where}.function.name", f"应为 must be a tool's name, found {excerpt(name)}")
    try:
        found = json.loads(arguments or "{}") if isinstance(arguments, str | None) else None
        made = call_of(name, found) if isinstance(found, dict) else None  # its text has no escapes
    except (ValueError, RecursionError):
        made = None
    if made is None:
        why = f"应为 must be the text of a JSON object, found {excerpt(arguments)}"
        raise _bad_message(f"{where}.function.arguments", why)
    return made, _read_id(call.get("id"), f"{where}.id")


def _read_id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise _bad_message(where, f"应为文字 must be text, as the answer gave it, found {excerpt(value)}")
    return value


def _with_results_in_order(said: Sequence[Said]) -> list[Turn]:
    """The Turns, results in the order of the calls before them; RequestRefusedError where one of either is missing."""
    turns: list[Turn] = []
    wanted: list[str] = []  # ids of calls without a result so far
    results: dict[str, Turn] = {}
    caller = ""
    for each in [*said, Said(Turn("", ""), [], "")]:
        if each.turn.role == "tool":
            if each.ids[0] not in wanted or each.ids[0] in results:
                why = f"前面的回答没有这个 id 的调用 no call of this id waits for a result: {excerpt(each.ids[0])}"
                raise _bad_message(f"{each.where}.tool_call_id", why)
            results[each.ids[0]] = each.turn
            continue
        if missing := [id_ for id_ in wanted if id_ not in results]:
            raise _bad_message(
                f"{caller}.tool_calls", f"没有结果 no tool message has the result of {excerpt(missing[0])}"
            )
        turns += [*(results[id_] for id_ in wanted), each.turn]
        wanted, results, caller = each.ids, {}, each.where
    return turns[:-1]


def _offering(turns: list[Turn], tools: str) -> list[Turn]:
    """The turns with `tools` on offer from the system turn on, which may have no text."""
    if not tools:
        return turns
    if turns[0].role == "system":
        return [turns[0]._replace(tools=tools), *turns[1:]]
    return [Turn("system", "", tools=tools), *turns]


def _read_content(content: Any, where: str) -> str:
    """The text of a content: a string, or a list of text parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _bad_message(where, f"应为文字 must be text, or a list of text parts, found {excerpt(content)}")
        if not is_unicode(part["text"]):
            raise _bad_message(where, "有半个字符 holds half a character (a lone surrogate)")
    return "\n".join(part["text"] for part in parts)


def _bad_message(where: str, why: str) -> RequestRefusedError:
    return RequestRefusedError(f"{where} {why}", param=where, code="invalid_message")


def _bad(where: str, why: str) -> RequestRefusedError:
    return RequestRefusedError(f"{where} {why}", param=where, code="invalid_value")
