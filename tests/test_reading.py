"""Files as conversations: every shape is read with no row lost, every defect is named with its line."""

import ast
import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from common.conversation import turns
from common.conversation.render import TooLongError
from common.conversation.turns import Call, FormatError, Turn, fill_identity
from common.data import arrays, defects, formats
from common.data.defects import DEFECTS
from common.data.sources import read_records
from common.errors import RowError, UserError
from common.evaluation import asking

QA = '{"question": "问", "answer": "答"}'
ASKED = [Turn("user", "问"), Turn("assistant", "答")]


def write(folder, name, content):
    """A file with this text or these bytes; its path as users give it."""
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def zipped(files):
    """The bytes of a zip of {name: text}."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        for name, text in files.items():
            packed.writestr(name, text)
    return content.getvalue()


def tarred(files, mode="w"):
    """The bytes of a tar of {name: text}."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as packed:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            packed.addfile(member, io.BytesIO(text.encode()))
    return content.getvalue()


def read(path):
    """What is in a file: ([(line, turns)], [(line, why a row cannot be used)])."""
    found, problems = [], []
    for record in read_records(str(path)):
        try:
            if record.problem:
                raise FormatError(record.kind, record.problem)
            found += [(record.line, turns) for turns in formats.read_row(record.value).conversations]
        except FormatError as problem:
            problems.append((record.line, str(problem)))
    return found, problems


def missing(words, text):
    return [word for word in words if word not in text]


def talk(*texts, system=None):
    """Turns of texts said in turn by user and assistant."""
    spoken = [Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]
    return [Turn("system", system), *spoken] if system else spoken


# ---------------------------------------------------------------- real files

EMPTY = [(line, "std_answer 是空的 is empty") for line in (4, 5, 6, 7, 18, 19)]
# file: conversations, line of the first, line of the last, problems
REAL = {
    "advgen_content_summary.json": (400, 1, 400, []),
    "advgen_input_output.json": (10, 2, 11, []),
    "alpaca_history.json": (30, 2, 250, []),
    "alpaca_instruction_input_output.json": (100, 2, 497, []),
    "arc_options_in_instruction.json": (40, 2, 236, []),
    "belle_question_std_answer.json": (14, 1, 20, EMPTY),
    "firefly_conversation_human_assistant.jsonl": (10, 1, 10, []),
    "gsm8k.jsonl": (40, 1, 40, []),
    "identity_placeholders_lower.json": (91, 2, 452, []),
    "identity_placeholders_upper.json": (20, 2, 97, []),
    "messages.json": (20, 2, 230, []),
    "msra_instruct_query_answer.txt": (120, 1, 120, []),
    "sharegpt_conversations_tools.json": (10, 2, 271, []),
    "small_formats/alpaca.csv": (3, 2, 4, []),
    "small_formats/alpaca.jsonl": (3, 1, 3, []),
    "small_formats/alpaca2.csv": (3, 2, 4, []),
    "small_formats/chatml.jsonl": (3, 1, 3, []),
    "small_formats/conversations.jsonl": (3, 1, 3, []),
    "small_formats/sharegpt.jsonl": (3, 1, 3, []),
    "small_formats/swift_multi.json": (3, 1, 3, []),
    "small_formats/swift_multi.jsonl": (3, 1, 3, []),
    "small_formats/swift_pre.csv": (3, 2, 4, []),
    "small_formats/swift_pre.jsonl": (3, 1, 3, []),
    "small_formats/swift_single.csv": (3, 2, 4, []),
    "small_formats/swift_single.jsonl": (3, 1, 3, []),
}


def test_every_real_file_is_in_the_table(fixtures):
    folder = fixtures / "data"
    choices = {"ceval", "cmmlu", "mmlu"}
    files = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file() and file.suffix != ".md"}
    assert {str(file) for file in files if file.parts[0] not in choices} == set(REAL)


@pytest.mark.parametrize("name", REAL)
def test_real_files_lose_no_row(fixtures, name):
    rows, first, last, expected = REAL[name]
    found, problems = read(fixtures / "data" / name)
    assert (len(found), found[0][0], found[-1][0], problems) == (rows, first, last, expected)
    lines = [line for line, _ in found] + [line for line, _ in problems]
    assert len(set(lines)) == rows + len(expected)


# the turns of a raw row, said once more and independently of common/data/formats.py
REAL_TURNS = {
    "advgen_content_summary.json": lambda row: talk(row["content"], row["summary"]),
    "advgen_input_output.json": lambda row: talk(row["input"], row["output"]),
    "alpaca_history.json": lambda row: talk(
        *sum(row["history"], []), "\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]
    ),
    "arc_options_in_instruction.json": lambda row: talk(row["instruction"], row["output"]),
    "firefly_conversation_human_assistant.jsonl": lambda row: talk(
        *(text for round_ in row["conversation"] for text in (round_["human"], round_["assistant"]))
    ),
    "gsm8k.jsonl": lambda row: talk(row["question"], row["answer"]),
    "messages.json": lambda row: talk(*(message["content"] for message in row["messages"])),
    "msra_instruct_query_answer.txt": lambda row: talk(f"{row['instruct']}\n{row['query']}", row["answer"]),
    "sharegpt_conversations_tools.json": lambda row: called(row),
}
WHO = {"human": "user", "gpt": "assistant", "observation": "tool"}


def called(row):
    """Turns of LLaMA-Factory's rows of tools: a call is a JSON object in a message of its own."""
    tools = [{"type": "function", "function": tool} for tool in json.loads(row["tools"])]
    turns = [Turn("system", "", tools=json.dumps(tools, ensure_ascii=False))] if tools else []
    for message in row["conversations"]:
        if message["from"] != "function_call":
            turns.append(Turn(WHO[message["from"]], message["value"]))
            continue
        call = json.loads(message["value"])
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        turns.append(Turn("assistant", "", calls=(Call(call["name"], arguments),)))
    return turns


