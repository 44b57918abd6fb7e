"""eval_report.md and eval_report.png: what the evaluations of a run found, as one would put it into a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from common.evaluation.intervals import RESAMPLES
from common.evaluation.records import UNANSWERED, Record, predictions, unanswered
from common.evaluation.tables import (
    REST_NOTE,
    ROW_METRIC,
    WORST,
    Scored,
    by_length,
    cell,
    changes,
    file_name,
    heads,
    metric_rows,
    overlap_text,
    task_rows,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from common.config import SFTConfig

LONGEST = 300  # characters of a text in a table
STYLES = {"base": ("tab:gray", "o", 0.15), "tuned": ("tab:blue", "s", -0.15)}  # colour, marker, offset


Groups = list[tuple[str, int, dict[str, Scored]]]  # as tables.by_length gives them


def leave_report(cfg: SFTConfig, results: Mapping[str, Any]) -> None:
    """Write eval_report.md and eval_report.png from all the evaluations the run's folder holds.

    results: what all_results.json holds.
    """
    records = {name: predictions(cfg, name == "base") for name in ("base", "tuned") if name in results}
    write(Path(cfg.model_save_dir), results, records, cfg.seed)
    print(f"\n评估报告 report: {Path(cfg.model_save_dir) / 'eval_report.md'}")


def write(folder: Path, results: Mapping[str, Any], records: Mapping[str, Mapping[int, Record]], seed: int) -> None:
    """Write both files into `folder`. records: {model: {row number: prediction record}}; seed: of the bootstrap."""
    groups: Groups = []
    parts = ["# Evaluation"]
    if records:
        groups = by_length(records, seed)
        parts += [_held_out_part(results, records), _length_part(groups, list(records))]
    if len(records) == 2:
        parts.append(_worst_part(**records))
    if "tasks" in results:
        parts.append(_task_part(results["tasks"]))
    text = "\n\n".join([*parts, "![scores](eval_report.png)"])
    (folder / "eval_report.md").write_text(text + "\n", encoding="utf-8", newline="\n")
    _draw(folder, results, groups, list(records))


def _held_out_part(results: Mapping[str, Any], records: Mapping[str, Mapping[int, Record]]) -> str:
    held_out, models = results["held_out"], list(records)
    silent = {name: unanswered(each.values()) for name, each in records.items()}
    lines = [
        f"## Held-out rows: {held_out['rows']}\n",
        f"- answers: {held_out['decoding']}",
        f"- {overlap_text(held_out)}",
        f"- [low, high]: 95 % interval, {RESAMPLES} bootstrap resamples of the rows",
        f"- {results['signature']}",
        *(f"- {name}: {UNANSWERED}: {count} / {len(records[name])}" for name, count in silent.items() if count),
    ]
    first, others = (_table(["metric", *heads(models)], metric_rows(results, models, part)) for part in (True, False))
    return "\n\n".join(["\n".join(lines), first, REST_NOTE, others])


def _length_part(groups: Groups, models: Sequence[str]) -> str:
    rows = [[label, str(count), *(cell(*means[name]) for name in models)] for label, count, means in groups]
    title = f"## {ROW_METRIC} by the reference's length in characters\n\n"
    return title + _table(["length", "rows", *models], rows)


def _worst_part(base: Mapping[int, Record], tuned: Mapping[int, Record]) -> str:
    rows = []
    for change, row in changes(base, tuned)[:WORST]:
        texts = (tuned[row]["question"], tuned[row]["reference"], base[row]["answer"], tuned[row]["answer"])
        rows.append([f"{change:+.3f}", file_name(tuned[row]["where"]), *map(_short, texts)])
    title = f"## The {len(rows)} rows with the worst change of {ROW_METRIC}\n\n"
    return title + _table(["change", "row", "question", "reference", "base", "tuned"], rows)


def _task_part(tasks: Mapping[str, Any]) -> str:
    models = [name for name in ("base", "tuned") if name in tasks]
    lines = [f"- {found['method']}" for found in tasks[models[-1]].values()]
    title = "## Benchmarks: accuracy; loss in nats an id\n\n" + "\n".join(lines) + "\n\n"
    return title + _table(["task", "questions", *heads(models)], task_rows(tasks, models))


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(text: str) -> str:
    """A text as a cell of a table."""
    text = text if len(text) <= LONGEST else text[:LONGEST] + "…"
    for mark, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", "<br>")):
        text = text.replace(mark, escaped)
    return text


def _draw(folder: Path, results: Mapping[str, Any], groups: Groups, models: Sequence[str]) -> None:
    """Scores by metric and by the reference's length, accuracy by task: what of these there is. Labels are ASCII."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = results.get("tasks", {})
    panels = [
        draw for draw, wanted in ((_draw_metrics, models), (_draw_lengths, models), (_draw_tasks, tasks)) if wanted
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.5 * len(panels), 5.5), dpi=120, squeeze=False)
    for draw, axis in zip(panels, axes[0], strict=True):
        draw(axis, results, groups, models)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.05), ncols=2, frameon=False)  # above: on no point
    figure.tight_layout()
    figure.savefig(folder / "eval_report.png")
    pyplot.close(figure)


def _draw_metrics(axis: Axes, results: Mapping[str, Any], groups: Groups, models: Sequence[str]) -> None:
    names = [row[0] for row in metric_rows(results, models) if row[0].isascii()][::-1]
    for model in models:
        values = [(results[model][name], results["intervals"][model].get(name)) for name in names]
        _points(axis, model, values, upright=False)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(-0.02, 1.02), xlabel="score, 95 % interval", title=f"{results['held_out']['rows']} held-out rows")


def _draw_lengths(axis: Axes, results: Mapping[str, Any], groups: Groups, models: Sequence[str]) -> None:
    for model in models:
        _points(axis, model, [means[model] for _, _, means in groups], upright=True)
    axis.set_xticks(range(len(groups)), [f"{label}\n({count} rows)" for label, count, _ in groups])
    axis.set(xlabel="characters in the reference answer", ylabel=f"{ROW_METRIC}, 95 % interval")
    axis.set(ylim=(-0.02, 1.02), xlim=(-0.5, len(groups) - 0.5), title="Score by answer length")


def _draw_tasks(axis: Axes, results: Mapping[str, Any], groups: Groups, models: Sequence[str]) -> None:
    tasks = {name: found for name, found in results["tasks"].items() if name in STYLES}
    names = list(dict.fromkeys(task for found in tasks.values() for task in found))
    for model, found in tasks.items():
        values = [(found[n]["accuracy"], found[n]["interval"]) if n in found else None for n in names]
        _points(axis, model, values, upright=True)
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="accuracy, 95 % interval", ylim=(-0.02, 1.02), xlim=(-0.5, len(names) - 0.5), title="Benchmarks")


def _points(axis: Axes, model: str, values: Sequence[Scored | None], upright: bool) -> None:
    """A point and its interval for each (value, [low, high]); None leaves a gap."""
    colour, marker, offset = STYLES[model]
    places = [number - offset if upright else number + offset for number, value in enumerate(values) if value]
    there = [value for value in values if value]
    middles = [value for value, _ in there]
    bounds = [(value, interval or (value, value)) for value, interval in there]
    errors = numpy.array([(max(0, value - low), max(0, high - value)) for value, (low, high) in bounds]).T
    across, along = (places, middles) if upright else (middles, places)
    bars = {"yerr" if upright else "xerr": errors}
    axis.errorbar(across, along, **bars, fmt=marker, color=colour, ecolor=colour, capsize=3, label=model)
