"""predict.py --output: a file of questions in, a file of answers out, written as they are made and gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import files
from common.conversation.turns import Turn, said
from common.data.accounts import show_repaired, show_unused
from common.data.formats import Notes
from common.errors import UserError
from common.evaluation import asking
from common.evaluation.records import (
    FAILED,
    Answers,
    Progress,
    Record,
    asked_as,
    key_of,
    predict,
    score_rows,
    shortest_first,
    show_cut,
    show_unanswered,
)
from common.evaluation.results import sampling_of
from common.runs import places

if TYPE_CHECKING:
    from common.config import PredictFlags, SFTConfig

ToAsk = Sequence[tuple[str, Sequence[Turn]]]  # (file:line, turns that end with a question or the answer given to it)
OURS = b'{"key"'  # how a line of ours begins


def rows_to_ask(cfg: SFTConfig, flags: PredictFlags) -> ToAsk:
    """The rows of `--data_path`, with `--system` before those without a system text; prints why others are left out.

    UserError where none can be asked, or `--output` cannot be written or holds something else than answers.
    """
    for name in ("query", "compare", "print_prompt"):
        if getattr(flags, name):
            raise UserError(f"--{name} 与 --output 不能同用 cannot go together: leave one out")
    if "data_path" not in cfg.given:
        raise UserError("--output: 没有提问 there are no questions: give a file of them by --data_path")
    places.check_readable(cfg.data_path, "data_path")
    places.check_writable(Path(flags.output).parent, "output")
    if None in _keys_in(Path(flags.output)):
        raise UserError(f"{flags.output}: 已有别的内容 holds something that is no answer; give another --output")
    notes = Notes()
    rows, left_out = asking.held_out(cfg, cfg.data_path, 0, notes, asking.to_ask)
    print(f"提问 questions {len(rows)}, 不问 not asked {len(left_out)}")
    show_unused(notes.unused)
    show_repaired(notes.repaired)
    for row in left_out:
        print(f"  不问 not asked: {row.where}: {row.reason}")
    if not rows:
        raise UserError(
            f"{' '.join(cfg.data_path)}: 没有可以问的行 there is no row to ask; docs/data.md has the shapes"
        )
    system = [Turn("system", flags.system)] if flags.system else []
    return [(where, turns if turns[0].role == "system" else [*system, *turns]) for where, turns in rows]


def write(answer: Answers, rows: ToAsk, cfg: SFTConfig, flags: PredictFlags) -> None:
    """Answer the rows into `--output`, a JSON line each, in their order once all are there; print what became of them.

    Answers that an earlier call with the same rows, model and sampling left there are kept; a row that could not be
    asked is asked again. UserError where the file holds other answers, or no row could be asked.
    """
    path, sampling = Path(flags.output), sampling_of(cfg)
    asked = [(where, _with_reference(turns)) for where, turns in rows]
    hashed = [(where, said(turns)) for where, turns in asked]
    key = key_of(cfg, flags.base, [hashed, vars(sampling), *asked_as(answer)])
    if _keys_in(path) - {key}:
        raise UserError(
            f"{path}: 是别的提问、模型或采样的回答 holds answers to other questions, or of another model or sampling; "
            "remove it, or give another --output"
        )
    failed: list[Record] = []

    def ask(numbers: list[int]) -> Iterator[Record]:
        for record in predict(
            answer, [(number, *asked[number]) for number in numbers], sampling, flags.base, lambda *_: {}
        ):
            if record["stop"].startswith(FAILED):
                failed.append(record)
            else:
                yield _line(record)

    order = shortest_first([turns[:-1] for _, turns in asked])
    records = score_rows(path, key, order, ask, cfg, Progress("回答 answers"))
    files.write_jsonl(path, records)
    for record in failed:
        print(f"未回答 not answered: {record['where']}: {record['stop'].removeprefix(FAILED)}")
    if not records:
        raise UserError(f"{path}: 一行也没有回答 no row was answered, for the reasons above")
    show_cut(records)
    show_unanswered(records)
    cut_off = sum(record["finish_reason"] == "length" for record in records)
    print(
        f"完成 done: 回答 answers {len(records)} / {len(rows)}, 到 --max_new_tokens {sampling.max_new_tokens} 为止 "
        f"cut off there {cut_off}: {path}"
    )


def _keys_in(path: Path) -> set[str | None]:
    """The keys under which the lines of a file were made, none where there is no file; None for a line not ours."""
    keys: set[str | None] = set()
    if not path.exists():
        return keys
    try:
        with path.open("rb") as file:
            for line in file:
                if line.startswith(OURS):
                    keys |= {json.loads(line)["key"]} if line.endswith(b"\n") else set()  # a kill may cut the last one
                else:
                    keys.add(None)
    except (OSError, ValueError):
        keys.add(None)
    return keys


def _with_reference(turns: Sequence[Turn]) -> Sequence[Turn]:
    return turns if turns[-1].role == "assistant" else [*turns, Turn("assistant", "")]


def _line(record: Record) -> dict[str, Any]:
    """What a line of the file says of an answer; `prompt` is there where more was asked than the question.

    The result of a tool, where the row ends with one, stands under its role, `tool`.
    """
    asked = "tool" if record["prompt"][-1]["role"] == "tool" else "question"
    line = {"row": record["row"], "where": record["where"], asked: record["question"]}
    line["answer"] = record.get("content", record["answer"])  # without the calls
    line |= {name: record[name] for name in ("reasoning_content", "tool_calls") if name in record}
    line |= {"finish_reason": record["stop"], "tokens": record["tokens"]}
    if len(record["prompt"]) > 1:
        line["prompt"] = record["prompt"]
    return line | {name: record[name] for name in ("reference", "cut_to") if record[name]}
