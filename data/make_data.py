"""Write every data file of this folder; the same files, byte for byte, on every run.

``python data/make_data.py`` writes the files and prints the table of the README; ``--check`` writes nothing and exits
with 1, naming each file that differs from what the script makes.  Only the standard library is used.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import entities
import general
import pretrain
import probe
import products

HERE = Path(__file__).resolve().parent
SEED = 20240607
FILES = (
    "product_train.jsonl",
    "product_heldout.jsonl",
    "entity_train.jsonl",
    "entity_heldout.jsonl",
    "identity.jsonl",
    "general.jsonl",
)
PROBE = "probe.jsonl"  # no training file: the pre-training reads nothing of it


@cache
def build() -> dict[str, str]:
    """Compose the text of every file."""
    product_train, product_heldout = products.product_rows(4000, 200, SEED)
    entity_train, entity_heldout = entities.entity_rows(2400, 200, SEED + 1)
    rows = (
        product_train,
        product_heldout,
        entity_train,
        entity_heldout,
        general.identity_rows(SEED + 2),
        general.general_rows(600, SEED + 3),
    )
    for row in product_train + product_heldout:
        assert all(pair.split("#")[1] in row["summary"] for pair in row["content"].split("*"))
    return {name: to_lines(part) for name, part in zip(FILES, rows, strict=True)}


def to_lines(rows: list[dict]) -> str:
    """Write rows as JSON lines, one compact object a line."""
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)


def read_rows(text: str) -> list[dict]:
    """Parse JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


def build_all() -> dict[str, str]:
    """Compose the text of every file and of the probe."""
    return build() | {PROBE: to_lines(probe.probe_rows(SEED + 4))}


# ---------------------------------------------------------------------------------------------------------- the table


def written_text(row: dict) -> str:
    """Return the text of a row that a model is to write."""
    if "messages" in row:
        return "\n".join(m["content"] for m in row["messages"] if m["role"] == "assistant")
    return next(row[key] for key in ("summary", "answer", "output") if key in row)


def measured_text(row: dict) -> str:
    """Return the composed text that the diversity columns look at: for entity rows it is the query."""
    return row["query"] if "query" in row else written_text(row)


def distinct_2(texts: list[str]) -> float:
    """Return the number of distinct character bigrams over the number of all bigrams (inside a text)."""
    counts = Counter(text[i : i + 2] for text in texts for i in range(len(text) - 1))
    return len(counts) / max(1, sum(counts.values()))


def identical_share(texts: list[str]) -> float:
    """Return the share of sentences (split at 。！？；, six characters or more) that occur more than once."""
    sentences = Counter(s for text in texts for s in re.split("[。！？；]", text) if len(s) >= 6)
    return sum(n for n in sentences.values() if n > 1) / max(1, sum(sentences.values()))


def table(files: dict[str, str]) -> str:
    """Measure the files; return the Markdown table that the README shows."""
    lines = [
        "| file | rows | KiB | mean length | distinct-2 | identical sentences | characters |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in FILES:
        rows = read_rows(files[name])
        texts = [measured_text(row) for row in rows]
        cells = (
            f"`{name}`",
            len(rows),
            round(len(files[name].encode()) / 1024),
            f"{sum(map(len, texts)) / len(texts):.1f}",
            f"{distinct_2(texts):.4f}",
            f"{100 * identical_share(texts):.1f} %",
            len(set(files[name])),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    everything = "".join(files[name] for name in FILES)
    rows_total = everything.count("\n")
    lines.append(f"| all | {rows_total} | {round(len(everything.encode()) / 1024)} | | | | {len(set(everything))} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- pre-training


def _shipped() -> dict[str, str]:
    """Return the files as they lie here, or composed where one is missing."""
    if all((HERE / name).is_file() for name in FILES):
        return {name: (HERE / name).read_text(encoding="utf-8") for name in FILES}
    return build()


@cache
def heldout_texts() -> tuple[frozenset[str], tuple[str, ...]]:
    """Return what no pre-training document may contain: held-out names; summaries and attribute lists."""
    files = _shipped()
    names = {
        line.rsplit("_", 1)[0]
        for row in read_rows(files["entity_heldout.jsonl"])
        for line in row["answer"].splitlines()
        if "_" in line
    }
    products_rows = read_rows(files["product_heldout.jsonl"])
    return frozenset(names), tuple(row[key] for row in products_rows for key in ("summary", "content"))


@cache
def heldout_combinations() -> list[frozenset[tuple[str, str]]]:
    """Return the attribute combinations of the held-out products."""
    rows = read_rows(_shipped()["product_heldout.jsonl"])
    return [frozenset(tuple(pair.split("#")) for pair in row["content"].split("*")) for row in rows]


@cache
def alphabet() -> tuple[str, ...]:
    """Return every character of the shipped files that can stand in a text."""
    rows = [row for text in _shipped().values() for row in read_rows(text)]
    return tuple(sorted(set("".join(json.dumps(row, ensure_ascii=False) for row in rows)) - {"\n"}))


def has_heldout(document: str, names: frozenset[str], starts: frozenset[str]) -> bool:
    """Tell whether a document has a held-out name, or ten characters that open a held-out text, in it."""
    for i in range(len(document) - 1):
        if document[i : i + 2] in starts and (
            any(document[i : i + n] in names for n in range(2, 16)) or document[i : i + 10] in names
        ):
            return True
    return False


def pretrain_documents(
    count: int, seed: int, shop_share: float = pretrain.SHOP_SHARE, names_share: float = 0.0
) -> Iterator[str]:
    """Yield ``count`` plain-text documents: shares of shop texts and of names found in sentences; of the rest half
    are about garments, a fifth is copying."""
    rng = random.Random(seed)
    names, texts = heldout_texts()
    guarded = names | {text[:10] for text in texts}
    starts = frozenset(text[:2] for text in guarded)
    barred = heldout_combinations()
    characters, position = list(alphabet()), [0]
    makers = [maker for maker, _ in pretrain.WEIGHTED]
    cumulative = list(accumulate(weight for _, weight in pretrain.WEIGHTED))
    made = 0
    while made < count:
        roll = rng.random()
        if roll < pretrain.ALPHABET_SHARE:
            document = pretrain.alphabet_document(characters, position, rng)
        elif roll < pretrain.ALPHABET_SHARE + shop_share:
            document = pretrain.shop_document(barred, rng)
        elif roll < pretrain.ALPHABET_SHARE + shop_share + names_share:
            document = pretrain.names_document(rng)
        else:
            maker = rng.choices(makers, cum_weights=cumulative)[0]
            document = maker(rng)
            while len(document) < 62 and rng.random() < 0.8:
                document += "\n" + maker(rng)
        if has_heldout(document, guarded, starts):
            continue
        made += 1
        yield document


# ------------------------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """Write or check the files; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; name the files that differ")
    options = parser.parse_args(argv)
    files = build_all()
    if options.check:
        differing = [n for n in files if not (HERE / n).is_file() or (HERE / n).read_bytes() != files[n].encode()]
        for name in differing:
            print(f"{name} differs from what make_data.py makes", file=sys.stderr)
        return 1 if differing else 0
    for name, text in files.items():
        (HERE / name).write_bytes(text.encode())
    print(table(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
