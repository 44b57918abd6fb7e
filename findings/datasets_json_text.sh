#!/usr/bin/env bash
# One row that is not a text makes load_dataset("json") change the other rows' texts
#
# What one would guess: a text in a .jsonl file stays a text. One odd row is an error, or only that row is changed.
# What happens (datasets 5.2.0, pyarrow 26.0.1, 2026-11-28): a column that holds texts and one number or list becomes a
# column of type Json, and reading it back decodes every text that happens to be JSON: "0012" is 12, "null" is None. With
# features=Features({"output": Value("string")}) it is worse: all other texts get quotes and escapes, 你好 is then
# "\u4f60\u597d", quotes included. When the odd row comes late in a big file, the texts stay and a list becomes its text.
# Why it matters: labels and answers such as "0012", "true" or a telephone number change before the tokenizer sees them,
# and "null" becomes a missing answer. One row is enough, and nothing is printed. Read the file with json and give the
# rows to Dataset.from_list: there a mixed column is an error.
#
# Output seen:
#   datasets 5.2.0, pyarrow 26.0.1
#   guess: every text stays as it is, whatever stands in the row before the first or after the last
#   texts alone:                ['0012', '13800138000', '3.10', 'true', 'null', '[1, 2]', '你好']
#   after one row with a list:  [12, 13800138000, 3.1, True, None, [1, 2], '你好']
#   after one row with a 7:     [12, 13800138000, 3.1, True, None, [1, 2], '你好']
#   a list after 400,000 texts: ['0012', '13800138000', '3.10', 'true', 'null', '[1, 2]', '你好'] and the list itself: '["A","B"]'
#   a 7, features say string:   ['0012', '13800138000', '3.10', 'true', 'null', '[1, 2]', '"\\u4f60\\u597d"']
#   a 7, Dataset.from_list:     an error, ArrowInvalid
#   as stated: one value that is not a text changes the texts of the other rows
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$work"
venv/bin/python - <<'PY'
import json
import sys

import datasets
import pyarrow
from datasets import Dataset, Features, Value, load_dataset

datasets.disable_progress_bars()
print(f"datasets {datasets.__version__}, pyarrow {pyarrow.__version__}")
TEXTS = ["0012", "13800138000", "3.10", "true", "null", "[1, 2]", "你好"]


def load(name, rows, **kwargs):
    with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"output": row}, ensure_ascii=False) + "\n" for row in rows)
    data = load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache", **kwargs)
    return [row["output"] for row in data]


print("guess: every text stays as it is, whatever stands in the row before the first or after the last")
alone = load("alone", TEXTS)
print("texts alone:               ", alone)
first = load("first", [["A", "B"], *TEXTS])[1:]
print("after one row with a list: ", first)
number = load("number", [7, *TEXTS])[1:]
print("after one row with a 7:    ", number)
filler = ["这是一条很普通的回答。"] * 400_000
late = load("late", [*TEXTS, *filler, ["A", "B"]])
print("a list after 400,000 texts:", late[: len(TEXTS)], "and the list itself:", repr(late[-1]))
typed = load("typed", [7, *TEXTS], features=Features({"output": Value("string")}))[1:]
print("a 7, features say string:  ", typed)
try:
    Dataset.from_list([{"output": row} for row in [7, *TEXTS]])
    refused = False
except Exception as error:
    refused = True
    print("a 7, Dataset.from_list:     an error,", type(error).__name__)

changed = [12, 13800138000, 3.1, True, None, [1, 2], "你好"]
held = alone == TEXTS and first == number == changed and refused
held = held and late[: len(TEXTS)] == TEXTS and late[-1] == '["A","B"]'
held = held and typed == [*TEXTS[:-1], json.dumps("你好")]
if not held:
    sys.exit("changed: the texts come back as other values than stated")
print("as stated: one value that is not a text changes the texts of the other rows")
PY
