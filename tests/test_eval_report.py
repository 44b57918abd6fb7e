"""What an evaluation leaves: the report, the overlap with the training rows, and the same after a kill or in parts."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.config import EvaluationFlags
from common.conversation.turns import Call, Turn
from common.evaluation import evaluate, overlap
from common.evaluation.records import predictions
from common.evaluation.tables import by_length, metric_rows, overlap_text
from common.files import file_hash
from common.inference.answerer import Answer
from gemma_sft.ft_gemma.config import Config

ROOT = Path(__file__).resolve().parents[1]


def rows_of(*pairs):
    return [(f"held.jsonl:{n}", [Turn("user", q), Turn("assistant", a)]) for n, (q, a) in enumerate(pairs, 1)]


PAIRS = [(f"第{number}问", "一二三四五六七八九十" * (1 + number // 5) + str(number)) for number in range(20)]


def fake(conversations, sampling, base=False):
    """The base says nothing to every other question; the tuned model is right, but for question 3, and | there."""
    references = dict(PAIRS)
    found = []
    for turns in conversations:
        question = turns[-1].text
        number = int(question[1:-1])
        text = ("" if number % 2 else references[question]) if base else references[question]
        found.append(Answer("错|了\n<b>" if number == 3 or number == 6 and not base else text, "stop", 3))
    return found


BASE = EvaluationFlags(base=True)


@pytest.fixture
def cfg(tmp_path):
    return Config(path_model_pretrain="google/gemma-2b-it", model_save_dir=str(tmp_path / "run"))


@pytest.fixture
def compared(cfg, capsys):
    """(folder, all_results.json, what was printed) of base and tuned compared by a fake."""
    evaluate.report(fake, rows_of(*PAIRS), cfg, EvaluationFlags(compare=True))
    folder = Path(cfg.model_save_dir)
    return folder, json.loads((folder / "all_results.json").read_text(encoding="utf-8")), capsys.readouterr().out


def test_scores_have_intervals(compared):
    _, results, _ = compared
    intervals = results["intervals"]
    assert intervals.keys() == {"base", "tuned", "change"}
    assert all(intervals[name].keys() == results[name].keys() for name in ("base", "tuned"))
    for name in ("base", "tuned"):
        for metric, (low, high) in intervals[name].items():
            assert low - 1e-9 <= results[name][metric] <= high + 1e-9, metric
    low, high = intervals["change"]["exact"]
    assert results["tuned"]["exact"] - results["base"]["exact"] == pytest.approx(18 / 20 - 10 / 20)
    assert 0.1 < low < 0.4 < high < 0.7


def test_the_table_has_one_order(compared):
    """Whatever changed most: what no cheat raises, then how answers look, then the others."""
    folder, results, printed = compared
    rows = metric_rows(results, ["base", "tuned"])
    names = [row[0] for row in rows]
    assert names[:4] == ["novel-f1", "copied", "looping", "stopped"] and names[4:6] == ["bleu-4", "rouge-1-f"]
    assert names == [row[0] for row in metric_rows(results, ["tuned"])]
    assert names == [row[0] for leading in (True, False) for row in metric_rows(results, ["base", "tuned"], leading)]
    report = (folder / "eval_report.md").read_text(encoding="utf-8")
    for row in rows:
        assert "| " + " | ".join(row) + " |" in report
        assert row[0] in printed and row[3] in printed
    assert not [row for row in rows if row[0].endswith(("-r", "-p"))]
    assert results["signature"] in report and "greedy, at most 256 tokens" in report


def test_the_report_says_that_the_model_was_quantised(cfg):
    asked = dataclasses.replace(cfg, quantization_bit=8, given=frozenset({"quantization_bit"}))
    evaluate.report(fake, rows_of(*PAIRS), asked, EvaluationFlags())
    report = (Path(cfg.model_save_dir) / "eval_report.md").read_text(encoding="utf-8")
    assert "greedy, at most 256 tokens, quantised to 8 bits" in report


def test_the_worst_ten_rows(compared):
    """Row 6, right before and wrong now, comes first; 3 was and is wrong; texts cannot break the table."""
    folder, _, printed = compared
    report = (folder / "eval_report.md").read_text(encoding="utf-8")
    worst = report.partition("worst change")[2].splitlines()[4:14]
    cells = [line.split(" | ") for line in worst]
    assert all(len(line) == 6 for line in cells)
    assert cells[0][1:3] == ["held.jsonl:7", "第6问"] and float(cells[0][0].strip("| ")) < -0.9
    assert cells[0][5] == "错\\|了<br>&lt;b> |"
    assert [float(line[0].strip("| ")) for line in cells] == sorted(float(line[0].strip("| ")) for line in cells)
    assert printed.count(" → ") == 11 and "-1.000  1.000 → 0.000  held.jsonl:7" in printed


def test_scores_by_length_add_up(compared):
    folder, results, _ = compared
    records = {name: predictions(Config(model_save_dir=str(folder)), name == "base") for name in ("base", "tuned")}
    groups = by_length(records, 42)
    assert [label for label, _, _ in groups] == ["11", "21", "32", "42"]
    assert sum(count for _, count, _ in groups) == 20
    mean = sum(count * means["tuned"][0] for _, count, means in groups) / 20
    assert mean == pytest.approx(results["tuned"]["novel-f1"])


def test_answers_drawn_in_another_way_are_not_put_beside(cfg, capsys):
    """Shorter answers of the base were shown beside the tuned model's, all as if drawn like the later ones."""
    path = Path(cfg.model_save_dir) / "all_results.json"
    for most, flags, models in (
        (8, BASE, {"base"}),
        (8, EvaluationFlags(), {"base", "tuned"}),
        (16, EvaluationFlags(), {"tuned"}),
    ):
        evaluate.report(fake, rows_of(*PAIRS), dataclasses.replace(cfg, max_new_tokens=most), flags)
        results = json.loads(path.read_text(encoding="utf-8"))
        assert results.keys() & {"base", "tuned"} == models and f"at most {most} " in results["held_out"]["decoding"]
        assert ("left out: base" in capsys.readouterr().out) == (most == 16)


