"""predict.py --output: which rows are asked, what is written, what a second call does; a fake, then models."""

import importlib
import json

import pytest

from common.cli import parse
from common.config import PredictFlags
from common.conversation.turns import Call, Conversation, Turn
from common.data import dataset
from common.errors import UserError
from common.evaluation import answer_file, asking
from common.inference.answerer import Answer, Sampling
from common.inference.remote import UnreachableError
from gemma_sft.ft_gemma import predict
from gemma_sft.ft_gemma.config import Config


class Fake:
    """Answers "答" and the question, "stop" for even lengths; stops after `calls` batches, fails at `bad` questions."""

    def __init__(self, calls=99, bad=(), error=UserError):
        self.calls, self.bad, self.error, self.asked, self.samplings = calls, bad, error, [], []

    def __call__(self, conversations, sampling, base=False):
        questions = [turns[-1].text for turns in conversations]
        assert all(turns[-1].role == "user" for turns in conversations)
        if not self.calls:
            raise KeyboardInterrupt
        if set(self.bad) & set(questions):
            raise self.error("放不下 does not fit")
        self.calls -= 1
        self.asked += conversations
        self.samplings.append(sampling)
        return [Answer("答" + text, "length" if len(text) % 2 else "stop", len(text)) for text in questions]

    @property
    def questions(self):
        return [turns[-1].text for turns in self.asked]


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def many(tmp_path):
    """Eleven questions, the longest first."""
    return written(tmp_path / "many.jsonl", [{"question": "问" * (11 - n)} for n in range(11)])


@pytest.fixture
def answered(tmp_path):
    """answered(fake, *flags): the lines of answers.jsonl after predict.py has answered, four questions at once."""

    def answer(fake, *flags, output=tmp_path / "answers.jsonl"):
        flags = ["--output", output, "--model_save_dir", tmp_path / "run", "--eval_batch_size", 4, *flags]
        cfg, parsed = parse(Config, PredictFlags, [str(flag) for flag in flags])
        answer_file.write(fake, answer_file.rows_to_ask(cfg, parsed), cfg, parsed)
        return lines_of(output)

    return answer


# --- which rows are asked ---------------------------------------------------------------------------------------------


SAID = (("human", "甲"), ("gpt", "乙"), ("human", "丙"))
ASKED = [  # row, what is asked, the answer it gives
    ({"question": "甲"}, ["甲"], ""),
    ({"query": "甲", "response": ""}, ["甲"], ""),
    ({"query": "甲", "response": None}, ["甲"], ""),
    ({"query": "甲", "response": "乙"}, ["甲"], "乙"),
    ({"instruction": "甲", "input": "", "output": ""}, ["甲"], ""),
    ({"instruction": "甲", "input": "乙"}, ["甲\n乙"], ""),
    ({"instruct": "甲", "query": "乙"}, ["甲\n乙"], ""),
    ({"input": "甲"}, ["甲"], ""),
    ({"content": "甲", "summary": " "}, ["甲"], ""),
    ({"prompt": "甲"}, ["甲"], ""),
    ({"prompt": [{"role": "user", "content": "甲"}]}, ["甲"], ""),
    ({"question": "丙", "history": [["甲", "乙"]], "system": "系"}, ["系", "甲", "乙", "丙"], ""),
    ({"question": "甲", "context": "文"}, ["甲\n文"], ""),
    ({"问题": "甲"}, ["甲"], ""),
    ({"指令": "甲", "输入": "乙"}, ["甲\n乙"], ""),
    ({"messages": [{"role": "user", "content": "甲"}]}, ["甲"], ""),
    ([{"role": "user", "content": "甲"}], ["甲"], ""),
    ({"messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": ""}]}, ["甲"], ""),
    ({"messages": [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}]}, ["甲"], "乙"),
    ({"messages": [{"role": "人", "content": "甲"}]}, None, "unknown role"),
    ({"conversations": [{"from": who, "value": t} for who, t in SAID]}, ["甲", "乙", "丙"], ""),
    ({"conversation": [{"human": "甲", "assistant": "乙"}, {"human": "丙", "assistant": ""}]}, ["甲", "乙", "丙"], ""),
    ({"messages": [{"role": "assistant", "content": "乙", "loss": False}]}, None, "assistant alone"),
    ({"query": "甲", "response": "乙", "weight": 0}, ["甲"], "乙"),
    ({"text": "甲"}, None, "no question"),
    ({"problem": "甲"}, None, "unknown keys"),
    ({"question": ""}, None, "empty"),
    ({"question": " ", "answer": "乙"}, None, "empty"),
    ({"question": "甲", "A": "1", "B": "2"}, None, "options would be lost"),
    ({"question": "甲", "images": ["a.png"]}, None, "only text"),
    ("甲", None, "object expected"),
]


