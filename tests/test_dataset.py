"""Files as training rows: what is drawn, cut, supervised, left out and cached; every row is accounted for."""

import datetime
import importlib.util
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import workers
from common.conversation.render import TooLongError, encode_text, frame_ids, prompt_ids, special_id, training_sample
from common.conversation.turns import Turn
from common.data import accounts, cache, dataset
from common.errors import UserError
from common.evaluation import asking
from common.files import read_jsonl
from common.inputs import split_sample
from common.knobs import IDS
from gemma_sft import prompt
from gemma_sft.ft_gemma.config import Config

QA = {"question": "问", "answer": "答"}
EMPTY = {"question": "问", "answer": ""}

# ids of conftest's tokenizer: control tokens, 256 bytes, then a piece a character
BOS, EOS, START, END, NEWLINE = 2, 1, 5, 6, 264
USER = [START, 285, 283, 269, 282, NEWLINE]  # <start_of_turn>user\n
MODEL = [END, NEWLINE, START, 277, 279, 268, 269, 276, NEWLINE]  # <end_of_turn>\n<start_of_turn>model\n
A, B, C, D, E, F = range(265, 271)  # a to f
ASK, ANSWER = 312, 313  # 问 答
FRAME = 16  # ids around a single question


def talk(*texts, system=None):
    """Turns of texts said in turn by user and assistant."""
    spoken = [Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    return [Turn("system", system), *spoken] if system else spoken


def write(folder, name, rows):
    """A JSON lines file; a row that is text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file = folder / name
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(file)


def numbered(folder, count, name="a.jsonl"):
    return write(folder, name, [{"question": f"问{number}", "answer": "答"} for number in range(count)])


def lines(rows):
    """The line numbers of a dataset's rows, in order."""
    return [int(where.rpartition(":")[2]) for where in rows[:]["where"]]


def settings(folder, *specs, **knobs):
    return Config(**{"data_path": specs, "cache_dir": str(folder / "cache"), "val_set_size": 0} | knobs)


@pytest.fixture
def prepare(tmp_path, tokenizer):
    """prepare(path, …, knob=value): the TrainingData, cached in tmp_path/cache; no validation split unless asked."""

    def run(*specs, tokenizer=tokenizer, prompt=prompt, **knobs):
        return dataset.prepare(settings(tmp_path, *specs, **knobs), tokenizer, prompt)

    return run


@pytest.fixture
def arrows(tmp_path):
    """The tokenised files in the cache with their times."""
    return lambda: {str(file): file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*/rows.arrow")}


# ---------------------------------------------------------------- sampling and mixing


def test_lengths_are_those_of_the_rows_that_were_drawn(tmp_path, prepare):
    file = write(tmp_path, "a.jsonl", [{"question": "问" * n, "answer": "答"} for n in range(1, 30)])
    rows = prepare(f"{file}#50", val_set_size=0.2)
    for some in (rows.train, rows.validation, rows.train.select(range(0))):
        assert dataset.lengths_of(some).tolist() == some["length"][:]
    assert dataset.lengths_of(prepare(file).train).tolist() == [FRAME + n + 2 for n in range(1, 30)]


def test_all_rows_in_order(tmp_path, prepare):
    rows = prepare(numbered(tmp_path, 10))
    assert lines(rows.train) == list(range(1, 11)) and len(rows.validation) == 0


@pytest.mark.parametrize("text", ["{}", "[{}]", "[\n{}\n]\n"], ids=["objects", "array", "array with margins"])
def test_rows_that_share_a_line_are_told_apart(tmp_path, prepare, text):
    """As json.dump writes a list: they are numbered, held out one by one, and left out one by one."""
    rows = [{"question": f"{n}+1=", "answer": "" if n == 7 else str(n + 1)} for n in range(1, 21)]
    file = tmp_path / "rows.json"
    file.write_text(text.replace("{}", ", ".join(map(json.dumps, rows))))
    made = prepare(str(file), val_set_size=0.2)
    assert (len(made.train), len(made.validation)) == (15, 4)
    assert sorted(lines(made.train) + lines(made.validation)) == [n for n in range(1, 21) if n != 7]
    assert [row.where for row in made.rejected] == [f"{file}:7"]


@pytest.mark.parametrize("ends", [("[", "]", ","), ("", "", "\n")], ids=["array", "objects"])
def test_rows_that_share_a_later_line_are_told_apart(tmp_path, prepare, ends):
    begin, end, between = ends
    rows = [json.dumps({"question": f"{n}+1=", "answer": "" if n == 7 else str(n + 1)}) for n in range(1, 21)]
    file = tmp_path / "rows.json"
    file.write_text(f"{begin}{rows[0]}{between.strip()}\n{rows[1]}{between.strip()}\n{', '.join(rows[2:])}{end}\n")
    made = prepare(str(file), val_set_size=0.2)
    assert (len(made.train), len(made.validation)) == (15, 4)
    where = [f"{file}:{place}" for place in ("1", "2", "3", *(f"3.{part}" for part in range(2, 19)))]
    assert sorted([*made.train["where"], *made.validation["where"], f"{file}:3.5"]) == sorted(where)
    assert [row.where for row in made.rejected] == [f"{file}:3.5"]


@pytest.mark.parametrize("count, times", [(1, {0, 1}), (4, {0, 1}), (10, {1}), (13, {1, 2}), (20, {2}), (37, {3, 4})])
def test_sampling(tmp_path, prepare, count, times):
    rows = prepare(f"{numbered(tmp_path, 10)}#{count}")
    drawn = Counter({line: 0 for line in range(1, 11)})
    drawn.update(lines(rows.train))
    assert len(rows.train) == count == rows.sources[0]["used"]
    assert set(drawn.values()) == times
    assert rows.sources[0]["rows"] == rows.sources[0]["kept"] == 10


def test_the_seed_decides_the_sample(tmp_path, prepare):
    spec = f"{numbered(tmp_path, 50)}#8"
    drawn = {seed: lines(prepare(spec, seed=seed).train) for seed in (1, 2, 3)}
    assert drawn[1] == lines(prepare(spec, seed=1).train)
    assert len({tuple(sorted(sample)) for sample in drawn.values()}) == 3


@pytest.mark.parametrize(
    "spec, expected",
    [("a.jsonl", ("a.jsonl", None)), ("a.jsonl#5", ("a.jsonl", 5)), ("c#.jsonl", ("c#.jsonl", None))]
    + [("c#/a.jsonl#12", ("c#/a.jsonl", 12)), ("a#b", ("a#b", None)), ("https://h/a#7", ("https://h/a", 7))],
)
def test_split_sample(spec, expected):
    assert split_sample(spec) == expected


def test_a_sample_of_nothing_is_refused(tmp_path, prepare):
    with pytest.raises(UserError, match="a.jsonl#0: .*above 0"):
        prepare(f"{numbered(tmp_path, 3)}#0")


def test_files_are_mixed(tmp_path, prepare):
    one, two = numbered(tmp_path, 10, "一.jsonl"), write(tmp_path, "c#.jsonl", [QA, EMPTY, QA])
    rows = prepare(f"{one}#4", two, f"{two}#5")
    wheres = [where.rpartition(":")[0] for where in rows.train[:]["where"]]
    assert wheres == [one] * 4 + [two] * 7
    assert [(source["path"], source["rows"], source["kept"], source["used"]) for source in rows.sources] == [
        (one, 10, 10, 4),
        (two, 3, 2, 2),
        (two, 3, 2, 5),
    ]


def test_missing_files_are_named(tmp_path, prepare):
    with pytest.raises(UserError, match="nothing.jsonl: .*no such file"):
        prepare(str(tmp_path / "nothing.jsonl"))


# ---------------------------------------------------------------- the validation split


@pytest.mark.parametrize(
    "size, held", [(0, 0), (1, 1), (3, 3), (19, 19), (0.25, 5), (0.001, 1), (0.02, 1), (0.9, 18), (0.5, 10)]
)
def test_rows_or_a_share_are_held_out(tmp_path, prepare, size, held):
    rows = prepare(numbered(tmp_path, 20), val_set_size=size)
    assert (len(rows.train), len(rows.validation)) == (20 - held, held)
    assert sorted(lines(rows.train) + lines(rows.validation)) == list(range(1, 21))


@pytest.mark.parametrize("size", [20, 21, 1000, 0.99])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path, prepare, size):
    with pytest.raises(UserError, match=f"--val_set_size {size:g} "):
        prepare(numbered(tmp_path, 20), val_set_size=size)


@pytest.mark.parametrize("spec", ["", "#10"])
def test_a_single_row_is_not_all_held_out(tmp_path, prepare, spec):
    with pytest.raises(UserError, match="--val_set_size 0.02 "):
        prepare(numbered(tmp_path, 1) + spec, val_set_size=0.02)


def test_the_seed_decides_the_split(tmp_path, prepare):
    path = numbered(tmp_path, 50)
    held = {seed: lines(prepare(path, val_set_size=8, seed=seed).validation) for seed in (1, 2)}
    assert held[1] == lines(prepare(path, val_set_size=8, seed=1).validation) != held[2]


def test_a_repeated_row_is_on_one_side_only(tmp_path, prepare):
    rows = prepare(f"{numbered(tmp_path, 10)}#35", val_set_size=0.3)
    assert len(rows.validation) == len(set(lines(rows.validation))) == 3
    assert set(lines(rows.train)) | set(lines(rows.validation)) == set(range(1, 11))
    assert set(lines(rows.train)) & set(lines(rows.validation)) == set()
    assert 35 - 3 * 4 <= len(rows.train) <= 35 - 3 * 3


def test_a_file_named_twice_is_on_one_side_only(tmp_path, prepare):
    path = numbered(tmp_path, 10)
    rows = prepare(path, f"{path}#10", val_set_size=3)
    assert set(lines(rows.train)) & set(lines(rows.validation)) == set()
    assert len(rows.validation) == 3


# ---------------------------------------------------------------- rows left out


def test_rejected_rows_are_listed(tmp_path, prepare):
    path = write(tmp_path, "a.jsonl", [QA, EMPTY, QA, '{"question": 坏', "", QA, {"问": "答"}])
    rows = prepare(path)
    assert lines(rows.train) == [1, 3, 6]
    assert [(row.where, row.row) for row in rows.rejected] == [
        (f"{path}:2", EMPTY),
        (f"{path}:4", '{"question": 坏'),
        (f"{path}:7", {"问": "答"}),
    ]
    kept = read_jsonl(rows.rejected.files[0][0])
    assert [set(row) for row in kept] == [{"where", "reason", "row", "kind"}] * 3
    reasons = [row.reason for row in rows.rejected]
    assert reasons[0] == "answer 是空的 is empty" and "broken JSON line" in reasons[1] and "unknown keys" in reasons[2]
    source = rows.sources[0]
    assert (source["rows"], source["kept"], source["used"]) == (6, 3, 3)


def test_strict_stops_at_the_first(tmp_path, prepare):
    path = write(tmp_path, "a.jsonl", [QA, EMPTY, QA, {"问": "答"}])
    for _ in range(2):  # read, and out of the cache
        with pytest.raises(UserError) as error:
            prepare(path, strict=True)
        assert str(error.value).startswith(f"{path}:2: answer 是空的 is empty")
    assert len(prepare(path).rejected) == 2
    assert len(prepare(numbered(tmp_path, 3, "good.jsonl"), strict=True).train) == 3


@pytest.mark.parametrize("bad, share, refused", [(2, 0.5, False), (3, 0.5, True), (1, 0, True), (3, 0.75, False)])
def test_max_dropped(tmp_path, prepare, bad, share, refused):
    path = write(tmp_path, "a.jsonl", [QA] * (4 - bad) + [EMPTY] * bad)
    if refused:
        with pytest.raises(UserError, match=f"{bad} / 4 .*--max_dropped {share}.*a.jsonl:{5 - bad}: answer"):
            prepare(path, max_dropped=share)
    else:
        assert len(prepare(path, max_dropped=share).train) == 4 - bad


def test_max_dropped_gives_the_reason_of_the_row_it_names(tmp_path, prepare):
    path = write(tmp_path, "a.jsonl", [QA, {"问": "答"}, EMPTY, EMPTY])
    with pytest.raises(UserError, match="a.jsonl:2: .*unknown keys"):
        prepare(path)


def test_nothing_to_train_on(tmp_path, prepare):
    path = write(tmp_path, "a.jsonl", [EMPTY, EMPTY])
    with pytest.raises(UserError, match="no row can be trained on; first: .*a.jsonl:1: answer .*is empty"):
        prepare(path, max_dropped=1)


def test_half_an_emoji_is_a_row_left_out(tmp_path, prepare):
    path = write(tmp_path, "a.jsonl", [QA, r'{"question": "问", "answer": "好\ud83d"}', QA, QA])
    rows = prepare(path)
    assert lines(rows.train) == [1, 3, 4] and [row.where for row in rows.rejected] == [f"{path}:2"]


def test_a_rejected_row_may_hold_half_an_emoji(tmp_path, prepare):
    path = write(tmp_path, "a.jsonl", [QA, r'{"question": "问", "answer": "", "note": "\ud83d"}', QA])
    rows = prepare(path)
    assert lines(rows.train) == [1, 3] and [row.where for row in rows.rejected] == [f"{path}:2"]


def test_a_rejected_parquet_row_may_hold_a_date(tmp_path, prepare):
    import pyarrow
    import pyarrow.parquet

    rows = [row | {"day": datetime.date(2024, 5, 6), "raw": b"\xff"} for row in (QA, EMPTY, QA)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = prepare(str(tmp_path / "a.parquet"))
    assert lines(found.train) == [1, 3] and [row.where[-2:] for row in found.rejected] == [":2"]
    assert "2024" in json.dumps(list(found.rejected))


def test_identity_rows_are_filled_or_reported(tmp_path, prepare, tokenizer):
    asked = [{"question": "你是谁", "answer": text} for text in ("我是{{name}}", "{{AUTHOR}}", "<NAME>", "答")]
    path = write(tmp_path, "a.jsonl", asked)

    def answers(rows):
        return [tokenizer.decode([label for label in labels if label >= 0][:-1]) for labels in rows.train[:]["labels"]]

    assert answers(prepare(path, model_name=("小明",) * 2, model_author=("实验室",) * 2)) == [
        "我是小明",
        "实验室",
        "小明",
        "答",
    ]
    rows = prepare(path, model_name=("小明",) * 2)
    assert answers(rows) == ["我是小明", "小明", "答"]
    assert [(row.where, row.row) for row in rows.rejected] == [(f"{path}:2", asked[1])]
    assert "{{AUTHOR}}" in rows.rejected[0].reason and "--model_author" in rows.rejected[0].reason
    with pytest.raises(UserError, match="3 / 4 .*--max_dropped"):
        prepare(path)


def test_held_out_rows(tmp_path):
    path = write(
        tmp_path, "a.jsonl", [QA, EMPTY, {"text": "一段"}, *[{"input": f"{n}", "output": "答"} for n in range(6)]]
    )
    cfg = settings(tmp_path, "unused")
    kept, left_out = asking.held_out(cfg, [path], 0)
    assert [where for where, _ in kept] == [f"{path}:{line}" for line in (1, 4, 5, 6, 7, 8, 9)]
    assert kept[0][1] == talk("问", "答")
    assert [row.where for row in left_out] == [f"{path}:2", f"{path}:3"]
    assert asking.held_out(cfg, [path], 3)[0] == kept[:3]
    drawn = asking.held_out(cfg, [f"{path}#3"], 0)[0]
    assert drawn == asking.held_out(cfg, [f"{path}#3"], 0)[0] and len({where for where, _ in drawn}) == 3


# ---------------------------------------------------------------- the cache


def test_a_second_time_nothing_is_tokenised(tmp_path, prepare, arrows):
    path = numbered(tmp_path, 10)
    first, before = prepare(path), arrows()
    second = prepare(path)
    assert arrows() == before and len(before) == 1
    assert second.train[:] == first.train[:] and second.sources == first.sources


@pytest.mark.parametrize(
    "knobs",
    [{"seed": 7}, {"val_set_size": 3}, {"strict": True}, {"max_dropped": 0.1}, {"learning_rate": 1.0}, {"epochs": 9}],
    ids=str,
)
def test_what_does_not_change_the_ids_uses_the_cache(tmp_path, prepare, arrows, knobs):
    path = numbered(tmp_path, 10)
    prepare(path)
    before = arrows()
    prepare(f"{path}#4", **knobs)
    assert arrows() == before


@pytest.mark.parametrize(
    "knobs",
    [{"max_length_q": FRAME + 2}, {"max_length_a": 3}, {"loss_on": "all"}, {"prompt_style": "plain"}]
    + [{"model_name": ("小明", "Ming")}, {"model_author": ("实验室", "Lab")}],
    ids=str,
)
def test_what_changes_the_ids_is_tokenised_again(tmp_path, prepare, arrows, knobs):
    rows = [{"question": "ab", "answer": "{{name}}"}, {"question": "ab", "answer": "{{author}}"}]
    path = write(tmp_path, "a.jsonl", [*rows, {"question": "abcd", "answer": "e"}, {"question": "a", "answer": "bcd"}])
    filled = {"model_name": ("a", "a"), "model_author": ("b", "b")}
    first, second = prepare(path, **filled), prepare(path, **filled | knobs)
    assert len(arrows()) == 2
    assert (first.train[:], list(first.rejected)) != (second.train[:], list(second.rejected))


OTHER = {
    "prompt_style": "plain",
    "thinking": "none",
    "loss_on": "all",
    "max_length_q": 7,
    "max_length_a": 7,
    "model_name": ("小明", "Ming"),
    "model_author": ("实验室", "Lab"),
}


def key_of(tmp_path, path="a.jsonl", content="1", tokenizer_id="2", **knobs):
    return cache.cache_key(path, content, settings(tmp_path, "a.jsonl", **knobs), tokenizer_id, prompt)


def test_the_cache_key_holds_every_knob_that_decides_ids_and_no_other(tmp_path):
    assert OTHER.keys() == IDS
    keys = [key_of(tmp_path), *(key_of(tmp_path, **{name: value}) for name, value in OTHER.items())]
    keys += [key_of(tmp_path, path="b.jsonl"), key_of(tmp_path, content="3"), key_of(tmp_path, tokenizer_id="4")]
    assert len(set(keys)) == len(keys)
    assert key_of(tmp_path / "elsewhere", seed=1, epochs=9, lora_r=4, model_save_dir="b") == key_of(tmp_path)


class Watched:
    """A config that remembers which knobs were asked for."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.asked = set()

    def __getattr__(self, name):
        self.asked.add(name)
        return getattr(self.cfg, name)


def test_tokenising_asks_for_no_knob_that_the_cache_key_leaves_out(tmp_path, tokenizer):
    rows = [QA, EMPTY, "broken", {"question": "问", "answer": "答" * 9}, {"question": "你是谁", "answer": "{{name}}"}]
    path = write(tmp_path, "a.jsonl", rows)
    cfg = Watched(settings(tmp_path, path, max_length_a=8))
    dataset.tokenised(path, cfg, tokenizer, cache.encoding_hash(tokenizer), prompt)
    assert cfg.asked == IDS | {"cache_dir", "strict"}


def reads_as_changed(file, read=Path.read_text):
    """Path.read_text as if a line had been added to `file`."""
    return lambda path, *args, **more: read(path, *args, **more) + ("#\n" if path == file else "")


def test_the_cache_key_holds_the_code_of_the_room_and_of_the_prompt(tmp_path, monkeypatch):
    key, files = key_of(tmp_path), [*Path(dataset.__file__).parent.rglob("*.py"), Path(prompt.__file__)]
    assert len(files) > 10
    for file in files:
        monkeypatch.setattr(Path, "read_text", reads_as_changed(file))
        assert key_of(tmp_path) != key, file


def test_changed_content_is_tokenised_again(tmp_path, prepare, arrows):
    path = write(tmp_path, "a.jsonl", [{"question": "a", "answer": "b"}])
    stat = os.stat(path)
    assert prepare(path).train[0]["labels"][-2:] == [B, END]
    write(tmp_path, "a.jsonl", [{"question": "a", "answer": "c"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same name, size and time
    assert os.stat(path).st_size == stat.st_size and os.stat(path).st_mtime_ns == stat.st_mtime_ns
    assert prepare(path).train[0]["labels"][-2:] == [C, END]
    assert len(arrows()) == 2


def test_another_tokenizer_is_tokenised_again(tmp_path, prepare, arrows):
    from gemma_sft.make_embedded import make_tokenizer

    path = write(tmp_path, "a.jsonl", [{"question": "a", "answer": "b"}])
    one, other = make_tokenizer(list("\nabmodelusr")), make_tokenizer(list("\nbamodelusr"))
    first = prepare(path, tokenizer=one).train[0]["input_ids"]
    one(["a", "ab"], padding=True, truncation=True, max_length=2)  # leaves settings in it that change no id
    assert prepare(path, tokenizer=one).train[0]["input_ids"] == first and len(arrows()) == 1
    assert prepare(path, tokenizer=other).train[0]["input_ids"] != first and len(arrows()) == 2


def test_another_template_is_tokenised_again(tmp_path, prepare, arrows):
    path = write(tmp_path, "a.jsonl", [QA])
    prepare(path)
    source = Path(prompt.__file__).read_text(encoding="utf-8")
    family = import_file(tmp_path, "family", source.replace('"model\\n"', '"bot\\n"'))
    assert family.render is not prompt.render
    assert prepare(path, prompt=family).train[0]["input_ids"] != prepare(path).train[0]["input_ids"]
    assert len(arrows()) == 2


def import_file(folder, name, source):
    """A module with this source."""
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def interrupted_at(number):
    """Gemma's prompt; someone presses Ctrl-C at row `number`."""
    rendered = []

    def render(*args):
        rendered.append(args)
        if len(rendered) == number:
            raise KeyboardInterrupt
        return prompt.render(*args)

    return SimpleNamespace(__file__=prompt.__file__, ONE_ANSWER=False, render=render)


def test_an_interrupted_tokenisation_is_not_taken_for_good(tmp_path, prepare, arrows):
    path = numbered(tmp_path, 10)
    with pytest.raises(KeyboardInterrupt):
        prepare(path, prompt=interrupted_at(6))
    assert lines(prepare(path).train) == list(range(1, 11))


def test_a_file_that_breaks_off_is_refused_every_time(tmp_path, prepare):
    path = tmp_path / "a.json"
    path.write_text(f"[{json.dumps(QA)},\n{json.dumps(QA)},\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match="does not end"):
            prepare(str(path))


def test_an_interrupted_tokenisation_leaves_no_rows_behind(tmp_path, prepare):
    with pytest.raises(KeyboardInterrupt):
        prepare(numbered(tmp_path, 10), prompt=interrupted_at(6))
    assert [file.name for file in (tmp_path / "cache").rglob("*") if not file.name.endswith(".lock")] == []


def test_two_at_once_tokenise_once(tmp_path, tokenizer):
    path, rendered, found = numbered(tmp_path, 200), [], []

    def render(*args):
        rendered.append(args)
        return prompt.render(*args)

    family = SimpleNamespace(__file__=prompt.__file__, ONE_ANSWER=False, render=render)
    cfg = settings(tmp_path, path)
    threads = [
        threading.Thread(target=lambda: found.append(len(dataset.prepare(cfg, tokenizer, family).train)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [200] * 3 and len(rendered) == 200


# ---------------------------------------------------------------- several processes


@pytest.fixture
def processes(monkeypatch):
    """Files of more than seven rows are tokenised by two processes, three rows at a time."""
    monkeypatch.setattr(dataset, "CHUNK", 3)
    monkeypatch.setattr(workers, "ALONE", 2)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    monkeypatch.setattr(workers, "any_ready", lambda started: True)


MANY = [QA, EMPTY, {"question": "问" * 90, "answer": "答"}, '{"question": 坏', {"x": 1}, {"text": "一段"}]
MANY += [
    {"question": f"a{number}", "human_answers": ["b"] * (number % 3), "chatgpt_answers": ["c"]} for number in range(9)
]


@pytest.mark.slow
def test_several_processes_make_what_one_makes(tmp_path, tokenizer, request):
    path, knobs = write(tmp_path, "a.jsonl", MANY), {"max_length_q": FRAME + 40, "max_dropped": 1.0}
    alone = dataset.prepare(settings(tmp_path / "one", path, **knobs), tokenizer, prompt)
    request.getfixturevalue("processes")
    together = dataset.prepare(settings(tmp_path / "two", path, **knobs), tokenizer, prompt)
    assert together.train[:] == alone.train[:] and len(alone.train) == 21
    assert together.sources == alone.sources and alone.sources[0]["rows"] == 24 and alone.sources[0]["cut"] > 0
    assert list(together.rejected) == list(alone.rejected)
    assert [int(row.where.rpartition(":")[2]) for row in alone.rejected] == [2, 4, 5]


def test_a_sentencepiece_tokenizer_can_be_handed_to_a_process():
    from chatglm_sft.make_embedded import make_tokenizer

    tokenizer = make_tokenizer(list("\nab问答"))
    copy = pickle.loads(pickle.dumps(tokenizer))
    for text in ("问 a\n[MASK]b", TYPED):
        assert encode_text(copy, text) == encode_text(tokenizer, text)
    assert cache.tokenizer_hash(copy) == cache.tokenizer_hash(tokenizer)
    assert cache.encoding_hash(copy) == cache.encoding_hash(tokenizer)
    copy.chat_template = f"{copy.chat_template} "
    assert cache.encoding_hash(copy) != cache.encoding_hash(tokenizer), "ids may be another template's"


def die(chunk):
    if chunk == [2]:
        os._exit(9)
    return chunk


@pytest.mark.slow
def test_a_process_that_dies_is_told(processes):
    found = workers.map_chunks(die, [[0], [1], [3], [2], [4]])
    with pytest.raises(UserError, match="a tokenising process died"):
        list(found)


def is_deaf(chunk):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="Windows")
def test_processes_that_start_do_not_hear_ctrl_c(processes):
    """Each showed a traceback of its imports."""
    assert all(workers.map_chunks(is_deaf, [[0], [1], [2]])) and not is_deaf([0])


def whose(chunk):
    return os.getpid()


@pytest.mark.slow
def test_work_goes_on_while_processes_start(monkeypatch):
    monkeypatch.setattr(workers, "ALONE", 2)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    pids, end = [os.getpid()], time.monotonic() + 120
    chunks = iter(lambda: pids[-1] == os.getpid() and time.monotonic() < end, False)
    for pid in workers.map_chunks(whose, chunks):
        pids.append(pid)
        time.sleep(0.01)
    assert pids[1:5] == [os.getpid()] * 4, "more than the first two chunks"
    assert pids[-1] != os.getpid()


def test_a_process_that_tokenises_imports_no_torch():
    """It takes as long as all the rest, and a process a core would hold it."""
    code = "import sys, common.data.dataset, gemma_sft.prompt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=dataset.__file__.partition("/common/")[0]).returncode == 0


@pytest.mark.parametrize("cores, ahead", [(1, 1), (2, 9)])
def test_few_chunks_are_read_ahead_of_their_use(monkeypatch, cores, ahead):
    """As many as it takes to see whether processes pay; where there are none, none."""
    monkeypatch.setattr(workers, "cores", lambda: cores)
    monkeypatch.setattr(workers, "any_ready", lambda started: False)
    read = []
    found = workers.map_chunks(list, (read.append(number) or [number] for number in range(100)))
    assert next(found) == [0] and len(read) == ahead
    found.close()


@pytest.mark.slow
def test_processes_that_start_too_late_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(workers, "ALONE", 2)
    monkeypatch.setattr(workers, "cores", lambda: 2)
    assert list(workers.map_chunks(whose, [[0], [1], [2]])) == [os.getpid()] * 3
    assert multiprocessing.active_children(), "still starting"
    end = time.monotonic() + 120
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------- labels, id by id

TWO_ROUNDS = talk("a", "b", "问", "答cd", system="e")
CHAT = [BOS, *USER, E, NEWLINE, NEWLINE, A, *MODEL, B, END, NEWLINE, *USER, ASK, *MODEL, ANSWER, C, D, END]
PLAIN = [BOS, E, NEWLINE, NEWLINE, A, B, EOS, ASK, ANSWER, C, D, EOS]


def only(ids, *places):
    """Labels: these ids where a place is counted, -100 elsewhere."""
    return [id_ if number in places else -100 for number, id_ in enumerate(ids)]


@pytest.mark.parametrize(
    "style, loss_on, ids, labels",
    [
        ("chat", "all", CHAT, [-100, *CHAT[1:]]),
        ("chat", "answer", CHAT, only(CHAT, 20, 21, 39, 40, 41, 42)),
        ("chat", "last", CHAT, only(CHAT, 39, 40, 41, 42)),
        ("plain", "all", PLAIN, [-100, *PLAIN[1:]]),
        ("plain", "answer", PLAIN, only(PLAIN, 5, 6, 8, 9, 10, 11)),
        ("plain", "last", PLAIN, only(PLAIN, 8, 9, 10, 11)),
        ("log", "answer", PLAIN, only(PLAIN, 5, 6, 8, 9, 10, 11)),
    ],
)
def test_labels(tokenizer, style, loss_on, ids, labels):
    sample = training_sample(tokenizer, prompt, TWO_ROUNDS, style, loss_on, 512, 512)
    assert sample == (ids, labels, False)


@pytest.mark.parametrize("style", prompt.STYLES)
@pytest.mark.parametrize("loss_on", ["all", "answer", "last"])
def test_labels_of_a_text(tokenizer, style, loss_on):
    sample = training_sample(tokenizer, prompt, [Turn("text", "ab")], style, loss_on, 512, 512)
    assert sample == ([BOS, A, B, EOS], [-100, A, B, EOS], False)


def test_rows_of_a_prepared_file(tmp_path, prepare):
    messages = [{"role": turn.role, "content": turn.text} for turn in TWO_ROUNDS]
    path = write(tmp_path, "a.jsonl", [{"messages": messages}, {"text": "ab"}])
    rows = prepare(path, loss_on="last")
    assert rows.train[:] == {
        "input_ids": [CHAT, [BOS, A, B, EOS]],
        "labels": [only(CHAT, 39, 40, 41, 42), [-100, A, B, EOS]],
        "length": [43, 4],
        "cut": [False, False],
        "where": [f"{path}:1", f"{path}:2"],
    }


# ---------------------------------------------------------------- over-long rows


def sample_of(tokenizer, turns, longest, longest_answer=512, style="chat"):
    return training_sample(tokenizer, prompt, turns, style, "answer", longest, longest_answer)


@pytest.mark.parametrize(
    "longest, kept",
    [(FRAME + 6, "abcdef"), (FRAME + 5, "abcef"), (FRAME + 4, "abef"), (FRAME + 2, "af"), (FRAME + 1, "a")],
)
def test_the_middle_of_the_question_goes(tokenizer, longest, kept):
    question = [A + "abcdef".index(letter) for letter in kept]
    sample = sample_of(tokenizer, talk("abcdef", "问答"), longest)
    assert sample.input_ids == [BOS, *USER, *question, *MODEL, ASK, ANSWER, END]
    assert sample.labels == [-100] * (FRAME + len(kept)) + [ASK, ANSWER, END]
    assert sample.cut is (kept != "abcdef")


def test_no_room_for_a_question(tokenizer):
    with pytest.raises(TooLongError, match=f"--max_length_q {FRAME}"):
        sample_of(tokenizer, talk("abcdef", "答"), FRAME)


@pytest.mark.parametrize(
    "room, kept",
    [
        (0, talk("a", "b", "c", "d", "abcdef", "答", system="e")),
        (-1, talk("c", "d", "abcdef", "答", system="e")),
        (-19, talk("c", "d", "abcdef", "答", system="e")),
        (-20, talk("abcdef", "答", system="e")),
        (-38, talk("abcdef", "答", system="e")),
        (-39, talk("abcef", "答", system="e")),
    ],
)
def test_the_oldest_turns_go_first_and_the_system_text_stays(tokenizer, room, kept):
    turns = talk("a", "b", "c", "d", "abcdef", "答", system="e")
    whole = len(sample_of(tokenizer, turns, 512).input_ids) - 2  # without answer and stop
    sample = sample_of(tokenizer, turns, whole + room)
    assert sample == sample_of(tokenizer, kept, 512)._replace(cut=room < 0)
    assert len(sample.input_ids) - 2 <= whole + room
    assert sample.input_ids[:10] == [BOS, *USER, E, NEWLINE, NEWLINE]


def test_system_text_that_fills_the_prompt_is_refused(tokenizer):
    with pytest.raises(TooLongError, match="--max_length_q 40"):
        sample_of(tokenizer, talk("a", "b", system="abcdef" * 10), 40)


@pytest.mark.parametrize("style", prompt.STYLES)
def test_an_answer_that_is_too_long_is_never_cut(tokenizer, style):
    turns = talk("a", "abcd")
    assert sample_of(tokenizer, turns, 512, 5, style).input_ids[-5:-1] == [A, B, C, D]
    with pytest.raises(TooLongError, match="5 个 token.*--max_length_a 4"):
        sample_of(tokenizer, turns, 512, 4, style)


def test_over_long_rows_are_cut_or_dropped_and_counted(tmp_path, prepare, capsys):
    asked = [
        {"question": "ab", "answer": "cd"},
        {"question": "abcdef", "answer": "cd"},  # cut
        {"question": "ab", "answer": "abcd"},  # dropped
        {"query": "abc", "response": "c", "history": [["a", "b"]]},  # cut
        {"question": "ab", "answer": ""},  # dropped
    ]
    path = write(tmp_path, "a.jsonl", asked)
    rows = prepare(path, max_length_q=FRAME + 3, max_length_a=3)
    assert rows.train[:]["input_ids"] == [
        [BOS, *USER, A, B, *MODEL, C, D, END],
        [BOS, *USER, A, B, F, *MODEL, C, D, END],
        [BOS, *USER, A, B, C, *MODEL, C, END],
    ]
    assert [row.where for row in rows.rejected] == [f"{path}:3", f"{path}:5"]
    assert "--max_length_a 3" in rows.rejected[0].reason and "abcd" in json.dumps(rows.rejected[0].row)
    source = rows.sources[0]
    assert (source["rows"], source["kept"], source["cut"], source["used"]) == (5, 3, 2, 3)
    assert (source["tokens"], source["supervised"]) == (21 + 22 + 21, 3 + 3 + 2)
    accounts.show_counts(rows)
    out = capsys.readouterr().out
    assert "rows 5, 可用 kept 3, 截断 cut 2, 剔除 dropped 2, 使用 used 3, token 64, 计损失 supervised 12%" in out
    assert "train 3, 验证 validation 0" in out and "answer 是空的 is empty" in out


@pytest.mark.parametrize("val_set_size", [0, 4])
def test_counts_add_up(tmp_path, prepare, val_set_size):
    asked = [QA, EMPTY, {"question": "ab" * 40, "answer": "c"}, {"question": "a", "answer": "c" * 40}, {"x": 1}, QA]
    one, two = write(tmp_path, "a.jsonl", asked * 5), numbered(tmp_path, 7, "b.jsonl")
    rows = prepare(one, f"{two}#4", max_length_q=FRAME + 20, max_length_a=20, val_set_size=val_set_size)
    for source in rows.sources:
        rejected = [row for row in rows.rejected if row.where.startswith(source["path"])]
        assert source["rows"] == source["kept"] + len(rejected)
    assert [source["rows"] for source in rows.sources] == [30, 7]
    assert [source["kept"] for source in rows.sources] == [15, 7]
    assert [source["cut"] for source in rows.sources] == [5, 0]
    assert len(rows.train) + len(rows.validation) == 15 + 4 == sum(source["used"] for source in rows.sources)
    if not val_set_size:
        first = rows.train[:15]
        assert rows.sources[0]["tokens"] == sum(map(len, first["input_ids"])) == sum(first["length"])
        assert rows.sources[0]["supervised"] == sum(label != -100 for row in first["labels"] for label in row)


SILENT = """
from common.conversation.render import ANSWER, FRAME, Piece, encode_text

ONE_ANSWER = False

def render(tokenizer, turns, style):
    part = FRAME if "a" in turns[-1].text else ANSWER
    return [Piece([tokenizer.bos_token_id], FRAME), Piece(encode_text(tokenizer, turns[-1].text), part)]
"""


def test_a_row_without_a_supervised_id_never_reaches_training(tmp_path, prepare):
    family = import_file(tmp_path, "silent", SILENT)
    path = write(tmp_path, "a.jsonl", [{"question": "q", "answer": text} for text in ("b", "ab", "c")])
    rows = prepare(path, prompt=family)
    assert lines(rows.train) == [1, 3] and rows.sources[0]["kept"] == 2
    assert [row.where for row in rows.rejected] == [f"{path}:2"]
    assert "no id of the row is supervised" in rows.rejected[0].reason


# ---------------------------------------------------------------- one renderer for training and answering

TYPED = "<bos><eos><start_of_turn>model\n<end_of_turn><pad><unk><mask>"
CONVERSATIONS = {
    "one round": talk("类型#上衣*风格#街头", "这件上衣很有街头感。"),
    "system": talk("请介绍一下北京。", "好的。", system="请用中文回答。"),
    "three rounds": talk("一加一？", "二。", "再加一？", "三。\n\n就是三。", "谢谢", "不客气"),
    "rounds with system": talk(" 你好\n", " hello ", "Bye", "再见🙂", system="  简短 \n"),
    "typed control tokens": talk(f"什么是 {TYPED}？", f"{TYPED} 是控制符。", TYPED, TYPED, system=TYPED),
    "long question": talk("问题很长，" * 30 + "\n\n请总结。", "好。"),
    "long history": talk("问" * 50, "答" * 20, "再问" * 20, "再答" * 10, "最后" * 20, "完。", system="规则"),
}


@pytest.fixture(params=["characters", "gemma"])
def any_tokenizer(request):
    return request.getfixturevalue("tokenizer" if request.param == "characters" else "gemma_tokenizer")


def answers_of(labels):
    """The runs of supervised ids."""
    runs = [[]]
    for label in labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("style", prompt.STYLES)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
def test_training_and_answering_see_the_same_prompt(any_tokenizer, style, name, whole):
    turns = CONVERSATIONS[name]
    shortest = [*turns[: turns[0].role == "system"], Turn("user", turns[-2].text.strip()[0])]
    least, most = (len(prompt_ids(any_tokenizer, prompt, asked, style, 100_000)[0]) for asked in (shortest, turns[:-1]))
    limit = most if whole else (least + most) // 2
    asked, cut = prompt_ids(any_tokenizer, prompt, turns[:-1], style, limit)
    sample = training_sample(any_tokenizer, prompt, turns, style, "answer", limit, 512)
    ids, labels = sample.input_ids, sample.labels

    assert ids[: len(asked)] == asked and len(asked) <= limit
    assert sample.cut is cut is not whole
    assert labels[len(asked) :] == ids[len(asked) :] and labels[len(asked) - 1] == -100
    assert ids[0] == BOS and ids.count(BOS) == 1
    stops = set(prompt.stop_ids(any_tokenizer, style))
    answers = answers_of(labels)
    assert [stops & set(answer[:-1]) for answer in answers] == [set()] * len(answers)
    assert {answer[-1] for answer in answers} == {prompt.stop_ids(any_tokenizer, style)[0]}
    if whole:
        assert len(answers) == sum(turn.role == "assistant" for turn in turns)
    if style == "chat":
        frame = [special_id(any_tokenizer, "<start_of_turn>"), *frame_ids(any_tokenizer, "user\n")]
        assert asked[1 : 1 + len(frame)] == frame
        frame = [special_id(any_tokenizer, "<start_of_turn>"), *frame_ids(any_tokenizer, "model\n")]
        assert asked[-len(frame) :] == frame


@pytest.mark.parametrize("style", prompt.STYLES)
def test_typed_control_tokens_stay_text(any_tokenizer, style):
    turns = CONVERSATIONS["typed control tokens"]
    ids = training_sample(any_tokenizer, prompt, turns, style, "answer", 100_000, 512).input_ids
    names = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>", "<unk>", "<mask>"]
    counts = [ids.count(any_tokenizer.convert_tokens_to_ids(name)) for name in names]
    assert counts == ([1, 0, 4, 4, 0, 0, 0] if style == "chat" else [1, 2, 0, 0, 0, 0, 0])
    assert any_tokenizer.decode(encode_text(any_tokenizer, TYPED)) == TYPED
    assert any_tokenizer.decode(ids).count(TYPED) == 5


@pytest.mark.parametrize("style", prompt.STYLES)
def test_system_text_is_folded_into_the_first_question(any_tokenizer, style):
    def ids(turns):
        return training_sample(any_tokenizer, prompt, turns, style, "all", 512, 512).input_ids

    assert ids(talk("你好", "好", "再见", "好", system="规则")) == ids(talk("规则\n\n你好", "好", "再见", "好"))


@pytest.mark.parametrize("number", [0, 3])
def test_golden_prompts(fixtures, gemma_tokenizer, number):
    golden = json.loads((fixtures / "golden_prompt_ids.json").read_text(encoding="utf-8"))[number]
    asked = [Turn("user", golden["instruction"])]
    assert golden["family"] == "gemma"
    found = prompt_ids(gemma_tokenizer, prompt, asked, golden["prompt_style"], 512)
    assert found == (golden["input_ids"], False)
    assert gemma_tokenizer.decode(found[0]) == golden["text"]
