"""Scoring held-out rows: what is asked, counted, written down and resumed; with a fake, then with a trained run."""

import dataclasses
import json
import random
import re
import shutil

import pytest

from common.cli import parse
from common.config import EvaluationFlags
from common.conversation.turns import Call, Turn
from common.data import dataset
from common.errors import UserError
from common.evaluation import evaluate, metrics, records
from common.evaluation.records import predictions
from common.inference.answerer import Answer, Sampling
from common.inference.remote import UnreachableError
from gemma_sft import prompt
from gemma_sft.ft_gemma import evaluation, predict, train
from gemma_sft.ft_gemma.config import Config


class Fake:
    """Answers "答" and the question's last characters; remembers its calls; stops after `calls` of them."""

    def __init__(self, calls=None, bad=(), before=None):
        self.calls, self.bad, self.before = calls, set(bad), before
        self.batches, self.samplings, self.bases = [], [], []

    def __call__(self, conversations, sampling, base=False):
        if self.calls is not None and len(self.batches) >= self.calls:
            raise KeyboardInterrupt
        questions = [turns[-1].text for turns in conversations]
        assert all(turns[-1].role == "user" for turns in conversations)  # no reference is ever shown to the model
        if self.before:
            self.before()
        if self.bad & set(questions):
            raise UserError("提问太长 the question is too long")
        self.batches.append(questions)
        self.samplings.append(sampling)
        self.bases.append(base)
        return [Answer(self.text(question, base), "stop", 3) for question in questions]

    @staticmethod
    def text(question, base):
        return ("基" if base else "答") + question[-6:]

    @property
    def asked(self):
        return [question for batch in self.batches for question in batch]


def rows_of(*pairs):
    return [(f"held.jsonl:{n}", [Turn("user", q), Turn("assistant", a)]) for n, (q, a) in enumerate(pairs, 1)]


def made(count):
    """Rows of several lengths in no order, no two questions alike."""
    draw = random.Random(1)
    words = "一二三四五六七八九十的裙子颜色宽松"
    texts = ["".join(draw.choices(words, k=draw.randrange(2, 30))) + f"问{n}" for n in range(count)]
    return rows_of(*((text, "答" + text[-5:]) for text in texts))


@pytest.fixture
def cfg(tmp_path):
    """cfg(**knobs): a Config that saves into tmp_path/run and asks four rows at once."""

    def make(**knobs):
        values = {"path_model_pretrain": "google/gemma-2b-it", "model_save_dir": str(tmp_path / "run")}
        return Config(**values | {"eval_batch_size": 4} | knobs, given=frozenset(knobs))

    return make


def lines_of(folder, name="predictions.jsonl"):
    return (folder / name).read_text(encoding="utf-8").split("\n")[:-1]


# --- what is asked and counted --------------------------------------------------------------------------------------


def test_batches_go_from_short_to_long(cfg):
    fake, rows = Fake(), made(11)
    evaluate.evaluate(fake, rows, cfg())
    assert [len(batch) for batch in fake.batches] == [4, 4, 3]
    assert [len(question) for question in fake.asked] == sorted(len(turns[0].text) for _, turns in rows)


@pytest.mark.parametrize(
    "knobs, expected",
    [
        ({}, (False, 256, 1)),
        ({"temperature": 0.1, "max_new_tokens": 9}, (False, 9, 1)),
        ({"do_sample": False}, (False, 256, 1)),
        ({"do_sample": True, "num_beams": 2}, (True, 256, 2)),
    ],
)
def test_greedy_unless_sampling_is_asked_for(cfg, knobs, expected):
    fake = Fake()
    evaluate.evaluate(fake, made(3), cfg(**knobs))
    (sampling,) = set(fake.samplings)
    assert (sampling.do_sample, sampling.max_new_tokens, sampling.num_beams) == expected


def test_only_the_answer_is_scored(cfg):
    """A question that is its own answer's text changes no score."""
    references = ["黑色的裙子很好看", "宽松的版型"]
    fake = Fake()
    fake.text = lambda question, base: references[int(question[0])]
    scores = evaluate.evaluate(fake, rows_of(("0问", references[0]), ("1" + "宽松的版型" * 9, references[1])), cfg())
    assert scores["bleu-4"] == pytest.approx(1) and scores["rouge-l-p"] == pytest.approx(1)
    fake.text = lambda question, base: question
    other = evaluate.evaluate(fake, rows_of(("甲乙丙", "丁戊己")), cfg())
    assert {name for name, value in other.items() if value} == {"distinct-2", "stopped", "copied"}  # not the reference


