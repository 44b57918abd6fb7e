"""What a start imports: no library that the run does not use; none is taken for not installed afterwards."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import garbage
from common.errors import run_main
from common.model.loading import load_tokenizer
from gemma_sft import prompt
from gemma_sft.ft_gemma.config import Config

ROOT = Path(__file__).resolve().parents[1]
NOT_USED = ("bitsandbytes", "nltk", "sacrebleu", "flask", "gguf")
TRAIN_AND_ASK = f"""
import sys
from gemma_sft.ft_gemma import predict, train

out = sys.argv[1]
train.main(["--model_save_dir", out, "--max_steps", "1", "--val_set_size", "0", "--eval_rows", "0",
            "--data_path", sys.argv[2], "--cache_dir", out + "/cache"])
predict.main(["--model_save_dir", out, "--query", "类型#裙", "--max_new_tokens", "1"])
print("imported:", [name for name in {NOT_USED} if name in sys.modules])

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from transformers.utils import is_bitsandbytes_available

print("there:", is_bitsandbytes_available(), is_bnb_available(), is_bnb_4bit_available())
"""


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="it cannot be imported where it is not")
def test_a_run_in_full_precision_imports_no_bitsandbytes_and_no_scorers(tmp_path):
    rows = [{"instruction": f"{n} 加一？", "output": f"{n + 1}"} for n in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "-c", TRAIN_AND_ASK, tmp_path / "out", tmp_path / "rows.json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    imported, there = found.stdout.splitlines()[-2:]
    assert imported == "imported: []"
    assert there == "there: True True True"


def test_a_script_looks_for_garbage_from_the_tokenizer_on():
    """Before that it imports its libraries."""
    seen = []

    def look(kept):
        seen.append((gc.get_threshold()[0], gc.get_freeze_count() > kept))
        return gc.get_freeze_count()

    def main():
        kept = look(gc.get_freeze_count())
        load_tokenizer(Config.EMBEDDED_DIR, prompt)
        kept = look(kept)
        load_tokenizer(Config.EMBEDDED_DIR, prompt)
        look(kept)

    try:
        run_main(main)
    finally:
        gc.set_threshold(*garbage.USUAL)
    # a program that loads a second model keeps no garbage of the first
    assert seen == [(garbage.RARE, False), (garbage.USUAL[0], True), (garbage.USUAL[0], False)]


def test_python_does_not_look_for_garbage_where_rows_are_tokenised():
    seen = []

    def watch(phase, info):
        seen.append(phase)

    gc.callbacks.append(watch)
    try:
        with garbage.not_looked_for():
            kept = [[number] for number in range(5 * garbage.USUAL[0])]
            within = list(seen)
        kept += [[number] for number in range(5 * garbage.USUAL[0])]
    finally:
        gc.callbacks.remove(watch)
    assert kept and not within and seen
