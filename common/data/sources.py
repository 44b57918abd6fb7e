"""Records out of files, each with its line: JSON array, JSON lines, CSV, TSV or Parquet, told by content."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, islice, pairwise
from typing import Any, BinaryIO, NamedTuple

from common.data import formats
from common.data.arrays import BLOCK, DECODER, decoded, json_array
from common.data.corpora import RARE
from common.data.defects import matter_of
from common.data.fields import ANSWERS, QUESTIONS, SPOKEN, literal
from common.errors import UserError
from common.opened import COMMENT, COMMENT_LINE, HEAD, encoding_of, opened, said_of

LINE_ENDS = ("\n", "\r\n", "")
BETWEEN = re.compile(r"(?:\s*,)?\s*")  # two objects
UTF_16 = re.compile(rb"[^\0]\0[^\0]\0|\0[^\0]\0[^\0]", re.DOTALL)  # of ASCII, without a BOM
QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""")
KNOWN = QUESTIONS.union(ANSWERS, *formats.READERS, *RARE)  # keys that a header line has
SEPARATOR = re.compile(r"""["']?sep=(.)["']?\s*$""", re.IGNORECASE)
BATCH = 1000  # rows of a Parquet file read at a time
OTHER_DELIMITERS = re.compile("[|，；:、]")


class Record(NamedTuple):
    """One row as the file has it.

    `line` is where it begins, or its number in a file whose first rows share a line; in other files `part` tells the
    rows of a line apart, from 1 on. `problem` says why it could not be read, and `kind` (a key of DEFECTS) of which
    kind it is; then `value` is the raw text or the raw cells.
    """

    line: int
    value: Any
    problem: str = ""
    kind: str = ""
    part: int = 1

    @property
    def place(self) -> str:
        """What stands behind the file's name: the line, with the part where it is not the line's first row."""
        return f"{self.line}.{self.part}" if self.part > 1 else str(self.line)


def read_records(path: str) -> Iterator[Record]:
    """Yield the Records of a file that `common.inputs.listing` names, compressed or not, with a BOM or not.

    One unreadable line becomes a Record with a problem; a file that cannot be trusted beyond a point (not UTF-8, a
    broken JSON array, no such file) raises UserError with `file:line`.
    """
    with opened(path, unpack=True) as file:
        yield from _told_apart(_records(file, path))


def _told_apart(records: Iterator[Record]) -> Iterator[Record]:
    """The Records, numbered where the first two share a line: an array may be one line, as json.dump writes it.

    Elsewhere the second row of a line and those behind it have a part of their own.
    """
    first = list(islice(records, 2))
    share = len(first) == 2 and first[0].line == first[1].line
    line = part = 0
    for number, record in enumerate(chain(first, records), 1):
        part = part + 1 if record.line == line else 1
        line = record.line
        if share:
            yield record._replace(line=number)
        else:
            yield record._replace(part=part) if part > 1 else record