def test_scores_are_the_means_over_rows(cfg, tmp_path):
    rows, fake = made(10), Fake()
    found = evaluate.evaluate(fake, rows, cfg())
    each = [metrics.score(fake.text(turns[0].text, False), turns[1].text, turns[0].text) for _, turns in rows]
    each = [scores | {"stopped": 1.0} for scores in each]
    assert found == pytest.approx(metrics.average(each))
    records = [json.loads(line) for line in lines_of(tmp_path / "run")]
    assert {record["row"]: record["scores"] for record in records} == dict(enumerate(each))


def test_history_and_system_text_are_asked_the_last_answer_is_scored(cfg, tmp_path):
    turns = [
        Turn("system", "猫"),
        Turn("user", "甲"),
        Turn("assistant", "乙"),
        Turn("user", "丙"),
        Turn("assistant", "丁"),
    ]
    seen = []

    def fake(conversations, sampling, base=False):
        seen.extend(conversations)
        return [Answer("丁", "stop", 1)]

    assert evaluate.evaluate(fake, [("f:1", turns)], cfg())["rouge-1-f"] == pytest.approx(1)
    assert seen == [turns[:-1]]
    record = json.loads(lines_of(tmp_path / "run")[0])
    assert (record["question"], record["reference"], record["answer"]) == ("丙", "丁", "丁")


def test_an_empty_answer_stays_in_the_mean(cfg):
    fake = Fake()
    fake.text = lambda question, base: "" if question == "空" else "黑色的裙子"
    scores = evaluate.evaluate(fake, rows_of(("空", "黑色的裙子"), ("满满", "黑色的裙子")), cfg())
    assert scores["bleu-4"] == pytest.approx(0.5)


def test_a_row_that_fails_scores_0_and_says_why(cfg, tmp_path):
    rows = made(6)
    bad = rows[2][1][0].text
    fake = Fake(bad=[bad])
    scores = evaluate.evaluate(fake, rows, cfg())
    records = predictions(cfg())
    assert sorted(records) == list(range(6))
    assert records[2]["answer"] == "" and set(records[2]["scores"].values()) == {0.0}
    assert records[2]["stop"].startswith("error") and "too long" in records[2]["stop"]
    assert all(records[number]["answer"] and records[number]["stop"] == "stop" for number in (0, 1, 3, 4, 5))
    assert scores["rouge-1-f"] == pytest.approx(sum(record["scores"]["rouge-1-f"] for record in records.values()) / 6)
    again = Fake()
    assert evaluate.evaluate(again, rows, cfg()) == scores and again.asked == []


def test_thought_is_not_scored_and_calls_are(cfg, tmp_path, capsys):
    """Two answers with thought, one all thought, one that calls as its reference does."""
    call = Call("f", '{"b":1, "a": "参"}')
    answers = {
        "甲": Answer("参考答案", "stop", 3, 0, "想了很多"),
        "乙": Answer("", "length", 3, 0, "想不完"),
        "丙": Answer("", "stop", 3, 0, "", (Call("f", '{"a": "参", "b": 1}'),)),
    }

    def thinking(conversations, sampling, base=False):
        return [answers[turns[-1].text] for turns in conversations]

    rows = rows_of(("甲", "参考答案"), ("乙", "参考答案"), ("丙", ""))
    rows[2] = (rows[2][0], [Turn("user", "丙"), Turn("assistant", "", calls=(call,))])
    knobs = cfg()
    scores = evaluate.evaluate(thinking, rows, knobs)
    assert scores["exact"] == scores["stopped"] == pytest.approx(2 / 3)
    first, second, third = records.predictions(knobs).values()
    assert (first["answer"], first["reasoning_content"]) == ("参考答案", "想了很多")
    assert (second["answer"], second["reasoning_content"], second["scores"]["bleu-4"]) == ("", "想不完", 0)
    assert third["answer"] == third["reference"] == '{"name": "f", "arguments": {"a": "参", "b": 1}}'
    assert (third["content"], third["tool_calls"][0]["function"]["name"]) == ("", "f") and "tool_calls" not in first
    told = "只有思考，没有回答 thought alone, no answer; remedy: a larger --max_new_tokens: 1 / 3"
    assert told in capsys.readouterr().out
    evaluate.conclude(knobs, rows, {"tuned": scores})
    assert f"- tuned: {told}\n" in (tmp_path / "run/eval_report.md").read_text(encoding="utf-8")


