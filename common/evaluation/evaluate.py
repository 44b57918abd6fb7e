"""Scoring on held-out rows: batched, written down as it goes, resumed where it stopped; base and tuned side by side."""

import hashlib
import json
import time
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from common import distributed, files, launch
from common.data import conversations
from common.data.turns import Conversation
from common.errors import UserError
from common.evaluation import intervals, metrics, overlap
from common.evaluation.report import ROW_METRIC, WORST, changes, heads, metric_rows, overlap_text, write
from common.inference.answerer import Sampling
from common.inference.tuned import trained_with
from common.model.loading import base_hash
from common.runs.manifest import read_manifest


def held_out_rows(cfg, rows=None):
    """(where, turns) on which base and tuned are compared: `cfg.eval_data_path`, or else the validation rows."""
    if not cfg.eval_rows:
        return []
    if cfg.eval_data_path:
        return conversations.held_out(cfg, cfg.eval_data_path, cfg.eval_rows)[0]
    wanted = set(rows.validation["where"]) if rows is not None else set()
    paths = [conversations.split_sample(spec)[0] for spec in cfg.data_path] if wanted else []
    found = (row for path in paths for row in conversations.questions(path, cfg))
    return list(islice((row for row in found if isinstance(row, Conversation) and row.where in wanted), cfg.eval_rows))


def rows_to_score(cfg, limit):
    """(where, turns) of `--data_path` where given, or of the run's held-out files; `limit` rows at most (0: all)."""
    manifest = read_manifest(cfg.model_save_dir)
    specs = cfg.data_path if "data_path" in cfg.given else cfg.eval_data_path
    if manifest and not cfg.given & {"data_path", "eval_data_path"}:
        specs = manifest["config"]["eval_data_path"]
    rows, left_out = conversations.held_out(cfg, specs, limit)
    for row in left_out:
        print(f"不评估 not scored: {row.where}: {row.reason}")
    if not rows:
        raise UserError(
            f"{' '.join(specs)}: 没有可评估的数据 there is no row to score; give a held-out file by --data_path"
        )
    return rows


def report(answer, rows, cfg, flags):
    """What evaluation.py does: score base, tuned or both (flags: EvaluationFlags), print, and leave the results.

    Under torchrun each process scores its share of the rows, and the first one prints and writes.
    """
    scores = {name: evaluate(answer, rows, cfg, name == "base") for name in models_of(flags)}
    if is_first():
        conclude(cfg, rows, scores)


def is_first():
    """Whether this process is the one that prints and writes: the first of those that work together, or one alone."""
    return not (distributed.together() and launch.rank())


def models_of(flags):
    """Names of the models that EvaluationFlags ask for."""
    return ("base", "tuned") if flags.compare else ("base",) if flags.base else ("tuned",)


def compare(answer, rows, cfg, apart=False):
    """Score base and tuned on the same rows, print and leave the results; all of all_results.json.

    apart: the rows are the validation rows, kept out of training though they stand in its files.
    """
    scores = {name: evaluate(answer, rows, cfg, name == "base") for name in ("base", "tuned")}
    return conclude(cfg, rows, scores, apart)


def conclude(cfg, rows, scores, apart=False):
    """Keep {model: {metric: mean}} in all_results.json, write the report, print answers and table; all the results."""
    results = save_results(cfg, rows, scores, apart)
    if len(scores) == 2:
        show_answers(cfg)
        show_worst(cfg)
    leave_report(cfg, results)
    show_table(results, list(scores))
    return results


def evaluate(answer, rows, cfg, base=False):
    """Score `answer` (an Answerer, or anything called like one) on rows [(where, turns)]: {metric: mean}.

    Predictions go to predictions.jsonl (predictions_base.jsonl) in `cfg.model_save_dir`, a line each as they are made;
    a second call with the same model, rows and settings goes on after the last whole line.
    """
    sampling = _sampling(cfg)
    records = score_rows(
        _path(cfg, base),
        key_of(cfg, base, [rows, vars(sampling), metrics.signature(), getattr(answer, "origin", "")]),
        sorted(range(len(rows)), key=lambda number: sum(len(turn.text) for turn in rows[number][1])),
        lambda numbers: predict(answer, [(number, *rows[number]) for number in numbers], sampling, base),
        cfg,
        ("评估基座 base" if base else "评估微调 tuned", "bleu-4"),
    )
    return metrics.average([record["scores"] for record in records])