@pytest.mark.parametrize(("row", "asked", "rest"), ASKED, ids=str)
def test_what_is_asked_of_a_row(tmp_path, row, asked, rest):
    path = tmp_path / "array.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    (found,) = asking.to_ask(str(path), Config())
    if asked is None:
        assert not isinstance(found, Conversation) and rest in found.reason and found.row == row
        return
    assert isinstance(found, Conversation)
    texts = [turn.text for turn in found.turns]
    assert texts == ([*asked, rest] if rest else asked)
    assert found.turns[len(asked) - 1].role == "user"


def test_a_csv_file_of_questions(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("question,answer\n甲,\n乙,丙\n", encoding="utf-8")
    assert [len(row.turns) for row in asking.to_ask(str(path), Config())] == [1, 2]


def test_rows_that_are_trained_on_stay_the_same_rows(tmp_path):
    """What may be asked is no more to be trained on than before."""
    rows = [row for row, asked, reference in ASKED if asked and not reference]
    path = str(written(tmp_path / "q.jsonl", rows))
    found = list(dataset.conversations(path, Config()))
    trained = [row for row in found if isinstance(row, Conversation)]
    assert len(trained) == 2  # of those, the two with a whole round before the last question


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_lines_in_order_with_all_that_is_said_of_a_row(tmp_path, answered, capsys):
    rows = [
        {"question": "三个字", "id": 5},
        {"text": "只有文字"},
        {"question": "二字", "answer": "参考"},
        {"messages": [{"role": "system", "content": "系"}, {"role": "user", "content": "问"}]},
    ]
    path, fake = written(tmp_path / "q.jsonl", rows), Fake()
    lines = answered(fake, "--data_path", path, "--system", "猫")
    assert fake.questions == ["问", "二字", "三个字"], "from short to long"
    assert [line["where"] for line in lines] == [f"{path}:{number}" for number in (1, 3, 4)]
    assert [line["question"] for line in lines] == ["三个字", "二字", "问"]
    assert [line["answer"] for line in lines] == ["答三个字", "答二字", "答问"]
    assert [line["finish_reason"] for line in lines] == ["length", "stop", "length"]
    assert [line["tokens"] for line in lines] == [3, 2, 1]
    assert [line.get("reference") for line in lines] == [None, "参考", None]
    assert [line["prompt"][0]["content"] for line in lines] == ["猫", "猫", "系"], "a row's own system text stays"
    assert not fake.samplings[0].do_sample
    shown = capsys.readouterr().out
    assert f"{path}:2: 没有提问" in shown and "questions 3, 不问 not asked 1" in shown
    assert "id: not used in 1 rows" in shown and "3 / 3" in shown and "cut off there 2" in shown


def test_thought_and_calls_have_fields_of_their_own(tmp_path, answered, capsys):
    class Thinking(Fake):
        def __call__(self, conversations, sampling, base=False):
            calls = (Call("f", '{"a": 1}'),)
            return [
                Answer("好", "stop", 3, 0, "想", calls)
                if turns[-1].text == "一"
                else Answer("", "length", 3, 0, "没想完")
                for turns in conversations
            ]

    path = written(tmp_path / "q.jsonl", [{"question": "一"}, {"question": "二"}])
    called, silent = answered(Thinking(), "--data_path", path)
    assert (called["answer"], called["reasoning_content"]) == ("好", "想")
    assert called["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    assert (silent["answer"], silent["reasoning_content"]) == ("", "没想完") and "tool_calls" not in silent
    assert "thought alone, no answer; remedy: a larger --max_new_tokens: 1 / 2" in capsys.readouterr().out


def test_a_result_of_a_tool_is_no_question(tmp_path, answered):
    class Any(Fake):
        def __call__(self, conversations, sampling, base=False):
            return [Answer("好", "stop", 1) for _ in conversations]

    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    rows = [{"messages": [*said, {"role": "tool", "content": "42"}], "tools": [tool]}, {"question": "乙"}]
    lines = answered(Any(), "--data_path", written(tmp_path / "q.jsonl", rows))
    assert [(line.get("question"), line.get("tool")) for line in lines] == [(None, "42"), ("乙", None)]
    assert lines[0]["prompt"][-1] == {"role": "tool", "content": "42"}


def test_a_sample_of_several_files(tmp_path, many, answered):
    other = written(tmp_path / "other.jsonl", [{"query": "别的"}])
    lines = answered(Fake(), "--data_path", f"{many}#3", other)
    assert len(lines) == 4 and lines[3]["question"] == "别的" and "prompt" not in lines[3]


def test_sampling_where_it_is_asked_for(many, answered):
    fake = Fake()
    answered(fake, "--data_path", many, "--do_sample", "--temperature", 0.5, "--max_new_tokens", 9)
    assert set(fake.samplings) == {Sampling(9, True, 0.5, 0.95, 50)}


# --- a second call ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_stopped_run_goes_on(tmp_path, many, answered, cut):
    whole = answered(Fake(), "--data_path", many, output=tmp_path / "whole.jsonl")
    first, path = Fake(calls=2), tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answered(first, "--data_path", many)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    second = Fake()
    assert answered(second, "--data_path", many) == whole
    assert len(first.asked) == 8 and len(second.asked) == (4 if cut else 3)
    third = Fake()
    assert answered(third, "--data_path", many) == whole and third.asked == []


OTHER = [["--max_new_tokens", 8], ["--do_sample"], ["--system", "猫"], ["--base"], ["--prompt_style", "plain"]]


@pytest.mark.parametrize("flags", OTHER, ids=str)
def test_answers_of_another_kind_are_not_mixed_in(tmp_path, many, answered, flags):
    answered(Fake(), "--data_path", many)
    before, fake = (tmp_path / "answers.jsonl").read_bytes(), Fake()
    with pytest.raises(UserError, match="answers.jsonl.*another model or sampling"):
        answered(fake, "--data_path", many, *flags)
    assert (tmp_path / "answers.jsonl").read_bytes() == before and fake.asked == []


def test_answers_to_other_questions_are_not_mixed_in(tmp_path, many, answered):
    answered(Fake(), "--data_path", many)
    written(many, [{"question": "别的"}])
    with pytest.raises(UserError, match="answers to other questions"):
        answered(Fake(), "--data_path", many)


@pytest.mark.parametrize("content", [b"mine\n", b"mine", b'{"row": 1}\n', b"[1]", b"\xff\xfe", b'{"key"\n'])
def test_a_file_that_is_no_output_is_left_alone(tmp_path, many, answered, content):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds something that is no answer"):
        answered(Fake(), "--data_path", many)
    assert path.read_bytes() == content


def test_the_questions_are_not_overwritten(many, answered):
    before = many.read_bytes()
    with pytest.raises(UserError, match="no answer"):
        answered(Fake(), "--data_path", many, output=many)
    assert many.read_bytes() == before


def test_files_beside_the_output_are_left_alone(tmp_path, many, answered):
    names = ("answers.zip.part", "answers.draft", "answers.0.partial")
    for name in names:
        (tmp_path / name).write_bytes(b"\xffmine")
    answered(Fake(), "--data_path", many)
    assert all((tmp_path / name).read_bytes() == b"\xffmine" for name in names)


# --- what cannot be answered ------------------------------------------------------------------------------------------


def test_a_row_that_fails_is_told_and_asked_again(many, answered, capsys):
    lines = answered(Fake(bad=["问" * 3]), "--data_path", many)
    assert len(lines) == 10 and "问" * 3 not in [line["question"] for line in lines]
    assert f"未回答 not answered: {many}:9: 放不下" in capsys.readouterr().out
    again = Fake()
    assert len(answered(again, "--data_path", many)) == 11 and again.questions == ["问" * 3]


def test_a_server_that_is_gone_ends_it_and_nothing_is_lost(tmp_path, many, answered):
    with pytest.raises(UnreachableError):
        answered(Fake(bad=["问" * 7], error=UnreachableError), "--data_path", many)
    assert len(lines_of(tmp_path / "answers.jsonl")) == 4
    again = Fake()
    assert len(answered(again, "--data_path", many)) == 11 and len(again.asked) == 7


def test_nothing_to_ask(tmp_path, answered):
    path = written(tmp_path / "q.jsonl", [{"text": "文字"}])
    with pytest.raises(UserError, match="no row to ask"):
        answered(Fake(), "--data_path", path)
    path = written(tmp_path / "q.jsonl", [{"query": "坏"}])
    with pytest.raises(UserError, match="no row was answered"):
        answered(Fake(bad=["坏"]), "--data_path", path)


@pytest.mark.parametrize("flags", [["--query", "甲"], ["--compare"], ["--print_prompt", "甲"]], ids=str)
def test_flags_that_cannot_go_together(many, flags):
    with pytest.raises(UserError, match=f"{flags[0]} .*cannot go together"):
        predict.main(["--data_path", str(many), "--output", "answers.jsonl", *flags])


def test_what_is_missing_is_said_before_a_model_is_loaded(tmp_path, many):
    output = ["--output", str(tmp_path / "answers.jsonl"), "--model_save_dir", str(tmp_path / "none")]
    with pytest.raises(UserError, match="--data_path"):
        predict.main(output)
    with pytest.raises(UserError, match="gone.jsonl"):
        predict.main([*output, "--data_path", str(tmp_path / "gone.jsonl")])
    with pytest.raises(UserError, match="another --output"):
        predict.main(["--data_path", str(many), "--output", str(many / "answers.jsonl")])


# --- with a model -----------------------------------------------------------------------------------------------------


PACKAGES = {
    "gemma": "gemma_sft.ft_gemma",
    "qwen": "qwen2_sft.ft_qwen2",
    "chatglm": "chatglm_sft.ft_chatglm",
    "glm4": "chatglm_sft.ft_glm4",
}


@pytest.mark.parametrize("family", PACKAGES)
def test_the_answers_are_those_of_the_model(request, tmp_path, family, capsys):
    package = PACKAGES[family]
    recipe, folder = importlib.import_module(f"{package}.predict"), request.getfixturevalue(f"small_{family}")
    questions = ["一", "问答" * 9, "1+1="]
    path = written(tmp_path / "q.jsonl", [{"question": text} for text in questions])
    flags = ["--base", "--path_model_pretrain", folder, "--model_save_dir", tmp_path / "none", "--max_new_tokens", 9]
    flags += ["--data_path", path, "--output", tmp_path / "new/answers.jsonl"]
    recipe.main([str(flag) for flag in flags])
    lines = lines_of(tmp_path / "new/answers.jsonl")
    cfg = importlib.import_module(f"{package}.config").Config(
        path_model_pretrain=str(folder), model_save_dir="/nowhere"
    )
    answer = recipe.load_answer(cfg, base=True)
    alone = [answer([[Turn("user", text)]], Sampling(max_new_tokens=9))[0] for text in questions]
    assert [(line["answer"], line["finish_reason"], line["tokens"]) for line in lines] == [
        (one.text, one.stop, one.tokens) for one in alone
    ]