def test_predictions_of_earlier_runs_keep_their_keys(tmp_path):
    """What these two gave when predictions were first keyed so; another key would throw every prediction away."""
    told = {"path_model_pretrain": "/nowhere/base", "dtype": "float32", "seed": 1}
    untrained = Config(**told, model_save_dir=str(tmp_path / "none"), prompt_style="chat", max_length_q=512)
    assert evaluate.key_of(untrained, True, [["rows"], {"max_new_tokens": 9}]) == "b32afe919036fcd0"
    config = {"prompt_style": "plain", "max_length_q": 64, "tuning": "qlora", "quantization_bit": 8}
    manifest = {"state": "finished", "base": {"path": "/nowhere/base", "sha256": ""}, "config": config}
    manifest |= {"tokenizer_sha256": "", "template": {"style": "plain", "text": ""}}
    (tmp_path / "run_manifest.json").write_text(json.dumps(manifest))
    assert evaluate.key_of(Config(**told, model_save_dir=str(tmp_path)), False, ["rows"]) == "632556cac511595c"


def test_cut_prompts_are_counted(cfg, capsys):
    """Also those of an earlier call."""

    def cutting(conversations, sampling, base=False):
        return [Answer("答", "stop", 1, 90 if len(turns[-1].text) > 10 else 0) for turns in conversations]

    rows = rows_of(("短", "答"), ("长" * 20, "答"), ("长" * 30, "答"))
    for _ in range(2):
        evaluate.evaluate(cutting, rows, cfg())
        assert "prompts cut: 2 / 3, 上限 the limit is 90 tokens" in capsys.readouterr().out
    evaluate.evaluate(cutting, rows[:1], cfg())
    assert "cut" not in capsys.readouterr().out


def test_another_context_is_asked_anew(cfg):
    rows = made(3)
    for context, asked in ((0, 3), (0, 0), (64, 3)):
        fake = Fake()
        fake.context = context
        evaluate.evaluate(fake, rows, cfg())
        assert len(fake.asked) == asked


def test_a_server_that_is_gone_scores_nothing(cfg, tmp_path):
    def gone(conversations, sampling, base=False):
        raise UnreachableError("nobody answers")

    with pytest.raises(UnreachableError):
        evaluate.evaluate(gone, made(6), cfg())
    assert lines_of(tmp_path / "run") == []


def test_attributes_are_scored_where_they_are_asked_for(cfg):
    fake = Fake()
    fake.text = lambda question, base: "黑色的裙子"
    scores = evaluate.evaluate(fake, rows_of(("类型#裙*颜色#黑色*版型#宽松", "黑裙"), ("你好", "好")), cfg())
    assert scores["attributes"] == pytest.approx(2 / 3)


# --- written as it goes, resumed where it stopped -------------------------------------------------------------------


def test_predictions_are_on_disk_before_the_next_batch(cfg, tmp_path):
    seen = []
    fake = Fake(before=lambda: seen.append(len(lines_of(tmp_path / "run"))))
    evaluate.evaluate(fake, made(10), cfg())
    assert seen == [0, 4, 8]
    records = [json.loads(line) for line in lines_of(tmp_path / "run")]
    keys = "row where prompt question reference answer stop tokens seconds scores".split()
    assert all(set(keys) <= set(record) for record in records)
    assert any("答" in line for line in lines_of(tmp_path / "run"))  # readable, not escaped


def without(record, *names):
    return {name: value for name, value in record.items() if name not in names}


