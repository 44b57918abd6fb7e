"""Records out of files, each with its line number: JSON array, JSON lines, CSV, TSV or Parquet, told by content."""

from __future__ import annotations

import codecs
import csv
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import fsspec

from common.errors import UserError

BLANKS = re.compile(r"[ \t\n\r]+")
DECODER = json.JSONDecoder()
BLOCK = 1 << 18  # bytes of a JSON array read at a time
LONGEST_TOKEN = 16  # characters; a JSON error farther from the end of what was read does not go away by reading on


class Record(NamedTuple):
    """One row as the file has it.

    `problem` says why it could not be read, and `kind` (a key of DEFECTS) of which kind it is; then `value` is the raw
    text or the raw cells.
    """

    line: int
    value: Any
    problem: str = ""
    kind: str = ""


def split_sample(spec: str) -> tuple[str, int | None]:
    """`path#N` as (path, N); N is None where it is not given."""
    path, mark, count = spec.rpartition("#")
    if mark and count.isdigit():
        if int(count) == 0:
            raise UserError(f"{spec}: 抽样行数应大于 0 the number of rows after # must be above 0")
        return path, int(count)
    return spec, None


def read_records(path: str) -> Iterator[Record]:
    """Yield the Records of a local file or any fsspec URL, compressed or not, with a BOM or not.

    One unreadable line becomes a Record with a problem; a file that cannot be trusted beyond a point (not UTF-8, a
    broken JSON array, no such file) raises UserError with `file:line`.
    """
    try:
        if path.lower().endswith(".zip"):
            _refuse_many_members(path)
        with fsspec.open(path, "rb", compression="infer") as file:
            yield from _records(file, path)
    except FileNotFoundError:
        raise UserError(f"{path}: 文件不存在 no such file; check --data_path") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, ImportError, ValueError) as problem:
        raise UserError(f"{path}: 无法打开 cannot be opened: {problem}") from None


def _refuse_many_members(path: str) -> None:
    """UserError where a zip holds more than one file: fsspec would read the first and say nothing of the others."""
    with fsspec.open(path, "rb") as file, zipfile.ZipFile(file) as packed:
        names = [name for name in packed.namelist() if not name.endswith("/")]
    if len(names) > 1:
        raise UserError(f"{path}: 有 {len(names)} 个文件 holds {len(names)} files: {', '.join(names[:5])}; unpack it")


def _records(file: BinaryIO, path: str) -> Iterator[Record]:
    """The Records of an open file, by a reader of its format."""
    head = file.read(4)
    file.seek(0)
    if head == b"PAR1":
        return _parquet(file)
    if head in (b"ARRO", b"\xff\xff\xff\xff"):
        raise UserError(f"{path}: Arrow 文件 an Arrow file is not read; save it as Parquet or as JSON lines")
    if head == b"PK\x03\x04":
        raise UserError(f"{path}: xlsx 或 zip, an Excel file or a zip inside is not read; save it as CSV in UTF-8")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}:1: 编码是 UTF-16 the file is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    if _first_byte(file) == b"[":
        return _json_array(_Blocks(file, path))
    lines = _Lines(file, path)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("//"):
        raise UserError(f"{path}:{lines.number}: 注释行 a comment line; delete the lines that begin with //")
    lines.push_back(first)
    if first.lstrip().startswith("{"):
        return _json_lines(lines)
    return _table(lines, path)


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte of a file that is neither BOM nor blank; the file is at its start afterwards."""
    found = b""
    while not found and (block := file.read(4096)):
        found = block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    file.seek(0)
    return found


class _Lines:
    """Text lines of a binary file, decoded one by one; `number` counts the lines handed out."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file = iter(file)
        self.path = path
        self.number = 0
        self.pushed: list[str] = []

    def push_back(self, line: str) -> None:
        """Hand out the last line once more."""
        if line:
            self.pushed.append(line)
            self.number -= 1

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number += 1
        if self.pushed:
            return self.pushed.pop()
        raw = next(self.file)
        try:
            return raw.decode("utf-8-sig")  # a BOM may also stand inside: files are joined by cat
        except UnicodeDecodeError:
            raise UserError(f"{self.path}:{self.number}: {_encoding_of(raw)}") from None


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
        return UserError(f"{self.path}:{line}: {_encoding_of(raw)}")