def score_rows(path, key, order, predict, cfg, shown):
    """The records of the row numbers in `order`, sorted by number; `predict(numbers)` yields those of a batch.

    Each batch is appended to `path` as it is done; what an earlier call under the same `key` left there is not done
    again. Batches and their seeds do not depend on where that call stopped, nor on the number of processes.
    shown: the title of the progress bar, and the score whose mean it shows.
    """
    distributed.first(lambda: _gather(path, key))
    done = {record["row"]: record for record in files.read_jsonl(path)}
    distributed.wait()
    batches = [order[start : start + cfg.eval_batch_size] for start in range(0, len(order), cfg.eval_batch_size)]
    running = [record["scores"][shown[1]] for record in done.values()]
    rank, count = (launch.rank(), launch.world_size()) if distributed.together() else (0, 1)
    mine = path.with_suffix(f".{rank}.part") if rank else path
    with (
        mine.open("a", encoding="utf-8", newline="\n") as file,
        tqdm(total=len(order), initial=len(done), desc=shown[0]) as bar,
    ):
        for number in range(rank, len(batches), count):
            left = [row for row in batches[number] if row not in done]
            if not left:
                continue
            torch.manual_seed((cfg.seed + number) % 2**32)
            records = list(predict(left))
            file.write("".join(files.line_of({"key": key, **record}) for record in records))
            file.flush()
            running += [record["scores"][shown[1]] for record in records]
            bar.update(len(left))
            bar.set_postfix_str(f"{shown[1]} {sum(running) / len(running):.3f}")
    distributed.wait()
    distributed.first(lambda: _gather(path, key))
    return records_in(path)


def records_in(path):
    """The records `score_rows` left in a file, by row number."""
    return sorted(files.read_jsonl(path), key=lambda record: record["row"])


def predictions(cfg, base=False):
    """{row number: record} of the last evaluation, in that order."""
    return {record["row"]: record for record in records_in(_path(cfg, base))}


def save_results(cfg, rows, scores, apart=False):
    """Put {base: …, tuned: …} with their intervals into all_results.json and return all of it.

    Scores on other rows are dropped. held_out: number and hash of the rows, and how many of them were trained on.
    """
    results = read_results(cfg)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    if results.get("held_out", {}).get("sha256") != digest:
        results = {name: value for name, value in results.items() if name not in ("base", "tuned")}
    manifest = read_manifest(cfg.model_save_dir)
    found = overlap.count(manifest, rows, apart) if manifest else None
    held_out = {"rows": len(rows), "sha256": digest, "decoding": _decoding(_sampling(cfg)), "overlap": found}
    results |= {**scores, "held_out": held_out, "signature": metrics.signature()}
    each = {
        name: [record["scores"] for record in predictions(cfg, name == "base").values()]
        for name in ("base", "tuned")
        if name in results
    }
    results["intervals"] = {name: intervals.intervals(found, cfg.seed) for name, found in each.items()}
    if len(each) == 2:
        results["intervals"]["change"] = intervals.change_intervals(each["base"], each["tuned"], cfg.seed)
    files.write_json(Path(cfg.model_save_dir) / "all_results.json", results)
    return results


def read_results(cfg):
    """What all_results.json in the run's folder holds, {} where there is none."""
    path = Path(cfg.model_save_dir) / "all_results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def leave_report(cfg, results):
    """Write eval_report.md and eval_report.png from all the evaluations the run's folder holds."""
    records = {name: predictions(cfg, name == "base") for name in ("base", "tuned") if name in results}
    write(cfg.model_save_dir, results, records, cfg.seed)
    print(f"\n评估报告 report: {Path(cfg.model_save_dir) / 'eval_report.md'}")


def show_table(results, models):
    """Print a line a metric, a column a model and one for the change, by which the lines are sorted."""
    print(f"\n留出数据 held-out rows: {results['held_out']['rows']}, {overlap_text(results['held_out'])}")
    for name, *cells in [["metric", *heads(models)], *metric_rows(results, models)]:
        print(f"{name:<18}" + "".join(f"{cell:<26}" for cell in cells).rstrip())
    print(f"[95 % interval: {intervals.RESAMPLES} bootstrap resamples of the rows]")
    print(results["signature"])