@pytest.mark.parametrize("tail", ["nothing", "cut line", "cut character", "no newline"])
def test_a_killed_evaluation_goes_on_without_asking_twice(cfg, tmp_path, tail):
    rows = made(15)
    whole = evaluate.evaluate(Fake(), rows, cfg(model_save_dir=str(tmp_path / "whole")))
    first, path = Fake(calls=2), tmp_path / "run/predictions.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(first, rows, cfg())
    content = path.read_bytes()
    if tail == "cut line":
        content += content.splitlines(keepends=True)[-1][:60]
    elif tail == "cut character":
        content += content.splitlines(keepends=True)[-1].partition("答".encode())[0] + "答".encode()[:2]
    elif tail == "no newline":
        content = content[:-1]
    path.write_bytes(content)
    second = Fake()
    assert evaluate.evaluate(second, rows, cfg()) == whole
    asked_twice = set(first.asked) & set(second.asked)
    assert len(asked_twice) <= (tail == "no newline")  # such a line may count as cut off
    assert len(second.asked) == 7 + len(asked_twice)
    resumed, uninterrupted = (
        predictions(cfg()),
        predictions(cfg(model_save_dir=str(tmp_path / "whole"))),
    )
    assert {n: without(r, "seconds", "key") for n, r in resumed.items()} == {
        n: without(r, "seconds", "key") for n, r in uninterrupted.items()
    }


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e", "\n", "\r"])
def test_any_line_end_within_a_text(cfg, mark):
    """JSON lines end at \\n alone: U+2028 and U+0085 are ordinary characters of a row."""
    rows, fake = rows_of((f"甲{mark}乙", f"丙{mark}丁"), ("戊", "己")), Fake()
    scores = evaluate.evaluate(fake, rows, cfg())
    again = Fake()
    assert evaluate.evaluate(again, rows, cfg()) == scores
    assert again.asked == []
    assert predictions(cfg())[0]["question"] == f"甲{mark}乙"


def test_asking_for_the_same_again_asks_nothing(cfg):
    rows = made(5)
    scores = evaluate.evaluate(Fake(), rows, cfg())
    again = Fake()
    assert evaluate.evaluate(again, rows, cfg(eval_batch_size=2)) == scores
    assert again.asked == []


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_new_tokens": 8},
        {"do_sample": True},
        {"repetition_penalty": 1.2},
        {"num_beams": 3},
        {"prompt_style": "plain"},
        {"max_length_q": 64},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_other_settings_are_asked_anew(cfg, knobs):
    rows = made(3)
    evaluate.evaluate(Fake(), rows, cfg())
    again = Fake()
    evaluate.evaluate(again, rows, cfg(**knobs))
    assert len(again.asked) == 3


def test_other_rows_are_asked_anew(cfg):
    rows = made(3)
    evaluate.evaluate(Fake(), rows, cfg())
    for changed in (rows[:2], rows[::-1], [*rows[:2], (rows[2][0], [rows[2][1][0], Turn("assistant", "别的")])]):
        again = Fake()
        evaluate.evaluate(again, changed, cfg())
        assert len(again.asked) == len(changed)


def test_another_adapter_is_asked_anew(cfg, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/adapter_config.json").write_text("{}")
    for weights, asked in ((b"one", 3), (b"one", 0), (b"two", 3)):
        (tmp_path / "run/adapter_model.safetensors").write_bytes(weights)
        fake = Fake()
        evaluate.evaluate(fake, made(3), cfg())
        assert len(fake.asked) == asked


@pytest.mark.parametrize("other", ["folder", "hub id"])
def test_another_base_is_asked_anew(cfg, small_gemma, tmp_path, other):
    paths = {"hub id": ("google/gemma-2b-it", "google/gemma-7b-it"), "folder": (small_gemma, tmp_path / "other")}[other]
    if other == "folder":
        shutil.copytree(*paths)
        with (paths[1] / "model.safetensors").open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"\x00\x00\x80\x3f")
    for path, asked in zip((paths[0], paths[0], paths[1]), (3, 0, 3), strict=True):
        fake = Fake()
        evaluate.evaluate(fake, made(3), cfg(path_model_pretrain=str(path)), base=True)
        assert len(fake.asked) == asked


def test_base_and_tuned_do_not_share_predictions(cfg, tmp_path, capsys):
    rows, fake = made(5), Fake()
    scores = evaluate.compare(fake, rows, cfg())
    assert sorted(fake.asked) == sorted(turns[0].text for _, turns in rows for _ in "12")
    assert set(fake.bases) == {True, False}
    assert all(json.loads(line)["answer"][0] == "基" for line in lines_of(tmp_path / "run", "predictions_base.jsonl"))
    assert all(json.loads(line)["answer"][0] == "答" for line in lines_of(tmp_path / "run"))
    assert list(scores) == ["base", "tuned", "held_out", "signature", "intervals"]
    assert scores["tuned"]["bleu-4"] > scores["base"]["bleu-4"]
    shown = capsys.readouterr().out
    for line in ("base", "tuned", "bleu-4", "rouge-l-f", metrics.signature(), f"{scores['tuned']['bleu-4']:.4f}"):
        assert line in shown
    assert shown.count("参考 reference:") == 3