@pytest.mark.parametrize("name", REAL_TURNS)
def test_real_turns(fixtures, name):
    text = (fixtures / "data" / name).read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]
    assert [turns for _, turns in read(fixtures / "data" / name)[0]] == [REAL_TURNS[name](row) for row in rows]


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    "row, turns",
    [
        ({"instruction": "译", "input": "天", "output": "sky"}, talk("译\n天", "sky")),
        ({"instruction": "译", "input": "", "output": "sky"}, talk("译", "sky")),
        ({"instruction": "译", "input": None, "output": "sky"}, talk("译", "sky")),
        ({"instruction": "译", "output": "sky"}, talk("译", "sky")),
        ({"input": "天", "output": "sky"}, talk("天", "sky")),
        (
            {"instruction": "三", "input": "", "output": "四", "history": [["一", "二"]], "system": "简短"},
            talk("一", "二", "三", "四", system="简短"),
        ),
        ({"instruction": "问", "output": "答", "history": None, "system": ""}, talk("问", "答")),
        ({"content": "类型#裙", "summary": "好看。"}, talk("类型#裙", "好看。")),
        ({"instruct": "抽取", "query": "文", "answer": "无"}, talk("抽取\n文", "无")),
        ({"query": "问", "response": "答"}, talk("问", "答")),
        ({"query": "问", "response": "答", "tag": "zh"}, talk("问", "答")),  # self-cognition
        (
            {"system": "简短", "query": "三", "response": "四", "history": [["一", "二"]]},
            talk("一", "二", "三", "四", system="简短"),
        ),
        ({"response": "一段文字"}, [Turn("text", "一段文字")]),
        ({"text": "一段文字"}, [Turn("text", "一段文字")]),
        ({"kind": "译", "input": "问", "target": "答"}, talk("问", "答")),  # Firefly
        ({"question": "问", "answer": "答"}, talk("问", "答")),
        ({"question": "问", "std_answer": "答", "class": "qa"}, talk("问", "答")),
        ({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}, talk("问", "答")),
        (
            {
                "messages": [
                    {"role": "system", "content": "简短"},
                    {"role": "user", "content": "一"},
                    {"role": "assistant", "content": "二"},
                    {"role": "user", "content": "三"},
                    {"role": "assistant", "content": "四"},
                ]
            },
            talk("一", "二", "三", "四", system="简短"),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "查天气"},
                    {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "晴"},
                    {"from": "gpt", "value": "晴天。"},
                ],
                "tools": "[工具]",
            },
            talk("查天气", "{}", "晴", "晴天。", system="[工具]"),
        ),
        (
            {
                "conversation_id": 1,
                "category": "QA",
                "conversation": [{"human": "一", "assistant": "二"}, {"human": "三", "assistant": "四"}],
                "dataset": "x",
            },
            talk("一", "二", "三", "四"),
        ),
        ({"system": "简短", "conversation": [{"human": "一", "assistant": "二"}]}, talk("一", "二", system="简短")),
        (
            {
                "conversation": [{"system": "简短", "input": "一", "output": "二"}, {"input": "三", "output": "四"}]
            },  # XTuner
            talk("一", "二", "三", "四", system="简短"),
        ),
        (  # ChatGLM3
            {"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
            talk("问", "答"),
        ),
        ({"messages": [{"from": "user", "value": "问"}, {"from": "assistant", "value": "答"}]}, talk("问", "答")),
        ({"instruction": "问", "context": "文", "response": "答", "category": "qa"}, talk("问\n文", "答")),  # Dolly
        ({"instruction": "问", "input": "", "response": "答"}, talk("问", "答")),
        ({"prompt": "问", "completion": "答"}, talk("问", "答")),
        ({"instruction": "选", "input": "", "output": "选甲", "answer": "甲"}, talk("选", "选甲")),
        ({"question": " 问\n题 ", "answer": " 答 "}, talk(" 问\n题 ", " 答 ")),  # nothing is trimmed here
    ],
)
def test_shapes(row, turns):
    assert formats.read_row(row).conversations == [turns]


def moss(*texts, command="None"):
    """Rounds of MOSS's chat, made up."""
    rounds = zip(texts[::2], texts[1::2], strict=True)
    return {
        f"turn_{number}": {
            "Human": f"<|Human|>: {question}<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Commands": f"<|Commands|>: {command}<eoc>\n",
            "Tool Responses": "<|Results|>: None<eor>\n",
            "MOSS": f"<|MOSS|>: {answer}<eom>\n",
        }
        for number, (question, answer) in enumerate(rounds, 1)
    }


def said(role, text, *replies, **more):
    """A message of an OpenAssistant tree, made up."""
    return {"message_id": "1", "text": text, "role": role, "lang": "zh", "replies": list(replies)} | more


def thinking(question, thought, answer):
    """A question and an answer, with what is thought before it."""
    asked, answered = talk(question, answer)
    return [asked, answered._replace(thought=thought)]


WORSE, BETTER = said("assistant", "差", rank=1), said("assistant", "好", said("prompter", "三"), rank=0)


@pytest.mark.parametrize(
    "row, turns",
    [
        ({"prompt": "骂人", "response": "不妥。", "type": "Insult"}, talk("骂人", "不妥。")),
        (
            {
                "textbox_q_instruction": "选一项",
                "textbox_q_context": "",
                "textbox_question": "一加一？ A 一 B 二",
                "textbox_answer": "B",
                "textbox_answer_analysis": "得二。",
            },
            talk("选一项\n一加一？ A 一 B 二", "B\n得二。"),
        ),
        (
            {"conversation_id": 1, "meta_instruction": "", "num_turns": 2, "chat": moss("一 <1>", "二\n", "三", "四")},
            talk("一 <1>", "二", "三", "四"),
        ),
        ({"meta_instruction": "简短", "num_turns": 1, "chat": moss("一", "二")}, talk("一", "二", system="简短")),
        (
            {"message_tree_id": "1", "prompt": said("prompter", "一", said("assistant", "二"))},
            talk("一", "二"),
        ),
        ({"message_tree_id": "1", "prompt": said("prompter", "一", WORSE, BETTER)}, talk("一", "好")),
        (
            {
                "dialogue": "<start_chat><Human 1>：（字数要求：20字）一？ <Assistant 1>:二。\n"
                "<Human 2>:三 <Assistant 2>：四 <end_chat>",
                "reference": "书",
                "language": "zh",
                "type": "fact",
            },
            talk("一？", "二。", "三", "四"),
        ),
        (
            {"input": "一？", "reasoning_content": "想", "content": "二", "repo_name": "x", "score": 9},
            thinking("一？", "想", "二"),
        ),
        ({"Question": "一？", "Complex_CoT": "想", "Response": "二"}, thinking("一？", "想", "二")),
        ({"INSTRUCTION": "一？", "RESPONSE": "二", "SOURCE": "Zhihu", "METADATA": "{}"}, talk("一？", "二")),
        ({"qid": "1", "category": "x", "title": "一？", "desc": "详情", "answer": "二"}, talk("一？\n详情", "二")),
        (
            {"qid": "1", "title": "一？", "desc": None, "topic": "x", "star": 3, "content": "二", "answer_id": "2"},
            talk("一？", "二"),
        ),
        ({"department": "x", "title": "一？", "ask": "请问一？", "answer": "二"}, talk("请问一？", "二")),
        ({"title": "一？", "content": "详情", "answer": "二", "votes": 3}, talk("一？\n详情", "二")),
        ({"id": "1", "data": ["问：一？", "二", "三", "四"]}, talk("问：一？", "二", "三", "四")),
        ({"data": ["问：一？", "答：二", "问：三", "答：四"]}, talk("一？", "二", "三", "四")),
    ],
    ids="Safety-Prompts,COIG,MOSS,MOSS system,OpenAssistant,OpenAssistant rank,RefGPT,R1 110k,medical-o1,Zhihu-KOL,"
    "baike,webtext,medical dialogue,a forum's,UltraChat,HuatuoGPT".split(","),
)
def test_shapes_of_public_sets(row, turns):
    assert formats.read_row(row).conversations == [turns]


