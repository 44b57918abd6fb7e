"""Benchmarks: questions answered by likelihood or in writing, counted by subject, base against tuned.

A choice is the option whose ids the model finds likeliest on average; a written answer is its last number.
Prompts are those of training, rendered by the family's own `prompt`; examples are earlier rounds of the conversation.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common.conversation.turns import Turn, said
from common.errors import UserError
from common.evaluation import evaluate, intervals, tasks
from common.evaluation.records import (
    Progress,
    Record,
    key_of,
    predict,
    read_records,
    score_rows,
    shortest_first,
    show_cut,
    show_unanswered,
)
from common.evaluation.report import leave_report
from common.evaluation.results import read_results, write_results
from common.evaluation.tables import Interval, heads, task_rows
from common.inference import likelihood
from common.inference.answerer import Sampling, prompt_limit

if TYPE_CHECKING:
    from common.config import EvaluationFlags, SFTConfig
    from common.evaluation.tasks import Question
    from common.inference.answerer import Answerer
    from common.inference.remote import Remote

PROMPT_LIMIT = 2048  # ids of a prompt, or what the model's context leaves, unless --max_length_q says otherwise


def report(
    answer: Answerer | Remote, questions: dict[str, list[Question]], cfg: SFTConfig, flags: EvaluationFlags
) -> None:
    """Ask base, tuned or both the `questions` of tasks.read; print and leave the accuracies.

    Under torchrun each process asks its share, and the first one prints and writes.
    """
    if "max_length_q" not in cfg.given:
        answer.max_length_q = prompt_limit(PROMPT_LIMIT, answer.context, cfg.max_new_tokens)
    models = evaluate.models_of(flags)
    for model in models:
        for task, asked in questions.items():
            records = run_task(answer, task, asked, cfg, model == "base")
            show_cut(records)
            show_unanswered(records)
    if evaluate.is_first():
        results = save_results(questions, models, cfg, flags)
        leave_report(cfg, results)
        show_table(results["tasks"], models, questions)


def run_task(
    answer: Answerer | Remote, task: str, questions: Sequence[Question], cfg: SFTConfig, base: bool = False
) -> list[Record]:
    """The records of a task's `questions`, in order; kept in a file, and gone on with, as an evaluation's are."""
    sampling = Sampling(max_new_tokens=cfg.max_new_tokens)
    settings = [_hashed(questions), vars(sampling), answer.max_length_q, "likelihood an id", tasks.NUMBER.pattern]

    def ask(numbers: list[int]) -> Iterable[Record]:
        asked = [(number, questions[number]) for number in numbers]
        if questions[0].options:  # tasks.read asks no Remote to choose
            return _choose(cast("Answerer", answer), asked, cfg.eval_batch_size, base)
        batch = [(number, each.where, [*each.turns, Turn("assistant", each.key)]) for number, each in asked]
        return predict(answer, batch, sampling, base, _number_score)

    return score_rows(
        records_path(cfg, task, base),
        key_of(cfg, base, settings),
        sorted(shortest_first([question.turns for question in questions]), key=lambda row: questions[row].subject),
        ask,
        cfg,
        Progress(f"{task} {'基座 base' if base else '微调 tuned'}", "accuracy", answer),
    )


def _hashed(questions: Sequence[Question]) -> list[tuple]:
    """The questions as hashes see them: a turn is its role and its text."""
    return [(*question[:2], said(question.turns), *question[3:]) for question in questions]


def records_path(cfg: SFTConfig, task: str, base: bool) -> Path:
    """Where the records of a task are kept."""
    return Path(cfg.model_save_dir) / f"task_{task}{'_base' if base else ''}.jsonl"


def save_results(
    questions: dict[str, list[Question]], models: Sequence[str], cfg: SFTConfig, flags: EvaluationFlags
) -> dict[str, Any]:
    """Put {model: {task: accuracies}} and their change into all_results.json; all of it.

    The other model's accuracies on other questions of the same task, or counted in another way, are dropped.
    """
    results = read_results(cfg)
    found = {name: dict(results.get("tasks", {}).get(name, {})) for name in ("base", "tuned")}
    for task, asked in questions.items():
        digest = hashlib.sha256(json.dumps(_hashed(asked)).encode()).hexdigest()
        way = {"method": method(task, asked, flags.shots, cfg), "sha256": digest}
        for name in ("base", "tuned"):
            if name in models:
                scores = [record["scores"] for record in read_records(records_path(cfg, task, name == "base"))]
                found[name][task] = accuracies(asked, scores, cfg.seed) | way
            elif not way.items() <= found[name].get(task, {}).items():
                found[name].pop(task, None)
    results["tasks"] = {name: each for name, each in found.items() if each} | {"change": _changes(found, cfg)}
    write_results(cfg, results)
    return results


def accuracies(questions: Sequence[Question], scores: Sequence[dict[str, float]], seed: int) -> dict[str, Any]:
    """{accuracy, interval, questions, average, loss, subjects} of a task: shares of right answers.

    average is the mean over the subjects; loss (nats an id) is that of the right answers, where there are options.
    """
    subjects: dict[str, list[float]] = {}
    for question, score in zip(questions, scores, strict=True):
        subjects.setdefault(question.subject, []).append(score["accuracy"])
    shares = {name: {"accuracy": _mean(part), "questions": len(part)} for name, part in subjects.items()}
    losses = [score["loss"] for score in scores if "loss" in score]
    return {
        "accuracy": _mean([score["accuracy"] for score in scores]),
        "interval": intervals.intervals(_alone(scores), seed).get("accuracy"),
        "questions": len(scores),
        "average": _mean([share["accuracy"] for share in shares.values()]),
        "subjects": shares,
    } | ({"loss": _mean(losses)} if losses else {})


def method(task: str, questions: Sequence[Question], shots: int, cfg: SFTConfig) -> str:
    """How a task was asked and counted, in words."""
    if not questions[0].options:
        how = f"the last number in a greedy answer of at most {cfg.max_new_tokens} tokens"
    else:
        how = "the option of the highest mean log probability an id"
    return f"{task}: {0 if task == 'probe' else shots}-shot, {how}"


def show_table(found: Mapping[str, Any], models: Sequence[str], questions: Iterable[str]) -> None:
    """Print accuracy by task and subject, a column a model. found: the results' "tasks"; questions: names of tasks."""
    for task in questions:
        print(found[models[0]][task]["method"])
    kept = {name: {task: found[name][task] for task in questions} for name in models} | {"change": found["change"]}
    rows = task_rows(kept, models)
    for name, count, *cells in [["task", "questions", *heads(models)], *rows]:
        print(f"{name:<32} {count:>9}  " + "".join(f"{cell:<26}" for cell in cells).rstrip())


