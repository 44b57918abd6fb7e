"""The commands of README and docs/ as tests run them: in a copy of the project, small models for the real ones."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"query": f"{n}+1=", "response": str(n + 1)} for n in range(40)]
SERVICE = re.compile(r"python \S+/post_api\.py")
STARTERS = {  # the first word of a command that is Python: the words after `python` in its place
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}
OTHERS = {"help", "config", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "config_file"}


def pages():
    """README and the pages of docs/ in English, each with its Chinese one: [(path, path)] from the root."""
    english = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md") if "_zh" not in p.name)]
    return [(page, page.replace(".md", "_zh.md")) for page in english]


def text_of(page):
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, language):
    """The texts of the page's ```language blocks, in order."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text_of(page), flags=re.S | re.M)


def commands(page):
    """The lines of the ```bash blocks, in order."""
    return [line.strip() for block in blocks(page, "bash") for line in block.splitlines()]


def flags_in(text):
    """Names of the --flags a text mentions."""
    return set(re.findall(r"(?<![\w-])--([a-z][a-z0-9_]*)", text))


def known_flags():
    """Names of all flags: knobs, what each recipe takes beside them, aliases, the launchers'."""
    from common.config import EvaluationFlags, ExportFlags, PredictFlags, ServeFlags, TrainFlags
    from common.knobs import ALIASES
    from gemma_sft.ft_gemma.config import Config

    classes = (Config, TrainFlags, PredictFlags, EvaluationFlags, ServeFlags, ExportFlags)
    return {*ALIASES, *OTHERS}.union(*({field.name for field in fields(cls)} for cls in classes))


def free_port():
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Warm:
    """tests/warm.py under way. It starts a process in a second, where Python alone takes twelve to import libraries."""

    def __init__(self, environment):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, ROOT / "tests/warm.py"], env=environment, **pipes)

    def start(self, words, environment, folder, output, errors):
        """The process of `python words…`, with more of an environment, in a folder, writing into two files."""
        return Forked(self, self.ask([words, environment, *map(str, (folder, output, errors))]))

    def run(self, words, folder):
        """(exit status, stdout, stderr) of `python words…` in a folder, once it has ended."""
        with tempfile.TemporaryDirectory() as place:
            files = Path(place, "stdout"), Path(place, "stderr")
            status = self.start(list(map(str, words)), {}, folder, *files).wait()
            return status, *(file.read_text(encoding="utf-8") for file in files)

    def ask(self, order):
        """What tests/warm.py answers, a number."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        """End it, when all it started has ended."""
        self.process.communicate()


class Forked:
    """A process that Warm started, with what we use of subprocess.Popen."""

    def __init__(self, warm, number):
        self.warm, self.number = warm, number

    def wait(self, timeout=None):
        """Its exit status, once it has ended."""
        return self.warm.ask(self.number)

    def send_signal(self, number):
        os.kill(self.number, number)


class Project:
    """A copy of the project as a fresh clone has it, with the two data files the pages speak of, and its commands.

    models: {hub id: folder of a small model}. warm: a Warm that starts its Python scripts.
    """

    def __init__(self, folder, models, environment, warm):
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "model_sft*", "__pycache__", ".venv"))
        for name in ("my.jsonl", "held_out.jsonl"):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self.folder, self.environment, self.server, self.warm = folder, environment, None, warm
        self.words = {hub_id: str(path) for hub_id, path in models.items()} | {"8044": str(free_port())}

    def run(self, line, fork=True):
        """stdout of a line, which must not fail. A service goes on, for the lines after it, until the next or `end`.

        fork: start Python by `warm`, not afresh as a user does.
        """
        is_service = bool(SERVICE.match(line))
        if is_service:
            self.end()
        kind = "service" if is_service else "command"
        output, errors = (self.folder / f"{kind}.{name}" for name in ("stdout", "stderr"))
        process = self._start(line, output, errors, fork)
        if is_service:
            self.server = process
            wait_for(lambda: "listening on http://127.0.0.1:" in output.read_text(), errors)
        else:
            status = process.wait()
            assert status == 0, f"{line}\n{_tail(output)}\n{_tail(errors)}"
        return output.read_text(encoding="utf-8", errors="replace")

    def end(self):
        """End the service, as an operator does."""
        server, self.server = self.server, None
        if server:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0

    def here(self, text):
        """The text with small models for the real ones and a free port."""
        for word, ours in self.words.items():
            text = text.replace(word, ours)
        return text

    def _start(self, line, output, errors, fork):
        """The process of a line, where nothing is installed and the environment may be written before the command."""
        line = line.removeprefix("pip install -r requirements.txt -c constraints.txt && ")  # .ci/run installs
        words, environment = shlex.split(self.here(line)), {}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        for file in (output, errors):
            file.write_text("")  # there and empty, whoever writes into it
        if words[0] in STARTERS:
            words[:1] = [sys.executable, *STARTERS[words[0]]]
            if fork and words[1] != "-c":  # what a page shows in Python is told of its first import too
                return self.warm.start(words[1:], environment, self.folder, output, errors)
        with output.open("w") as stdout, errors.open("w") as stderr:
            return subprocess.Popen(
                words, cwd=self.folder, env=self.environment | environment, stdout=stdout, stderr=stderr
            )


def wait_for(happened, errors, seconds=120):
    """Wait until something has happened; what is written to `errors` says why it has not."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, _tail(errors)
        time.sleep(0.1)


def _tail(file):
    return file.read_text(encoding="utf-8", errors="replace")[-3000:]
