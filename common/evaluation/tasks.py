"""Benchmark questions from local files: C-Eval, CMMLU, MMLU, ARC, GSM8K, and this project's probe for forgetting."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.config import DATA
from common.conversation.turns import Turn
from common.data import sources
from common.errors import UserError

if TYPE_CHECKING:
    from common.config import EvaluationFlags

LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS.lower(), "answer")
CHINESE = "以下是一道单项选择题，请直接写出正确选项的字母。\n\n{question}\n{options}\n答案："
ENGLISH = "Answer this multiple choice question with the letter of the right option.\n\n{question}\n{options}\nAnswer:"
SOLVE = "{question}\n\nSolve this step by step. End with a line of the form: #### number"
TABLES = {"ceval": ("val", CHINESE), "cmmlu": ("test", CHINESE), "mmlu": ("test", ENGLISH)}  # the files that are scored
# 3-1 holds 3 and 1, not -1, and v2 none; Chinese stands before a number without a blank
NUMBER = re.compile(r"(?<![A-Za-z_\d.])-?\d+(?:,\d{3})*(?:\.\d+)?")
FORMAT = re.compile(r"Answer format: *(\S+/\S+)\s*$")


class Question(NamedTuple):
    """One question. `options` are the texts to choose from by their label; {} where the answer is to be written."""

    where: str
    subject: str
    turns: list[Turn]  # the examples as earlier rounds, then the question
    options: dict[str, str]
    key: str  # the right label, or the right number


Row = tuple[str, dict[str, Any]]  # file:line, and the JSON object there
Example = tuple[Turn, Turn]  # a question and its answer
Parsed = tuple[Question, Turn]  # a question, and the answer it has as an example


def read(flags: EvaluationFlags) -> dict[str, list[Question]]:
    """{task: [Question]} as EvaluationFlags ask: `tasks` in `task_dir`, `shots` examples, `limit` a subject (0: all).

    Raises UserError naming the file, and the line, that is missing or not understood.
    """
    if set(flags.tasks) - {"probe"} and not flags.task_dir:
        raise UserError(
            "--task_dir 没有给出 is missing: the folder with ceval/, mmlu/, cmmlu/, arc*.json, gsm8k*.jsonl"
        )
    found = {task: [question for part in _subjects(task, flags) for question in part] for task in flags.tasks}
    chosen = [task for task, questions in found.items() if any(question.options for question in questions)]
    if flags.base_url and chosen:
        raise UserError(
            f"--base_url: 选择题要模型在本机 {', '.join(chosen)} choose by likelihood, which no server gives; "
            "leave --base_url out, or ask for gsm8k alone"
        )
    return found


def _subjects(task: str, flags: EvaluationFlags) -> list[list[Question]]:
    """The Questions of each subject of a task."""
    if task == "probe":
        found: dict[str, list[Question]] = {}
        for question in map(_probe, _records(DATA / "probe.jsonl")):
            found.setdefault(question.subject, []).append(question)
        return [part[: flags.limit or None] for part in found.values()]
    folder = Path(flags.task_dir).expanduser()
    if task in TABLES:
        return [_table(path, task, flags) for path in _files(folder / task / TABLES[task][0], "*.csv")]
    pattern, parse = {"arc": ("arc*.json*", _format_choice), "gsm8k": ("gsm8k*.json*", _sum)}[task]
    return [_rows(path, parse, flags) for path in _files(folder, pattern)]


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise UserError(f"{folder / pattern}: 没有这样的文件 no such file; check --task_dir")
    return found


def _table(path: Path, task: str, flags: EvaluationFlags) -> list[Question]:
    """Questions of a subject of C-Eval, CMMLU or MMLU, whose examples are in the folder `dev`."""
    template = TABLES[task][1]
    asked = [(where, _ask(template, question, options), key) for where, question, options, key in _choices(path)]
    rounds = _rounds(_examples(path, template), flags.shots, path.parents[1] / "dev") if flags.shots else []
    return [
        Question(where, _subject(path), [*rounds, turn], {letter: letter for letter in LETTERS}, key)
        for where, turn, key in asked[: flags.limit or None]
    ]


def _examples(path: Path, template: str) -> list[Example]:
    """(question, answer) Turns of the subject's examples."""
    found = [file for file in (path.parents[1] / "dev").glob("*.csv") if _subject(file) == _subject(path)]
    return [
        (_ask(template, question, options), Turn("assistant", key))
        for file in found
        for _, question, options, key in _choices(file)
    ]


