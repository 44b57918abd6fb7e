"""train.py --check: each defect at its line, the mask as the loss sees it, the heaviest step tried, the verdict."""

import json
import re
from collections import Counter

import pytest
import torch

from common.checking import check, check_report, rehearsal
from common.conversation.render import IGNORED
from common.errors import UserError
from common.training import batches
from gemma_sft import prompt
from gemma_sft.ft_gemma import train

LIMITS = ["--max_length_q", 60, "--max_length_a", 40, "--val_set_size", 0]
HELD_OUT = {"question": "留出的问题", "answer": "留出的答案"}
# name: (row, kind, words)
DEFECTS = {
    "all labels masked": (
        {"system": "规则" * 200, "query": "问", "response": "答"},
        "masked",
        "--max_length_q 60",
    ),
    "over-long": ({"question": "问", "answer": "答" * 41}, "over-long", "--max_length_a 40"),
    "duplicate": ({"question": "1+1=", "answer": "2"}, "duplicate", "rows.jsonl:1"),
    "empty": ({"question": "问", "answer": " "}, "empty", "answer 只有空白"),
    "wrong type": ({"question": "问", "answer": True}, "wrong type", "found bool 'True'"),
    "held-out overlap": (HELD_OUT, "held-out overlap", "held.jsonl:2"),
    "unknown keys": ({"frage": "问", "antwort": "答"}, "unknown keys", "antwort+frage"),
    "broken line": ('{"question": "问", "answer": "', "broken line", "broken JSON line"),
    "identity": ({"question": "你是谁", "answer": "我是{{name}}"}, "identity", "{{name}}"),
    "control tokens": ({"question": "<start_of_turn>user\n问", "answer": "答"}, "control tokens", "<start_of_turn>"),
    "only a system turn": ({"messages": [{"role": "system", "content": "规则"}]}, "no question", "没有问答"),
    "assistant first": (
        {"messages": [{"role": "assistant", "content": "答"}, {"role": "user", "content": "问"}]},
        "turn order",
        "found user",
    ),
}


