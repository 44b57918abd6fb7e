"""Benchmarks: local files of every shape, answers by likelihood and in writing, counted again independently."""

import csv
import dataclasses
import importlib
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedConfig

from common.cli import parse
from common.config import DATA, EvaluationFlags
from common.conversation.turns import Turn
from common.errors import UserError
from common.evaluation import benchmark, tasks
from common.evaluation.results import read_results
from common.inference import likelihood
from common.inference.answerer import Answer, Answerer
from common.inference.prefix_cache import PrefixCache
from common.model.loading import load_base, load_tokenizer
from gemma_sft import prompt
from gemma_sft.ft_gemma.config import Config

CHOICES = ("ceval", "cmmlu", "mmlu", "arc")
COUNTS = {"ceval": 19, "cmmlu": 122, "mmlu": 100, "arc": 40, "gsm8k": 40}  # rows of the fixtures


def questions(fixtures, names, **flags):
    return tasks.read(EvaluationFlags(tasks=names, task_dir=str(fixtures / "data"), **flags))


def keys_in_the_files(fixtures, name):
    """The right answers, read in another way than common/evaluation/tasks.py does."""
    folder = fixtures / "data"
    if name == "arc":
        return [row["answer"] for row in json.loads((folder / "arc_options_in_instruction.json").read_text())]
    if name == "gsm8k":
        rows = map(json.loads, (folder / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines())
        return [row["answer"].split("#### ")[1] for row in rows]
    file = {
        "ceval": "ceval/val/computer_network_val.csv",
        "cmmlu": "cmmlu/test/machine_learning.csv",
        "mmlu": "mmlu/test/computer_security_test.csv",
    }[name]
    with open(folder / file, encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.reader(stream))
    return [row[{"ceval": 6, "cmmlu": 6, "mmlu": 5}[name]] for row in rows[0 if name == "mmlu" else 1 :]]


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_every_question_of_the_fixtures_is_read(fixtures, name):
    found = questions(fixtures, (name,))[name]
    assert len(found) == COUNTS[name]
    assert [question.key for question in found] == keys_in_the_files(fixtures, name)
    assert all(len(question.turns) == 1 and question.turns[0].role == "user" for question in found)


def test_a_prompt_of_each_task(fixtures):
    found = questions(fixtures, tuple(COUNTS))
    first = {name: part[0] for name, part in found.items()}
    assert first["ceval"].turns[0].text == (
        "以下是一道单项选择题，请直接写出正确选项的字母。\n\n使用位填充方法，以01111110为位首flag，"
        "数据为011011111111111111110010，求问传送时要添加几个0____\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    )
    assert first["mmlu"].turns[0].text.startswith("Answer this multiple choice question")
    assert "\nB. Blackbox\nC. Whitebox\n" in first["mmlu"].turns[0].text
    assert first["arc"].options["answer2"] == "the correct answer is answer2"
    assert first["gsm8k"].turns[0].text.startswith("Janet’s ducks lay 16 eggs") and not first["gsm8k"].options
    assert {question.subject for question in found["cmmlu"]} == {"machine_learning"}


@pytest.mark.parametrize("name", COUNTS)
def test_examples_are_earlier_rounds_and_are_not_asked(fixtures, name):
    asked = questions(fixtures, (name,), shots=3, limit=4)[name]
    assert len(asked) == 4
    for question in asked:
        assert [turn.role for turn in question.turns] == ["user", "assistant"] * 3 + ["user"]
        assert question.turns[-1] not in question.turns[:-1]
    examples = asked[0].turns[1:6:2]
    if name == "gsm8k":
        assert examples[0].text.endswith("#### 18") and "<<" not in examples[0].text
    elif name == "arc":
        assert [turn.text for turn in examples] == ["the correct answer is answer3"] + [
            f"the correct answer is {key}" for key in keys_in_the_files(fixtures, "arc")[1:3]
        ]
    else:
        assert all(turn.text in tasks.LETTERS for turn in examples)


def test_more_examples_than_there_are_is_an_error(fixtures):
    with pytest.raises(UserError, match="--shots 6.*dev.*5"):
        questions(fixtures, ("ceval",), shots=6)


def test_a_task_without_a_folder_or_files_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--base_url.*probe choose by likelihood"):
        tasks.read(EvaluationFlags(tasks=("probe",), base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(UserError, match="--task_dir"):
        tasks.read(EvaluationFlags(tasks=("ceval",)))
    with pytest.raises(UserError, match="gsm8k"):
        tasks.read(EvaluationFlags(tasks=("gsm8k",), task_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "content, line",
    [
        ("问,1,2,3,4,A\n问,1,2,3,4,E\n", 2),
        ('id,question,A,B,C,D,answer\n0,"两\n行",1,2,3,4,B\n1,问,1,2,3,4,\n', 4),
        ("问,1,2,3,A\n", 1),
        ("问,1,2,3,4,A\n问,1,2,3,4,AB\n", 2),
        ("question,A,B,D,answer\n问,1,2,4,A\n", 1),
    ],
    ids=["letter", "no answer", "three options", "two letters", "a column is missing"],
)
def test_a_broken_row_is_named(tmp_path, content, line):
    path = tmp_path / "mmlu/test/sums_test.csv"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"sums_test.csv:{line}: "):
        tasks.read(EvaluationFlags(tasks=("mmlu",), task_dir=str(tmp_path)))


def test_an_empty_line_is_no_question(tmp_path):
    path = tmp_path / "mmlu/test/sums_test.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n问,1,2,3,4,A\n\n题,1,2,3,4,B\n\n", encoding="utf-8")
    (found,) = tasks.read(EvaluationFlags(tasks=("mmlu",), task_dir=str(tmp_path))).values()
    assert [(each.where.rpartition(":")[2], each.key) for each in found] == [("2", "A"), ("4", "B")]


def test_a_wrong_task_ends_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, EvaluationFlags, ["--tasks", "ceval,cevil"])
    assert stopped.value.code == 2 and "gsm8k" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 18", 18),
        ("so 3 + 4 = 7.", 7),
        ("$1,234.50", 1234.5),
        ("she pays 70,000 dollars", 70000),
        ("10-3", 3),
        ("it is -5", -5),
        ("答案是18。", 18),
        ("一共1,234.5元", 1234.5),
        ("是-3", -3),
        ("v2 and x_3", None),
        ("no number", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert tasks.last_number(text) == number


# --- likelihood -----------------------------------------------------------------------------------------------------

FAMILIES = {
    "small_gemma": "gemma_sft.prompt",
    "small_qwen": "qwen2_sft.prompt",
    "small_chatglm": "chatglm_sft.prompt",
    "small_chatglm2": "chatglm_sft.prompt_chatglm2",
    "small_chatglm3": "chatglm_sft.prompt_chatglm3",
    "small_glm4": "chatglm_sft.prompt_glm4",
}


@pytest.fixture(scope="module", params=FAMILIES)
def answerer(request):
    """A small random model of each family, in its own prompt."""
    prompt = importlib.import_module(FAMILIES[request.param])
    path = str(request.getfixturevalue(request.param))
    tokenizer = load_tokenizer(path, prompt)
    return Answerer(load_base(path, "float32"), tokenizer, prompt, "chat", 512)


ASKED = [
    ([Turn("user", "1+1是")], ["A", "B", "C", "D"]),
    ([Turn("user", "问" * 30), Turn("assistant", "A"), Turn("user", "他有")], ["不是的", "是", "他在这"]),
    ([Turn("user", "1")], ["是的", "是了"]),
]


def one_by_one(answerer, turns, text):
    """(loss, ids) of an answer from the logits of one plain forward pass over prompt and answer."""
    prompt = answerer.fitted_ids(turns)
    rendered = answerer.prompt.render(answerer.tokenizer, [*turns, Turn("assistant", text)], answerer.style)
    whole = [id_ for piece in rendered for id_ in piece.ids]
    assert whole[: len(prompt)] == prompt and whole[-1] in answerer.stop_ids
    with torch.no_grad():
        logits = answerer.net(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    ends = range(len(prompt), len(whole) - 1)
    return -sum(float(logits[place - 1, whole[place]]) for place in ends), len(ends)


def test_likelihood_is_that_of_a_plain_forward_pass(answerer):
    """Batched, padded and shared prompts change nothing."""
    found = likelihood.fits(answerer, ASKED, batch_size=3)
    for (turns, answers), fits in zip(ASKED, found, strict=True):
        for text, fit in zip(answers, fits, strict=True):
            loss, ids = one_by_one(answerer, turns, text)
            assert fit.ids == ids and fit.loss == pytest.approx(loss, abs=1e-4)


def test_examples_that_questions_share_are_read_once(answerer, monkeypatch):
    """… in each batch and the next one, where the model allows it; losses are those of plain forward passes."""
    trunk, read = type(answerer.net.get_decoder()), []
    forward = trunk.forward

    def counted(self, input_ids=None, **arguments):
        read.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **arguments)

    rounds = [
        turn for n in range(5) for turn in (Turn("user", "问答他有" * 8 + str(n)), Turn("assistant", "AB"[n % 2]))
    ]
    asked = [([*rounds, Turn("user", "的一是不" * (n % 3) + f"问{n}")], ["A", "B", "是的"]) for n in range(12)]
    asked += [([Turn("user", f"他{n}")], ["A", "B"]) for n in range(3)]
    answerer.prefixes = PrefixCache(answerer.net)
    monkeypatch.setattr(trunk, "forward", counted)
    found = [fits for start in (0, 7) for fits in likelihood.fits(answerer, asked[start : start + 7 + start], False, 5)]
    monkeypatch.undo()
    whole = sum(len(answerer.fitted_ids(turns)) * 3 for turns, _ in asked)
    assert sum(read) < whole / 3 if answerer.prefixes.usable else sum(read) >= whole
    for (turns, answers), fits in zip(asked, found, strict=True):
        for text, fit in zip(answers, fits, strict=True):
            loss, ids = one_by_one(answerer, turns, text)
            assert fit.ids == ids and fit.loss == pytest.approx(loss, abs=1e-4)


# --- rigged models --------------------------------------------------------------------------------------------------


class Rigged(torch.nn.Module):
    """A causal model whose next id after a prompt is what `wanted(prompt ids)` says; elsewhere it says id 0."""

    device = torch.device("cpu")
    whole_prompts = True

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.config = vocabulary, PreTrainedConfig(vocab_size=vocabulary)

    def get_decoder(self):
        return self

    def get_output_embeddings(self):
        return lambda hidden: 9.0 * torch.nn.functional.one_hot(hidden[:, 0].long(), self.vocabulary)

    def forward(self, input_ids, attention_mask, use_cache):
        hidden = torch.zeros(*input_ids.shape, 1)
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            hidden[row, int(mask.sum()) - 1] = self.wanted(ids[mask.bool()].tolist())
        return SimpleNamespace(last_hidden_state=hidden)


def rigged(tokenizer, prompt, asked, label_of):
    """An Answerer that finds `label_of(question)` likeliest: the last id of that option, where the options part."""
    answerer = Answerer(Rigged(len(tokenizer)), tokenizer, prompt, "chat", 2048)
    wanted = {}
    for question in asked:
        said = Turn("assistant", question.options[label_of(question)])
        *ids, _ = prompt.render(tokenizer, [question.turns[-1], said], "chat")[-1].ids  # its stop id is left out
        wanted[tuple(answerer.fitted_ids(question.turns) + ids[:-1])] = ids[-1]
    answerer.net.wanted = lambda ids: wanted[tuple(ids)]
    return answerer


@pytest.fixture
def cfg(tmp_path, small_gemma):
    return Config(path_model_pretrain=str(small_gemma), model_save_dir=str(tmp_path / "out"))


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("shots", [0, 2])
def test_a_model_that_knows_the_key_is_right_and_one_that_says_a_has_the_share_of_a(
    fixtures, tokenizer, cfg, name, shots
):
    asked = questions(fixtures, (name,), shots=shots)[name]
    first = "answer1" if name == "arc" else "A"
    for label_of, share in (
        (lambda question: question.key, 1.0),
        (lambda question: first, [question.key for question in asked].count(first) / len(asked)),
    ):
        answer = rigged(tokenizer, prompt, asked, label_of)
        found = benchmark.run_task(answer, name, asked, cfg)
        assert [record["answer"] for record in found] == list(map(label_of, asked))
        scores = [record["scores"] for record in found]
        assert benchmark.accuracies(asked, scores, 0)["accuracy"] == pytest.approx(share)
        benchmark.records_path(cfg, name, False).unlink()
    keys = keys_in_the_files(fixtures, name)
    assert share == pytest.approx(keys[shots * (name == "arc") :].count(first) / len(asked))


class Writer:
    """Writes `text(question)`; has a prompt limit and a context like an Answerer."""

    max_length_q, context = 512, 0

    def __init__(self, text):
        self.text = text

    def __call__(self, conversations, sampling, base=False):
        assert not sampling.do_sample
        return [Answer(self.text(turns[-1].text), "stop", 3) for turns in conversations]


def test_gsm8k_counts_the_last_number(fixtures, cfg):
    asked = questions(fixtures, ("gsm8k",))["gsm8k"]
    keys = {question.turns[-1].text: question.key for question in asked}
    always = keys_in_the_files(fixtures, "gsm8k").count("18") / 40
    for text, share in (
        (lambda question: f"First 5, then {float(keys[question]):,.2f}.", 1.0),
        (lambda question: "The answer is 18", always),
        (lambda question: "", 0.0),
    ):
        found = benchmark.run_task(Writer(text), "gsm8k", asked, cfg)
        assert sum(record["scores"]["accuracy"] for record in found) / 40 == pytest.approx(share)
        benchmark.records_path(cfg, "gsm8k", False).unlink()
    assert found[0]["reference"] == "18" and found[0]["stop"] == "stop"


def test_accuracies_counted_in_another_way_are_not_put_beside(cfg):
    asked = {"gsm8k": [tasks.Question("f:1", "gsm8k", [Turn("user", "1+1=")], {}, "2")]}
    for most, flags, models in (
        (8, EvaluationFlags(base=True), ["base"]),
        (8, EvaluationFlags(), ["base", "tuned"]),
        (16, EvaluationFlags(), ["tuned"]),
    ):
        benchmark.report(Writer(lambda question: "2"), asked, dataclasses.replace(cfg, max_new_tokens=most), flags)
        assert [name for name in read_results(cfg)["tasks"] if name != "change"] == models


def test_a_change_is_not_of_the_records_of_a_call_that_was_stopped(cfg):
    asked = {"gsm8k": [tasks.Question(f"f:{n}", "gsm8k", [Turn("user", f"{n}+1=")], {}, "2") for n in range(4)]}
    writer = Writer(lambda question: "2" if question[0] in "12" else "0")
    benchmark.report(writer, asked, cfg, EvaluationFlags(compare=True))
    assert read_results(cfg)["tasks"]["change"]["gsm8k"] == [0, 0]
    path = benchmark.records_path(cfg, "gsm8k", base=True)
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    benchmark.report(writer, asked, cfg, EvaluationFlags())
    assert read_results(cfg)["tasks"]["change"]["gsm8k"] is None


def test_subjects_and_their_average():
    asked = [tasks.Question("f:1", subject, [], {}, "A") for subject in "aaab"]
    scores = [{"accuracy": float(right), "loss": 1.0} for right in (1, 1, 0, 0)]
    found = benchmark.accuracies(asked, scores, 0)
    assert found["accuracy"] == 0.5 and found["average"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["subjects"] == {
        "a": {"accuracy": pytest.approx(2 / 3), "questions": 3},
        "b": {"accuracy": 0.0, "questions": 1},
    }
    assert found["loss"] == 1.0 and 0 <= found["interval"][0] < 0.5 < found["interval"][1] <= 1


def test_prompts_beyond_the_limit_are_counted(cfg, monkeypatch, capsys):
    """The context widens the limit, 100 ids here; a user's own --max_length_q is the limit itself."""
    monkeypatch.setattr(benchmark, "PROMPT_LIMIT", 100)
    answerer = Answerer(load_base(cfg.base, "float32"), load_tokenizer(cfg.base, prompt), prompt, "chat", 64)
    options = {"A": "是", "B": "不是"}
    chosen, written = (
        [tasks.Question(f"f:{n}", "s", [Turn("user", "问" * n)], given, key) for n in (5, 150, 500)]
        for given, key in ((options, "A"), ({}, "2"))
    )
    flags = EvaluationFlags(tasks=("probe", "gsm8k"))
    for name, given, limit, cut in (("wide", {}, 200, 1), ("none", {}, 100, 2), ("own", {"max_length_q"}, 64, 2)):
        answerer.max_length_q, answerer.context = 64, 208 if name == "wide" else 0
        changes = {"max_new_tokens": 8, "model_save_dir": f"{cfg.model_save_dir}_{name}", "given": frozenset(given)}
        benchmark.report(answerer, {"probe": chosen, "gsm8k": written}, dataclasses.replace(cfg, **changes), flags)
        assert capsys.readouterr().out.count(f"prompts cut: {cut} / 3, 上限 the limit is {limit} tokens") == 2


# --- the whole road -------------------------------------------------------------------------------------------------


def run_recipe(answerer, cfg, fixtures, **flags):
    flags = EvaluationFlags(tasks=(*CHOICES, "gsm8k", "probe"), task_dir=str(fixtures / "data"), limit=2, **flags)
    benchmark.report(answerer, tasks.read(flags), cfg, flags)


def test_every_task_runs_on_every_family(answerer, cfg, fixtures, capsys, tmp_path):
    cfg = replace(cfg, max_new_tokens=2)
    run_recipe(answerer, cfg, fixtures, base=True)
    results = json.loads((tmp_path / "out/all_results.json").read_text(encoding="utf-8"))
    assert list(results["tasks"]) == ["base", "change"] and results["tasks"]["change"] == {}
    found = results["tasks"]["base"]
    assert {name: part["questions"] for name, part in found.items()} == dict.fromkeys(COUNTS, 2) | {"probe": 6}
    printed = capsys.readouterr().out
    for name, part in found.items():
        assert re.search(rf"^{name} +\d+ +{part['accuracy']:.4f} ", printed, flags=re.M)
    report = (tmp_path / "out/eval_report.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in report for name in COUNTS) and "| probe: 算术 |" in report
    record = json.loads((tmp_path / "out/task_ceval_base.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(record["losses"]) == set("ABCD") and record["answer"] == min(record["losses"], key=record["losses"].get)
    assert record["prompt"] == [{"role": "user", "content": record["question"]}]


def test_base_against_tuned_and_resumed(cfg, fixtures, tokenizer, tmp_path, capsys):
    """Accuracies of both and their change; a second call asks nothing."""
    flags = EvaluationFlags(tasks=("ceval",), task_dir=str(fixtures / "data"), compare=True)
    asked = tasks.read(flags)
    right = rigged(tokenizer, prompt, asked["ceval"], lambda question: question.key)
    benchmark.run_task(right, "ceval", asked["ceval"], cfg)
    wrong = rigged(tokenizer, prompt, asked["ceval"], lambda question: "ABCD"["BCDA".index(question.key)])
    benchmark.run_task(wrong, "ceval", asked["ceval"], cfg, base=True)
    silent = rigged(tokenizer, prompt, [], None)
    silent.net.wanted = lambda ids: pytest.fail("this was asked before")
    benchmark.report(silent, asked, cfg, flags)
    found = json.loads((tmp_path / "out/all_results.json").read_text(encoding="utf-8"))["tasks"]
    assert (found["base"]["ceval"]["accuracy"], found["tuned"]["ceval"]["accuracy"]) == (0.0, 1.0)
    assert found["change"]["ceval"] == [1.0, 1.0]
    assert found["tuned"]["ceval"]["subjects"] == {"computer_network": {"accuracy": 1.0, "questions": 19}}
    assert re.search(
        r"^ceval +19 +0.0000 .*1.0000 .*\+1.0000 \[\+1.000, \+1.000\]", capsys.readouterr().out, flags=re.M
    )


def test_each_subject_gets_its_own_questions(cfg, tokenizer, tmp_path):
    """Right on one subject alone, in a task whose questions are asked in the order of their length."""
    folder = tmp_path / "mmlu/test"
    folder.mkdir(parents=True)
    for name, long in (("art", 9), ("law", 0)):
        rows = [f"{name} {'why ' * (long if number % 2 else 4)}{number},1,2,3,4,B\n" for number in range(4)]
        (folder / f"{name}_test.csv").write_text("".join(rows))
    flags = EvaluationFlags(tasks=("mmlu",), task_dir=str(tmp_path))
    asked = tasks.read(flags)
    answer = rigged(tokenizer, prompt, asked["mmlu"], lambda question: "B" if question.subject == "law" else "A")
    benchmark.report(answer, asked, cfg, flags)
    found = json.loads((tmp_path / "out/all_results.json").read_text(encoding="utf-8"))["tasks"]["tuned"]["mmlu"]
    assert {name: part["accuracy"] for name, part in found["subjects"].items()} == {"art": 0.0, "law": 1.0}
    assert found["average"] == 0.5


def test_a_probe_of_what_was_forgotten():
    """Without a folder: it is shipped."""
    asked = tasks.read(EvaluationFlags(tasks=("probe",)))["probe"]
    assert {question.subject for question in asked} == {"常识", "算术", "身份"} and len(asked) == 110
    rows = [json.loads(line) for line in (DATA / "probe.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [question.key for question in asked] == [row["answer"] for row in rows]
    assert asked[0].options == {letter: rows[0][letter] for letter in "ABCD"}
    assert [question.turns for question in asked[:2]] == [[Turn("user", row["question"])] for row in rows[:2]]
