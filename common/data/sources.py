"""Records out of files, each with its line number: JSON array, JSON lines, CSV, TSV or Parquet, told by content."""

from __future__ import annotations

import codecs
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from common.data.lines import COMMENT, COMMENT_LINE, Lines, Record, encoding_of, records_in
from common.errors import UserError
from common.inputs import office_file, opened

BLANKS = re.compile(r"[ \t\n\r]+")
DECODER = json.JSONDecoder()
BLOCK = 1 << 18  # bytes of a JSON array read at a time
LONGEST_TOKEN = 16  # characters; a JSON error farther from the end of what was read does not go away by reading on
HEAD = 512  # bytes that tell a file of another kind
OTHERS = [  # how a file begins that has no rows to read, and what is said of it
    (rb"ARRO|\xff{4}", "Arrow 文件 an Arrow file is not read; save it as Parquet or as JSON lines"),
    (
        rb"\x80[\2-\5]",
        "pickle 文件 a pickle file is not read, as it could run code; "
        "in pandas: read_pickle(…).to_json('my.json', orient='records')",
    ),
    (rb"%PDF", "PDF 文件 a PDF file is not read; write what it says as rows of JSON lines"),
    (rb"\xd0\xcf\x11\xe0", "旧版 Excel 或 Word an old Excel or Word file is not read; save it as CSV in UTF-8"),
    (rb".{5}\0\0\0\{", "safetensors 权重 a file of weights, not of rows; a base is given by --path_model_pretrain"),
    (rb"version https://git-lfs", "Git LFS 指针 a Git LFS pointer, not the data itself; fetch it: git lfs pull"),
    (
        rb"\s*<(?i:!doctype|html|head|\?xml)",
        "网页 an HTML or XML page, not data; was a page for logging in saved? Download the file again",
    ),
    (rb"\x1f\x8b", "gzip 压缩 compressed; let its name end with .gz, or .tar.gz where several files are in it"),
    (rb"BZh|\xfd7zXZ", "压缩文件 compressed; let its name end with .bz2 or .xz"),
    (rb"7z\xbc\xaf|Rar!", "压缩包 a 7z or RAR archive is not read; unpack it"),
    (rb".{257}ustar", "tar 包 a tar archive; give it as a file whose name ends with .tar or .tar.gz"),
]


def read_records(path: str) -> Iterator[Record]:
    """Yield the Records of a file that `common.inputs.listing` names, compressed or not, with a BOM or not.

    One unreadable line becomes a Record with a problem; a file that cannot be trusted beyond a point (not UTF-8, a
    broken JSON array, no such file) raises UserError with `file:line`.
    """
    with opened(path, unpack=True) as file:
        yield from _records(file, path)


def _records(file: BinaryIO, path: str) -> Iterator[Record]:
    """The Records of an open file, by a reader of its format."""
    head = file.read(HEAD).removeprefix(codecs.BOM_UTF8)
    file.seek(0)
    if head.startswith(b"PAR1"):
        return _parquet(file)
    said = _said_of_zip(file) if head.startswith(b"PK\3\4") else ""
    said = said or next((said for start, said in OTHERS if re.match(start, head, re.DOTALL)), "")
    if said:
        raise UserError(f"{path}: {said}")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}:1: 编码是 UTF-16 the file is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    if _first_byte(file) == b"[":
        return _json_array(_Blocks(file, path))
    return records_in(Lines(file, path))


def _said_of_zip(file: BinaryIO) -> str:
    """What is said of a zip that is read as a file: a file of an office program, or a zip inside a zip."""
    try:
        said = office_file(zipfile.ZipFile(file).namelist())
    except zipfile.BadZipFile:
        said = ""
    return said or "xlsx 或 zip an Excel file or a zip; save it as CSV in UTF-8, or let its name end with .zip"


def _first_byte(file: BinaryIO) -> bytes:
    """The first byte of a file that is neither BOM nor blank; the file is at its start afterwards."""
    found = b""
    while not found and (block := file.read(4096)):
        found = block.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    file.seek(0)
    return found


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
                found = text[start : start + 40]
                why = _hint(found) or str(getattr(problem, "msg", problem))
                raise UserError(f"{blocks.path}:{where}: JSON 有误 broken JSON: {why} in {found!r}") from None
        text, start, size = text[start:] + added, 0, size * 2


def _hint(found: str) -> str:
    """What is said of what stands in a JSON array, if it is something people write there; else ""."""
    if found.startswith(COMMENT):
        return COMMENT_LINE
    return "单引号 single quotes: Python's, not JSON; write it by json.dump" if found.startswith("{'") else ""


def _is_broken(problem: ValueError, text: str) -> bool:
    """Whether a JSON error stays an error whatever follows `text`."""
    at = getattr(problem, "pos", len(text))
    return at < len(text) - LONGEST_TOKEN and "Unterminated string" not in str(problem)


def _parquet(file: BinaryIO) -> Iterator[Record]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        for value in batch.to_pylist():
            number += 1
            yield Record(number, value)
