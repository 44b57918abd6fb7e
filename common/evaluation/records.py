"""Predictions on disk: one JSON object a row, written as they are made, and gone on with where a kill stopped them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from common import distributed, files, launch
from common.config import SFTConfig
from common.conversation.answer_form import as_openai, written
from common.conversation.turns import Call, Turn
from common.errors import UserError
from common.evaluation import metrics
from common.inference.answerer import Answer, Answerer, Sampling
from common.inference.remote import UnreachableError
from common.inference.tuned import trained_with
from common.model.loading import base_hash
from common.runs.adopted import find_manifest

EVERY = 2.0  # seconds between two words of how far a batch is
Record = dict[str, Any]  # row, where, prompt, question, reference, answer, stop, cut_to, seconds, scores, …
UNANSWERED = "只有思考，没有回答 thought alone, no answer; remedy: a larger --max_new_tokens"
FAILED = "error: "  # how the `stop` of a row that could not be asked begins; the reason follows


class Answers(Protocol):
    """An Answerer, a Remote, or whatever is called like them."""

    def __call__(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling, base: bool = False) -> list[Answer]:
        """One answer for each conversation, in order; base: the base model's."""


class Progress(NamedTuple):
    """What a progress bar says: its title, and the score whose mean over the rows so far it shows, "" for none."""

    title: str
    metric: str = ""
    answer: object = None  # an Answerer tells how far a batch is


def score_rows(
    path: Path,
    key: str,
    order: Sequence[int],
    predict_rows: Callable[[list[int]], Iterable[Record]],
    cfg: SFTConfig,
    progress: Progress,
) -> list[Record]:
    """The records of the row numbers in `order`, sorted by number; `predict_rows(numbers)` gives those of a batch.

    Each batch is appended to `path` as it is done; what an earlier call under the same `key` left there is not done
    again. Batches and their seeds do not depend on where that call stopped, nor on the number of processes.
    """
    distributed.first(lambda: _gather(path, key))
    done = {record["row"]: record for record in files.read_jsonl(path)}
    distributed.wait()
    batches = [order[start : start + cfg.eval_batch_size] for start in range(0, len(order), cfg.eval_batch_size)]
    so_far = [record["scores"][progress.metric] for record in done.values()] if progress.metric else []
    rank, count = (launch.rank(), launch.world_size()) if distributed.together() else (0, 1)
    own_path = path.with_suffix(f".{rank}.part") if rank else path
    with (
        own_path.open("a", encoding="utf-8", newline="\n") as file,
        tqdm(total=len(order), initial=len(done), desc=progress.title) as bar,
    ):
        for number in range(rank, len(batches), count):
            left = [row for row in batches[number] if row not in done]
            if not left:
                continue
            torch.manual_seed((cfg.seed + number) % 2**32)
            with _within(progress.answer, bar, cfg.max_new_tokens):
                records = list(predict_rows(left))
            file.write("".join(files.line_of({"key": key, **record}) for record in records))
            file.flush()
            bar.update(len(left))
            if progress.metric:
                so_far += [record["scores"][progress.metric] for record in records]
                bar.set_postfix_str(f"{progress.metric} {sum(so_far) / len(so_far):.3f}")
    distributed.wait()
    distributed.first(lambda: _gather(path, key))
    return read_records(path)


