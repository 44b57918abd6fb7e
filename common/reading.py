"""Records out of files, each with its line number: JSON array, JSON lines, CSV, TSV or Parquet, told by content."""

import csv
import json
import lzma
import re
import zlib
from typing import NamedTuple

import fsspec

from common.errors import UserError

BLANKS = re.compile(r"[ \t\n\r]*")


class Record(NamedTuple):
    """One row as the file has it. `problem` says why it could not be read; then `value` is the raw text."""

    line: int
    value: object
    problem: str = ""


def read_records(path):
    """Yield the Records of a local file or any fsspec URL, compressed or not, with a BOM or not.

    One unreadable line becomes a Record with a problem; a file that cannot be trusted beyond a point (not UTF-8, a
    broken JSON array, no such file) raises UserError with `file:line`.
    """
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            yield from _records(file, path)
    except FileNotFoundError:
        raise UserError(f"{path}: 文件不存在 no such file; check --data_path") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ImportError, ValueError) as problem:
        raise UserError(f"{path}: 无法打开 cannot be opened: {problem}") from None


def _records(file, path):
    head = file.read(4)
    file.seek(0)
    if head == b"PAR1":
        return _parquet(file)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}:1: 编码是 UTF-16 the file is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    lines = _Lines(file, path)
    first = next((line for line in lines if line.strip()), "")
    lines.push_back(first)
    if first.lstrip().startswith("["):
        return _json_array(lines, path)
    if first.lstrip().startswith("{"):
        return _json_lines(lines)
    return _table(lines, path)


class _Lines:
    """Text lines of a binary file, decoded one by one; `number` counts the lines handed out."""

    def __init__(self, file, path):
        self.file, self.path, self.number, self.pushed = iter(file), path, 0, []

    def push_back(self, line):
        if line:
            self.pushed.append(line)
            self.number -= 1

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        if self.pushed:
            return self.pushed.pop()
        raw = next(self.file)
        try:
            return raw.decode("utf-8-sig")  # a BOM may also stand inside: files are joined by cat
        except UnicodeDecodeError:
            raise UserError(f"{self.path}:{self.number}: {_encoding_of(raw)}") from None


def _encoding_of(raw):
    for name in ("gb18030", "big5"):
        try:
            raw.decode(name)
            return f"不是 UTF-8，像是 {name} not UTF-8, looks like {name}; convert it: iconv -f {name} -t UTF-8"
        except UnicodeDecodeError:
            continue
    return f"不是 UTF-8 not UTF-8: {raw[:40]!r}"


def _json_lines(lines):
    for text in lines:
        if not text.strip():
            continue
        try:
            yield Record(lines.number, json.loads(text))
        except ValueError as problem:
            yield Record(lines.number, text.rstrip("\n"), f"JSON 行有误 broken JSON line: {problem}; one object a line")


def _json_array(lines, path):
    """The elements of one JSON array, decoded one at a time, so that the file is never a tree in memory."""
    decoder, text, start, line, more = json.JSONDecoder(), next(lines).lstrip(), 1, lines.number, 1
    after_element = False
    while True:
        skipped = BLANKS.match(text, start).end()
        line += text.count("\n", start, skipped)
        start = skipped
        if start == len(text):
            text, start = _next_lines(lines, 1), 0
            if not text:
                raise UserError(f"{path}:{line}: JSON 数组没有结束 the JSON array does not end; is the file cut off?")
        elif text[start] == "]":
            rest = text[start + 1 :].lstrip() or next((more.lstrip() for more in lines if more.strip()), "")
            if rest:
                line = line if text[start + 1 :].strip() else lines.number
                raise UserError(f"{path}:{line}: 数组之后还有内容 something follows the JSON array: {rest[:40]!r}")
            return
        elif after_element:
            if text[start] != ",":
                raise UserError(f"{path}:{line}: 缺少逗号 a comma is missing before {text[start : start + 40]!r}")
            start, after_element = start + 1, False
        else:
            try:
                value, end = decoder.raw_decode(text, start)
            except ValueError as problem:
                added = _next_lines(lines, more)
                if not added:
                    found = text[start : start + 40]
                    where = line + text.count("\n", start, getattr(problem, "pos", start))
                    why = getattr(problem, "msg", problem)
                    raise UserError(f"{path}:{where}: JSON 有误 broken JSON: {why} in {found!r}") from None
                text, start, more = text[start:] + added, 0, more * 2
                continue
            yield Record(line, value)
            line += text.count("\n", start, end)
            start, more, after_element = end, 1, True


def _next_lines(lines, count):
    return "".join(line for _, line in zip(range(count), lines, strict=False))


def _table(lines, path):
    """Rows of a CSV or TSV file as dicts of text, by its header."""
    csv.field_size_limit(2**31 - 1)
    header_line = next(lines, "")
    if not header_line.strip():
        raise UserError(f"{path}: 文件是空的 the file is empty")
    lines.push_back(header_line)
    above = line = lines.number  # blank lines before the header
    reader = csv.reader(lines, delimiter="\t" if "\t" in header_line else ",", strict=True)
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
                yield Record(where, cells, f"{len(header)} 列 columns expected, {len(cells)} found")
    except csv.Error as problem:
        raise UserError(f"{path}:{line + 1}: CSV 有误 broken CSV: {problem}") from None


def _parquet(file):
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        for value in batch.to_pylist():
            number += 1
            yield Record(number, value)