def test_results_keep_what_else_is_there(cfg, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "all_results.json").write_text('{"train_loss": 1.5, "tuned": {"bleu-4": 0}}')
    evaluate.report(Fake(), made(3), cfg(), EvaluationFlags(compare=True))
    found = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    assert list(found) == ["train_loss", "base", "tuned", "held_out", "signature", "intervals"]
    assert found["train_loss"] == 1.5 and found["tuned"]["bleu-4"] > 0
    assert found["signature"] == metrics.signature()


@pytest.mark.parametrize("base, name", [(True, "base"), (False, "tuned")])
def test_one_model_alone(cfg, tmp_path, base, name):
    fake = Fake()
    evaluate.report(fake, made(3), cfg(), EvaluationFlags(base=base))
    found = json.loads((tmp_path / "run/all_results.json").read_text(encoding="utf-8"))
    assert list(found) == [name, "held_out", "signature", "intervals"] and set(fake.bases) == {base}


# --- which rows -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Nine rows to score, among them a broken line, a text without a question, and an unknown shape."""
    good = [json.dumps({"query": f"{n}+{n}=", "response": str(n + n)}, ensure_ascii=False) for n in range(9)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join([*good[:2], '{"query": ', *good[2:5], '{"text": "只有文字"}', *good[5:], '{"x": 1}\n']))
    return path


def chosen(*flags):
    cfg, flags = parse(Config, EvaluationFlags, [str(flag) for flag in flags])
    return evaluate.rows_to_score(cfg, flags.limit)


def test_unreadable_rows_are_reported(mixed, capsys):
    assert len(chosen("--data_path", mixed)) == 9
    shown = [line for line in capsys.readouterr().out.splitlines() if "not scored" in line]
    assert [line.split("mixed.jsonl:")[1].split(":")[0] for line in shown] == ["3", "7", "12"]
    assert "question" in shown[1]


def test_a_run_without_a_held_out_file_is_named(tmp_path):
    """As every run on data of one's own, whose validation rows were scored after the training."""
    (tmp_path / "run_manifest.json").write_text(json.dumps({"config": {"eval_data_path": []}, "base": {"path": "b"}}))
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: .*give a held-out file by --data_path"):
        chosen("--model_save_dir", tmp_path)


@pytest.mark.parametrize("read", ["evaluation.py", "train.py"])
def test_what_was_not_read_or_was_repaired_is_told(tmp_path, capsys, read):
    greeting = [{"role": role, "content": "好"} for role in ("assistant", "user", "assistant")]
    rows = [{"query": f"{n}", "response": "答", "id": n} for n in range(3)] + [{"messages": greeting}] * 2
    path = tmp_path / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"x": 1}\n')

    def told(spec, limit):
        if read == "evaluation.py":
            scored = chosen("--data_path", spec, "--limit", limit)
        else:
            scored = evaluate.held_out_rows(Config(eval_data_path=(str(spec),), eval_rows=limit or 9))
        assert len(scored) == (limit or 5)
        return capsys.readouterr().out.splitlines()

    title, unused, repaired, left_out = told(path, 0)
    assert str(path) in title and "id: not used in 3 rows" in unused
    assert "repaired 2" in repaired and f"greeting is context only: {path}:4, {path}:5" in repaired
    assert f"{path}:6" in left_out
    _, unused, repaired = told(path, 4)  # what is left out stands behind them
    assert "id: not used in 3 rows" in unused and repaired.endswith(f"greeting is context only: {path}:4")
    assert "id: not used in 2 rows" in told(path, 2)[1], "the rows beyond the limit are not counted"
    drawn = " ".join(told(f"{path}#1", 1))
    assert ("id: not used in 1 rows" in drawn) != ("repaired 1" in drawn)


@pytest.mark.parametrize("limit, count", [(0, 9), (4, 4), (100, 9)])
def test_limit(mixed, limit, count):
    rows = chosen("--data_path", mixed, "--limit", limit)
    assert [turns[0].text for _, turns in rows] == [f"{n}+{n}=" for n in range(count)]


