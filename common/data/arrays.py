"""The elements of one JSON array, decoded one at a time, so that the file is never a tree in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from common.errors import UserError
from common.opened import COMMENT, COMMENT_LINE, encoding_of

BLANKS = re.compile(r"[ \t\n\r]+")
BLOCK = 1 << 18  # bytes read at a time
LONGEST_TOKEN = 16  # characters; a JSON error farther from the end of what was read does not go away by reading on


class RepeatedError(ValueError):
    """A key that occurs twice in an object: json would keep its last value and drop the others."""

    def __init__(self, name: str) -> None:
        super().__init__(f"字段 {name!r} 出现两次 the key occurs twice in an object; remove one")


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedError(next(name for name in found if names.count(name) > 1))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_as_object)


def json_array(file: BinaryIO, path: str) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of the elements; UserError with `path:line` where the array is broken."""
    return _elements(_Blocks(file, path))


class _Blocks:
    """Text of a binary file, decoded a block at a time: one line may be the whole file."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file = file
        self.path = path
        self.line = 1  # of the end of what was read
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def read(self, size: int) -> str:
        """The text of up to `size` further bytes; "" at the end."""
        text = ""
        while not text and (raw := self.file.read(size)):
            try:
                text = self.decoder.decode(raw)
            except UnicodeDecodeError as problem:
                raise self._not_utf8(problem) from None
            self.line += raw.count(b"\n")
        return text

    def _not_utf8(self, problem: UnicodeDecodeError) -> UserError:
        line = self.line + problem.object.count(b"\n", 0, problem.start)
        raw = problem.object[problem.object.rfind(b"\n", 0, problem.start) + 1 :].split(b"\n")[0]
        return UserError(f"{self.path}:{line}: {encoding_of(raw)}")


def _elements(blocks: _Blocks) -> Iterator[tuple[int, Any]]:
    """(line, value) of each element.

    ijson 3.6 would be as fast. It does not tell an element's line, its fast reader fails at integers over 64 bits and
    reads half a character (a lone surrogate) as "?", and its own words about an error name no line.
    """
    text, start, line = "", 0, 1
    place = "before"  # the array; then at an "element", "after" one, and "behind" the array
    while True:
        blanks = BLANKS.match(text, start)
        skipped = blanks.end() if blanks else start
        line += text.count("\n", start, skipped)
        start = skipped
        if start == len(text):
            text, start = blocks.read(BLOCK), 0
            if not text and place == "behind":
                return
            if not text:
                raise UserError(
                    f"{blocks.path}:{line}: JSON 数组没有结束 the JSON array does not end; is the file cut off?"
                )
        elif place == "before":
            start, place = start + 1, "element"
        elif place == "behind":
            found = text[start : start + 40]
            why = f"数组之后还有内容 something follows the JSON array: {found!r}; one array a file"
            raise UserError(f"{blocks.path}:{line}: {why}")
        elif text[start] == "]":
            start, place = start + 1, "behind"
        elif place == "after":
            if text[start] != ",":
                raise UserError(
                    f"{blocks.path}:{line}: 缺少逗号 a comma is missing before {text[start : start + 40]!r}"
                )
            start, place = start + 1, "element"
        else:
            value, text, start, end = _element(text, start, blocks, line)
            yield line, value
            line, start, place = line + text.count("\n", start, end), end, "after"


def _element(text: str, start: int, blocks: _Blocks, line: int) -> tuple[Any, str, int, int]:
    """(value, text, start, end) of the element at text[start:end]; more is read where it is not whole."""
    size = BLOCK
    while True:
        try:
            value, end = decoded(text, start)
            if end < len(text) or text[end - 1] in '}]"':
                return value, text, start, end
            added = blocks.read(size)  # a number may have further digits
            if not added:
                return value, text, start, end
        except ValueError as problem:
            added = "" if _is_broken(problem, text) else blocks.read(size)
            if not added:
                where = line + text.count("\n", start, getattr(problem, "pos", start))
                found = text[start : start + 40]
                why = _hint(found) or str(getattr(problem, "msg", problem))
                raise UserError(f"{blocks.path}:{where}: JSON 有误 broken JSON: {why} in {found!r}") from None
        text, start, size = text[start:] + added, 0, size * 2


def decoded(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, and its end; JSONDecodeError where there is none."""
    try:
        return DECODER.raw_decode(text, start)
    except RecursionError:
        raise json.JSONDecodeError("嵌套太深 nested too deeply", text, start) from None


def _hint(found: str) -> str:
    """What is said of what stands in a JSON array, if it is something people write there; else ""."""
    if found.startswith(COMMENT):
        return COMMENT_LINE
    return "单引号 single quotes: Python's, not JSON; write it by json.dump" if found.startswith("{'") else ""


def _is_broken(problem: ValueError, text: str) -> bool:
    """Whether a JSON error stays an error whatever follows `text`."""
    at = getattr(problem, "pos", len(text))
    if isinstance(problem, RepeatedError):
        return True
    return at < len(text) - LONGEST_TOKEN and "Unterminated string" not in str(problem)