def _rounds(examples: Sequence[Example], count: int, place: Path) -> list[Turn]:
    """The first `count` examples as one list of turns."""
    if len(examples) < count:
        raise UserError(f"--shots {count}: {place}: 只有 {len(examples)} 个例题 there are only so many examples")
    return [turn for example in examples[:count] for turn in example]


def _subject(path: Path) -> str:
    return re.sub(r"_(dev|val|test)$", "", path.stem)


def _ask(template: str, question: str, options: Sequence[str]) -> Turn:
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    return Turn("user", template.format(question=question.strip(), options=lines))


def _choices(path: Path) -> Iterator[tuple[str, str, list[str], str]]:
    """Yield (file:line, question, [four options], letter) of a CSV file, with column names or without."""
    for where, cells in _csv(path):
        *_, question, a, b, c, d, key = cells
        if key.strip() not in list(LETTERS) or not question.strip():
            raise UserError(f"{where}: 应为 question, A, B, C, D, answer expected, found {str(cells)[:80]}")
        yield where, question, [a, b, c, d], key.strip()


def _csv(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (file:line, [question, A, B, C, D, answer]) of a CSV file."""
    columns: Sequence[int] | None = None
    line = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                names = [cell.strip().lower() for cell in cells]
                if not cells:
                    continue
                if columns is None and set(COLUMNS) <= set(names):
                    columns = [names.index(name) for name in COLUMNS]
                    continue
                columns = columns or range(6)
                if len(cells) <= max(columns):
                    raise UserError(f"{where}: 应为 question, A, B, C, D, answer expected, found {str(cells)[:80]}")
                yield where, [cells[column] for column in columns]
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise UserError(f"{path}: 无法读取 cannot be read: {problem}") from None


def _rows(path: Path, parse: Callable[[Row], Parsed], flags: EvaluationFlags) -> list[Question]:
    """Questions of a JSON file. Its first rows are the examples, and are then not asked."""
    found = [parse(record) for record in _records(path)]
    rounds = _rounds([(question.turns[0], answer) for question, answer in found], flags.shots, path)
    asked = [question for question, _ in found[flags.shots :]][: flags.limit or None]
    return [question._replace(turns=[*rounds, *question.turns]) for question in asked]


def _records(path: Path) -> list[Row]:
    """(file:line, row) of a JSON file."""
    found = [(f"{path}:{record.line}", record) for record in sources.read_records(str(path))]
    for where, record in found:
        if record.problem:
            raise UserError(f"{where}: {record.problem}")
    return [(where, record.value) for where, record in found]


def _fields(record: Row, *names: str) -> list[str]:
    """Texts of a row's fields."""
    where, row = record
    if not all(isinstance(row.get(name), str) for name in names):
        raise UserError(f"{where}: 应有 {', '.join(names)} expected, found {', '.join(map(str, row))}")
    return [row[name] for name in names]


def _format_choice(record: Row) -> Parsed:
    """(Question, answer Turn) of ARC as an instruction that ends with "Answer format: answer1/answer2/…"."""
    instruction, output, key = _fields(record, "instruction", "output", "answer")
    listed = FORMAT.search(instruction)
    labels = listed[1].split("/") if listed else []
    if key not in labels or output.count(key) != 1:
        raise UserError(
            f"{record[0]}: 应以 Answer format: a/b/… 结尾 expected at the end, and the answer in the output"
        )
    options = {label: output.replace(key, label) for label in labels}
    subject = Path(record[0].rpartition(":")[0]).stem
    return Question(record[0], subject, [Turn("user", instruction)], options, key), Turn("assistant", output)


def _sum(record: Row) -> Parsed:
    """(Question, answer Turn) of GSM8K, whose answer ends with "#### number"."""
    question, answer = _fields(record, "question", "answer")
    key = answer.rpartition("####")[2].strip()
    if "####" not in answer or last_number(key) is None:
        raise UserError(f"{record[0]}: 答案应以 #### 数 结尾 the answer must end with #### and a number")
    turns = [Turn("user", SOLVE.format(question=question))]
    worked = Turn("assistant", re.sub(r"<<.*?>>", "", answer))  # without the calculator's notes
    return Question(record[0], "gsm8k", turns, {}, key), worked


def _probe(record: Row) -> Question:
    subject, question, key, *options = _fields(record, "subject", "question", "answer", *LETTERS)
    return Question(record[0], subject, [Turn("user", question)], dict(zip(LETTERS, options, strict=True)), key)


def last_number(text: str) -> Decimal | None:
    """The last number in a text as a Decimal, or None: 1,234 and 1234.0 are equal; a full stop after it is no part."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
