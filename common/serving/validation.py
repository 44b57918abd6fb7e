"""Bodies of requests, read strictly: JSON of the right kind, known fields, right types, values within bounds."""

import difflib
import json
from typing import NamedTuple

LIMIT = 1 << 20  # bytes of a body


class Refused(Exception):
    """A request that is not answered: what the client is told, in the shape of OpenAI's errors.

    status: of HTTP. param: the field to blame. code: a word programs can look for. headers: more of them.
    """

    def __init__(self, message, status=400, param=None, code=None, headers=()):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers)
        self.param = param and param[:64].encode("utf-8", "replace").decode()


class Field(NamedTuple):
    """What a field may hold: a type (int also for float), what it is when left out, and its bounds, both included."""

    kind: type
    default: object = None
    least: float | None = None
    most: float | None = None
    about: str = ""


def read_json(request):
    """The JSON object in a Flask request's body. Refused where it is anything else."""
    if request.mimetype != "application/json":
        found = request.mimetype or "none"
        raise Refused(f"Content-Type 应为 must be application/json, found {found}", 415, code="content_type")
    try:
        body = json.loads(
            request.get_data().decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_without_repeats
        )
    except UnicodeDecodeError:
        raise Refused("请求体不是 UTF-8 the body is not UTF-8", code="invalid_json") from None
    except (ValueError, RecursionError) as problem:
        raise Refused(f"请求体不是有效的 JSON the body is not valid JSON: {problem}", code="invalid_json") from None
    if not isinstance(body, dict):
        found = type(body).__name__
        raise Refused(f"应为 JSON 对象 the body must be a JSON object, found {found}", code="invalid_json")
    return body


def values(body, fields, others=(), null=False):
    """{name: value} of all `fields` ({name: Field}), defaults filled in. Refused names the field and what is allowed.

    others: names the caller looks at itself. null: null is as good as leaving a field out.
    """
    for name in body.keys() - fields.keys() - set(others):
        near = difflib.get_close_matches(name, [*fields, *others], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise Refused(f"未知字段 unknown field {shown(name)}{hint}", param=name, code="unknown_field")
    found = {}
    for name, field in fields.items():
        value = body.get(name, field.default)
        left_out = name not in body or null and value is None
        found[name] = field.default if left_out else checked(name, value, field)
    return found


def checked(name, value, field):
    """`value` as the field wants it; Refused with its name, what was found and what is allowed."""
    if type(value) is not field.kind and not (field.kind is float and type(value) is int):
        found = f"{type(value).__name__} {shown(value)}"
        raise Refused(f"{name} 应为 must be {field.kind.__name__}, found {found}", param=name, code="invalid_type")
    if field.least is not None and not field.least <= value <= field.most:
        allowed = f"between {field.least} 和 and {field.most}"
        raise Refused(f"{name} 应在 must be {allowed}, found {shown(value)}", param=name, code="out_of_range")
    if field.kind is str and not is_unicode(value):
        raise Refused(f"{name} 有半个字符 holds half a character (a lone surrogate)", param=name, code="invalid_text")
    return float(value) if field.kind is float else value


def shown(value):
    """The start of any value, as it may stand in an error."""
    try:
        return ascii(value)[:60] if not isinstance(value, str) else repr(value[:60].encode("utf-8", "replace").decode())
    except (ValueError, RecursionError):  # an int of thousands of digits, a nest of thousands of lists
        return "…"


def is_unicode(text):
    """Whether a text is made of whole characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


def _without_repeats(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found