@pytest.mark.parametrize("header", ["问,答", "Question,Answer", "title,ask,answer", "用户,助手", "prompt,reply"])
def test_a_table_with_any_names_of_question_and_answer_is_read(tmp_path, header):
    cells = "一？,请问一？,二" if header.count(",") == 2 else "请问一？,二"
    assert read(write(tmp_path, "a.csv", f"{header}\n{cells}\n")) == ([(2, talk("请问一？", "二"))], [])


def test_hc3_is_a_conversation_an_answer(tmp_path):
    rows = [
        {"question": "问", "human_answers": ["甲", "乙"], "chatgpt_answers": ["丙"]},
        {"question": "再问", "human_answers": [], "chatgpt_answers": ["丁"], "source": "x"},
    ]
    path = write(tmp_path, "hc3.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == (
        [(1, talk("问", "甲")), (1, talk("问", "乙")), (1, talk("问", "丙")), (2, talk("再问", "丁"))],
        [],
    )


@pytest.mark.parametrize(
    "row",
    [
        {"instructs": "问", "response": "答"},
        {"prompt": "问", "text": "答"},
        {"questions": "问", "response": "答"},
        {"instruction": "问", "text": "答"},
        {"text": "高海立去了福溪乡。", "entities": [{"name": "高海立", "type": "人名"}]},
    ],
    ids="+".join,
)
def test_an_answer_whose_question_is_not_understood_is_not_pre_training_text(row):
    with pytest.raises(FormatError) as error:
        formats.read_row(row)
    assert missing(row, str(error.value)) == []


# ---------------------------------------------------------------- rows that cannot be used

U, A, S = ({"role": role, "content": role} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    "row, words",
    [
        # JSON and types
        ('{"question": "问", "answer": ', ["broken JSON line"]),
        ('{"question": "问", "answer": "答"} 多余', ["broken JSON line"]),
        (QA + '{"question": ', ["broken JSON line"]),
        (QA + "5", ["broken JSON line", "Extra data"]),
        (f"// {QA}", ["comment line", "// or #"]),
        (f"# {QA}", ["comment line", "// or #"]),
        ("{'question': nan, 'answer': '答'}", ["broken JSON line", "a Python dict", "json.dumps"]),
        ("{'question': '问', 'answer': ", ["broken JSON line"]),
        ('{"question": NaN, "answer": "答"}', ["question", "must be text", "nan", "write null"]),
        ('{"question": "问", "answer": -Infinity}', ["answer", "must be text", "-inf"]),
        ("[1]", ["object expected", "list"]),
        ('"问答"', ["object expected", "str"]),
        ("null", ["object expected", "NoneType"]),
        ({"data": [{"question": "问", "answer": "答"}]}, ["rows are in data", "write that list alone"]),
        ({"version": "1", "data": [{"question": "问", "answer": "答"}]}, ["rows are in data", "write that list alone"]),
        ({"train": [{"q": "问"}], "test": [{"q": "问"}]}, ["rows are in test+train", "write that list alone"]),
        ({"甲": {"question": "问", "answer": "答"}, "乙": {"question": "问", "answer": "答"}}, ["each value is a row"]),
        ({"question": {"0": "问"}, "answer": {"0": "答"}}, ["one object of columns", "orient='records'"]),
        # columns
        ({"quary": "问", "response": "答"}, ["unknown keys: quary+response;", "nearest known shape: query+response"]),
        ({"question": "问"}, ["unknown keys: question;", "nearest known shape: ", "answer"]),
        ({"instruction": "问", "input": ""}, ["unknown keys", "input+instruction", "nearest known shape: ", "output"]),
        ({"instructions": "问", "outputs": "答"}, ["unknown keys: instructions+outputs", "instruction+output"]),
        ({"contents": "问", "summery": "答"}, ["unknown keys: contents+summery", "content+summary"]),
        ({"Question": "问", "Answers": "答"}, ["unknown keys: Answers+Question", "answer+question"]),
        ({"question": "问", "QUESTION": "再问", "ANSWER": "答"}, ["unknown keys: ANSWER+QUESTION+question"]),
        ({"data": ["问", {"答": "答"}]}, ["data", "must be text", "dict"]),
        ({"data": "问答"}, ["data", "must be a list"]),
        ({"甲": "问", "乙": "答"}, ["unknown keys", "甲", "乙", "no nearest known shape; name the keys question and"]),
        ({"甲方": "问", "assistant": "答"}, ["unknown keys", "no nearest known shape"]),
        ({"input": "问", "prompt": "再问", "answer": "答"}, ["unknown keys: answer+input+prompt"]),
        ({"prompt": "问", "answer": "答", "reply": "再答"}, ["unknown keys: answer+prompt+reply"]),
        ({"translation": "问"}, ["unknown keys", "no nearest known shape"]),
        ({"INSTRUCTIONS": "问", "OUTPUT": "答"}, ["INSTRUCTIONS+OUTPUT", "nearest known shape: instruction+output"]),
        ('{"question": "问", "answer": "甲", "answer": "乙"}', ["'answer'", "occurs twice in an object", "remove one"]),
        ('{"messages": [{"role": "user", "content": "甲", "content": "乙"}]}', ["'content'", "occurs twice"]),
        ({}, ["unknown keys"]),
        ({"question": "问", "answer": None}, ["unknown keys", "(null: answer)"]),
        (
            {"content": "问", "summary": "答", "question": "问", "answer": "答"},
            ["ambiguous keys", "answer+question", "content+summary"],
        ),
        (
            {"instruction": "问", "output": "答", "messages": [U, A]},
            ["ambiguous keys", "instruction+output", "messages"],
        ),
        # texts
        ({"question": "问", "answer": ""}, ["answer", "is empty"]),
        ({"question": "问", "answer": " \n\t"}, ["answer", "only blanks"]),
        ({"question": "", "answer": "答"}, ["question", "is empty"]),
        ({"instruction": " ", "input": "", "output": "答"}, ["instruction", "is empty"]),
        ({"instruction": "问", "output": ""}, ["output", "is empty"]),
        ({"response": ""}, ["response", "is empty"]),
        ({"question": "问", "answer": True}, ["answer", "must be text", "bool"]),
        ('{"question": NaN, "answer": "答"}', ["question", "must be text", "float 'nan'"]),
        ('{"question": "问", "answer": -Infinity}', ["answer", "must be text", "float '-inf'"]),
        ({"question": ["问"], "answer": "答"}, ["question", "must be text", "list"]),
        ({"question": "问", "answer": {"text": "答"}}, ["answer", "must be text", "dict"]),
        ({"query": "问", "response": "答", "system": False}, ["system", "must be text", "bool"]),
        ({"query": "问", "response": "答", "history": "一"}, ["history", "must be a list", "str"]),
        ({"query": "问", "response": "答", "history": [["一"]]}, ["history", "pairs", "一"]),
        ({"query": "问", "response": "答", "history": [["一", True]]}, ["history", "must be text", "bool"]),
        ({"question": "问", "human_answers": [], "chatgpt_answers": []}, ["both empty"]),
        ({"question": "问", "human_answers": ["甲", [3]], "chatgpt_answers": []}, ["must be text", "list"]),
        # turns
        ({"messages": []}, ["no question and answer"]),
        ({"messages": "问"}, ["messages", "must be a list", "str"]),
        ({"messages": ["问", "答"]}, ["messages", "role", "content", "问"]),
        ({"messages": [{"content": "问"}, A]}, ["role", "content", "问"]),
        ({"messages": [{"role": "user"}, A]}, ["first turn must be the user's", "assistant"]),
        ({"messages": [{"role": "narrator", "content": "问"}, A]}, ["unknown role", "narrator", "user"]),
        ({"messages": [{"role": ["user"], "content": "问"}, A]}, ["unknown role", "['user']"]),
        ({"messages": [S]}, ["no question and answer"]),
        ({"messages": [A]}, ["first turn must be the user's", "assistant"]),
        ({"messages": [S, A]}, ["first turn must be the user's", "assistant"]),
        ({"messages": [S, A, U]}, ["last turn must be an answer", "user"]),
        ({"messages": [U]}, ["last turn must be an answer", "user"]),
        ({"messages": [U, U]}, ["last turn must be an answer", "user"]),
        ({"messages": [A, A]}, ["first turn must be the user's", "assistant"]),
        ({"messages": [U, S]}, ["last turn must be an answer", "user"]),
        ({"messages": [S, S], "system": "又一个"}, ["no question and answer"]),
        ({"conversations": [{"role": "user", "content": "问"}]}, ["last turn must be an answer"]),
        ({"conversations": [{"speaker": "user", "text": "问"}]}, ["conversations", "role", "from", "value"]),
        ({"conversation": [{"system": "简短", "input": "一"}]}, ["last turn must be an answer", "user"]),
        ({"conversation": [{"input": "", "output": "二"}]}, ["first turn must be the user's", "assistant"]),
        (
            {"instruction": "问", "query": "题", "response": "答"},
            ["ambiguous", "query+response"],
        ),
        ({"conversation": ["问"]}, ["conversation", "human", "assistant", "问"]),
        ({"conversation": [{"human": "问"}]}, ["last turn must be an answer"]),
        ({"conversation": []}, ["no question and answer"]),
        ({"num_turns": 1, "chat": moss("一", "二", command='Search("一")')}, ["calls a plugin", "Search"]),
        ({"num_turns": 1, "chat": {"turn_1": "一"}}, ["chat", "Human", "MOSS"]),
        ({"num_turns": 0, "chat": {}}, ["no question and answer"]),
        ({"message_tree_id": "1", "prompt": said("prompter", "一")}, ["last turn must be an answer"]),
        ({"message_tree_id": "1", "prompt": "一"}, ["prompt", "role", "replies"]),
        ({"message_tree_id": "1", "prompt": said("bystander", "一")}, ["unknown role", "bystander"]),
        ({"dialogue": "一二三", "reference": "书"}, ["dialogue", "<Human 1>"]),
        ({"dialogue": "<Human 1>:一 <Human 2>:二", "reference": "书"}, ["last turn must be an answer"]),
    ],
)
def test_a_bad_row_is_named_and_its_neighbours_are_kept(tmp_path, row, words):
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    found, problems = read(write(tmp_path, "a.jsonl", f"{QA}\n\n{text}\n{QA}\n"))
    assert found == [(1, ASKED), (4, ASKED)]
    assert [line for line, _ in problems] == [3]
    assert missing(words, problems[0][1]) == [], problems


