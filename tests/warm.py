"""Runs Python scripts in forks of one process that has the large libraries imported: ten seconds less for each.

A line of stdin is a JSON list: the words after `python`, more of the environment, the folder to run in, files for
stdout and stderr. It is answered by the number of the process. A line with such a number is answered by its exit
status, when it has ended. What torchrun and accelerate start is forked too. Used by tests/commands.py.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import sys

LIBRARIES = """accelerate datasets deepspeed jieba matplotlib.pyplot nltk.translate.bleu_score peft pyarrow.parquet
sacrebleu.metrics transformers.trainer transformers.models.gemma transformers.models.qwen2"""
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as the recipes do; DeepSpeed would warn on stdout
for name in LIBRARIES.split():
    with contextlib.suppress(ImportError):  # DeepSpeed is for Linux only
        importlib.import_module(name)
gc.collect()
gc.freeze()  # what is imported is no garbage: no fork looks at it again

for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, int):
        answer = os.waitstatus_to_exitcode(os.waitpid(order, 0)[1])
    elif (answer := os.fork()) == 0:
        break
    print(answer, flush=True)
else:
    sys.exit()
words, environment, folder, *files = order
os.environ |= {"PET_START_METHOD": "fork", "PET_RUN_PATH": "1"} | environment  # torchrun's --start-method, --run-path
os.chdir(folder)
signal.alarm(1200)  # where it hangs it ends
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for number, path in enumerate(files, 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
if words[0] == "-c":
    sys.argv, sys.path[0] = ["-c", *words[2:]], ""
    exec(words[1], {"__name__": "__main__"})
elif words[0] == "-m":
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
else:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