def _encoding_of(raw: bytes) -> str:
    """What is said of bytes that are not UTF-8: which encoding they may be in."""
    for name in ("gb18030", "big5"):
        try:
            codecs.getincrementaldecoder(name)().decode(raw)  # the last character may be cut off
            return f"不是 UTF-8，像是 {name} not UTF-8, looks like {name}; convert it: iconv -f {name} -t UTF-8"
        except UnicodeDecodeError:
            continue
    return f"不是 UTF-8 not UTF-8: {raw[:40]!r}"


def _json_lines(lines: _Lines) -> Iterator[Record]:
    """The objects of JSON lines; one may be indented over several lines, and a comma may stand behind it."""
    for text in lines:
        number = lines.number
        if not text.strip():
            continue
        if text.strip() == "{":
            text += _rest_of_object(lines)
        try:
            yield Record(number, json.loads(text.rstrip().removesuffix(",")))
        except ValueError as problem:
            reason = f"JSON 行有误 broken JSON line: {problem}; one object a line"
            yield Record(number, text.rstrip("\n"), reason, kind="broken-json")


def _rest_of_object(lines: _Lines) -> str:
    """The lines up to the one that closes an object which a line with { alone has opened."""
    text = ""
    for line in lines:
        text += line
        if line.rstrip().rstrip(",") == "}":
            break
    return text


def _json_array(blocks: _Blocks) -> Iterator[Record]:
    """The elements of one JSON array, decoded one at a time, so that the file is never a tree in memory.

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
            raise UserError(f"{blocks.path}:{line}: 数组之后还有内容 something follows the JSON array: {found!r}")
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
            yield Record(line, value)
            line, start, place = line + text.count("\n", start, end), end, "after"


def _element(text: str, start: int, blocks: _Blocks, line: int) -> tuple[Any, str, int, int]:
    """(value, text, start, end) of the element at text[start:end]; more is read where it is not whole."""
    size = BLOCK
    while True:
        try:
            value, end = DECODER.raw_decode(text, start)
            if end < len(text) or text[end - 1] in '}]"':
                return value, text, start, end
            added = blocks.read(size)  # a number may have further digits
            if not added:
                return value, text, start, end
        except ValueError as problem:
            added = "" if _is_broken(problem, text) else blocks.read(size)
            if not added:
                where = line + text.count("\n", start, getattr(problem, "pos", start))
                why, found = getattr(problem, "msg", problem), text[start : start + 40]
                raise UserError(f"{blocks.path}:{where}: JSON 有误 broken JSON: {why} in {found!r}") from None
        text, start, size = text[start:] + added, 0, size * 2


def _is_broken(problem: ValueError, text: str) -> bool:
    """Whether a JSON error stays an error whatever follows `text`."""
    at = getattr(problem, "pos", len(text))
    return at < len(text) - LONGEST_TOKEN and "Unterminated string" not in str(problem)


def _table(lines: _Lines, path: str) -> Iterator[Record]:
    """Rows of a CSV or TSV file as dicts of text, by its header."""
    csv.field_size_limit(2**31 - 1)
    header_line = next(lines, "")
    if not header_line.strip():
        raise UserError(f"{path}: 文件是空的 the file is empty")
    delimiter = _delimiter(header_line)
    if header_line.startswith("sep="):
        header_line = next(lines, "")
    lines.push_back(header_line)
    above = line = lines.number  # lines before the header
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader)
        if len(set(header)) < len(header):
            raise UserError(f"{path}:{line + 1}: 列名重复 a column name occurs twice in the header: {header}")
        line = above + reader.line_num
        for cells in reader:
            where, line = line + 1, above + reader.line_num
            if len(cells) == len(header):
                yield Record(where, dict(zip(header, cells, strict=True)))
            elif cells:
                reason = f"{len(header)} 列 columns expected, {len(cells)} found"
                yield Record(where, cells, reason, kind="columns")
    except csv.Error as problem:
        raise UserError(f"{path}:{line + 1}: CSV 有误 broken CSV: {problem}") from None


def _delimiter(line: str) -> str:
    """What sets the cells of a file with this first line apart; Excel may say it there as sep=; ."""
    if line.startswith("sep=") and line.strip("\r\n")[4:5]:
        return line[4]
    if "\t" in line:
        return "\t"
    return ";" if ";" in line and "," not in line else ","


def _parquet(file: BinaryIO) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        for value in batch.to_pylist():
            number += 1
            yield Record(number, value)
