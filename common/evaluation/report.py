"""eval_report.md and eval_report.png: what the evaluations of a run found, as one would put it into a report."""

import re
from pathlib import Path

import numpy

from common.evaluation.intervals import RESAMPLES, intervals

HIDDEN = re.compile(r"(word-)?rouge-.-[rp]")  # kept in all_results.json; a table shows F alone
ROW_METRIC = "rouge-l-f"  # by which rows are compared: each row has it
WORST, LONGEST = 10, 300  # rows shown, and characters of a text
STYLES = {"base": ("tab:gray", "o", 0.15), "tuned": ("tab:blue", "s", -0.15)}  # colour, marker, offset


def write(folder, results, records, seed):
    """Write both files into `folder`. results: all_results.json; records: {model: {row number: prediction record}};
    seed: of the bootstrap.
    """
    parts = ["# Evaluation"]
    if records:
        lengths = by_length(records, seed)
        parts += [_held_out_part(results, list(records)), _length_part(lengths, list(records))]
    if len(records) == 2:
        parts.append(_worst_part(**records))
    if "tasks" in results:
        parts.append(_task_part(results["tasks"]))
    text = "\n\n".join([*parts, "![scores](eval_report.png)"])
    (Path(folder) / "eval_report.md").write_text(text + "\n", encoding="utf-8", newline="\n")
    _draw(folder, results, records and lengths, list(records))


def shown(scores):
    """Names of the metrics a table of {model: {metric: value}} shows."""
    first, *others = scores.values()
    return [name for name in first if not HIDDEN.fullmatch(name) and all(name in values for values in others)]


def metric_rows(results, models):
    """[[metric, cell, …]] for the models and, where there are two, their change, by which the rows are sorted."""
    scores, bounds = {name: results[name] for name in models}, results["intervals"]
    rows = {metric: [cell(scores[n][metric], bounds[n][metric]) for n in models] for metric in shown(scores)}
    if len(models) == 2:
        change = {metric: scores["tuned"][metric] - scores["base"][metric] for metric in rows}
        rows = {metric: rows[metric] for metric in sorted(rows, key=lambda name: -change[name])}
        for metric, cells in rows.items():
            cells.append(cell(change[metric], bounds["change"][metric], "+"))
    return [[metric, *cells] for metric, cells in rows.items()]


def cell(value, interval, sign=""):
    """A score and its interval as text."""
    return f"{value:{sign}.4f} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def heads(models):
    """Column heads of the models, and of their change where there are two."""
    return [*models, "change"] if len(models) == 2 else list(models)


def overlap_text(held_out):
    """How many of the rows the training files hold, as far as is known."""
    found = held_out["overlap"]
    if found is None:
        return "与训练数据重合 overlap with training data: 未知 unknown, there is no manifest"
    unread = f"; 已变或不在 changed or gone: {', '.join(map(_name, found['unread']))}" if found["unread"] else ""
    return (
        f"与训练数据重合 overlap with training data: {found['rows']} / {held_out['rows']} rows, "
        f"提问相同 same question {found['questions']}{unread}"
    )


def changes(base, tuned):
    """[(change of ROW_METRIC, row number)] of the records of two models, the worst change first."""
    both = base.keys() & tuned.keys()
    return sorted((tuned[row]["scores"][ROW_METRIC] - base[row]["scores"][ROW_METRIC], row) for row in both)


def by_length(records, seed):
    """[(label, rows, {model: (mean of ROW_METRIC, [low, high])})] of up to four groups by the reference's length."""
    lengths = {row: len(record["reference"]) for row, record in next(iter(records.values())).items()}
    edges = numpy.quantile(list(lengths.values()), [0.25, 0.5, 0.75])
    groups = {}
    for row, length in sorted(lengths.items(), key=lambda item: item[1]):
        groups.setdefault(int(numpy.searchsorted(edges, length)), []).append(row)
    found = []
    for rows in groups.values():
        ends = sorted({lengths[rows[0]], lengths[rows[-1]]})
        scores = {
            name: [{ROW_METRIC: each[row]["scores"][ROW_METRIC]} for row in rows] for name, each in records.items()
        }
        means = {
            name: (float(numpy.mean([row[ROW_METRIC] for row in part])), intervals(part, seed)[ROW_METRIC])
            for name, part in scores.items()
        }
        found.append(("–".join(map(str, ends)), len(rows), means))
    return found


def _held_out_part(results, models):
    held_out = results["held_out"]
    lines = [
        f"## Held-out rows: {held_out['rows']}\n",
        f"- answers: {held_out['decoding']}",
        f"- {overlap_text(held_out)}",
        f"- [low, high]: 95 % interval, {RESAMPLES} bootstrap resamples of the rows",
        f"- {results['signature']}\n",
    ]
    return "\n".join(lines) + "\n" + _table(["metric", *heads(models)], metric_rows(results, models))


