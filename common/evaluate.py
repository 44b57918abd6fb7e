"""Scoring on held-out rows: batched, written down as it goes, resumed where it stopped; base and tuned side by side."""

import hashlib
import json
import re
import time
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from common import dataset, jsonl, metrics, run
from common.answer import Sampling, trained_with
from common.errors import UserError
from common.model import base_hash

HIDDEN = re.compile(r"rouge-.-[rp]")  # kept in all_results.json; a table shows F alone


def held_out_rows(cfg, rows=None):
    """(where, turns) on which base and tuned are compared: `cfg.eval_data_path`, or else the validation rows."""
    if not cfg.eval_rows:
        return []
    if cfg.eval_data_path:
        return dataset.held_out(cfg, cfg.eval_data_path, cfg.eval_rows)[0]
    wanted = set(rows.validation["where"]) if rows is not None else set()
    paths = [dataset.split_sample(spec)[0] for spec in cfg.data_path] if wanted else []
    found = (row for path in paths for row in dataset.questions(path, cfg))
    return list(
        islice(((where, turns) for where, turns, reason in found if not reason and where in wanted), cfg.eval_rows)
    )


def rows_to_score(cfg, limit):
    """(where, turns) of `--data_path` where given, or of the run's held-out files; `limit` rows at most (0: all)."""
    manifest = run.read_manifest(cfg.model_save_dir)
    specs = cfg.data_path if "data_path" in cfg.given else cfg.eval_data_path
    if manifest and not cfg.given & {"data_path", "eval_data_path"}:
        specs = manifest["config"]["eval_data_path"]
    rows, left_out = dataset.held_out(cfg, specs, limit)
    for row in left_out:
        print(f"不评估 not scored: {row['where']}: {row['reason']}")
    if not rows:
        raise UserError(
            f"{' '.join(specs)}: 没有可评估的数据 there is no row to score; give a held-out file by --data_path"
        )
    return rows


def report(answer, rows, cfg, flags):
    """What evaluation.py does: score base, tuned or both (flags: EvaluationFlags), print, and keep all_results.json."""
    if flags.compare:
        compare(answer, rows, cfg)
    else:
        name = "base" if flags.base else "tuned"
        scores = {name: evaluate(answer, rows, cfg, base=flags.base)}
        show_table(scores, len(rows))
        save_results(cfg, rows, scores)


def evaluate(answer, rows, cfg, base=False):
    """Score `answer` (an Answerer, or anything called like one) on rows [(where, turns)]: {metric: mean}.

    Predictions go to predictions.jsonl (predictions_base.jsonl) in `cfg.model_save_dir`, a line each as they are made;
    a second call with the same model, rows and settings goes on after the last whole line.
    """
    torch.manual_seed(cfg.seed)
    sampling = Sampling.of(cfg, do_sample="do_sample" in cfg.given and cfg.do_sample)
    path = Path(cfg.model_save_dir) / f"predictions{'_base' if base else ''}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    key = _key(cfg, rows, sampling, base)
    done = _done(path, key)
    left = [number for number in range(len(rows)) if number not in done]
    left.sort(key=lambda number: sum(len(turn.text) for turn in rows[number][1]))
    title = "评估基座 base" if base else "评估微调 tuned"
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(rows), initial=len(done), desc=title) as bar:
        for start in range(0, len(left), cfg.eval_batch_size):
            batch = left[start : start + cfg.eval_batch_size]
            for record in _predict(answer, [(number, *rows[number]) for number in batch], sampling, base):
                done[record["row"]] = record
                file.write(jsonl.line_of({"key": key, **record}))
            file.flush()
            bar.update(len(batch))
            bar.set_postfix_str(f"BLEU-4 {metrics.average([r['scores'] for r in done.values()])['bleu-4']:.3f}")
    return metrics.average([done[number]["scores"] for number in sorted(done)])