def test_nothing_is_read_behind_the_limit(mixed, tmp_path, capsys):
    with mixed.open("ab") as file:
        file.write("不是".encode("gb18030") + b"\n")
    assert len(chosen("--data_path", mixed, tmp_path, "--limit", 4)) == 4
    assert capsys.readouterr().out.count("not scored") == 1  # the broken line before the fourth
    with pytest.raises(UserError, match="gb18030"):
        chosen("--data_path", mixed)


def test_a_negative_limit_is_refused(mixed):
    with pytest.raises(SystemExit) as stopped:
        chosen("--data_path", mixed, "--limit", -1)
    assert stopped.value.code == 2


def test_a_sample_of_a_file(mixed):
    rows = chosen("--data_path", f"{mixed}#5")
    assert len(rows) == len({where for where, _ in rows}) == 5
    assert rows == chosen("--data_path", f"{mixed}#5")
    assert len(chosen("--data_path", f"{mixed}#5", mixed, "--limit", 12)) == 12


@pytest.mark.parametrize("content", ["", '{"text": "只有文字"}\n', '{"x": 1}\n'])
def test_nothing_to_score_is_a_user_error(tmp_path, content):
    path = tmp_path / "held.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="held.jsonl"):
        chosen("--data_path", path)


def test_a_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        chosen("--data_path", tmp_path / "none.jsonl")


@pytest.mark.parametrize("eval_rows, count", [(3, 3), (0, 0), (50, 9)])
def test_rows_compared_after_training(mixed, eval_rows, count):
    """eval_rows: 0 means none, also where a held-out file is given."""
    cfg = Config(eval_data_path=(str(mixed),), eval_rows=eval_rows)
    assert len(evaluate.held_out_rows(cfg)) == count