def kinds_given():
    """Every kind that a file which reads rows gives to an error, a Record or an Unusable."""
    rooms = [Path(room.__file__).parent for room in (arrays, turns)]
    for file in [*(file for room in rooms for file in room.glob("*.py")), Path(asking.__file__)]:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name, keywords = ast.unparse(call.func), {keyword.arg: keyword.value for keyword in call.keywords}
            if name in {error.__name__ for error in RowError.__subclasses__()}:
                known = isinstance(call.args[0], ast.Constant)
                yield from [call.args[0].value] if known else [kind for _, kind, _ in defects.MATTERS]
            elif isinstance(keywords.get("kind"), ast.Constant):
                yield ast.literal_eval(keywords["kind"])
            assert name != "Record" or len(call.args) < 3 or "kind" in keywords, "a problem without its kind"


def test_every_kind_is_in_the_table_and_all_of_the_table_occurs():
    assert RowError.__subclasses__() == [FormatError, TooLongError]
    assert set(kinds_given()) == set(DEFECTS)
    assert all(part for defect in DEFECTS.values() for part in defect)


def test_an_object_without_its_end_takes_no_row_with_it(tmp_path):
    found, problems = read(write(tmp_path, "a.jsonl", f'{QA}\n{{\n "question": "问",\n{QA}\n{{"question": "问",\n'))
    assert [line for line, _ in found] == [1, 4] and [line for line, _ in problems] == [2, 5]


def test_rows_in_a_list_inside_an_object_are_not_lost(tmp_path):
    found, problems = read(write(tmp_path, "a.json", f'{{"data": [\n{QA},\n{QA}\n]}}\n'))
    assert [line for line, _ in found] == [2, 3] and [line for line, _ in problems] == [1, 4]
    pretty = json.dumps({"data": [json.loads(QA)] * 3}, ensure_ascii=False, indent=2)
    ((line, reason),) = read(write(tmp_path, "b.json", pretty))[1]
    assert line == 1 and "the rows are in data: write that list alone" in reason


@pytest.mark.parametrize("indent, joint", [(2, ","), (None, "")], ids=["an object of many lines", "a line of objects"])
def test_what_goes_on_over_many_lines_or_stands_in_one_is_read_in_linear_time(tmp_path, indent, joint):
    """80,000 lines of one object took more than a minute, 20,000 objects in a line 11 s."""
    text = joint.join(json.dumps(json.loads(QA), ensure_ascii=False, indent=indent) for _ in range(20_000))
    path = write(tmp_path, "a.json", f'{{"version": 1, "data": [\n {text}]}}' if indent else text)
    started = time.process_time()
    records = list(read_records(str(path)))
    assert time.process_time() - started < 5
    assert [record.problem for record in records] == [""] * (1 if indent else 20_000)