def predictions(cfg, base=False):
    """The records of the last evaluation, by row number."""
    path = Path(cfg.model_save_dir) / f"predictions{'_base' if base else ''}.jsonl"
    return {record["row"]: record for record in jsonl.read(path)}


def save_results(cfg, rows, scores):
    """Put {base: …, tuned: …} into all_results.json and return all of it; scores on other rows are dropped."""
    path = Path(cfg.model_save_dir) / "all_results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    held_out = {"rows": len(rows), "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    if results.get("held_out") != held_out:
        results = {name: value for name, value in results.items() if name not in ("base", "tuned")}
    results |= {**scores, "held_out": held_out, "signature": metrics.signature()}
    run.write_json(path, results)
    return results


def compare(answer, rows, cfg):
    """Score base and tuned on the same rows, print the table and three pairs of answers; all of all_results.json."""
    scores = {name: evaluate(answer, rows, cfg, base=name == "base") for name in ("base", "tuned")}
    show_table(scores, len(rows))
    show_answers(cfg)
    return save_results(cfg, rows, scores)


def shown(scores):
    """Names of the metrics a table of {model: {metric: value}} shows."""
    first, *others = scores.values()
    return [name for name in first if not HIDDEN.fullmatch(name) and all(name in values for values in others)]


def show_table(scores, count):
    """Print one line a metric, one column a model."""
    print(f"\n留出数据 held-out rows: {count}")
    print(f"{'metric':<16}" + "".join(f"{name:>10}" for name in scores))
    for metric in shown(scores):
        print(f"{metric:<16}" + "".join(f"{values[metric]:>10.4f}" for values in scores.values()))
    print(metrics.signature())


def show_answers(cfg, count=3):
    """Print the first answers of base and tuned beside the reference."""
    base, tuned = predictions(cfg, base=True), predictions(cfg)
    for number in sorted(base.keys() & tuned.keys())[:count]:
        record = tuned[number]
        print(f"\n提问 question: {record['question']}")
        print(f"参考 reference: {record['reference']}")
        print(f"基座 base:      {base[number]['prediction']}")
        print(f"微调 tuned:     {record['prediction']}")


def _predict(answer, batch, sampling, base):
    """Records of a batch of (row number, where, turns); a row that cannot be asked scores 0 and says why."""
    started = time.monotonic()
    questions = [turns[:-1] for _, _, turns in batch]
    try:
        answers = answer(questions, sampling, base=base)
    except UserError as problem:
        if len(batch) > 1:
            for row in batch:
                yield from _predict(answer, [row], sampling, base)
            return
        answers = [("", f"error: {problem}", 0)]
    seconds = (time.monotonic() - started) / len(batch)
    for (number, where, turns), (text, stop, tokens) in zip(batch, answers, strict=True):
        question, reference = turns[-2].text, turns[-1].text
        yield {
            "row": number,
            "where": where,
            "question": question,
            "reference": reference,
            "prediction": text,
            "stop": stop,
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "scores": metrics.score(text, reference, question),
        }


def _done(path, key):
    """Records already made under `key`; the file is rewritten with these alone, without a line cut off by a kill."""
    records = [record for record in (jsonl.read(path) if path.exists() else []) if record.pop("key", None) == key]
    jsonl.write(path, [{"key": key, **record} for record in records])
    return {record["row"]: record for record in records}


def _key(cfg, rows, sampling, base):
    """Names the model, the rows and the settings a prediction depends on."""
    trained = trained_with(cfg, run.read_manifest(cfg.model_save_dir), base)
    adapter = Path(cfg.model_save_dir) / "adapter_model.safetensors"
    weights = [base_hash(trained["path_model_pretrain"])]
    if adapter.exists() and not base:
        weights.append(dataset.file_hash(str(adapter)))
    parts = [weights, trained, rows, vars(sampling), cfg.dtype, cfg.seed, metrics.signature(), base]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]
