"""Weight files looked at before they are loaded: empty, cut off, a Git LFS pointer, foreign bytes, a shard missing.

Only sizes and headers are read, so that a folder of 100 GB takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from common.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1"
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself refuses more
ZIP, PICKLE = b"PK\x03\x04", b"\x80"  # how torch.save's files begin, today's and those before torch 1.6
AGAIN = "download or copy it again"
# what transformers takes from a folder, the first that is there: one file, or an index of shards
CHOICES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def check_model(path: str | Path) -> None:
    """UserError where a weight file of the model in the folder `path` cannot be whole; a hub id is not looked at."""
    folder = Path(path).expanduser()
    chosen = next((folder / name for name in CHOICES if (folder / name).is_file()), None)
    if chosen is None:
        return  # transformers says what it looked for
    for file in _shards(chosen) if chosen.suffix == ".json" else [chosen]:
        check_file(file)


def _shards(index: Path) -> list[Path]:
    """The files that an index names; UserError where it is no index, or one of them is missing."""
    _check_content(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: 不是权重分片的索引 is no index of weight files; {AGAIN}") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent / missing[0]}: 缺少权重分片 a weight file is missing, {len(missing)} of the {len(names)} "
            f"that {index.name} names; download the folder again"
        )
    return [index.parent / name for name in names]


def check_adapter(folder: str | Path) -> Path:
    """The file of the adapter saved in `folder`; UserError where there is none, or it cannot be whole."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: 没有适配器 there is no adapter; train first, or give --model_save_dir or --base")
    file = adapter_file(folder)
    pickled = folder / "adapter_model.bin"
    if not file.is_file() and pickled.is_file():
        raise UserError(
            f"{pickled}: 只有 pickle 格式的适配器 the adapter is there as a pickle only, which could run code: it is "
            f"not opened; save it as {file.name} (peft's save_pretrained does), or train again"
        )
    if not file.is_file():
        raise UserError(
            f"{file}: 适配器的权重不在 the adapter's weights are missing; copy the folder again, or train again"
        )
    check_file(file)
    return file


def adapter_file(folder: str | Path) -> Path:
    """Where the weights of an adapter saved in `folder` are."""
    return Path(folder) / "adapter_model.safetensors"


def check_tokenizer(path: str | Path) -> None:
    """UserError where the tokenizer's file in the folder `path` is empty or a Git LFS pointer.

    SentencePiece's *.model is looked at where there is no tokenizer.json, from which it would be read otherwise.
    """
    folder = Path(path).expanduser()
    fast = folder / "tokenizer.json"
    for file in [fast] if fast.is_file() else sorted(folder.glob("*.model")):
        _check_content(file)


@contextlib.contextmanager
def readable(file: str | Path) -> Iterator[None]:
    """UserError instead of what safetensors raises within, where `file` is damaged; it is looked at first."""
    check_file(Path(file))
    try:
        yield
    except SafetensorError as problem:
        raise UserError(f"{file}: 无法读取 cannot be read: {' '.join(str(problem).split())[:200]}; {AGAIN}") from None


def check_file(file: Path) -> None:
    """UserError where a .safetensors or .bin file is empty, cut off, a Git LFS pointer, or another kind of file."""
    _check_content(file)
    if file.suffix == ".safetensors":
        _check_safetensors(file)
    else:
        _check_pickle(file)


def _check_content(file: Path) -> None:
    size = file.stat().st_size
    if size == 0:
        raise UserError(f"{file}: 文件是空的 the file is empty; {AGAIN}")
    with file.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{file}: 只是 Git LFS 的指针 is a Git LFS pointer, not the file itself; there run: git lfs pull"
            )


def _check_safetensors(file: Path) -> None:
    """The file is: 8 bytes with the header's length, the header (JSON, where each tensor ends), the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or start[8:] != b"{" or length > LONGEST_HEADER:
            raise UserError(f"{file}: 不是 safetensors 文件 is not a safetensors file, it begins {start!r}; {AGAIN}")
        if size < 8 + length:
            raise UserError(
                f"{file}: 文件不完整 is cut off: {size:,} bytes, its header alone has {8 + length:,}; {AGAIN}"
            )
        header = start[8:] + stream.read(length - 1)
    try:
        tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        whole = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{file}: safetensors 的文件头损坏 its safetensors header is damaged; {AGAIN}") from None
    if size != whole:
        what = "文件不完整 is cut off" if size < whole else "文件太长 is too long"
        raise UserError(f"{file}: {what}: {size:,} of {whole:,} bytes; {AGAIN}")


def _check_pickle(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(4)
    if start == ZIP and not zipfile.is_zipfile(file):  # what ends the archive is missing
        raise UserError(f"{file}: 文件不完整 is cut off: {file.stat().st_size:,} bytes, no end of the archive; {AGAIN}")
    if start != ZIP and not start.startswith(PICKLE):
        raise UserError(f"{file}: 不是 torch 的权重文件 is not a weight file of torch, it begins {start!r}; {AGAIN}")