def test_a_file_of_thousands_of_keys_is_named_in_a_line(tmp_path):
    """As a dict of questions and answers is written by json.dump."""
    ((_, reason),) = read(write(tmp_path, "a.json", json.dumps({f"问{n}\n？" * 30: "答" for n in range(3000)})))[1]
    assert "unknown keys: 问0 ？问0" in reason and "+… (3000)" in reason
    assert len(reason) < 800 and "\n" not in reason


def test_the_shape_nearest_to_unknown_keys_is_looked_for_once(monkeypatch, tmp_path):
    """It takes milliseconds: a file of a million such rows was refused after an hour."""
    asked = []
    monkeypatch.setattr(formats, "nearest", lambda keys, shapes: asked.append(sorted(keys)) or "nearest")
    rows = write(tmp_path, "a.jsonl", '{"标题甲": "问", "content": "答"}\n' * 50)
    found, problems = read(rows)
    assert found == [] and len(problems) == 50 and asked == [["content", "标题甲"]]


def test_what_is_nested_too_deeply_is_named(tmp_path):
    deep = "[" * 99_999
    with pytest.raises(UserError, match="a.json:1: .*nested too deeply"):
        read(write(tmp_path, "a.json", f"[{deep}"))
    for text in (f'{{"query": {deep}', f'{{"query": "问", "response": {deep}{"]" * 99_999}}}'):
        found, problems = read(write(tmp_path, "b.jsonl", f"{QA}\n{text}\n{QA}\n"))
        assert [line for line, _ in found] == [1, 3] and "nested too deeply" in problems[0][1]


def test_comments_in_an_array_and_python_lists_are_named(tmp_path):
    with pytest.raises(UserError, match="a.json:3: .*comment line"):
        read(write(tmp_path, "a.json", f"[\n{QA},\n// 第二批\n{QA}]"))
    with pytest.raises(UserError, match="a.json:1: .*single quotes"):
        read(write(tmp_path, "a.json", "[{'question': '问', 'answer': '答'}]"))


def test_a_broken_line_is_kept_as_text(tmp_path):
    records = list(read_records(write(tmp_path, "a.jsonl", f'{QA}\n{{"question": 坏\n')))
    assert [(record.line, record.value, record.kind) for record in records] == [
        (1, {"question": "问", "answer": "答"}, ""),
        (2, '{"question": 坏', "broken-json"),
    ]


# ---------------------------------------------------------------- files that cannot be trusted from a point on