def test_a_call_on_other_rows_that_was_stopped_leaves_nothing_beside(compared, cfg):
    """The report had the base's scores with the intervals of the other rows, and their answers among the worst."""
    asked = []

    def stopped(conversations, sampling, base=False):
        asked.extend(conversations)
        if len(asked) > 8:
            raise KeyboardInterrupt
        return [Answer("别的", "stop", 3) for _ in conversations]

    small = dataclasses.replace(cfg, eval_batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        evaluate.report(stopped, [(f"other:{n}", row) for n, (_, row) in enumerate(rows_of(*PAIRS))], small, BASE)
    evaluate.report(fake, rows_of(*PAIRS), small, EvaluationFlags())
    results = json.loads((compared[0] / "all_results.json").read_text(encoding="utf-8"))
    assert results["tuned"] == compared[1]["tuned"] and not {"base", "change"} & {*results, *results["intervals"]}
    assert "base" not in (compared[0] / "eval_report.md").read_text(encoding="utf-8")


def test_one_model_alone_has_a_report(cfg, tmp_path):
    evaluate.report(fake, rows_of(*PAIRS[:1]), cfg, EvaluationFlags())
    report = (tmp_path / "run/eval_report.md").read_text(encoding="utf-8")
    assert "| metric | tuned |" in report and "worst" not in report
    assert "| novel-f1 | 1.0000 |" in report  # one row has no interval
    assert (tmp_path / "run/eval_report.png").stat().st_size > 10_000


# --- overlap --------------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path):
    """A run trained on one file of five rows."""
    path = tmp_path / "train.jsonl"
    lines = [
        {"query": "甲", "response": "一"},
        {"query": "乙 ", "response": "二"},
        {"query": "丙", "response": "三"},
        {
            "messages": [
                {"role": r, "content": t}
                for r, t in (("user", "丁"), ("assistant", "四"), ("user", "戊"), ("assistant", "五"))
            ]
        },
        {"query": "甲", "response": "一"},
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    source = {"path": str(path), "sha256": file_hash(str(path))}
    return {"data": [source], "config": {"model_name": [], "model_author": []}}


def test_rows_that_were_trained_on_are_counted(manifest):
    rows = rows_of(("甲", "一"), ("乙", " 二"), ("丙", "别的"), ("丁", "四"), ("戊", "五"), ("己", "一"))
    assert overlap.count(manifest, rows) == {"questions": 4, "rows": 3, "unread": []}
    later = [
        (
            "f:1",
            [
                Turn("system", "助手"),
                *(Turn(*t) for t in (("user", "丁"), ("assistant", "四"), ("user", "戊"), ("assistant", "六"))),
            ],
        )
    ]
    assert overlap.count(manifest, later) == {"questions": 1, "rows": 0, "unread": []}


def test_the_same_question_with_another_call_is_another_row(manifest):
    path = Path(manifest["data"][0]["path"])
    call = '{"name": "weather", "arguments": {"city": "杭州"}}'
    said = [{"from": "human", "value": "天气"}, {"from": "function_call", "value": call}]
    path.write_text(json.dumps({"conversations": said}, ensure_ascii=False) + "\n", encoding="utf-8")
    manifest["data"][0]["sha256"] = file_hash(str(path))
    for city, rows in (("杭州", 1), ("苏州", 0)):
        answer = Turn("assistant", "", calls=(Call("weather", json.dumps({"city": city})),))
        assert overlap.count(manifest, [("f:1", [Turn("user", "天气"), answer])])["rows"] == rows


def test_validation_rows_stand_in_the_training_file_and_are_no_overlap(manifest):
    path = manifest["data"][0]["path"]
    rows = [
        (f"{path}:{line}", turns)
        for line, (_, turns) in ((2, rows_of(("乙 ", "二"))[0]), (5, rows_of(("甲", "一"))[0]))
    ]
    assert overlap.count(manifest, rows)["rows"] == 2
    assert overlap.count(manifest, rows, apart=True)["rows"] == 1  # line 5 was trained on as line 1


def test_a_training_file_that_changed_is_named(manifest, tmp_path):
    path = Path(manifest["data"][0]["path"])
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    manifest["data"].append({"path": str(tmp_path / "gone.jsonl"), "sha256": ""})
    found = overlap.count(manifest, rows_of(("甲", "一")))
    assert found == {"questions": 0, "rows": 0, "unread": [str(path), str(tmp_path / "gone.jsonl")]}
    assert "gone.jsonl" in overlap_text({"rows": 1, "overlap": found})


def test_the_overlap_is_shown(manifest, cfg, capsys):
    folder = Path(cfg.model_save_dir)
    folder.mkdir()
    manifest["config"] |= {"prompt_style": "chat", "max_length_q": 512}
    parts = {"base": {"path": "x", "sha256": ""}, "state": "finished", "tokenizer_sha256": ""}
    parts |= {"template": {"style": "chat", "text": ""}}
    (folder / "run_manifest.json").write_text(json.dumps(manifest | parts))
    answer = lambda turns, sampling, base=False: [Answer("一", "stop", 1)] * len(turns)  # noqa: E731
    evaluate.report(answer, rows_of(("甲", "一"), ("丙", "一")), Config(model_save_dir=str(folder)), EvaluationFlags())
    assert "overlap with training data: 1 / 2 rows, 提问相同 same question 2" in capsys.readouterr().out
    assert "overlap with training data: 1 / 2 rows" in (folder / "eval_report.md").read_text(encoding="utf-8")


def test_the_bits_of_a_run_are_not_another_way_to_draw(manifest, cfg):
    """The base's scores beside a QLoRA run's own were dropped by a later call, which needs not give the bits."""
    folder = Path(cfg.model_save_dir)
    folder.mkdir()
    manifest["config"] |= {"prompt_style": "chat", "max_length_q": 512, "tuning": "qlora", "quantization_bit": 4}
    (folder / "run_manifest.json").write_text(json.dumps(manifest | {"base": {"path": "x", "sha256": ""}}))
    for bits, flags, models in (
        ({}, BASE, {"base"}),
        ({"quantization_bit": 4, "tuning": "qlora"}, EvaluationFlags(), {"base", "tuned"}),
        ({"quantization_bit": 8}, EvaluationFlags(), {"tuned"}),
    ):
        evaluate.report(fake, rows_of(*PAIRS), dataclasses.replace(cfg, **bits, given=frozenset(bits)), flags)
        results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        assert results.keys() & {"base", "tuned"} == models
    assert results["held_out"]["decoding"] == "greedy, at most 256 tokens, quantised to 8 bits"


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(small_gemma, tmp_path_factory):
    """command(folder): evaluation.py on 24 rows and a small random base, one row after the other: words for python."""
    path = tmp_path_factory.mktemp("rows") / "held.jsonl"
    rows = [{"query": "问" * (1 + 3 * number), "response": f"答{number}"} for number in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = ROOT / "gemma_sft/ft_gemma/evaluation.py"
    flags = ["--base", "--path_model_pretrain", small_gemma, "--data_path", path, "--eval_batch_size", 1]
    flags += ["--max_new_tokens", 40, "--do_sample", "true"]

    def make(folder, *launcher):
        return [*launcher, *map(str, [script, *flags, "--model_save_dir", folder])]

    return make


@pytest.fixture(scope="module")
def uninterrupted(command, warm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    status, _, errors = warm.run(command(folder), folder.parent)
    assert status == 0, errors
    return folder


def left(folder):
    """What must not depend on how an evaluation came about: predictions, report, picture, results."""
    records = [json.loads(line) for line in (folder / "predictions_base.jsonl").read_text().split("\n")[:-1]]
    records = sorted(({**record, "seconds": 0} for record in records), key=lambda record: record["row"])
    files = [(folder / name).read_bytes() for name in ("eval_report.md", "eval_report.png", "all_results.json")]
    return records, files


@pytest.mark.slow
def test_killed_in_the_middle_and_called_again(command, environment, warm, uninterrupted, tmp_path):
    """kill -9 while sampling: no row is drawn twice, and the report is that of the uninterrupted evaluation."""
    predictions = tmp_path / "out/predictions_base.jsonl"
    process = subprocess.Popen(
        [sys.executable, *command(tmp_path / "out")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and (not predictions.exists() or predictions.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = predictions.read_bytes().rpartition(b"\n")[0].split(b"\n")
    assert 5 <= len(before) < 24
    status, _, errors = warm.run(command(tmp_path / "out"), tmp_path)
    assert status == 0, errors
    assert predictions.read_bytes().split(b"\n")[: len(before)] == before
    assert left(tmp_path / "out") == left(uninterrupted)


@pytest.mark.slow
def test_two_processes_share_the_rows(command, warm, uninterrupted, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    status, output, errors = warm.run(command(tmp_path / "out", *launcher), tmp_path)
    assert status == 0, errors[-2000:]
    assert left(tmp_path / "out") == left(uninterrupted)
    assert output.count("held-out rows: 24") == 1
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(uninterrupted))