def show_answers(cfg, count=3):
    """Print the first answers of base and tuned beside the reference."""
    base, tuned = predictions(cfg, base=True), predictions(cfg)
    for number in sorted(base.keys() & tuned.keys())[:count]:
        record = tuned[number]
        print(f"\n提问 question: {record['question']}")
        print(f"参考 reference: {record['reference']}")
        print(f"基座 base:      {base[number]['answer']}")
        print(f"微调 tuned:     {record['answer']}")


def show_worst(cfg):
    """Print where the tuned model's answers lost most against the base's; eval_report.md has the texts."""
    metric, base, tuned = ROW_METRIC, predictions(cfg, base=True), predictions(cfg)
    print(f"\n变化最差的行 worst rows, by the change of {metric} (base → tuned):")
    for change, row in changes(base, tuned)[:WORST]:
        before, after = (records[row]["scores"][metric] for records in (base, tuned))
        print(f"  {change:+.3f}  {before:.3f} → {after:.3f}  {tuned[row]['where']}")


def predict(answer, batch, sampling, base, score=metrics.score):
    """Records of a batch of (row number, where, turns); a row that cannot be asked scores 0 and says why.

    score(answer, reference, question) gives {name: value}; whether it "stopped" by itself is added.
    """
    started = time.monotonic()
    questions = [turns[:-1] for _, _, turns in batch]
    try:
        answers = answer(questions, sampling, base=base)
    except UserError as problem:
        if len(batch) > 1:
            for row in batch:
                yield from predict(answer, [row], sampling, base, score)
            return
        answers = [("", f"error: {problem}", 0)]
    seconds = (time.monotonic() - started) / len(batch)
    for (number, where, turns), (text, stop, tokens) in zip(batch, answers, strict=True):
        question, reference = turns[-2].text, turns[-1].text
        ended = {"stopped": float(stop == "stop" and bool(text.strip()))}
        yield {
            "row": number,
            "where": where,
            "prompt": [{"role": turn.role, "content": turn.text} for turn in turns[:-1]],
            "question": question,
            "reference": reference,
            "answer": text,
            "stop": stop,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "scores": score(text, reference, question) | ended,
        }


def _gather(path, key):
    """Put the records made under `key` by all processes into `path`, without a line cut off by a kill; drop others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = sorted(path.parent.glob(f"{path.stem}.*.part"))
    found = [record for file in [path, *parts] if file.exists() for record in files.read_jsonl(file)]
    records = {record["row"]: record for record in found if record.get("key") == key}
    draft = path.with_suffix(".draft")
    files.write_jsonl(draft, records.values())
    draft.replace(path)
    for part in parts:
        part.unlink()


def _path(cfg, base):
    return Path(cfg.model_save_dir) / f"predictions{'_base' if base else ''}.jsonl"


def _sampling(cfg):
    """Greedy unless sampling is asked for."""
    return Sampling.of(cfg, do_sample="do_sample" in cfg.given and cfg.do_sample)


def _decoding(sampling):
    """How the answers were drawn, in words."""
    drawn = f"sampled, temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}"
    how = drawn if sampling.do_sample else "greedy"
    beams = f", {sampling.num_beams} beams" if sampling.num_beams > 1 else ""
    penalty = f", repetition penalty {sampling.repetition_penalty}" if sampling.repetition_penalty != 1 else ""
    return f"{how}{beams}{penalty}, at most {sampling.max_new_tokens} tokens"


def key_of(cfg, base, parts):
    """Names the model, and in `parts` the rows and settings, that a prediction depends on."""
    trained = trained_with(cfg, read_manifest(cfg.model_save_dir), base)
    weights = [base_hash(trained["path_model_pretrain"])]
    adapter = Path(cfg.model_save_dir) / "adapter_model.safetensors"
    if not base:
        weights.append(files.file_hash(str(adapter)) if adapter.exists() else base_hash(cfg.model_save_dir))
    parts = [weights, trained, cfg.dtype, cfg.seed, base, *parts]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]