def _length_part(lengths, models):
    rows = [[label, str(count), *(cell(*means[name]) for name in models)] for label, count, means in lengths]
    title = f"## {ROW_METRIC} by the reference's length in characters\n\n"
    return title + _table(["length", "rows", *models], rows)


def _worst_part(base, tuned):
    rows = []
    for change, row in changes(base, tuned)[:WORST]:
        texts = (tuned[row]["question"], tuned[row]["reference"], base[row]["answer"], tuned[row]["answer"])
        rows.append([f"{change:+.3f}", _name(tuned[row]["where"]), *map(_short, texts)])
    title = f"## The {len(rows)} rows with the worst change of {ROW_METRIC}\n\n"
    return title + _table(["change", "row", "question", "reference", "base", "tuned"], rows)


def _task_part(tasks):
    models = [name for name in ("base", "tuned") if name in tasks]
    lines = [f"- {found['method']}" for found in tasks[models[-1]].values()]
    title = "## Benchmarks: accuracy; loss in nats an id\n\n" + "\n".join(lines) + "\n\n"
    return title + _table(["task", "questions", *heads(models)], task_rows(tasks, models))


def task_rows(tasks, models):
    """[[task or subject, questions, cell, …]] of the tasks all models have."""
    rows = []
    for task in [task for task in tasks[models[0]] if all(task in tasks[name] for name in models)]:
        found = [tasks[name][task] for name in models]
        cells = [cell(each["accuracy"], each["interval"]) for each in found]
        if len(found) == 2:
            cells.append(cell(found[1]["accuracy"] - found[0]["accuracy"], tasks["change"][task], "+"))
        rows.append([task, str(found[0]["questions"]), *cells])
        if all("loss" in each for each in found):
            rows.append([f"{task}: loss of right answers", "", *_plain([each["loss"] for each in found])])
        if len(found[0]["subjects"]) > 1:
            rows.append([f"{task}: mean of subjects", "", *_plain([each["average"] for each in found])])
            for subject, part in found[0]["subjects"].items():
                values = [each["subjects"][subject]["accuracy"] for each in found]
                rows.append([f"{task}: {subject}", str(part["questions"]), *_plain(values)])
    return rows


def _plain(values):
    change = [f"{values[1] - values[0]:+.4f}"] if len(values) == 2 else []
    return [f"{value:.4f}" for value in values] + change


def _table(names, rows):
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _name(path):
    """A file's name (and line) without its folders."""
    return re.split(r"[/\\]", path)[-1]


def _short(text):
    """A text as a cell of a table."""
    text = text if len(text) <= LONGEST else text[:LONGEST] + "…"
    for mark, shown_as in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\n", "<br>")):
        text = text.replace(mark, shown_as)
    return text


def _draw(folder, results, lengths, models):
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
        draw(axis, results, lengths, models)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(Path(folder) / "eval_report.png")
    pyplot.close(figure)


def _draw_metrics(axis, results, lengths, models):
    names = [row[0] for row in metric_rows(results, models) if row[0].isascii()][::-1]
    for model in models:
        values = [(results[model][name], results["intervals"][model][name]) for name in names]
        _points(axis, model, values, upright=False)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(-0.02, 1.02), xlabel="score, 95 % interval", title=f"{results['held_out']['rows']} held-out rows")


def _draw_lengths(axis, results, lengths, models):
    for model in models:
        _points(axis, model, [means[model] for _, _, means in lengths], upright=True)
    axis.set_xticks(range(len(lengths)), [f"{label}\n({count} rows)" for label, count, _ in lengths])
    axis.set(xlabel="characters in the reference answer", ylabel=f"{ROW_METRIC}, 95 % interval")
    axis.set(ylim=(-0.02, 1.02), xlim=(-0.5, len(lengths) - 0.5), title="Score by answer length")


def _draw_tasks(axis, results, lengths, models):
    tasks = {name: found for name, found in results["tasks"].items() if name in STYLES}
    names = list(dict.fromkeys(task for found in tasks.values() for task in found))
    for model, found in tasks.items():
        values = [(found[n]["accuracy"], found[n]["interval"]) if n in found else None for n in names]
        _points(axis, model, values, upright=True)
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="accuracy, 95 % interval", ylim=(-0.02, 1.02), xlim=(-0.5, len(names) - 0.5), title="Benchmarks")


def _points(axis, model, values, upright):
    """A point and its interval for each (value, [low, high]); None leaves a gap."""
    colour, marker, offset = STYLES[model]
    places = [number - offset if upright else number + offset for number, value in enumerate(values) if value]
    values = [value for value in values if value]
    middles = [value for value, _ in values]
    errors = numpy.array([(max(0, value - low), max(0, high - value)) for value, (low, high) in values]).T
    across, along = (places, middles) if upright else (middles, places)
    bars = {"yerr" if upright else "xerr": errors}
    axis.errorbar(across, along, **bars, fmt=marker, color=colour, ecolor=colour, capsize=3, label=model)
