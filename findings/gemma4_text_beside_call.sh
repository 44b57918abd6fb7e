#!/usr/bin/env bash
# Gemma 4: what an answer says before it calls a tool is shown behind the tool's result, glued to the next answer
#
# What one would guess: a chat template shows an answer with a text and a call as it was generated: the text, then the
# call, then the result. So the next prompt goes on where the last answer ended.
# What happens (Gemma 4's five chat templates as trl 1.16.0 carries them, rendered by transformers 5.23.0, 2026-11-28): the
# text of the answer stands behind the call, and in all but one revision behind the result too. Three revisions then end the
# turn and show the final answer as one without a header; the newest writes the two texts as one, with nothing between.
# Why it matters: trained on such rows a model learns to call first and to explain afterwards, and two sentences run
# together. When it is asked, each round after a tool is a prompt of its own: what it has just written is not a prefix of
# what it is given to read, so no cache of the prompt holds.
#
# Output seen:
#   transformers 5.23.0, trl 1.16.0
#   guess: …LOOKING{call}{result}FINAL…
#   gemma4: {call}{result}LOOKING<turn|>⏎FINAL<turn|>
#   gemma4_v2: {call}LOOKING<turn|>⏎<|turn>tool⏎RESULT<turn|>⏎<|turn>model⏎FINAL<turn|>
#   gemma4_v3: {call}{result}LOOKING<turn|>⏎FINAL<turn|>
#   gemma4_v4: {call}{result}LOOKING<turn|>⏎FINAL<turn|>
#   gemma4_v5: {call}{result}LOOKINGFINAL<turn|>
#   as stated: in no revision does the text stand before the call
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6
"$work/venv/bin/pip" install -qq --disable-pip-version-check --no-deps trl==1.16.0
cd "$work"
venv/bin/python -W ignore - <<'PY'
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

print(f"transformers {transformers.__version__}, trl {version('trl')}")
templates = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
messages = [
    {"role": "user", "content": "QUESTION"},
    {"role": "assistant", "content": "LOOKING", "tool_calls": [call | {"id": "1"}]},
    {"role": "tool", "tool_call_id": "1", "name": "f", "content": "RESULT"},
    {"role": "assistant", "content": "FINAL"},
]
properties = {"a": {"type": "integer", "description": "a number"}}
parameters = {"type": "object", "properties": properties, "required": ["a"]}
tools = [{"type": "function", "function": {"name": "f", "description": "a tool", "parameters": parameters}}]
CALL, GIVEN = "<|tool_call>call:f{a:1}<tool_call|>", '<|tool_response>response:f{value:<|"|>RESULT<|"|>}<tool_response|>'

print("guess: …LOOKING{call}{result}FINAL…")
seen = {}
for name in ["gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"]:
    template = (templates / f"{name}.jinja").read_text(encoding="utf-8")
    (text,), _ = render_jinja_template([messages], tools=tools, chat_template=template, bos_token="<bos>")
    answer = text.partition("<|turn>model\n")[2].rstrip("\n")
    seen[name] = answer.replace(CALL, "{call}").replace(GIVEN, "{result}").replace("\n", "⏎")
    print(f"{name}: {seen[name]}")

after = [answer.index("{call}") < answer.index("LOOKING") for answer in seen.values()]
if not all(after) or seen["gemma4_v5"] != "{call}{result}LOOKINGFINAL<turn|>":
    sys.exit("changed: a revision shows the text before the call, or the newest one parts the two texts")
print("as stated: in no revision does the text stand before the call")
PY
