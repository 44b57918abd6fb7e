"""The problem files of ../shared/fixtures/cases: each gives its right turns, or one line that says why not."""

import pytest

from common.conversation import turns as mend
from common.conversation.turns import Call, Turn, Unusable
from common.data.formats import Notes, conversations_in
from common.data.sources import read_records
from common.errors import UserError
from common.inputs import files_of
from gemma_sft.ft_gemma.config import Config


def talk(*texts):
    """Turns of texts said in turn by user and assistant."""
    return [Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]


MONTHS, CLOSING = talk("一年有几个月？", "十二个月。"), talk("几点关门", "九点。")
UNLEARNT = [Turn("user", "一加一"), Turn("assistant", "等于三。", False), *talk("不对", "等于二。")]
WEATHER = (
    '[{"type": "function", "function": {"name": "get_weather", "description": "查天气", '
    '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]'
)
CALLED = [
    Turn("system", "", tools=WEATHER),
    Turn("user", "杭州天气"),
    Turn("assistant", "", calls=(Call("get_weather", '{"city": "杭州"}'),)),
    Turn("tool", '{"t": 21}'),
    Turn("assistant", "杭州今天21度。"),
]
# file: the turns of its first row, and the repair if one was made
READ = {
    "d01_same_role_twice.jsonl": (talk("在吗\n\n我想退货", "在的。\n\n请把订单号发给我。"), mend.JOINED),
    "d02_begins_with_gpt.jsonl": (
        [Turn("assistant", "您好，有什么可以帮您？", False), *talk("几点关门", "晚上九点。")],
        mend.GREETING,
    ),
    "d03_ends_with_human.jsonl": (talk("几点关门", "晚上九点。"), mend.UNANSWERED),
    "d04_openai_tool_calls.jsonl": (CALLED, None),
    "d05_chinese_keys.jsonl": (MONTHS, None),
    "d06_content_parts.jsonl": (MONTHS, None),
    "d07_number_labels.jsonl": (talk("这句话是正面的吗，答1或0\n第0次来，很好", "0"), None),
    "d09_pretty_objects.json": (MONTHS, None),
    "d11_jsonl_commas.jsonl": (MONTHS, None),
    "d13_excel_sep.csv": (MONTHS, None),
    "d15_system_in_middle.jsonl": (talk("你好", "您好。", "现在用英文回答\n\n你好", "Hello."), mend.SYSTEM),
    "d16_roles_User_Assistant.jsonl": (MONTHS, None),
    "d16_roles_tool_call.jsonl": (MONTHS, None),
    "d16_roles_user_system_gpt.jsonl": (MONTHS, None),
    "d16_roles_yonghu.jsonl": (MONTHS, None),
    "d17_loss_flags.jsonl": (UNLEARNT, None),
    "d17b_weight.jsonl": (UNLEARNT, None),
    "d20_reasoning_content.jsonl": (
        [Turn("user", "3*4"), Turn("assistant", "12", thought="三个四相加是十二。")],
        None,
    ),
    "d23_rows_are_lists.json": (talk("你好", "您好。"), None),
    "d27_history_dicts.jsonl": ([*MONTHS, *talk("再说一遍", "十二个月。")], None),
    "d32_dialog.jsonl": (MONTHS, None),
    "d32b_text_gemma.jsonl": (
        [
            Turn(
                "text",
                "<start_of_turn>user\n一年有几个月？<end_of_turn>\n<start_of_turn>model\n十二个月。<end_of_turn>",
            )
        ],
        None,
    ),
    "e01_context_question_answer.jsonl": (talk("书店哪天休息？\n福溪书店周一休息。", "周一。"), None),
    "e02_instruction_context_output.jsonl": (talk("书店哪天休息？\n福溪书店周一休息。", "周一。"), None),
    "e08_typed_eos.jsonl": (talk("一周有几天？", "七天。<|im_end|>"), None),
    "e08b_typed_s.jsonl": (talk("一周有几天？", "七天。</s>"), None),
    "e12_conversation_role_content.jsonl": (CLOSING, None),
    "e14_content_text_key.jsonl": (CLOSING, None),
    "p04_two_files.zip": (talk("a", "b"), None),
    "v03_number_refs.jsonl": (talk("一加一", "2"), None),
}
COMMENTED = "d31_commented.jsonl"
# file: words of the reason every row, or the file, is refused for
REFUSED = {
    "d14_preference.jsonl": ["chosen+rejected", "preference pair"],
    "d19_images.jsonl": ["images", "only text"],
    "d24_answer_list.jsonl": ["unknown keys", "answers"],
    "d26_nan.jsonl": ["input", "must be text", "nan"],
    "d29_pandas_columns.json": ["columns", "to_json(orient='records')"],
    "d30_no_header.csv": ["unknown keys", "一年有几个月？"],
    "e05_capital_Input.jsonl": ["Input", "is input meant"],
    "e06_choices.jsonl": ["choices", "multiple-choice"],
    "e15_mask_human.jsonl": ["every answer", "not to be learnt"],
    "e17_nested_dicts.jsonl": ["unknown keys", "paragraph"],
    "e18_lists_flat.jsonl": ["conversations", "role, content", "几点关门"],
    "e20_output_dict.jsonl": ["output", "must be text", "dict"],
    "p03.arrow": ["Arrow", "Parquet"],
    "p05.xlsx": ["Excel", "CSV"],
    "v01_questions_only.jsonl": ["unknown keys", "input+instruction", "output"],
    "v01b_empty_output.jsonl": ["output", "is empty"],
    "v02_ends_with_user.jsonl": ["last turn must be an answer"],
    "v04_list_refs.jsonl": ["answer", "must be text", "list"],
    "v05_prompt_solution.jsonl": ["unknown keys", "problem+solution"],
}