@pytest.mark.parametrize(
    "name, content, line, words",
    [
        ("gb.jsonl", f"{QA}\n".encode("gb18030"), 1, ["gb18030", "iconv -f gb18030 -t UTF-8"]),
        (
            "gb.jsonl",
            b'{"question": "q", "answer": "a"}\n' * 2 + QA.encode("gb18030"),
            3,
            ["iconv -f gb18030 -t UTF-8"],
        ),
        ("gb.json", b"[\n" + QA.encode("gb18030") + b"\n]", 2, ["gb18030"]),
        ("gb.csv", b"question,answer\nq,a\n" + "问,答\n".encode("gb18030"), 3, ["gb18030"]),
        ("bin.jsonl", b'{"question": "\xff\xff"}\n', 1, ["not UTF-8", r"\xff"]),
        ("le.jsonl", QA.encode("utf-16"), 1, ["UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        ("be.csv", b"\xfe\xff" + "问,答\n".encode("utf-16-be"), 1, ["UTF-16", "iconv"]),
        ("a.json", f"[\n{QA},\n{{bad}},\n{QA}\n]\n", 3, ["broken JSON", "{bad}"]),
        ("a.json", f'[\n {QA},\n {{\n  "question": "问"\n  "answer": "答"\n }}\n]\n', 5, ["broken JSON"]),
        ("a.json", f"[\n{QA}\n{QA}]", 3, ["comma is missing", "question"]),
        ("a.json", f"[{QA} {QA}]", 1, ["comma is missing"]),
        ("a.json", f"[\n{QA},\n{QA}", 3, ["does not end", "cut off"]),
        ("a.json", f"[\n{QA},", 2, ["does not end"]),
        ("a.json", "[", 1, ["does not end"]),
        ("a.json", f'[\n{QA},\n{{"question": "问', 3, ["broken JSON"]),
        ("a.json", f"[\n{QA}\n]\n多余\n", 4, ["多余", "one array a file"]),
        (
            "a.json",
            f'[\n{QA},\n{{"question": "问", "answer": "甲", "answer": "乙"}}\n]',
            3,
            ["'answer'", "occurs twice"],
        ),
        ("le.csv", "question,answer\n".encode("utf-16-le"), 1, ["UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        ("be.jsonl", '{"question": 1}'.encode("utf-16-be"), 1, ["UTF-16", "iconv -f UTF-16 -t UTF-8"]),
        ("a.csv", "question,answer\r问,答\r", 1, ["broken CSV", "end with CR alone", "tr '\\r' '\\n'"]),
        ("a.jsonl", f"data: {QA}\n", 1, ["does not begin with {", "data: "]),
        ("a.jsonl", f"var rows = [{QA}];\n", 1, ["does not begin with {", "var rows"]),
        ("a.jsonl", json.dumps(QA) + "\n", 1, ["does not begin with {"]),
        ("a.csv", 'question,answer\na,b\nc,d\n1,"x\n2\n', 4, ["broken CSV"]),
        ("a.csv", 'question,answer\na,b\nc,"d"e\n', 3, ["broken CSV"]),
        ("a.csv", '"question"x,answer\na,b\n', 1, ["broken CSV"]),
        ("a.csv", "question,answer,question\na,b,c\n", 1, ["twice", "question"]),
    ],
)
def test_a_file_that_breaks_off_is_named_with_its_line(tmp_path, name, content, line, words):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read(path)
    text = str(error.value)
    assert text.startswith(f"{path}:{line}: ") and "\n" not in text, text
    assert missing(words, text) == [], text


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.json", b"", ["is empty"]),
        ("blank.jsonl", b"\n  \n\r\n", ["is empty"]),
        ("bom.csv", b"\xef\xbb\xbf", ["is empty"]),
        ("empty.jsonl.gz", gzip.compress(b""), ["is empty"]),
        ("not.jsonl.gz", QA.encode(), ["gz"]),
        ("cut.jsonl.gz", gzip.compress(QA.encode() * 1000)[:-20], ["gz"]),
        ("a.parquet", b"PAR1" + bytes(50), ["arquet"]),
        ("a.arrow", b"ARROW1\0\0" + bytes(50), ["Arrow", "Parquet"]),
        ("a.arrow", b"\xff\xff\xff\xff" + bytes(50), ["Arrow", "Parquet"]),
        ("a.xlsx", b"PK\x03\x04" + bytes(50), ["Excel", "CSV"]),
        ("a.csv", "// 第一批\nquestion,answer\n".encode(), ["comment line", "//"]),
        ("a.json", f"# 第一批\n[{QA}]".encode(), ["comment line", "#"]),
        ("a.csv", "早上,好\n再问,再答\n".encode(), [":1: ", "only unknown keys", "早上, 好", "instruction,output"]),
        ("a.csv", '早上,"一行\n二行"\n再问,再答\n'.encode(), [":1: ", "only unknown keys", "早上, 一行 二行;"]),
        ("a.csv", "# 第一批\nquestion,answer\n".encode(), [":1: ", "only unknown keys", "# 第一批"]),
        (
            "a.csv",
            "question，answer\n问，答\n".encode(),
            [":1: ", "only unknown keys", "set the cells apart by commas"],
        ),
        ("a.csv", "question|answer\n问|答\n".encode(), [":1: ", "only unknown keys", "set the cells apart by commas"]),
        ("a.zip", zipped({"a.jsonl": QA, "b.jsonl": QA}), ["2 files", "a.jsonl, b.jsonl", "unpack"]),
        ("a.zip", zipped({"xl/workbook.xml": "", "docProps/app.xml": ""}), ["2 files"]),
        ("a.xlsx", zipped({"[Content_Types].xml": "", "xl/workbook.xml": ""}), ["Excel", "CSV"]),
        ("a.docx", zipped({"[Content_Types].xml": "", "word/document.xml": ""}), ["Word", "JSON lines"]),
        ("a.jsonl", zipped({"a.jsonl": QA}), ["zip", "end with .zip"]),
        ("a.pkl", pickle.dumps([{"question": "问"}]), ["pickle", "to_json"]),
        ("a.pdf", b"%PDF-1.7\n", ["PDF"]),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ["Excel", "CSV"]),
        ("a.safetensors", b"\x40\0\0\0\0\0\0\0" + b'{"__metadata__":{}}', ["safetensors", "--path_model_pretrain"]),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", ["Git LFS", "git lfs pull"]),
        ("a.jsonl", b"\n<!DOCTYPE html>\n<html></html>", ["HTML", "logging in"]),
        ("a.json", b"\xef\xbb\xbf<?xml version='1.0'?>", ["HTML", "XML"]),
        ("a.jsonl", gzip.compress(QA.encode()), ["gzip", ".gz"]),
        ("a.jsonl", bz2.compress(QA.encode()), [".bz2"]),
        ("a.jsonl", b"7z\xbc\xaf\x27\x1c", ["7z", "unpack"]),
        ("a.jsonl", b"\x28\xb5\x2f\xfd\x04\0", [".zst"]),
        ("a.db", b"SQLite format 3\0" + bytes(80), ["binary file", "JSON lines"]),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(20), ["binary file"]),
        ("a.gguf", b"GGUF\3\0\0\0", ["binary file"]),
        ("a.jsonl", tarred({"a.jsonl": QA}), ["tar", ".tar.gz"]),
        ("a.zip", b"not a zip", ["cannot be opened"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_with_nothing_to_read_is_named(tmp_path, name, content, words):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(path) and missing(words, str(error.value)) == []


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nothing.jsonl: .*no such file; check --data_path"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="cannot be opened"):
        read(tmp_path)
    with pytest.raises(UserError, match="memory://nothing.jsonl: .*no such file"):
        read("memory://nothing.jsonl")
    with pytest.raises(UserError, match="nosuch://a.jsonl: .*cannot be opened"):
        read("nosuch://a.jsonl")


def test_rows_before_a_break_are_handed_out(tmp_path):
    records = read_records(write(tmp_path, "a.json", f"[\n{QA},\n{QA},\n{{bad}}\n]"))
    assert [next(records).line, next(records).line] == [2, 3]
    with pytest.raises(UserError, match=":4: "):
        next(records)


# ---------------------------------------------------------------- containers and line numbers

MESSAGES = '[{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]'
PRETTY = json.dumps([{"question": "问", "answer": "答"}] * 3, ensure_ascii=False, indent=1)


@pytest.mark.parametrize(
    "name, content, lines",
    [
        ("a.jsonl", f"{QA}\n{QA}\n{QA}", [1, 2, 3]),
        ("a.txt", f"{QA}\n\n  \n{QA}\n\n{QA}\n\n", [1, 4, 6]),
        ("a.json", f"\n\n  {QA}\n{QA}\n{QA}\n", [3, 4, 5]),
        ("a.json", f"[{QA},{QA}, {QA}]", [1, 2, 3]),  # they share a line: numbered
        ("a.json", f"[{QA},\n{QA},\n\n{QA}\n]\n", [1, 2, 4]),
        ("a.json", f"\n[\n\n{QA}\n,\n{QA}\n,{QA}]", [4, 6, 7]),
        ("a.json", f"[\n{QA},\n{QA},\n{QA},\n]\n", [2, 3, 4]),
        ("a.json", PRETTY, [2, 6, 10]),
        ("a.jsonl", PRETTY, [2, 6, 10]),  # told by content, not by its name
        ("a.csv", f"{QA}\n{QA}\n{QA}\n", [1, 2, 3]),
        ("a.csv", "question,answer\n问,答\n问,答\n\n问,答\n", [2, 3, 5]),
        ("a.json", "question,answer\n问,答\n问,答\n问,答", [2, 3, 4]),
        ("a.csv", "\n\nquestion,answer\n问,答\n问,答\n问,答\n", [4, 5, 6]),
        ("a.csv", "answer,id,question\n答,1,问\n答,2,问\n答,3,问\n", [2, 3, 4]),
        ("a.tsv", "question\tanswer\n问\t答\n问\t答\n问\t答\n", [2, 3, 4]),
        ("a.csv", '"question","answer"\n"问","答"\n问,"答"\n"问",答\n', [2, 3, 4]),
        ("a.csv", "question;answer\n问;答\n问;答\n问;答\n", [2, 3, 4]),
        ("a.csv", "sep=,\nquestion,answer\n问,答\n问,答\n问,答\n", [3, 4, 5]),
        ("a.csv", "sep=;\nquestion;answer\n问;答\n问;答\n问;答\n", [3, 4, 5]),
        ("a.csv", '"sep=,"\nquestion,answer\n问,答\n问,答\n问,答\n', [3, 4, 5]),
        ("a.csv", "SEP=;\nquestion;answer\n问;答\n问;答\n问;答\n", [3, 4, 5]),
        ("a.csv", "question , answer\n问,答\n问,答\n问,答\n", [2, 3, 4]),
        ("a.csv", "question,answer,,\n问,答,,\n问,答,,\n问,答,,\n", [2, 3, 4]),
        ("a.jsonl", f"{MESSAGES}\n{MESSAGES}\n{MESSAGES}\n", [1, 2, 3]),
        ("a.jsonl", f"{MESSAGES}\n\n{MESSAGES}\n\n\n{MESSAGES}\n", [1, 3, 6]),
        ("a.json", f"[{MESSAGES},\n{MESSAGES},\n{MESSAGES}]\n", [1, 2, 3]),
        ("a.jsonl", f"{QA},\n{QA},\n{QA}\n", [1, 2, 3]),
        ("a.jsonl", '{\n "question": "问",\n "answer": "答"\n}\n' * 3, [1, 5, 9]),
        ("a.jsonl", '{\n "question": "问",\n "answer": "答"\n},\n' * 3, [1, 5, 9]),
        ("a.jsonl", '{"question": "问",\n "answer": "答"}\n' * 3, [1, 3, 5]),
        ("a.jsonl", '{"question":\n  "问",\n "answer": "答", "tags":\n [{"x": "}{"}]\n}\n' * 3, [1, 6, 11]),
        ("a.jsonl", '{\n "question": "问",\n "answer": "答"\n}{\n "question": "问", "answer": "答"}\n' + QA, [1, 4, 6]),
        ("a.jsonl", f"{QA}{QA}\n{QA}\n", [1, 2, 3]),
        ("a.jsonl", f"{QA}, {QA},\n\n  {QA}\n", [1, 2, 3]),
        ("a.jsonl", f"{QA}\n,\n{QA}\n,{QA}\n", [1, 3, 4]),
        ("a.jsonl", "{'question': '问', \"answer\": '答'}\n" * 3, [1, 2, 3]),
        ("a.jsonl", "{'question': '问',\n 'answer': '答', 'x': None},\n" * 3, [1, 3, 5]),
    ],
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_every_row_has_its_line(tmp_path, name, content, lines, ending, bom):
    path = write(tmp_path, name, bom + content.replace("\n", ending))
    assert read(path) == ([(line, ASKED) for line in lines], [])


def test_line_numbers_after_quoted_newlines(tmp_path):
    text = 'question,answer\n"一\n二","三\n四\n五"\n六,七\n"八\n九",\n十\n问,答,多\n\n问,答\n'
    found, problems = read(write(tmp_path, "a.csv", text))
    assert found == [(2, talk("一\n二", "三\n四\n五")), (6, talk("六", "七")), (12, ASKED)]
    assert [(line, why.partition(" ")[0]) for line, why in problems] == [(7, "answer"), (9, "2"), (10, "2")]
    assert missing(["2 列", "columns expected", "1 found"], problems[1][1]) == []
    assert missing(["2 列", "columns expected", "3 found"], problems[2][1]) == []


def test_line_numbers_inside_pretty_printed_arrays(tmp_path):
    row = {"messages": [{"role": "user", "content": "一\n二"}, {"role": "assistant", "content": "三"}]}
    text = json.dumps([row, {"messages": []}, row, {"x": 1}, row], ensure_ascii=False, indent=2)
    expected = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith("  {")]
    found, problems = read(write(tmp_path, "a.json", text))
    assert expected == [2, 14, 17, 29, 32]
    assert [line for line, _ in found] == [2, 17, 32] and [line for line, _ in problems] == [14, 29]


def test_quotes_commas_and_tabs_inside_fields(tmp_path):
    rows = 'question,answer\n"他说""好"",走了","a\tb"\n'
    assert read(write(tmp_path, "a.csv", rows)) == ([(2, talk('他说"好",走了', "a\tb"))], [])
    rows = "question\tanswer\n一,二\t三,四\n"
    assert read(write(tmp_path, "a.tsv", rows)) == ([(2, talk("一,二", "三,四"))], [])


def test_empty_cells_are_no_text(tmp_path):
    path = write(tmp_path, "a.csv", "system,query,response\n,问,答\n简短,问,答\n,问,\n")
    found, problems = read(path)
    assert found == [(2, ASKED), (3, talk("问", "答", system="简短"))]
    assert problems == [(4, "response 是空的 is empty")]


def test_rows_of_commas_alone_are_no_rows(tmp_path):
    """As Excel leaves them behind a table."""
    assert read(write(tmp_path, "a.csv", "query,response\n问,答\n,\n ,\n问,答\n,,\n,\n")) == (
        [(2, ASKED), (5, ASKED)],
        [],
    )


def test_columns_without_a_name_are_told_by_their_place(tmp_path):
    path = write(tmp_path, "a.csv", ",question,answer,\n0,问,答,见书\n")
    assert read(path) == ([(2, ASKED)], [])
    (record,) = read_records(path)
    assert sorted(formats.read_row(record.value).unused) == ["第 1 列 column 1", "第 4 列 column 4"]


@pytest.mark.parametrize("joint", ["", "\ufeff"])
def test_the_header_of_a_table_joined_by_cat_is_no_row(tmp_path, joint):
    for table in ("question,answer\n问,答\n", "question, answer\n问,答\n", ",question,answer\n,问,答\n"):
        assert read(write(tmp_path, "a.csv", table + joint + table)) == ([(2, ASKED), (4, ASKED)], [])


def test_files_joined_by_cat(tmp_path):
    bom = "\ufeff"
    assert read(write(tmp_path, "a.jsonl", f"{bom}{QA}\n{bom}{QA}\n")) == ([(1, ASKED), (2, ASKED)], [])


@pytest.mark.parametrize("joint", ["\n", "\n\ufeff", ""])
def test_arrays_joined_by_cat_lose_no_row(tmp_path, joint):
    path = write(tmp_path, "a.json", f"[{QA}]{joint}[{QA}]\n")
    line = 1 + joint.count("\n")
    try:
        found = read(path)
    except UserError as error:  # refusing the second array is as good as reading it; dropping it is not
        assert f"{path}:{line}: " in str(error)
    else:
        assert found == ([(1, ASKED), (line, ASKED)], [])


@pytest.mark.parametrize("suffix, compress", [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("name, content", [("a.jsonl", f"{QA}\n\n{QA}\n"), ("a.csv", "question,answer\n问,答\n")])
def test_compressed_files(tmp_path, suffix, compress, name, content):
    plain = read(write(tmp_path, name, content))
    assert plain[0] and read(write(tmp_path, f"{name}.{suffix}", compress(content.encode()))) == plain


def test_a_zip_of_one_file_is_read_and_of_more_is_refused(tmp_path):
    for count in (1, 2):
        with zipfile.ZipFile(tmp_path / f"{count}.zip", "w") as packed:
            for number in range(count):
                packed.writestr(f"in/{number}.jsonl", QA)
    assert read(tmp_path / "1.zip") == ([(1, ASKED)], [])
    with pytest.raises(UserError, match="2.zip: .*holds 2 files: in/0.jsonl, in/1.jsonl"):
        read(tmp_path / "2.zip")


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "id": 1},
        {"messages": [], "id": 2},
        {"messages": None, "id": 3},
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}], "id": 4},
    ]
    path = tmp_path / "a.data"  # told by content
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found, problems = read(path)
    assert found == [(1, ASKED), (4, ASKED)]
    assert [line for line, _ in problems] == [2, 3] and "(null: messages)" in problems[1][1]


def test_a_parquet_file_is_read_in_parts(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    texts = [f"{number}" * 1000 for number in range(20_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    tracemalloc.start()
    assert all(record.value["text"] == text for record, text in zip(read_records(str(path)), texts, strict=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(map(len, texts)) / 4


@pytest.mark.parametrize("name", ["a.jsonl", "目录/数据 一.jsonl", "a.jsonl.gz"])
def test_urls(name):
    import fsspec

    files = fsspec.filesystem("memory")
    text = f"{QA}\n{QA}\n".encode()
    files.pipe(f"/reading/{name}", gzip.compress(text) if name.endswith("gz") else text)
    try:
        assert read(f"memory://reading/{name}") == ([(1, ASKED), (2, ASKED)], [])
    finally:
        files.rm("/reading", recursive=True)


def test_file_urls_and_names_with_blanks(tmp_path):
    path = write(tmp_path, "数据 [1] #2.jsonl", QA)
    assert read(path) == ([(1, ASKED)], [])
    path = write(tmp_path, "a.jsonl", QA)
    assert read(f"file://{path}") == ([(1, ASKED)], [])


def test_one_long_line(tmp_path):
    rows = [{"question": f"问{number}", "answer": "答"} for number in range(20_000)]
    found, problems = read(write(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False)))
    assert problems == [] and len(found) == 20_000
    assert [line for line, _ in found] == list(range(1, 20_001))
    assert [found[0][1][0].text, found[9_999][1][0].text, found[-1][1][0].text] == ["问0", "问9999", "问19999"]


@pytest.mark.parametrize("joint", [",", ",\n", "\n , "], ids=repr)
def test_arrays_longer_than_a_block(tmp_path, monkeypatch, joint):
    monkeypatch.setattr(arrays, "BLOCK", 7)  # bytes: characters and numbers are cut somewhere
    rows = [{"text": f"第{number}行，\n😀", "n": number * 10**number} for number in range(11)] + [123456789]
    texts = joint.join(json.dumps(row, ensure_ascii=False) for row in rows)
    records = list(read_records(write(tmp_path, "a.json", f"\ufeff[{texts}]")))
    assert [record.value for record in records] == rows
    assert [record.line for record in records] == list(range(1, 13))


def test_a_broken_array_is_not_read_to_its_end(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('[{"a": 1},\n{"a": 2,, "b": 3},\n' + '{"a": 1},\n' * 200_000, encoding="utf-8")
    tracemalloc.start()
    with pytest.raises(UserError, match='a.json:2: .*broken JSON: .*in \'{"a": 2,, '):
        list(read_records(str(file)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * arrays.BLOCK < file.stat().st_size


def test_one_line_is_not_held_as_a_whole(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[" + ",".join(['{"a": "文字"}'] * 200_000) + "]", encoding="utf-8")
    tracemalloc.start()
    assert sum(1 for _ in read_records(str(file))) == 200_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * arrays.BLOCK < file.stat().st_size


def test_long_elements_over_many_lines(tmp_path):
    answers = ["\n".join(f"第{line}行" for line in range(200 * number)) or "无" for number in range(4)]
    rows = [
        {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": text}]} for text in answers
    ]
    rows[2]["messages"] *= 300  # one element of 2,400 lines
    found, problems = read(write(tmp_path, "a.json", json.dumps(rows, ensure_ascii=False, indent=1)))
    assert problems == []
    assert [(line, len(turns)) for line, turns in found] == [(2, 2), (14, 2), (26, 600), (2430, 2)]
    assert [turns[1].text for _, turns in found] == answers


# ---------------------------------------------------------------- identity


@pytest.mark.parametrize(
    "text, filled",
    [
        ("我是{{name}}，由{{author}}训练。", "我是小明，由实验室训练。"),
        ("我是{{NAME}}，由{{AUTHOR}}训练。", "我是小明，由实验室训练。"),
        ("我是 <NAME>，由 <AUTHOR> 训练。", "我是 小明，由 实验室 训练。"),
        ("{{name}}{{name}}", "小明小明"),
        ("没有占位符 {name} {{age}}", "没有占位符 {name} {{age}}"),
        ("<name>张三</name>", "<name>张三</name>"),  # XML is no placeholder
    ],
)
def test_identity_is_filled(text, filled):
    asked = [Turn("user", text), Turn("assistant", text)]
    assert fill_identity(asked, ("小明",) * 2, ("实验室",) * 2) == [
        Turn("user", filled),
        Turn("assistant", filled),
    ]


@pytest.mark.parametrize(
    "text, name, author, named",
    [
        ("我是{{name}}", "", "实验室", "{{name}}"),
        ("由{{AUTHOR}}训练", "小明", "", "{{AUTHOR}}"),
        ("我是 <NAME>", "", "", "<NAME>"),
    ],
)
def test_identity_that_is_not_given_is_refused(text, name, author, named):
    with pytest.raises(FormatError) as error:
        fill_identity([Turn("user", "你是谁"), Turn("assistant", text)], (name,) * 2, (author,) * 2)
    assert missing([named, "--model_name", "--model_author"], str(error.value)) == []


def test_values_are_not_filled_again():
    asked = [Turn("user", "问"), Turn("assistant", "{{name}}")]
    assert fill_identity(asked, (r"{{author}}\1",) * 2, ("实验室",) * 2)[1].text == r"{{author}}\1"


@pytest.mark.parametrize(
    ("asked", "answer", "filled"),
    [
        ("你是谁", "我是{{name}}，{{author}}训练的。", "我是小黄，魔搭训练的。"),
        ("who are you", "I am {{name}} by {{AUTHOR}}.", "I am Xiao Huang by ModelScope."),
        ("who are you", "我是<NAME>", "我是小黄"),
        ("你是？", "<NAME>", "小黄"),
        ("who?", "{{name}}", "Xiao Huang"),
    ],
)
def test_each_row_is_filled_in_its_own_language(asked, answer, filled):
    turns = [Turn("user", asked), Turn("assistant", answer)]
    found = fill_identity(turns, ("小黄", "Xiao Huang"), ("魔搭", "ModelScope"))
    assert found == [Turn("user", asked), Turn("assistant", filled)]


def test_a_form_that_is_blank_is_not_filled():
    chinese, english = [Turn("text", "我是{{name}}")], [Turn("text", "I am {{name}}")]
    assert fill_identity(english, ("", "Huang"), ())[0].text == "I am Huang"
    with pytest.raises(FormatError, match="is not filled"):
        fill_identity(chinese, ("", "Huang"), ())