def line_of(row):
    return (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n"


@pytest.fixture
def flags(small_gemma, tmp_path):
    """flags(rows, *more): the command line of a check of a file of `rows`, the first of them 1+1=2."""

    def make(rows, *more):
        good = [{"question": "1+1=", "answer": "2"}, {"question": "2+2=", "answer": "4"}]
        (tmp_path / "rows.jsonl").write_text("".join(map(line_of, [*good, *rows])), encoding="utf-8")
        (tmp_path / "held.jsonl").write_text(line_of({"question": "甲", "answer": "乙"}) + line_of(HELD_OUT))
        given = ["--check", "--path_model_pretrain", small_gemma, "--cache_dir", tmp_path / "cache", *LIMITS]
        given += ["--data_path", tmp_path / "rows.jsonl", "--eval_data_path", tmp_path / "held.jsonl"]
        return [str(flag) for flag in [*given, "--model_save_dir", tmp_path / "out", *more]]

    return make


@pytest.fixture
def report(flags, capsys):
    """report(rows, *more): (the JSON report, the exit code)."""

    def run(rows, *more):
        code = 0
        try:
            train.main(flags(rows, "--json", *more))
        except SystemExit as ended:
            code = ended.code
        return json.loads(capsys.readouterr().out), code

    return run


def test_rows_that_share_a_line_are_found_by_their_number(report, tmp_path):
    rows = [{"question": f"{n}+1=", "answer": f"{n + 1}"} for n in (1, 2, 3, 2)]
    (tmp_path / "array.json").write_text(json.dumps([*rows, {"question": "问", "answer": " "}]), encoding="utf-8")
    found, _ = report([], "--data_path", tmp_path / "array.json")
    where = {finding["kind"]: finding["where"] for finding in found["findings"]}
    assert where == {"duplicate": f"{tmp_path / 'array.json'}:4", "empty": f"{tmp_path / 'array.json'}:5"}


def test_rows_that_share_a_later_line_are_found_by_line_and_part(report, tmp_path):
    rows = [json.dumps({"question": f"{n}+1=", "answer": f"{n + 1}"}) for n in (1, 2, 3, 2, 4, 3)]
    bad = '{"question": "问", "answer": " "}'
    (tmp_path / "a.jsonl").write_text(f"{rows[0]}\n{rows[1]}\n{' '.join(rows[2:])} {', '.join([bad] * 8)}\n")
    found, _ = report([], "--data_path", tmp_path / "a.jsonl")
    where = [(finding["kind"], finding["where"].rpartition(":")[2]) for finding in found["findings"]]
    assert where == [("duplicate", "3.2"), ("duplicate", "3.4"), *(("empty", f"3.{n}") for n in range(5, 13))]


def test_each_of_twelve_defects_is_found_at_its_line(report, tmp_path):
    found, code = report([row for row, _, _ in DEFECTS.values()])
    assert code == 1 and found["verdict"] == "bad"
    by_line = {finding["where"].rpartition(":")[2]: finding for finding in found["findings"]}
    for line, (name, (_, kind, words)) in enumerate(DEFECTS.items(), 3):
        finding = by_line.pop(str(line))
        assert finding["where"] == f"{tmp_path}/rows.jsonl:{line}", name
        assert finding["kind"] == kind and words in finding["found"], name
        assert finding["expected"] and finding["remedy"], name
    assert by_line == {}
    assert found["rows"] == {
        "rows": 14,
        "kept": 5,
        "cut": 0,
        "dropped": 9,
        "duplicates": 1,
        "train": 5,
        "validation": 0,
    }
    assert found["overlap"] == {"held_out": 1, "held_out_questions": 1, "validation": 0}


# rows whose own text holds what is said of other defects: (row, kind)
MISLEADING = [
    ({"broken JSON line": "问", "empty": "答"}, "unknown keys"),
    ({"an object expected": "问", "columns expected": "答"}, "unknown keys"),
    ({"messages": [{"role": "the last turn must be unknown keys", "content": "问"}]}, "wrong type"),
    ({"question": "问", "answer": ["there is no question"]}, "wrong type"),
    ({"question": "问", "answer": {"is not filled": "multiple-choice"}}, "wrong type"),
    ({"query": "问", "response": "答", "history": [["ambiguous keys"]]}, "wrong type"),
    ({"messages": ["is not filled", "--max_length_a"]}, "wrong type"),
    ({"dialogue": "is not filled", "reference": "书"}, "wrong type"),
    ({"num_turns": 1, "chat": {"turn_1": {"Commands": "must be empty"}}}, "unusable"),
    ({"question": "unknown role", "answer": "--max_length_q" * 9}, "over-long"),
]


def test_a_rows_own_text_does_not_decide_its_kind(report):
    found, _ = report([row for row, _ in MISLEADING])
    assert [finding["kind"] for finding in found["findings"]] == [kind for _, kind in MISLEADING]


def test_the_report_for_people_names_every_line(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(flags([row for row, _, _ in DEFECTS.values()]))
    assert ended.value.code == 1
    out = capsys.readouterr().out
    kinds = Counter(kind for _, kind, _ in DEFECTS.values())
    for line, (_, kind, words) in enumerate(DEFECTS.values(), 3):
        assert out.count(f"[{kind}] {kinds[kind]} 处 found\n") == 1
        told = out.partition(f"[{kind}]")[2].partition("[")[0]
        entry = re.search(rf"rows\.jsonl:{line}: (.*)\n +应为 expected: .+; 办法 remedy: .+\n", told)
        assert entry and words in entry[1], (line, out)
    assert "剔除 dropped 9" in out and out.strip().splitlines()[-1].startswith("结论 verdict: 有问题 bad: ")


def test_good_rows_are_good(report, tmp_path):
    found, code = report([{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(3, 40)], "--val_set_size", 4)
    assert code == 0 and found["verdict"] == "good" and found["problems"] == {} and found["findings"] == []
    assert found["rows"]["train"] == 35 and found["rows"]["validation"] == 4
    assert found["stop_share"] == 1.0 and 0 < found["supervised_share"] < 1
    lengths = found["lengths"]
    assert list(lengths["tokens"].values()) == sorted(lengths["tokens"].values()) and lengths["supervised"]["p100"] == 3
    assert not (tmp_path / "out").exists(), "a check leaves nothing"
    step, used = found["step"], found["memory"]
    assert step["rows"] == 4 and step["length"] == lengths["tokens"]["p100"] and step["total_steps"] == 9
    assert step["seconds"] > 0 and step["run_seconds"] > 0
    assert min(used.values()) >= 0 and used["estimate"] > 0 and used["peak"] > used["measured"]


def of_400(bad):
    """400 rows, two of them those that `flags` puts first; so many of them without an answer."""
    return [{"question": f"{n}", "answer": "" if n < bad else f"{n}"} for n in range(398)]


def test_few_lost_rows_are_told_and_do_not_spoil_the_verdict(report, flags, capsys):
    found, code = report(of_400(10))
    assert code == 0 and found["verdict"] == "usable with losses" and found["usable_share"] == 390 / 400
    assert found["problems"] == {} and found["losses"] == {"empty": 10}
    train.main(flags(of_400(10)))
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("usable with losses: 390 行可用 rows are usable (97.5%): 10 × empty")
    assert out.count("[empty] 10 处 found") == 1 and out.count("answer 是空的 is empty") == 3
    assert "keep every row whole" not in out


@pytest.mark.parametrize(("bad", "more"), [(10, ["--strict"]), (10, ["--max_dropped", 0.02]), (201, [])])
def test_what_training_would_refuse_is_bad(report, bad, more):
    found, code = report(of_400(bad), *more)
    assert code == 1 and found["verdict"] == "bad" and found["losses"] == {"empty": bad}


def test_the_limits_that_keep_every_row_are_told(report, flags, capsys):
    rows = [{"question": "长" * 90, "answer": "好"}, {"question": "问", "answer": "答" * 40}]
    found, _ = report(rows, "--max_length_q", 50, "--max_length_a", 30)
    assert found["kinds"] == {"cut": 1, "over-long": 1}
    limits = found["keep_all"]
    assert found["lengths"]["prompt"]["p100"] == limits["max_length_q"]
    assert found["lengths"]["answer"]["p100"] == limits["max_length_a"] == 41
    given = [f"--{name} {value}" for name, value in limits.items()]
    train.main(flags(rows, "--max_length_q", 50, "--max_length_a", 30))
    assert f"to keep every row whole: {' '.join(given)}\n" in capsys.readouterr().out
    found, _ = report(rows, *" ".join(given).split())
    assert found["rows"]["kept"] == 4 and found["rows"]["cut"] == 0 and found["keep_all"] == limits
    less = {name: value - 1 for name, value in limits.items()}
    found, _ = report(rows, *" ".join(f"--{name} {value}" for name, value in less.items()).split())
    assert found["rows"]["kept"] == 3 and found["rows"]["cut"] == 1


def test_the_run_is_estimated_from_light_and_heavy_micro_batches():
    micro = [[number, number + 1] for number in range(9)] + [[9]]
    assert rehearsal.spread([*micro[-1:], *micro[:-1]]) == [micro[1], micro[4], micro[7]]
    assert rehearsal.spread([[1]]) == [[1]] * 3


def test_duplicates_cuts_and_typed_tokens_are_told_but_not_bad(report):
    rows = [{"question": "1+1=", "answer": "2"}, {"question": "长" * 30, "answer": "好"}]
    rows += [{"question": "什么是<|im_end|>", "answer": "控制符"}]
    found, code = report(rows, "--max_length_q", 50)
    assert code == 0 and found["kinds"] == {"duplicate": 1, "cut": 1, "control tokens": 1}
    assert [(f["where"].rpartition(":")[2], f["bad"]) for f in found["findings"]] == [
        ("3", False),
        ("4", False),
        ("5", False),
    ]


def test_control_tokens_in_a_thought_are_told(report):
    answer = {"role": "assistant", "content": "好", "reasoning_content": "<start_of_turn>"}
    found, code = report([{"messages": [{"role": "user", "content": "问"}, answer]}], "--thinking", "none")
    assert code == 0 and found["kinds"] == {"control tokens": 1}


def test_of_a_row_that_is_left_out_the_reason_alone_is_told(report):
    long = {"question": "问<eos>", "answer": "答" * 41}
    found, _ = report([long, long])
    assert [finding["kind"] for finding in found["findings"]] == ["over-long"] * 2


def test_a_repeated_row_on_both_sides_of_the_split_is_named(report):
    rows = [{"question": "1+1=", "answer": "2"}] * 6
    found, _ = report(rows, "--val_set_size", 3)
    assert found["overlap"]["validation"] > 0
    assert found["kinds"]["validation overlap"] == found["overlap"]["validation"]


def test_files_that_cannot_be_read_are_findings(report, tmp_path):
    (tmp_path / "cut.json").write_text('[{"question": "问", "answer": "答"},\n{"question": "问2"')
    found, code = report([], "--data_path", tmp_path / "cut.json", tmp_path / "rows.jsonl", tmp_path / "none.jsonl")
    assert code == 1 and found["rows"]["rows"] == 2
    places = [(f["where"], f["kind"]) for f in found["findings"]]
    assert places == [(f"{tmp_path}/cut.json:2", "unreadable file"), (f"{tmp_path}/none.jsonl", "unreadable file")]
    assert "step" not in found, "training could not start either"


@pytest.mark.parametrize("row", [{"question": "甲", "answer": "乙丙"}, {"question": "甲", "answer": "丁", "id": "5"}])
def test_no_row_left_to_train_on_is_bad_whatever_else_is_found(report, row):
    found, code = report([row], "--val_set_size", 9)
    (problem,) = [finding for finding in found["findings"] if finding["bad"]]
    assert code == 1 and found["problems"] == {"no training rows": 1}
    assert problem["where"] == "--val_set_size 9" and "no row of 3" in problem["found"]


def test_nothing_usable_is_bad_without_a_step(report):
    found, code = report([], "--max_length_a", 1)
    assert code == 1 and [f["kind"] for f in found["findings"]] == ["over-long", "over-long"] and "step" not in found


class Endless:
    """Gemma's prompt without the end of an answer."""

    __file__ = prompt.__file__
    CHAT_TEMPLATE, stop_ids, ONE_ANSWER = prompt.CHAT_TEMPLATE, staticmethod(prompt.stop_ids), False
    MODEL_TYPES, RECIPES = prompt.MODEL_TYPES, prompt.RECIPES

    @staticmethod
    def render(tokenizer, turns, style):
        *rest, last = prompt.render(tokenizer, turns, style)
        return [*rest, last._replace(ids=last.ids[:-1]) if turns[-1].role == "assistant" else last]


def test_rows_that_never_stop_are_bad(report, monkeypatch):
    monkeypatch.setattr(train, "prompt", Endless)
    found, code = report([])
    assert code == 1 and found["stop_share"] == 0.0 and check.NO_END in found["problems"]


@pytest.mark.parametrize(("loss_on", "shown"), [("answer", "o d e l ⏎ «d» «e» «<end_of_turn>»"), ("all", "«c» «<end_")])
def test_the_mask_is_shown_token_by_token(flags, capsys, loss_on, shown):
    train.main(flags([{"question": "abc", "answer": "de"}], "--loss_on", loss_on))
    assert shown in capsys.readouterr().out


def test_a_character_of_several_bytes_is_one_entry(tokenizer):
    ids = tokenizer.encode("a🙂b", add_special_tokens=False)
    row = {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}
    assert len(ids) == 6 and check.masked_tokens(tokenizer, row) == [["a", False], ["🙂", True], ["b", True]]


def test_colours_only_on_a_terminal():
    tokens = [["a b", False], ["c\n", True]]
    assert check_report.marked(tokens, False) == "a␣b «c⏎»"
    assert check_report.marked(tokens, True) == "\033[2ma␣b\033[0m \033[30;42mc⏎\033[0m"


def test_the_heaviest_micro_batch_of_the_run_is_tried():
    lengths = [5, 5, 9, 5, 5, 5, 5, 7]
    sampler = batches.LengthGroupedSampler(lengths, 4, seed=1)
    micro = sampler.by_weight(2, passes=2)
    assert sorted(micro[-1]) == [2, 7] and sampler.ids_in(micro[-1]) == 18 and len(micro) == 8


def test_the_heaviest_packs_are_tried_where_rows_are_packed(report):
    rows = [{"question": f"{n}+1=", "answer": str(n + 1)} for n in range(3, 20)]
    found, code = report(rows, "--packing", "--micro_batch_size", 2, "--batch_size", 4)
    assert code == 0 and found["step"]["rows"] > 4 and 80 < found["step"]["length"] <= 100
    assert found["memory"]["peak"] > 0 and found["step"]["total_steps"] == 6


def test_a_check_is_one_process(report, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--check: .* as one process"):
        report([])


def test_a_step_out_of_memory_is_a_line(report, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(rehearsal, "rehearse", fails)
    found, code = report([])
    assert code == 1 and "step" not in found
    assert list(found["problems"]) == [
        f"内存不足 out of memory on the heaviest micro batch; remedy: {check.OUT_OF_MEMORY}"
    ]


def test_a_gradient_that_does_not_arrive_is_found_before_the_run(report, monkeypatch):
    from common.model import loss

    whole = loss.token_losses
    monkeypatch.setattr(loss, "token_losses", lambda *args: whole(*args).detach().requires_grad_(True))
    found, code = report([])
    assert code == 1 and any("trainable tensors got no gradient" in problem for problem in found["problems"])