def _choose(answer: Answerer, asked: list[tuple[int, Question]], batch_size: int, base: bool) -> Iterator[Record]:
    """Records of (row number, Question), each answered by its likeliest option; one that cannot be asked scores 0."""
    started = time.monotonic()
    try:
        pairs = [(question.turns, list(question.options.values())) for _, question in asked]
        found, stop = likelihood.fits(answer, pairs, base, batch_size), "choice"
    except UserError as problem:
        if len(asked) > 1:
            for each in asked:
                yield from _choose(answer, [each], batch_size, base)
            return
        found, stop = [[]], f"error: {problem}"
    seconds = (time.monotonic() - started) / len(asked)
    for (number, question), fits in zip(asked, found, strict=True):
        losses = dict(zip(question.options, (fit.loss / fit.ids for fit in fits), strict=False))
        chosen = min(losses, key=lambda label: losses[label], default="")
        right = {"accuracy": float(chosen == question.key)}
        yield {
            "row": number,
            "where": question.where,
            "prompt": [{"role": turn.role, "content": turn.text} for turn in question.turns],
            "question": question.turns[-1].text,
            "reference": question.key,
            "answer": chosen,
            "stop": stop,
            "cut_to": answer.cut_to(question.turns, answer.context) if losses else 0,
            "seconds": round(seconds, 3),
            "losses": losses,
            "scores": right | ({"loss": losses[question.key]} if losses else {}),
        }


def _number_score(text: str, reference: str, question: str) -> dict[str, float]:
    return {"accuracy": float(tasks.last_number(text) == tasks.last_number(reference))}


def _changes(found: Mapping[str, Any], cfg: SFTConfig) -> dict[str, Interval]:
    """{task: [low, high]} of the change of accuracy, for the tasks that both models have; None without the records."""
    changes: dict[str, Interval] = {}
    for task in found["base"].keys() & found["tuned"].keys():
        before, after = (
            _alone([record["scores"] for record in read_records(records_path(cfg, task, base))])
            for base in (True, False)
        )
        whole = len(before) == len(after) == found["base"][task]["questions"]  # else a call was stopped
        changes[task] = intervals.change_intervals(before, after, cfg.seed).get("accuracy") if whole else None
    return changes


def _alone(scores: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The accuracies, without the losses beside them."""
    return [{"accuracy": score["accuracy"]} for score in scores]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
