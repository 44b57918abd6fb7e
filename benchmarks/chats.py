"""What keeping prefixes saves: a chat's tenth turn, a system text many share, and questions with shared examples.

python benchmarks/chats.py --rounds 5                      (the embedded Qwen2)
python benchmarks/chats.py --model DIR --rounds 1 --clients 4 --parts chat system

Each part is done with what was read kept and with nothing kept, in turns, by one process. Printed are medians, their
ratio, and how many of the greedy answers of both are equal. Answers in a chat end where the model ends them, those to
many clients are as long as asked for.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CHARACTERS = "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么"


def text_of(dice, length):
    return "".join(dice.choices(CHARACTERS, k=length))


def answerer(model, dtype):
    """An Answerer of a Qwen folder, "" for the embedded one."""
    from qwen2_sft.ft_qwen2.config import Config
    from qwen2_sft.ft_qwen2.predict import load_answer

    path = model or "embedded"
    return load_answer(Config(path_model_pretrain=path, model_save_dir="/nowhere", dtype=dtype), base=True)


class Batch:
    """A Batcher that keeps what it has read, or nothing; ends: answers may end before they are as long as asked."""

    def __init__(self, answer, keeps, ends=True):
        from common.engine.batcher import Batcher

        self.batcher = Batcher(answer, {"base": None})
        self.batcher.stop_ids = self.batcher.stop_ids if ends else set()
        self.batcher.prefixes.usable &= keeps

    def ask(self, conversations, tokens):
        """(rows, tickets) of conversations asked at once, when all have been answered."""
        from common.engine.request import Ask
        from common.inference.answerer import Sampling

        sampling = Sampling(max_new_tokens=tokens)
        prompts = [self.batcher.encoder.whole_ids(turns) for turns in conversations]
        tickets = [self.batcher.submit("base", [Ask(ids, sampling)]) for ids in prompts]
        for ticket in tickets:
            list(ticket.parts())
        return [ticket.rows[0] for ticket in tickets], tickets


def chat(answer, keeps, dice, args):
    """Ten turns: (ids of all answers, {seconds to the first token of the tenth, tokens of its prompt, kept})."""
    from common.conversation.turns import Turn

    batch, turns, said = Batch(answer, keeps), [], []
    for _ in range(10):
        turns.append(Turn("user", text_of(dice, 80)))
        (row,), (ticket,) = batch.ask([turns], args.tokens)
        said.append(row.ids)
        turns.append(Turn("assistant", row.text))
    batch.batcher.close()
    return said, {"first": ticket.first - ticket.created, "prompt": len(row.ask.ids), "kept": row.cached}


def system(answer, keeps, dice, args):
    """A system text of 1,000 tokens and many clients, asked twice: (ids, {seconds of the second time, …})."""
    from common.conversation.turns import Turn

    batch, shared = Batch(answer, keeps, ends=False), Turn("system", text_of(dice, args.system))
    asked = [[shared, Turn("user", text_of(dice, 20))] for _ in range(2 * args.clients)]
    first, _ = batch.ask(asked[: args.clients], args.tokens)
    started = time.monotonic()
    rows, tickets = batch.ask(asked[args.clients :], args.tokens)
    seconds = time.monotonic() - started
    waits = statistics.median(ticket.first - ticket.created for ticket in tickets)
    read = [sum(len(row.ask.ids) - row.cached for row in some) for some in (first, rows)]
    batch.batcher.close()
    return [row.ids for row in first + rows], {
        "requests_per_second": args.clients / seconds,
        "first": waits,
        "prompt": len(rows[0].ask.ids),
        "read_at_first": read[0],
        "read_then": read[1],
    }


def examples(answer, keeps, dice, args):
    """256 questions of four subjects, five examples each, for an Answerer with nothing kept so far."""
    from common.conversation.turns import Turn
    from common.inference.prefix_cache import PrefixCache

    def question(length):
        return Turn("user", text_of(dice, length) + "\n" + "\n".join(f"{a}. {text_of(dice, 8)}" for a in "ABCD"))

    asked = []
    for _ in range(4):
        shots = [turn for a in "ABCDA" for turn in (question(60), Turn("assistant", a))]
        asked += [[*shots, question(dice.randint(30, 60))] for _ in range(args.questions // 4)]
    answer.prefixes = PrefixCache(answer.net)
    answer.prefixes.usable &= keeps
    answer.max_length_q = 1900
    return asked


def questions(answer, keeps, dice, args):
    """Questions to be answered by a letter, the likeliest: (letters, {seconds})."""
    from common.inference import likelihood

    asked = [(turns, list("ABCD")) for turns in examples(answer, keeps, dice, args)]
    started = time.monotonic()
    found = [fits for n in range(0, len(asked), 32) for fits in likelihood.fits(answer, asked[n : n + 32])]
    seconds = time.monotonic() - started
    letters = ["ABCD"[min(range(4), key=lambda n, fits=fits: fits[n].loss)] for fits in found]
    return letters, {"seconds": seconds, "prompt": len(answer.fitted_ids(asked[0][0]))}


def written(answer, keeps, dice, args):
    """The same questions answered in writing, 32 at once: (texts, {seconds})."""
    from common.inference.answerer import Sampling

    asked, sampling = examples(answer, keeps, dice, args), Sampling(max_new_tokens=args.tokens)
    started = time.monotonic()
    found = [one.text for n in range(0, len(asked), 32) for one in answer(asked[n : n + 32], sampling)]
    return found, {"seconds": time.monotonic() - started, "prompt": len(answer.fitted_ids(asked[0]))}


PARTS = {
    "chat": (chat, "first"),
    "system": (system, "requests_per_second"),
    "questions": (questions, "seconds"),
    "written": (written, "seconds"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a Qwen folder; the embedded one if left out")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--system", type=int, default=1000, help="characters of the shared system text")
    parser.add_argument("--questions", type=int, default=256)
    args = parser.parse_args(argv)
    answer = answerer(args.model, args.dtype)
    for name in args.parts:
        part, figure = PARTS[name]
        results, same, count = {True: [], False: []}, 0, 0
        for number in range(args.rounds):
            said = {}
            for keeps in (True, False) if number % 2 else (False, True):
                before = resource.getrusage(resource.RUSAGE_SELF)
                said[keeps], result = part(answer, keeps, random.Random(number), args)
                after = resource.getrusage(resource.RUSAGE_SELF)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                results[keeps].append(result | {"cpu_seconds": cpu})
            same += sum(a == b for a, b in zip(said[True], said[False], strict=True))
            count += len(said[True])
        medians = {
            "kept" if keeps else "not kept": {key: statistics.median(one[key] for one in found) for key in found[0]}
            for keeps, found in results.items()
        }
        print(json.dumps({"part": name} | medians))
        ratio = medians["kept"][figure] / medians["not kept"][figure]
        print(f"{name}: {figure}, kept / not kept: {ratio:.2f}; equal answers: {same} / {count}")


if __name__ == "__main__":
    main()
