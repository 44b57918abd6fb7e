"""Bodies of requests, read strictly: JSON of the right kind, known fields, right types, values within bounds.

Plain Python, no schema library: every refusal has this service's own text and code. pydantic lets a lone surrogate
through and calls an int beyond a float's range no number, and the same texts on top of it took a fourth more lines.
"""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from common.serving.failures import RequestRefusedError

if TYPE_CHECKING:
    from flask import Request

LIMIT = 1 << 20  # bytes of a body


class Field(NamedTuple):
    """What a field may hold: a type (int also for float), what it is when left out, and its bounds, both included."""

    kind: type
    default: Any = None
    least: float | None = None
    most: float | None = None
    about: str = ""


def read_json(request: Request) -> dict[str, Any]:
    """The JSON object in a Flask request's body. RequestRefusedError where it is anything else."""
    if request.mimetype != "application/json":
        found = request.mimetype or "none"
        raise RequestRefusedError(
            f"Content-Type 应为 must be application/json, found {found}", 415, code="content_type"
        )
    packed = request.headers.get("Content-Encoding", "")
    if packed.strip().lower() not in ("", "identity"):
        why = f"Content-Encoding: 不支持压缩 a compressed body is not read: {packed[:64]}; send it uncompressed"
        raise RequestRefusedError(why, 415, code="content_encoding")
    data = request.get_data()
    if data.startswith(codecs.BOM_UTF8):
        why = "请求体以 BOM 开头 the body begins with a BOM (UTF-8 signature); send it without"
        raise RequestRefusedError(why, code="invalid_json")
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError:
        raise RequestRefusedError("请求体不是 UTF-8 the body is not UTF-8", code="invalid_json") from None
    except (ValueError, RecursionError) as problem:
        raise RequestRefusedError(
            f"请求体不是有效的 JSON the body is not valid JSON: {problem}", code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        found = type(body).__name__
        raise RequestRefusedError(f"应为 JSON 对象 the body must be a JSON object, found {found}", code="invalid_json")
    return body


def read_fields(
    body: Mapping[str, Any], fields: Mapping[str, Field], others: Collection[str] = (), null: bool = False
) -> dict[str, Any]:
    """{name: value} of all `fields`, defaults filled in. RequestRefusedError names the field and what is allowed.

    others: names the caller reads itself. null: a field that is null counts as left out, also one unknown here.
    """
    for name in body:
        if name not in fields and name not in others and not (null and body[name] is None):
            meant = name.lower().replace("-", "_")
            near = difflib.get_close_matches(meant, [*fields, *others], n=1, cutoff=0.85)
            hint = f"; did you mean {near[0]!r}?" if near else "; leave it out"
            raise RequestRefusedError(f"未知字段 unknown field {excerpt(name)}{hint}", param=name, code="unknown_field")
    found = {}
    for name, field in fields.items():
        value = body.get(name, field.default)
        left_out = name not in body or null and value is None
        found[name] = field.default if left_out else check_value(name, value, field)
    return found


def check_value(name: str, value: Any, field: Field) -> Any:
    """`value` as the field wants it; RequestRefusedError with its name, what was found and what is allowed."""
    kind = type(value)
    if kind is not field.kind and not (field.kind is float and kind is int):
        found = f"{kind.__name__} {excerpt(value)}"
        raise RequestRefusedError(
            f"{name} 应为 must be {field.kind.__name__}, found {found}", param=name, code="invalid_type"
        )
    if field.least is not None and field.most is not None and not field.least <= value <= field.most:
        allowed = f"between {field.least} 和 and {field.most}"
        raise RequestRefusedError(
            f"{name} 应在 must be {allowed}, found {excerpt(value)}", param=name, code="out_of_range"
        )
    if field.kind is str and not is_unicode(value):
        raise RequestRefusedError(
            f"{name} 有半个字符 holds half a character (a lone surrogate)", param=name, code="invalid_text"
        )
    return float(value) if field.kind is float else value


def excerpt(value: Any) -> str:
    """The start of any value, as it may stand in an error: 60 characters, none of them half."""
    try:
        return ascii(value)[:60] if not isinstance(value, str) else repr(value[:60].encode("utf-8", "replace").decode())
    except (ValueError, RecursionError):  # an int of thousands of digits, a nest of thousands of lists
        return "…"


def is_unicode(text: str) -> bool:
    """Whether a text is made of whole characters, with no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found
