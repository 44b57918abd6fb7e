"""A few validation rows are answered at each validation; the run learns the same with and without."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import STEPS

from common.config import TrainFlags
from common.conversation.turns import Turn
from common.errors import UserError
from common.training import callbacks, curve, samples

VALIDATED = [*STEPS, "--val_set_size", 4, "--max_new_tokens", 6]


@pytest.fixture(scope="module")
def sampled(family):
    return family.train("sampled", *VALIDATED, "--sample_rows", 3)


def lines(folder, name="samples.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_held_out_prompts_are_answered_at_each_validation(family, sampled):
    found = lines(sampled)
    rows = [json.loads(line) for line in (family.parent / "rows.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [step for step in (1, 2, 3, 4) for _ in range(3)]
    assert len({line["where"] for line in found}) == 3
    for line in found:
        path, _, number = line["where"].rpartition(":")
        row = rows[int(number) - 1]
        assert (path, line["question"], line["reference"]) == (
            str(family.parent / "rows.jsonl"),
            row["query"],
            row["response"],
        )
        assert line["stop"] in ("stop", "length") and line["tokens"] <= 6
        assert line["stopped"] <= (line["stop"] == "stop")
    logged = lines(sampled, "trainer_log.jsonl")
    for record in logged:
        of_step = [line for line in found if line["step"] == record["step"]]
        assert record["eval_stopped"] == pytest.approx(sum(line["stopped"] for line in of_step) / 3)
        assert record["eval_looping"] == pytest.approx(sum(line["looping"] for line in of_step) / 3)
    results = json.loads((sampled / "all_results.json").read_text())
    assert results["eval_stopped"] == logged[-1]["eval_stopped"]


def test_the_last_answers_are_those_of_the_saved_adapter(family, sampled):
    from common.inference.answerer import Sampling

    cfg, _ = family.parse(TrainFlags, "--model_save_dir", sampled)
    answer = family.recipe("predict").load_answer(cfg)
    for line in lines(sampled)[-3:]:
        found = answer([[Turn("user", line["question"])]], Sampling(max_new_tokens=6))[0]
        assert (found.text, found.stop, found.tokens) == (line["answer"], line["stop"], line["tokens"])


def test_a_run_learns_the_same_without(family, sampled):
    plain = family.train("plain", *VALIDATED, "--sample_rows", 0)
    assert (plain / "adapter_model.safetensors").read_bytes() == (sampled / "adapter_model.safetensors").read_bytes()
    assert not (plain / "samples.jsonl").exists()
    assert not any("eval_stopped" in record for record in lines(plain, "trainer_log.jsonl"))


def test_a_resumed_run_leaves_the_same_samples(family, sampled):
    """It stops between two validations, after samples of a step that is made again."""
    folder = family.stop("resumed", 3, *VALIDATED, "--sample_rows", 3)
    whole = [line for line in lines(sampled) if line["step"] <= 3]
    assert lines(folder) == whole
    (folder / "checkpoint-3" / "whole.json").unlink()
    family.train("resumed", *VALIDATED, "--sample_rows", 3)
    assert lines(folder) == lines(sampled)
    assert (folder / "adapter_model.safetensors").read_bytes() == (sampled / "adapter_model.safetensors").read_bytes()


def test_a_whole_model_keeps_its_own_generation_config(gemma):
    from transformers import GenerationConfig

    more = ["--tuning", "full", "--learning_rate", 0.001, "--max_steps", 1, "--val_set_size", 4, "--max_new_tokens", 2]
    with_samples, without = (gemma.train(f"full{n}", *more, "--sample_rows", n) for n in (2, 0))
    asked = [GenerationConfig.from_pretrained(folder).to_dict() for folder in (with_samples, without)]
    assert asked[0] == asked[1]


def test_rows_of_all_files_are_asked(gemma):
    """The first validation row of each file, and only then the second one of the first."""
    (gemma.parent / "text.jsonl").write_text('{"text": "plain"}\n' * 8)
    files = [gemma.parent / f"{name}.jsonl" for name in ("rows", "other", "text")]
    given = ["--max_steps", 1, "--val_set_size", 0.5, "--sample_rows", 4, "--data_path", *files]
    folder = gemma.train("mixed", *VALIDATED[2:], *given)
    names = [line["where"].rpartition("/")[2].partition(":")[0] for line in lines(folder)]
    assert names == ["rows.jsonl", "other.jsonl", "rows.jsonl", "other.jsonl"]


def test_without_validation_rows_they_are_refused_where_asked_for(gemma):
    with pytest.raises(UserError, match="--sample_rows .* needs validation rows: --val_set_size above 0"):
        gemma.train("nothing", *STEPS, "--val_set_size", 0, "--sample_rows", 2)
    assert not (gemma.train("nothing", *STEPS, "--val_set_size", 0) / "samples.jsonl").exists()


LINE = {"step": 4, "stop": "stop", "looping": False}


@pytest.mark.parametrize(
    "ends, told",
    [
        ([{}, {}], None),
        ([{}, {"stop": "length"}, {"step": 3, "stop": "length"}], "1 / 2 within --max_new_tokens 256, 0 of them"),
        ([{"stop": "length", "looping": True}], "1 / 1 within --max_new_tokens 256, 1 of them"),
    ],
)
def test_a_run_ends_with_a_word_on_answers_that_do_not(gemma, tmp_path, capsys, ends, told):
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(LINE | end) + "\n" for end in ends))
    cfg, _ = gemma.parse(TrainFlags)
    samples.conclude(SimpleNamespace(folder=tmp_path), {"adapter_of_step": 4}, cfg)
    said = capsys.readouterr().out
    if told is None:
        assert said == ""
    else:
        assert f"回答不停止 answers do not stop: {told}" in said and said.count("\n") == 1
        assert ("--repetition_penalty 1.05" in said) == ends[-1].get("looping", False)
        assert ("--train_template_tokens true" in said) != ends[-1].get("looping", False)
        samples.conclude(SimpleNamespace(folder=tmp_path), {"adapter_of_step": 4}, replace(cfg, repetition_penalty=1.1))
        assert "--repetition_penalty" not in capsys.readouterr().out  # it has one


def test_a_run_ends_with_a_word_on_answers_that_are_all_thought(gemma, tmp_path, capsys):
    ends = [{"answer": "", "reasoning_content": "想"}, {"answer": "好", "reasoning_content": "想"}, {"answer": ""}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(LINE | end) + "\n" for end in ends))
    cfg, _ = gemma.parse(TrainFlags)
    samples.conclude(SimpleNamespace(folder=tmp_path), {"adapter_of_step": 4}, cfg)
    assert capsys.readouterr().out.endswith("no answer; remedy: a larger --max_new_tokens: 1 / 3\n")


def test_the_picture_is_there_while_the_run_goes_on(gemma, monkeypatch):
    """It is drawn at each validation, from all lines up to it."""
    drawn = []

    def draw(folder):
        drawn.append([record["step"] for record in lines(folder, "trainer_log.jsonl") if "eval_loss" in record])

    monkeypatch.setattr(callbacks.curve, "draw", draw)
    gemma.train("pictured", *VALIDATED, "--sample_rows", 0)
    assert drawn[:4] == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]


def test_the_picture_appears_whole(tmp_path):
    from PIL import Image

    records = [{"step": step, "loss": 2.0 / step, "eval_loss": 2.5 / step} for step in (1, 2)]
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    curve.draw(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trainer_log.jsonl", "training_loss.png"]
    Image.open(tmp_path / "training_loss.png").verify()


def test_the_generator_of_random_numbers_is_left_alone(gemma, monkeypatch):
    states = []
    take = samples.Samples.take

    def watched(self, step):
        before = torch.get_rng_state()
        found = take(self, step)
        states.append(torch.equal(before, torch.get_rng_state()))
        return found

    monkeypatch.setattr(samples.Samples, "take", watched)
    gemma.train("random", *VALIDATED, "--sample_rows", 2, "--do_sample", "true")
    assert states == [True] * 4
