"""all_results.json in a run's folder: scores of base and tuned, their intervals, and on which rows they were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import files
from common.config import SFTConfig
from common.conversation.turns import Turn, said
from common.evaluation import intervals, metrics, overlap
from common.evaluation.records import predictions
from common.inference.answerer import Sampling
from common.inference.tuned import bits_of
from common.runs.adopted import find_manifest


def read_results(cfg: SFTConfig) -> dict[str, Any]:
    """What all_results.json in the run's folder holds, {} where there is none."""
    path = _path(cfg)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_results(cfg: SFTConfig, results: dict[str, Any]) -> None:
    """Replace all_results.json."""
    files.write_json(_path(cfg), results)


def add_scores(
    cfg: SFTConfig,
    rows: Sequence[tuple[str, Sequence[Turn]]],
    scores: Mapping[str, dict[str, float]],
    apart: bool = False,
) -> dict[str, Any]:
    """Put {base: …, tuned: …} with their intervals into all_results.json and return all of it.

    Scores on other rows, of answers drawn in another way, or counted in another way, are dropped, and those whose
    predictions are gone. held_out: number and hash of the rows, and how many of them were trained on.
    apart: as in overlap.count.
    """
    results, manifest = read_results(cfg), find_manifest(cfg.model_save_dir)
    had, decoding = results, _decoding(cfg, manifest)
    digest = hashlib.sha256(json.dumps([(where, said(turns)) for where, turns in rows]).encode()).hexdigest()
    earlier = results.get("held_out", {})
    before = earlier.get("sha256"), earlier.get("decoding"), results.get("signature")
    if before != (digest, decoding, metrics.signature()):
        results = {name: value for name, value in had.items() if name not in ("base", "tuned")}
    trained_on = overlap.count(manifest, rows, apart) if manifest else None
    held_out = {"rows": len(rows), "sha256": digest, "decoding": decoding, "overlap": trained_on}
    results |= {**scores, "held_out": held_out, "signature": metrics.signature()}
    by_model: dict[str, list[dict[str, Any]]] = {}
    for name in [name for name in ("base", "tuned") if name in results]:
        made = list(predictions(cfg, name == "base").values())
        if [record["where"] for record in made] == [where for where, _ in rows]:
            by_model[name] = [record["scores"] for record in made]
        else:
            del results[name]  # a later call on other rows was stopped
    for name in sorted({"base", "tuned"} & had.keys() - results.keys()):
        print(
            f"不再并列 left out: {name} 的旧得分 the earlier scores, of other rows or drawn otherwise "
            f"({earlier.get('decoding')}); --compare 一次给两者打分 scores both alike"
        )
    results["intervals"] = {name: intervals.intervals(each, cfg.seed) for name, each in by_model.items()}
    if len(by_model) == 2:
        results["intervals"]["change"] = intervals.change_intervals(by_model["base"], by_model["tuned"], cfg.seed)
    write_results(cfg, results)
    return results


def sampling_of(cfg: SFTConfig) -> Sampling:
    """How an evaluation draws answers: greedy unless the user asked for sampling."""
    return Sampling.of(cfg, do_sample="do_sample" in cfg.given and cfg.do_sample)


def _decoding(cfg: SFTConfig, manifest: dict[str, Any] | None) -> str:
    """How the answers were drawn, in words; bits are told where they are others than those of the run."""
    sampling = sampling_of(cfg)
    drawn = f"sampled, temperature {sampling.temperature}, top_p {sampling.top_p}, top_k {sampling.top_k}"
    drawn += f", min_p {sampling.min_p}" if sampling.min_p else ""
    how = drawn if sampling.do_sample else "greedy"
    beams = f", {sampling.num_beams} beams" if sampling.num_beams > 1 else ""
    penalty = f", repetition penalty {sampling.repetition_penalty}" if sampling.repetition_penalty != 1 else ""
    is_other = "quantization_bit" in cfg.given and cfg.bits != bits_of((manifest or {}).get("config", {}))
    asked = f", quantised to {cfg.bits} bits" if is_other else ""
    return f"{how}{beams}{penalty}, at most {sampling.max_new_tokens} tokens{asked}"


def _path(cfg: SFTConfig) -> Path:
    return Path(cfg.model_save_dir) / "all_results.json"