# --- a trained run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(small_gemma, tmp_path_factory):
    """(folder, flags) of a run of four steps with no held-out file, on 40 rows of which 5 are for validation."""
    home = tmp_path_factory.mktemp("trained")
    rows = [{"query": f"{n}+{n * 7 % 50}", "response": str(n + n * 7 % 50) * (1 + n % 4)} for n in range(40)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--path_model_pretrain", small_gemma, "--data_path", home / "rows.jsonl", "--model_save_dir", home / "out"]
    flags += ["--max_steps", 4, "--val_set_size", 5, "--eval_rows", 2, "--max_new_tokens", 8, "--learning_rate", 0.01]
    flags = [str(flag) for flag in [*flags, "--cache_dir", home / "cache"]]
    train.main(flags)
    return home / "out", flags


def results_in(folder):
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


@pytest.fixture
def copied(trained, tmp_path):
    """The trained run's folder, for one test alone."""
    return shutil.copytree(trained[0], tmp_path / "copied")


@pytest.mark.parametrize("beams", [1, 2])
def test_a_long_batch_tells_how_far_it_is(trained, monkeypatch, tmp_path, capsys, beams):
    """With the same answers as where nobody watches."""
    monkeypatch.setattr(records, "EVERY", 0.0)
    folder, _ = trained
    cfg, _ = parse(Config, EvaluationFlags, ["--model_save_dir", str(folder), "--num_beams", str(beams)])
    answer = predict.load_answer(cfg)
    rows = rows_of(("1+1", "2"), ("2+3是多少", "5"), ("3+4", "7"))
    cfg = dataclasses.replace(cfg, model_save_dir=str(tmp_path / "scored"), max_new_tokens=8, eval_batch_size=2)
    evaluate.evaluate(answer, rows, cfg)
    shown = capsys.readouterr().err
    assert "this batch: 1 / 8 tokens" in shown and "this batch: 2 / 8 tokens" in shown
    assert answer.watch is None
    alone = answer([turns[:-1] for _, turns in rows[:1]], Sampling(max_new_tokens=8, num_beams=beams))
    assert predictions(cfg)[0]["answer"] == alone[0].text


def test_training_ends_with_a_comparison_on_the_validation_rows(trained):
    folder, flags = trained
    found = results_in(folder)
    assert found["base"].keys() == found["tuned"].keys() > {"bleu-4", "rouge-1-p", "rouge-2-r", "rouge-l-f"}
    assert found["signature"] == metrics.signature()
    assert found["train_loss"] > 0
    cfg, _ = parse(Config, EvaluationFlags, [flag for flag in flags if flag not in ("--max_steps", "4")])
    from common.model.loading import load_tokenizer

    rows = dataset.prepare(cfg, load_tokenizer(cfg.base, prompt), prompt)
    for base in (True, False):
        scored = {record["where"] for record in predictions(cfg, base).values()}
        assert len(scored) == 2
        assert scored <= set(rows.validation["where"]) and not scored & set(rows.train["where"])
    assert "| bleu-4 |" in (folder / "README.md").read_text(encoding="utf-8")


def test_evaluation_gives_the_numbers_of_the_training_run(copied, small_gemma, tmp_path, capsys):
    """The run's own comparison, made again from what it left, on the same rows."""
    expected = results_in(copied)
    records = [json.loads(line) for line in lines_of(copied)]
    for name in ("predictions.jsonl", "predictions_base.jsonl", "all_results.json"):
        (copied / name).unlink()
    held = tmp_path / "held.jsonl"
    rows = [{"query": record["question"], "response": record["reference"]} for record in records]
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model_save_dir", str(copied), "--data_path", str(held), "--max_new_tokens", "8"]
    evaluation.main([*flags, "--compare"])
    found = results_in(copied)
    for name in ("base", "tuned"):
        assert found[name] == pytest.approx(expected[name])
    assert "留出数据 held-out rows: 2" in capsys.readouterr().out
    evaluation.main([*flags, "--base"])  # the base alone, loaded without the adapter, says the same
    assert results_in(copied)["base"] == pytest.approx(expected["base"])


def test_knobs_of_the_embedded_model_are_not_those_of_a_run_on_another(copied, tmp_path, monkeypatch):
    """The run's base is no embedded model, though evaluation.py is not told its path: the shared values hold."""
    held = tmp_path / "held.jsonl"
    rows = [{"query": f"{n}+{n}", "response": str(n + n)} for n in range(40)]
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fake = Fake()
    monkeypatch.setattr(evaluation, "load_answer", lambda cfg, base=False, base_url="": fake)
    evaluation.main(["--model_save_dir", str(copied), "--data_path", str(held)])
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    assert {sampling.max_new_tokens for sampling in fake.samplings} == {defaults["max_new_tokens"]}
    assert [len(batch) for batch in fake.batches] == [defaults["eval_batch_size"], 40 - defaults["eval_batch_size"]]


@pytest.mark.parametrize("switch", [[], ["--path_model_pretrain", "embedded"]], ids=["the run's", "embedded"])
def test_a_base_given_later_is_asked_anew(copied, mixed, small_gemma, monkeypatch, switch):
    """Without a flag --base is the run's own base, not the default's: they share no predictions."""
    asked = []
    for flags in ([], switch):
        fake = Fake()
        monkeypatch.setattr(evaluation, "load_answer", lambda cfg, base=False, base_url="", fake=fake: fake)
        evaluation.main(["--model_save_dir", str(copied), "--data_path", str(mixed), "--base", *flags])
        asked.append(len(fake.asked))
    assert asked == [9, 9 if switch else 0]


def test_base_and_compare_do_not_score_the_base_as_tuned(copied, mixed, monkeypatch):
    """With --base no adapter is loaded: such an answerer must not give the tuned model's numbers."""
    fake, loaded = Fake(), []
    monkeypatch.setattr(evaluation, "load_answer", lambda cfg, base=False, base_url="": loaded.append(base) or fake)
    try:
        evaluation.main(["--model_save_dir", str(copied), "--data_path", str(mixed), "--base", "--compare"])
    except (UserError, SystemExit):
        return
    assert loaded == [False] or False not in fake.bases


def test_no_trained_run_is_a_user_error(mixed, tmp_path):
    with pytest.raises(UserError, match="train.py.*--base"):
        evaluation.main(["--model_save_dir", str(tmp_path / "none"), "--data_path", str(mixed)])


def test_base_and_tuned_answers_side_by_side(trained, capsys):
    """predict.py --compare on the trained run: two lines, and the tuned one is the run's answer."""
    flags = ["--model_save_dir", str(trained[0]), "--query", "1+1=", "--do_sample", "false", "--max_new_tokens", "8"]
    predict.main([*flags, "--compare"])
    shown = capsys.readouterr().out
    assert shown.startswith("基座 base:") and "\n微调 tuned:" in shown
    predict.main(flags)
    assert shown.endswith("微调 tuned: " + capsys.readouterr().out)