def _records(file: BinaryIO, path: str) -> Iterator[Record]:
    """The Records of an open file, by a reader of its format."""
    head = file.read(HEAD).removeprefix(codecs.BOM_UTF8)
    file.seek(0)
    if head.startswith(b"PAR1"):
        return _parquet(file)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or UTF_16.match(head):
        raise UserError(f"{path}:1: 编码是 UTF-16 the file is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    said = said_of(file, head)
    if said:
        raise UserError(f"{path}: {said}")
    if _first_byte(file) == b"[" and not _is_list_a_line(file):
        return (Record(line, value) for line, value in json_array(file, path))
    return _of_lines(_Lines(file, path))


def _is_list_a_line(file: BinaryIO) -> bool:
    """Whether a file's first line is a list of messages and a list follows; it is at its start afterwards."""
    first, behind = file.readline(BLOCK), file.read(HEAD).lstrip()
    file.seek(0)
    try:
        said = DECODER.decode(first.decode("utf-8-sig")) if behind.startswith(b"[") else []
    except (ValueError, RecursionError):
        return False
    return bool(said) and all(isinstance(message, dict) and message.keys() & SPOKEN for message in said)


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte of a file that is neither BOM nor blank; the file is at its start afterwards."""
    found = b""
    while not found and (block := file.read(4096)):
        found = block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    file.seek(0)
    return found


class _Lines:
    """Text lines of a binary file, decoded one by one; `number` counts the lines handed out."""

    def __init__(self, file: Iterable[bytes], path: str) -> None:
        self.file = iter(file)
        self.path = path
        self.number = 0
        self.pushed: list[str] = []

    def push_back(self, lines: Iterable[str]) -> None:
        """Hand out the last lines once more."""
        again = [line for line in lines if line]
        self.pushed += reversed(again)
        self.number -= len(again)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        text = self.pushed.pop() if self.pushed else None
        if text is None:
            raw = next(self.file)
            try:
                text = raw.decode().removeprefix("\ufeff")  # a BOM may also stand inside: files are joined by cat
            except UnicodeDecodeError:
                raise UserError(f"{self.path}:{self.number + 1}: {encoding_of(raw)}") from None
        self.number += 1
        return text


def _of_lines(lines: _Lines) -> Iterator[Record]:
    """The Records of a file of lines: JSON lines where the first that is no comment begins with {, else a table."""
    first = next((line for line in lines if line.strip()), "")
    seen = [first]
    while seen[-1].lstrip().startswith(COMMENT) and (line := next(lines, "")):
        seen.append(line)
    row = seen[-1].lstrip()
    lines.push_back(seen)
    if row.startswith("{") or row.startswith("[") and len(seen) == 1:
        return _json_lines(lines)
    if first.lstrip().startswith("//") or row.startswith("[") and len(seen) > 1:
        raise UserError(f"{lines.path}:{lines.number + 1}: {COMMENT_LINE}")
    if re.search(r"""\{\s*\\?['"]""", row):
        why = "行首不是 { JSON that does not begin with {; delete what stands before it"
        raise UserError(f"{lines.path}:{lines.number + len(seen)}: {why}: {row[:40]!r}")
    return _table(lines)


def _json_lines(lines: _Lines) -> Iterator[Record]:
    """The objects of JSON lines, and what else people write so: see `_other_line`."""
    for text in lines:
        try:
            value, end = DECODER.raw_decode(text)
            is_plain = text[end:] in LINE_ENDS
        except (ValueError, RecursionError):
            is_plain = False
        if is_plain:
            yield Record(lines.number, value)
        else:
            yield from _other_line(text, lines)


def _other_line(text: str, lines: _Lines) -> list[Record]:
    """The Records of a line that is not one JSON value.

    Read are objects over several lines, objects in one line, with commas between or behind, and Python's dicts.
    """
    number = lines.number
    if text.lstrip().startswith(COMMENT):
        return [Record(number, text.rstrip("\n"), COMMENT_LINE, kind="broken-json")]
    text += _rest_of_object(text, lines)
    try:
        found = _objects(text)
    except ValueError as problem:
        reason = f"JSON 行有误 broken JSON line: {problem}; one object a line"
        return [Record(number, text.rstrip("\n"), reason, kind="broken-json")]
    starts = [0, *(start for start, _ in found)]
    passed = accumulate(text.count("\n", *between) for between in pairwise(starts))  # lines, up to each object
    return [Record(number + count, value) for count, (_, value) in zip(passed, found, strict=True)]


def _rest_of_object(text: str, lines: _Lines) -> str:
    """The lines up to the one that closes the object which `text` opens; a { at the margin begins another one."""
    rest, depth = [], _depth(text)
    while depth > 0 and (line := next(lines, "")):
        if line.startswith("{"):
            lines.push_back([line])
            break
        rest.append(line)
        depth += _depth(line)
    return "".join(rest)


def _depth(line: str) -> int:
    """How many brackets a line opens and does not close."""
    bare = QUOTED.sub("", line)
    return sum(map(bare.count, "{[")) - sum(map(bare.count, "]}"))


def _objects(text: str) -> list[tuple[int, Any]]:
    """[(where it begins, value)] of the one JSON value or the several objects in a text; ValueError for others."""
    start = _next_object(text, 0)
    if text.startswith("{'", start):
        return [(start, _python_dict(text[start:].strip().removesuffix(",")))]
    found: list[tuple[int, Any]] = []
    while start < len(text):
        value, end = decoded(text, start)
        found.append((start, value))
        start = _next_object(text, end)
    if len(found) > 1 and not all(isinstance(value, dict) for _, value in found):
        raise ValueError("Extra data behind a value")
    return found


def _next_object(text: str, at: int) -> int:
    """The place behind the blanks and the comma, if any, at `at`."""
    between = BETWEEN.match(text, at)
    return between.end() if between else at


def _python_dict(text: str) -> Any:
    """The value of a dict as Python prints it, in single quotes."""
    try:
        return literal(text)
    except ValueError:
        raise ValueError(
            "Python 的字典 a Python dict that is no literal; write by json.dumps(row, ensure_ascii=False)"
        ) from None


def _table(lines: _Lines) -> Iterator[Record]:
    """Rows of a CSV or TSV file as dicts of text, by its header."""
    csv.field_size_limit(2**31 - 1)
    header_line = next(lines, "")
    if not header_line.strip():
        raise UserError(f"{lines.path}: 文件是空的 the file is empty")
    delimiter = _delimiter(header_line)
    if SEPARATOR.match(header_line):
        header_line = next(lines, "")
    lines.push_back([header_line])
    above = line = lines.number  # lines before the header
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        header, again = _header(names, f"{lines.path}:{line + 1}"), _bare(names)
        line = above + reader.line_num
        for cells in reader:
            where, line = line + 1, above + reader.line_num
            if _bare(cells) in (again, [""] * len(cells)):
                continue  # files are joined by cat; Excel leaves rows of commas alone behind a table
            if len(cells) == len(header):
                yield Record(where, dict(zip(header, cells, strict=True)))
            else:
                reason = f"{len(header)} 列 columns expected, {len(cells)} found"
                yield Record(where, cells, reason, kind="columns")
    except csv.Error as problem:
        old = "new-line character" in str(problem)
        why = "行尾是 CR lines that end with CR alone; convert them: tr '\\r' '\\n'" if old else problem
        raise UserError(f"{lines.path}:{line + 1}: CSV 有误 broken CSV: {why}") from None


def _bare(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells]


def _delimiter(line: str) -> str:
    """What sets the cells of a file with this first line apart; Excel may say it there as sep=; ."""
    said = SEPARATOR.match(line)
    if said:
        return said[1]
    if "\t" in line:
        return "\t"
    return ";" if ";" in line and "," not in line else ","


def _header(cells: list[str], where: str) -> list[str]:
    """The names of the columns, those of columns without one made up.

    UserError where a name occurs twice, or none is a key that any reader knows: the first line may be a row.
    """
    header = [cell.strip() or f"第 {number} 列 column {number}" for number, cell in enumerate(cells, 1)]
    if len(set(header)) < len(header):
        raise UserError(f"{where}: 列名重复 a column name occurs twice in the header: {header}")
    if not _knows(header):
        found = " ".join(", ".join(header).split())[:80]  # a row in its place may have cells of several lines
        apart = OTHER_DELIMITERS.split(header[0])
        hint = "put one such as instruction,output or question,answer above the rows"
        if len(apart) > 1 and _knows(apart):
            hint = "以逗号、分号或制表符分列 set the cells apart by commas, semicolons or tabs"
        raise UserError(f"{where}: 表头里没有认识的字段 only unknown keys in the header line: {found}; {hint}")
    return header


def _knows(header: list[str]) -> bool:
    """Whether one of the names is a key that a reader knows, or that matters."""
    return any(name.strip().lower() in KNOWN or matter_of(name)[0] for name in header)


def _parquet(file: BinaryIO) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH):
        for value in batch.to_pylist():
            number += 1
            yield Record(number, value)
