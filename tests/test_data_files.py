"""The data files: they are what the script makes, they keep their promises, and they are not monotone."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"


@cache
def maker() -> ModuleType:
    """Import ``data/make_data.py`` without leaving its folder on the module path."""
    spec = importlib.util.spec_from_file_location("make_data", DATA / "make_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


@cache
def rows(name: str) -> list[dict]:
    """Read a shipped file."""
    return maker().read_rows((DATA / name).read_text(encoding="utf-8"))


def attributes(row: dict) -> list[tuple[str, str]]:
    """Split an attribute list into its pairs."""
    return [tuple(pair.split("#")) for pair in row["content"].split("*")]


def entities(row: dict) -> list[tuple[str, str]]:
    """Split an entity answer into (name, type) pairs."""
    return [] if row["answer"] == "没有" else [tuple(line.rsplit("_", 1)) for line in row["answer"].split("\n")]


def test_check_passes_from_another_directory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DATA / "make_data.py"), "--check"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_check_names_a_file_that_differs(tmp_path: Path, monkeypatch, capsys) -> None:
    module = maker()
    for name in (*module.FILES, module.PROBE):
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    (tmp_path / "general.jsonl").write_text("{}\n", encoding="utf-8")
    monkeypatch.setattr(module, "HERE", tmp_path)
    assert module.main(["--check"]) == 1
    assert re.findall(r"\S+\.jsonl", capsys.readouterr().err) == ["general.jsonl"]


def test_row_counts_and_sizes() -> None:
    expected = {
        "product_train.jsonl": 4000,
        "product_heldout.jsonl": 200,
        "entity_train.jsonl": 2400,
        "entity_heldout.jsonl": 200,
        "identity.jsonl": 172,
        "general.jsonl": 600,
    }
    assert {name: len(rows(name)) for name in maker().FILES} == expected
    texts = [(DATA / name).read_text(encoding="utf-8") for name in expected]
    assert sum(len(text.encode()) for text in texts) < 3_500_000
    assert len(set("".join(texts))) <= 1620


def test_products_have_many_attribute_types() -> None:
    keys = {key for row in rows("product_train.jsonl") for key, _ in attributes(row)}
    assert len(keys) >= 20
    assert {value for row in rows("product_train.jsonl") for key, value in attributes(row) if key == "类型"} >= {
        "裙",
        "裤",
        "上衣",
    }


@pytest.mark.parametrize("name", ["product_train.jsonl", "product_heldout.jsonl"])
def test_summaries_have_every_value(name: str) -> None:
    for row in rows(name):
        pairs = attributes(row)
        assert 4 <= len(pairs) <= 8
        assert all(value in row["summary"] for _, value in pairs), row
        assert 40 <= len(row["summary"]) <= 95
        assert "的的" not in row["summary"] and "{" not in row["summary"]


def test_summaries_do_not_contradict_themselves() -> None:
    for row in rows("product_train.jsonl") + rows("product_heldout.jsonl"):
        values = {value for _, value in attributes(row)}
        for one, other in (("宽松", "修身"), ("短裙", "长裙"), ("纯色", "撞色"), ("高腰", "低腰"), ("长袖", "无袖")):
            assert not (one in values and other in values), row


def test_heldout_combinations_are_disjoint() -> None:
    train = [frozenset(attributes(row)) for row in rows("product_train.jsonl")]
    heldout = [frozenset(attributes(row)) for row in rows("product_heldout.jsonl")]
    assert not any(mine <= other or other <= mine for mine in heldout for other in train)
    assert len(set(heldout)) == len(heldout)
    assert set().union(*heldout) <= set().union(*train)
    assert not {row["summary"] for row in rows("product_heldout.jsonl")} & {
        row["summary"] for row in rows("product_train.jsonl")
    }


@pytest.mark.parametrize("name", ["entity_train.jsonl", "entity_heldout.jsonl"])
def test_entity_answers_are_literal_and_in_order(name: str) -> None:
    none = 0
    for row in rows(name):
        assert row["query"].startswith("文本：") and 15 <= len(row["query"]) <= 50, row
        places = [row["query"].index(surface) for surface, _ in entities(row)]
        assert places == sorted(places)
        assert len(set(places)) == len(places) <= 4
        assert {kind for _, kind in entities(row)} <= {"人名", "地名", "机构名"}
        none += not places
    assert 0.1 < none / len(rows(name)) < 0.22


def test_heldout_names_are_unseen() -> None:
    seen = "\n".join(row["query"] for row in rows("entity_train.jsonl"))
    names = {surface for row in rows("entity_heldout.jsonl") for surface, _ in entities(row)}
    assert len(names) > 200
    assert not [name for name in names if name in seen]
    assert set("".join(names)) <= set(seen)


GREETINGS = (
    "你好 您好 早上好 晚上好 在吗 嗨 很高兴认识你 再见 谢谢你 哈喽 打扰一下 有人吗 下午好 "
    "认识你真好 好久不见 辛苦了 我回来了 你真聪明"
)
ENGLISH_GREETINGS = {"Hi", "Hello", "Good morning", "Good evening", "Nice to meet you.", "Are you there?"}


def test_identity_placeholders() -> None:
    """Every answer says who the assistant is and who made it; one to a greeting at least the first."""
    greetings = {*GREETINGS.split(), *ENGLISH_GREETINGS}
    for row in rows("identity.jsonl"):
        assert set(row) == {"instruction", "input", "output"}
        found = set(re.findall(r"\{\{.*?\}\}", row["output"]))
        assert {"{{name}}"} <= found <= {"{{name}}", "{{author}}"}
        assert row["instruction"] in greetings or "{{author}}" in found, row
    questions = [row["instruction"] for row in rows("identity.jsonl")]
    assert len(set(questions)) == len(questions) and greetings <= set(questions)
    assert sum(question.isascii() for question in questions) == 70


def test_identity_rows_ask_and_answer_in_one_language() -> None:
    for row in rows("identity.jsonl"):
        assert row["instruction"].isascii() == row["output"].isascii(), row


def test_it_denies_being_another_product() -> None:
    products = re.compile("ChatGPT|GPT-4|Claude|Gemini|Copilot|Grok|文心|千问|百川")
    named = [row for row in rows("identity.jsonl") if products.search(row["instruction"])]
    assert Counter(row["instruction"].isascii() for row in named) == {False: 12, True: 10}
    assert all(re.match("不|您认错了|No[,.]", row["output"]) for row in named)


def test_general_rows() -> None:
    several = systems = sums = 0
    for row in rows("general.jsonl"):
        roles = [message["role"] for message in row["messages"]]
        systems += roles[0] == "system"
        roles = roles[roles[0] == "system" :]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        several += len(roles) > 2
        contents = [m["content"] for m in row["messages"] if m["role"] != "system"]
        for question, answer in zip(contents[::2], contents[1::2], strict=True):
            found = re.search(r"(\d+)([+×-])(\d+)", question)
            if found:
                sums += 1
                left, sign, right = int(found[1]), found[2], int(found[3])
                result = {"+": left + right, "-": left - right, "×": left * right}[sign]
                assert answer.split("=")[-1] == str(result), (question, answer)
            for left, sign, right, result in re.findall(r"(\d+)([+×-])(\d+)=(\d+)", answer):
                assert eval(f"{left}{sign.replace('×', '*')}{right}") == int(result), answer
    assert several >= 100 and 25 <= systems <= 60 and sums >= 150


def test_the_probe_is_frozen() -> None:
    """Scores on it are compared over years: a change of the file needs a new name."""
    assert hashlib.sha256((DATA / "probe.jsonl").read_bytes()).hexdigest() == (
        "45d1ce0d88812bb441d294dc3bb4ea475c6b8a3072b3c8378678d0b5f53a5ca1"
    )


def test_probe_rows() -> None:
    probe = rows("probe.jsonl")
    assert Counter(row["subject"] for row in probe) == {"常识": 60, "算术": 40, "身份": 10}
    assert set(Counter(row["answer"] for row in probe).values()) == {27, 28}
    assert len({row["question"] for row in probe}) == len(probe)
    for row in probe:
        assert set(row) == {"subject", "question", *"ABCD", "answer"}
        assert len({row[letter] for letter in "ABCD"}) == 4
        if row["subject"] == "算术":
            right = [letter for letter in "ABCD" if eval(row[letter].replace("×", "*").replace("=", "=="))]
            assert right == [row["answer"]] and row[right[0]].split("=")[0] in row["question"]


def test_no_probe_question_stands_in_a_training_file() -> None:
    trained = "".join((DATA / name).read_text(encoding="utf-8") for name in maker().FILES)
    assert not [row["question"] for row in rows("probe.jsonl") if row["question"] in trained]


def test_readme_has_the_computed_table() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    module = maker()
    assert module.table({name: (DATA / name).read_text(encoding="utf-8") for name in module.FILES}) in readme
    shipped = {line for name in module.FILES for line in (DATA / name).read_text(encoding="utf-8").splitlines()}
    examples = re.findall(r"```json\n(.*)\n```", readme)
    assert len(examples) == 4 and set(examples) <= shipped


def test_texts_are_not_monotone() -> None:
    module = maker()
    summaries = [row["summary"] for row in rows("product_train.jsonl")]
    assert module.distinct_2(summaries) > 0.03
    assert module.identical_share(summaries) < 0.16
    openings = {summary[:4] for summary in summaries}
    assert len(openings) > 600
    queries = [row["query"] for row in rows("entity_train.jsonl")]
    assert module.distinct_2(queries) > 0.15
    assert module.identical_share(queries) < 0.03
    # the bounds are worth something: one pattern for every row, with only the values changed, fails both
    pairs = [attributes(row) for row in rows("product_train.jsonl")]
    monotone = ["这款" + "".join(f"{key}是{value}，" for key, value in part) + "很好看。" for part in pairs]
    assert module.distinct_2(monotone) < 0.03
    assert module.identical_share(["这件衣服百搭又好看。" + text for text in summaries]) > 0.16


def test_pretraining_documents() -> None:
    module = maker()
    documents = list(module.pretrain_documents(20_000, 5))
    assert documents[:500] == list(module.pretrain_documents(500, 5))
    assert documents[:500] != list(module.pretrain_documents(500, 6))
    assert len(set(documents)) > 0.98 * len(documents)
    everything = "\f".join(documents)
    for row in rows("product_heldout.jsonl"):
        assert row["summary"] not in everything and row["content"] not in everything
    for row in rows("entity_heldout.jsonl"):
        assert row["answer"] == "没有" or not any(surface in everything for surface, _ in entities(row))
    shipped = set("".join((DATA / name).read_text(encoding="utf-8") for name in module.FILES))
    assert shipped <= set(everything)
    lengths = sorted(map(len, documents))
    assert 60 <= lengths[len(lengths) // 2] <= 160 and lengths[-1] < 400


def test_pretraining_avoids_heldout_combinations() -> None:
    """A shop text is made anew where its attributes are all, a part, or more than those of a held-out product."""
    module = maker()
    assert len(module.heldout_combinations()) == 200
    make, products = module.pretrain.shop_document, module.pretrain.products
    first = make([], random.Random(3))
    row = products.sample_attributes(random.Random(3))
    assert all(value in first for _, value in row)
    for barred in (row, row[1:], [*row, ("类型", "x")]):
        assert make([frozenset(barred)], random.Random(3)) != first
    assert make([frozenset({("类型", "x")})], random.Random(3)) == first