@contextlib.contextmanager
def _within(answer: object, bar: tqdm, most: int) -> Iterator[None]:
    """Let an Answerer's batch tell on the bar every few seconds how many of `most` tokens its answers have."""
    last = time.monotonic()

    def tell(tokens: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            bar.set_postfix_str(f"本批 this batch: {tokens} / {most} tokens")

    if not isinstance(answer, Answerer):
        yield
        return
    answer.watch = tell
    try:
        yield
    finally:
        answer.watch = None


def predict(
    answer: Answers,
    batch: Sequence[tuple[int, str, Sequence[Turn]]],
    sampling: Sampling,
    base: bool,
    score: Callable[[str, str, str], dict[str, Any]] = metrics.score,
) -> Iterator[Record]:
    """Records of a batch of (row number, where, turns); a row that cannot be asked scores 0 and says why.

    UnreachableError where a server answers nothing at all.

    score(answer, reference, question) gives {name: value}; whether it "stopped" by itself is added. Thought is not
    scored; calls are, as lines of JSON behind the text.
    """
    started = time.monotonic()
    questions = [turns[:-1] for _, _, turns in batch]
    try:
        answers = answer(questions, sampling, base=base)
    except UnreachableError:
        raise
    except UserError as problem:
        if len(batch) > 1:
            for row in batch:
                yield from predict(answer, [row], sampling, base, score)
            return
        answers = [Answer("", f"{FAILED}{problem}", 0)]
    seconds = (time.monotonic() - started) / len(batch)
    for (number, where, turns), found in zip(batch, answers, strict=True):
        question, reference = turns[-2].text, written(turns[-1].text, turns[-1].calls)
        text = written(found.text, found.calls)
        ended = {"stopped": float(found.stop == "stop" and bool(text.strip()))}
        yield {
            "row": number,
            "where": where,
            "prompt": [_message(turn) for turn in turns[:-1]],
            "question": question,
            "reference": reference,
            "answer": text,
            **_apart(found.thought, found.calls),
            **({"content": found.text} if found.calls else {}),
            "stop": found.stop,
            "tokens": found.tokens,
            "cut_to": found.cut_to,
            "seconds": round(seconds, 3),
            "scores": score(text, reference, question) | ended,
        }


def _message(turn: Turn) -> dict[str, Any]:
    """A turn as a message in OpenAI's shape; tools stand with it as a text."""
    tools = {"tools": turn.tools} if turn.tools else {}
    return {"role": turn.role, "content": turn.text, **_apart(turn.thought, turn.calls), **tools}


def _apart(thought: str, calls: Sequence[Call]) -> dict[str, Any]:
    """Thought and calls under OpenAI's names, where there are any."""
    return ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": as_openai(calls)} if calls else {})


def unanswered(records: Iterable[Record]) -> int:
    """Number of records whose answer is all thought."""
    return sum("reasoning_content" in each and not (each["answer"] or "tool_calls" in each) for each in records)


def show_unanswered(records: Sequence[Record]) -> None:
    """Print how many of the answers are all thought, and what helps; nothing where none is."""
    if count := unanswered(records):
        print(f"{UNANSWERED}: {count} / {len(records)}")


def key_of(cfg: SFTConfig, base: bool, settings: list[Any]) -> str:
    """16 hex digits for the model and for `settings`: the rows and whatever else a prediction depends on."""
    trained = trained_with(cfg, find_manifest(cfg.model_save_dir), base)
    weights = [base_hash(trained.path_model_pretrain)]
    adapter = Path(cfg.model_save_dir) / "adapter_model.safetensors"
    if not base:
        weights.append(files.file_hash(str(adapter)) if adapter.exists() else base_hash(cfg.model_save_dir))
    asked = {name: value for name, value in trained._asdict().items() if (name, value) != ("thinking", "auto")}
    parts = [weights, asked, cfg.dtype, cfg.seed, base, *settings]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


def asked_as(answer: Answers) -> list[Any]:
    """What a prediction depends on besides: the server that makes it, and the context its prompt may fill."""
    return [getattr(answer, "origin", ""), getattr(answer, "context", 0)]


def shortest_first(conversations: Sequence[Sequence[Turn]]) -> list[int]:
    """Row numbers, shortest conversation first, so that those of a batch are about as long as each other."""
    return sorted(range(len(conversations)), key=lambda row: sum(len(turn.text) for turn in conversations[row]))


def show_cut(records: Sequence[Record]) -> None:
    """Print how many of the records' prompts had to be cut, and to which limit; nothing where none was."""
    limits = [record["cut_to"] for record in records if record.get("cut_to")]
    if limits:
        print(f"截断的提示 prompts cut: {len(limits)} / {len(records)}, 上限 the limit is {max(limits)} tokens")


def read_records(path: Path) -> list[Record]:
    """The records `score_rows` left in a file, by row number."""
    return sorted(files.read_jsonl(path), key=lambda record: record["row"])


def predictions(cfg: SFTConfig, base: bool = False) -> dict[int, Record]:
    """{row number: record} of the last evaluation on held-out rows, in that order."""
    return {record["row"]: record for record in read_records(predictions_path(cfg, base))}


def predictions_path(cfg: SFTConfig, base: bool) -> Path:
    """Where the predictions on held-out rows are kept."""
    return Path(cfg.model_save_dir) / f"predictions{'_base' if base else ''}.jsonl"


def _gather(path: Path, key: str) -> None:
    """Put the records made under `key` by all processes into `path`, without a line cut off by a kill; drop others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = re.compile(rf"{re.escape(path.stem)}\.\d+\.part")
    parts = sorted(file for file in path.parent.iterdir() if own.fullmatch(file.name))
    found = [record for file in [path, *parts] if file.exists() for record in files.read_jsonl(file)]
    records = {record["row"]: record for record in found if record.get("key") == key}
    files.write_jsonl(path, records.values())
    for part in parts:
        part.unlink()