def read(path):
    """(what each row of a file is, what was repaired)."""
    notes = Notes()
    files = [file for file, _ in files_of([str(path)])]
    rows = [
        row
        for file in files
        for record in read_records(file)
        for row in conversations_in(record, file, Config(), notes)
    ]
    assert not notes.unused
    return rows, [repair.reason for repair in notes.repaired]


@pytest.mark.parametrize("name", READ)
def test_a_file_gives_its_right_turns(fixtures, name):
    expected, repair = READ[name]
    rows, repaired = read(fixtures / "cases" / name)
    assert rows[0].turns == expected and not [row for row in rows if isinstance(row, Unusable)]
    assert repaired == ([repair] * len(rows) if repair else [])


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_says_why(fixtures, name):
    try:
        rows, _ = read(fixtures / "cases" / name)
    except UserError as problem:
        reasons = [str(problem)]
    else:
        assert rows and all(isinstance(row, Unusable) for row in rows)
        reasons = [row.reason for row in rows]
    for reason in reasons:
        assert [word for word in REFUSED[name] if word not in reason] == [] and "\n" not in reason


def test_a_comment_is_told_and_the_rows_beside_it_are_read(fixtures):
    rows, _ = read(fixtures / "cases" / COMMENTED)
    assert "comment line" in rows[0].reason and rows[0].where.endswith(":1") and rows[0].row == "// 第一批"
    assert [row.turns for row in rows[1:]] == [MONTHS]


def test_the_files_of_a_zip_have_places_of_their_own(fixtures):
    path = fixtures / "cases" / "p04_two_files.zip"
    rows, _ = read(path)
    assert [row.where for row in rows] == [f"{path}/a.jsonl:1", f"{path}/b.jsonl:1"]
    assert [row.turns for row in rows] == [talk("a", "b"), talk("c", "d")]


def test_every_file_is_in_a_table(fixtures):
    names = {path.name for path in (fixtures / "cases").iterdir() if path.is_file() and path.name[0] in "depv"}
    assert names == READ.keys() | REFUSED.keys() | {COMMENTED}
