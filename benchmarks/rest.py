"""The memory of a service at rest: after 100 conversations, and after ten times as many.

python benchmarks/rest.py
python benchmarks/rest.py --model DIR --counts 100 300

post_api.py with a Qwen2 folder, by default random weights in the embedded model's shape. A conversation has three turns
of its own words, so that nothing but its own turns can be read once; clients hold theirs at the same time. Printed: the
service's proportional set size, three seconds after the last answer, when it has handed back what it does not use.
"""

import argparse
import http.client
import json
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from chats import text_of
from measure import MIB, machine, table, tree_memory
from serve import end, ours, prepare


def converse(port, number, tokens):
    """One conversation of three turns; the number makes its words."""
    dice, messages = random.Random(number), []
    for _ in range(3):
        messages.append({"role": "user", "content": text_of(dice, dice.randint(10, 80))})
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        body = json.dumps({"model": "base", "messages": messages, "max_tokens": tokens}).encode()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200:
            raise SystemExit(f"{response.status}: {answer}")
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Qwen2 folder")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 300, 1000], help="conversations so far")
    parser.add_argument("--clients", type=int, default=8, help="conversations at the same time")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    args = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sizes, done = [], 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.model, folder)
        service = ours(folder)
        try:
            service.wait()
            for count in args.counts:
                with ThreadPoolExecutor(args.clients) as pool:
                    list(pool.map(lambda n: converse(service.port, n, args.tokens), range(done, count)))
                done = count
                time.sleep(3)
                sizes.append(tree_memory(service.process.pid) / MIB)
                print(f"{count}: {sizes[-1]:.0f} MiB", file=sys.stderr)
        finally:
            end([service])
    rows = [[count, f"{size:.0f}", f"{size / sizes[0]:.3f}"] for count, size in zip(args.counts, sizes, strict=True)]
    print(f"{machine()}\n\n" + table(["conversations", "MiB at rest", "ratio"], rows))


if __name__ == "__main__":
    main()
