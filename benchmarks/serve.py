"""Requests a second and time to first token: our service beside `transformers serve --continuous-batching`.

python benchmarks/serve.py --rounds 5            (pip install fastapi uvicorn, for the other side)

Both serve the same small Qwen2 folder on this machine, greedily, the same questions, answers streamed. Without --model
its weights are random, in the embedded model's shape, so that no answer ends early. The sides take turns, and while one
is measured the other one is stopped. Printed: for 1 and 16 clients each side's requests a second (median, least and
most of the rounds), the time to the first event, p50 and p95, and the tokens of an answer.
"""

import argparse
import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
EMBEDDED = ROOT / "qwen2_sft/embedded"
SETTLE = 1.2  # seconds until a side has noticed that the other one no longer computes
OURS, THEIRS = "post_api.py", "transformers serve --continuous-batching"


def prepare(source, folder):
    """Put model and tokenizer of `source` into `folder`, with a chat template and stop ids in the files.

    source: a Qwen2 folder; None: random weights in the shape of the embedded one, with its tokenizer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from qwen2_sft import prompt

    tokenizer = AutoTokenizer.from_pretrained(source or EMBEDDED)
    tokenizer.chat_template = tokenizer.chat_template or prompt.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    if source:
        net = AutoModelForCausalLM.from_pretrained(source)
    else:
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(EMBEDDED), dtype=torch.float32)
        net = net.bfloat16().float()  # numbers of bfloat16, as in a checkpoint; both sides compute in float32
    stops = prompt.stop_ids(tokenizer, "chat")
    net.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=stops[0])
    net.save_pretrained(folder)


class Side:
    """One server as a process."""

    def __init__(self, name, command, port, model):
        self.name, self.port, self.model, self.results = name, port, model, {}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self, seconds=300):
        """Until it answers a request."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name}: ended with code {self.process.returncode}")
            try:
                return self.ask("你好", 2)
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(0.5)
        raise SystemExit(f"{self.name}: no answer within {seconds} s")

    def ask(self, question, tokens):
        """(seconds to the first event, tokens) of a streamed answer; ValueError where it is not answered."""
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "max_tokens": tokens}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        started, connection = time.monotonic(), http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                raise ValueError(response.read().decode())
            response.readline()
            first = time.monotonic() - started
            return first, int(re.findall(rb'"completion_tokens": ?(\d+)', response.read())[-1])
        finally:
            connection.close()

    def measure(self, clients, count, tokens):
        """Add one round: `count` requests of so many clients."""
        started = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(lambda n: self.ask(f"类型#裙*颜色#黑色*编号#{n}", tokens), range(count)))
        rate = count / (time.monotonic() - started)
        rates, all_answers = self.results.setdefault(clients, ([], []))
        rates.append(rate)
        all_answers += answers

    def summary(self, clients):
        """{requests_per_second: median, least, most, ttft_p50, ttft_p95 (seconds), tokens of an answer}."""
        rates, answers = self.results[clients]
        firsts, tokens = zip(*answers, strict=True)
        cuts = statistics.quantiles(firsts, n=20, method="inclusive")
        return {
            "requests_per_second": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "ttft_p50": cuts[9],
            "ttft_p95": cuts[18],
            "tokens": statistics.mean(tokens),
        }


def free_port():
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ours(folder):
    """Our service of a Qwen2 folder, greedy, started."""
    port = free_port()
    command = [sys.executable, str(ROOT / "qwen2_sft/ft_qwen2/post_api.py"), "--base", "--port", str(port)]
    command += ["--path_model_pretrain", folder, "--model_save_dir", f"{folder}/none", "--do_sample", "false"]
    return Side(OURS, command, port, "base")


def theirs(folder):
    """transformers' service of the folder, started."""
    port = free_port()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--continuous-batching"]
    command += ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    return Side(THEIRS, command, port, folder)


def start(folder):
    """Both sides, ours first, answering."""
    sides = [ours(folder), theirs(folder)]
    try:
        for side in sides:
            side.wait()
    except BaseException:
        end(sides)
        raise
    return sides


def end(sides):
    """End the processes."""
    for side in sides:
        side.process.kill()
        side.process.wait()


def run(sides, args):
    """All rounds, sides in turn, the one that waits stopped."""
    for number in range(args.rounds):
        for clients in (1, 16):
            for side in sides if number % 2 == 0 else sides[::-1]:
                (other,) = [one for one in sides if one is not side]
                other.process.send_signal(signal.SIGSTOP)
                time.sleep(SETTLE)
                try:
                    side.measure(clients, args.requests * (4 if clients > 1 else 1), args.tokens)
                finally:
                    other.process.send_signal(signal.SIGCONT)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a small Qwen2 folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--requests", type=int, default=24, help="of one client in a round; 16 clients ask four times as many"
    )
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.model, folder)
        sides = start(folder)
        try:
            run(sides, args)
        finally:
            end(sides)
    found = {side.name: {clients: side.summary(clients) for clients in (1, 16)} for side in sides}
    for name, by_clients in found.items():
        for clients, one in by_clients.items():
            print(
                f"{name:<42} {clients:>2} clients  {one['requests_per_second']:6.1f} requests/s "
                f"({one['least']:.1f} … {one['most']:.1f})  TTFT p50 {1000 * one['ttft_p50']:.0f} ms, "
                f"p95 {1000 * one['ttft_p95']:.0f} ms, {one['tokens']:.0f} tokens an answer"
            )
    many, one = (found[OURS][clients]["requests_per_second"] for clients in (16, 1))
    print(f"16 clients / 1 client: {many / one:.2f}")
    print(f"ours / theirs, 16 clients: {many / found[THEIRS][16]['requests_per_second']:.2f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
