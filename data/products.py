"""Composition of product rows (attribute list and description) from the tables in ``grammar``."""

# ruff: noqa: E501 -- a Chinese character counts as two columns; the tables read better in long lines

from __future__ import annotations

import random
import re

import grammar as g

Attribute = tuple[str, str]
LIMITS = {
    "很": 2,
    "又": 2,
    "穿": 2,
    "让": 2,
    "都": 2,
    "显": 2,
    "有": 3,
    "得": 3,
    "更": 2,
    "好": 3,
    "衬": 2,
    "出": 4,
    "的": 8,
}
LENGTH = (45, 92)


def _choose_keys(kind: str, count: int, rng: random.Random) -> list[str]:
    """Draw ``count`` keys without replacement by weight; ``风格+`` stands for a second 风格."""
    weights = dict(g.KEY_WEIGHTS[kind])
    keys = []
    for _ in range(count):
        names = [name for name in weights if not name.endswith("+") or name[:-1] in keys]
        key = rng.choices(names, [weights[name] for name in names])[0]
        keys.append(key)
        del weights[key]
    return keys


def _candidates(kind: str, key: str, subkind: str) -> list[str]:
    """Return the values a key may take for a garment of this type (and of this 衣样式, 鞋款 or 包款)."""
    rules = g.KIND_RULES.get(subkind, {})
    if key == "材质":
        return g.KIND_MATERIALS.get(subkind, g.GARMENT_MATERIALS[kind])
    if key in rules:
        return rules[key]
    tables = {
        "颜色": g.GARMENT_COLORS.get(kind, list(g.COLOR)),
        "风格": g.GARMENT_STYLES[kind],
        "图案": g.GARMENT_PRINTS[kind],
    }
    return tables.get(key) or g.VALUES[kind][key]


def clashes(values: list[str]) -> bool:
    """Tell whether two of the values contradict each other (or are the same)."""
    styles = set(values)
    if len(styles) != len(values):
        return True
    soft, hard = g.STYLE_CLASH
    if styles & soft and styles & hard:
        return True
    pairs = [frozenset((a, b)) for i, a in enumerate(values) for b in values[i + 1 :]]
    return any(pair in g.CLASHES or pair in g.STYLE_CLASH_PAIRS for pair in pairs)


def sample_attributes(rng: random.Random) -> list[Attribute]:
    """Draw one consistent attribute list, the type first, in the key order of ADVGEN."""
    while True:
        kind = rng.choices(list(g.TYPE_WEIGHTS), list(g.TYPE_WEIGHTS.values()))[0]
        keys = _choose_keys(kind, rng.choices((4, 5, 6, 7), (34, 34, 22, 10))[0], rng)
        row: list[Attribute] = [("类型", kind)]
        subkind = ""
        if kind == "裙" and rng.random() < 0.85:
            subkind = rng.choices(("连衣裙", "半身裙", "长裙", "短裙", "中长裙"), (45, 28, 11, 8, 8))[0]
            row.append(("裙长", subkind))
            keys.pop()
        if g.KIND_KEY.get(kind) in keys:
            key = g.KIND_KEY[kind]
            subkind = rng.choice(g.VALUES[kind][key])
            row.append((key, subkind))
            keys.remove(key)
        if subkind == "半身裙" and g.HALF_SKIRT_BANNED & set(keys):
            continue
        pools = [_candidates(kind, key.rstrip("+"), subkind) for key in keys]
        if not all(pools):
            continue
        row += [(key.rstrip("+"), rng.choice(pool)) for key, pool in zip(keys, pools, strict=True)]
        if not clashes([value for _, value in row]) and not ({"裙袖长", "裙袖型"} <= {k for k, _ in row}):
            row.sort(key=lambda pair: g.KEY_ORDER.index(pair[0]))
            return row


def content_of(row: list[Attribute]) -> str:
    """Write the attribute list in ADVGEN's form."""
    return "*".join(f"{key}#{value}" for key, value in row)


def _words(attribute: Attribute, rng: random.Random) -> str:
    """Return a noun phrase that carries the value."""
    key, value = attribute
    if key == "材质":
        return rng.choice(g.MATERIAL_NOUNS[value])
    if key == "图案" and value != "纯色":
        return rng.choice(g.PRINT_NOUNS[value])
    if key == "风格":
        return rng.choice(g.STYLE_NP[value])
    return value


def _point(attribute: Attribute, rng: random.Random) -> str:
    """Return a selling point of the value."""
    key, value = attribute
    if value == "纯色":
        return rng.choice(g.PLAIN)
    points = g.GROUPS[key][1]
    return rng.choice(points[value]) if value in points else ""


def _group(attribute: Attribute) -> str:
    """Return the name of the pattern group that words this attribute."""
    key, value = attribute
    if value == "纯色":
        return "纯色"
    group = g.GROUPS[key][0]
    if value == "可调节":
        return "包肩带调节"
    return "款式结构" if group == "款式" and value in g.STRUCTURAL_DETAILS else group


def _fill(pattern: str, words: dict[str, str], points: dict[str, str]) -> str:
    """Fill a pattern; a point that cannot be a predicate of the words before it gets a comma."""
    for name, point in points.items():
        slot = "{" + name + "}"
        before = pattern.partition(slot)[0]
        comma = "，" if point in g.FREE_POINTS and before and not before.endswith("，") else ""
        pattern = pattern.replace(slot, comma + point)
    for name, word in words.items():
        pattern = pattern.replace("{" + name + "}", word)
    return pattern


def clause(attribute: Attribute, kind: str, rng: random.Random) -> str:
    """Word one attribute as a clause."""
    words = _words(attribute, rng)
    pattern = rng.choice(g.PATTERNS[_group(attribute)])
    slots = {"v": words, "m": words, "s": words, "g": words, "p": g.SURFACE[kind]}
    return _fill(pattern, slots, {"b": _point(attribute, rng)})


def merged_clause(first: Attribute, second: Attribute, kind: str, rng: random.Random) -> str | None:
    """Word two attributes in one clause, or return None where no pattern joins them."""
    for one, two in ((first, second), (second, first)):
        groups = (g.GROUPS[one[0]][0], g.GROUPS[two[0]][0])
        if groups in g.MERGES and not {"纯色", "可调节"} & {one[1], two[1]}:
            text = rng.choice(g.MERGES[groups])
            words = {"1": _words(one, rng), "2": _words(two, rng), "p": g.SURFACE[kind]}
            return _fill(text, words, {"b1": _point(one, rng), "b2": _point(two, rng)})
    return None


REGIONS = [
    {"版型", "材质", "颜色", "图案"},
    {
        "裙领型",
        "裙袖长",
        "裙袖型",
        "衣领型",
        "衣袖长",
        "衣袖型",
        "衣门襟",
        "裙衣门襟",
        "鞋头",
        "鞋帮",
        "鞋闭合",
        "包闭合",
        "包肩带",
    },
    {"裙腰型", "裙型", "裙下摆", "裤腰型", "裤型", "裤长", "裤口", "衣长", "鞋跟", "包型", "包大小"},
    {"裙款式", "衣款式", "裤款式", "鞋款式", "包款式", "衣样式", "鞋款", "包款"},
    {"风格"},
]


def _ordered(attributes: list[Attribute], rng: random.Random) -> list[Attribute]:
    """Shuffle the attributes while keeping those of one region of the garment together."""
    regions = [[a for a in attributes if a[0] in region] for region in REGIONS]
    for region in regions:
        rng.shuffle(region)
    if rng.random() < 0.55:
        body = regions[:4]
        rng.shuffle(body)
        regions = [*body, regions[4]]
    else:
        rng.shuffle(regions)
    return [attribute for region in regions for attribute in region]


def _noun(kind: str, row: list[Attribute], rng: random.Random) -> tuple[str, Attribute | None]:
    """Choose the noun for the garment and the attribute that it already words, if any."""
    options = [pair for pair in row if pair[0] in ("裙长", "衣样式", "裤型", "裤长", "鞋款", "包款")]
    if options and (kind == "裙" or rng.random() < 0.7):
        chosen = rng.choice(options)
        return chosen[1], chosen
    return rng.choice(g.NOUNS[kind]), None


def _modifiers(row: list[Attribute], noun: str, rng: random.Random) -> tuple[str, list[Attribute]]:
    """Choose words before the noun and return them with the attributes they word."""
    roll = rng.random()
    by_key = {key: (key, value) for key, value in row}
    if roll < 0.3 and "风格" in by_key:
        return rng.choice(g.STYLE_ADJ[by_key["风格"][1]]) + "的", [by_key["风格"]]
    if roll < 0.42 and "颜色" in by_key:
        return by_key["颜色"][1] + rng.choice(("", "的")), [by_key["颜色"]]
    if roll < 0.48 and "版型" in by_key:
        return by_key["版型"][1] + "的", [by_key["版型"]]
    if roll < 0.72:
        tables = (
            ("风格", g.DIRECT_STYLES),
            ("颜色", set(g.COLOR)),
            ("材质", g.DIRECT_MATERIALS),
            ("图案", g.DIRECT_PRINTS),
        )
        direct = [by_key[key] for key, table in tables if key in by_key and by_key[key][1] in table]
        if any(char in noun for pair in direct for char in pair[1] if pair[0] == "材质") or not direct:
            return "", []
        count = min(len(direct), rng.choice((1, 2, 2)))
        chosen = sorted(rng.sample(range(len(direct)), count))
        picked = [direct[i] for i in chosen]
        return "".join(value for _, value in picked), picked
    return "", []


def _clauses(attributes: list[Attribute], kind: str, rng: random.Random) -> list[str]:
    """Word the attributes in order, joining neighbours in one clause now and then."""
    merge_rate = 0.25 if len(attributes) < 5 else 0.6
    out: list[str] = []
    i = 0
    while i < len(attributes):
        both = None
        if i + 1 < len(attributes) and rng.random() < merge_rate:
            both = merged_clause(attributes[i], attributes[i + 1], kind, rng)
        out.append(both or clause(attributes[i], kind, rng))
        i += 2 if both else 1
    return out


def _sentences(clauses: list[str], rng: random.Random) -> list[str]:
    """Group clauses into sentences of one to three, with a connective here and there."""
    out: list[str] = []
    i = 0
    while i < len(clauses):
        size = rng.choice((1, 2, 2, 2, 3)) if len(clauses) > 2 else rng.choice((1, 2))
        group = clauses[i : i + size]
        text = group[0]
        for part in group[1:]:
            joiner = rng.choice(g.JOINERS) if rng.random() < 0.25 else ""
            if joiner in g.JOINERS_BEFORE_NOUNS and part.startswith(g.VERB_STARTS):
                joiner = ""
            text += "，" + joiner + part
        if i and rng.random() < 0.12:
            text = rng.choice(g.DETAIL_LEADS) + text
        out.append(text)
        i += size
    return out


def _closer(kind: str, rng: random.Random) -> str:
    """Write a closing clause: an occasion or what to combine the garment with."""
    table = g.COMMON_CLOSERS if rng.random() < 0.35 and kind != "上衣" else g.CLOSERS[kind]
    text = rng.choices(table, [1 + 4 * min(1, line.count("{")) + 3 * line.count("{o2}") for line in table])[0]
    first, second = rng.sample(g.SLOTS["o"], 2)
    slots = {name: rng.choice(words) for name, words in g.SLOTS.items()} | {"o": first, "o2": second}
    return _fill(text.replace("{o}{o2}", "{o}、{o2}") if rng.random() < 0.5 else text, slots, {})


def _draft(row: list[Attribute], rng: random.Random) -> str:
    """Write one candidate description."""
    kind = row[0][1]
    noun, noun_attribute = _noun(kind, row, rng)
    modifiers, used = _modifiers(row[1:], noun, rng)
    rest = _ordered([a for a in row[1:] if a != noun_attribute and a not in used and a[0] != "裙长"], rng)
    clauses = _clauses(rest, kind, rng)
    names = {"c": g.MEASURE[kind], "a": modifiers, "n": noun}
    closer = _closer(kind, rng)
    mode = rng.random()
    if mode < 0.16 and clauses:
        end = rng.choice(g.LATE_NOUNS).format(**names, e=closer, x=rng.choice(g.LATE_PRAISE))
        return ("。".join([*_sentences(clauses, rng), end]) + "。").replace("牛仔裤子", "牛仔裤")
    if (mode < 0.62 or not modifiers) and clauses:
        opener = rng.choice([o for o in g.OPENERS_TAKING_CLAUSE if modifiers or not o.startswith("{a}")])
        parts = [opener.format(**names, cl=clauses[0]), *_sentences(clauses[1:], rng)]
        if rng.random() < 0.25 and len(parts) > 1:
            parts[:2] = [parts[0] + "，" + parts[1]]
    else:
        parts = [rng.choice(g.OPENERS_ALONE).format(**names), *_sentences(clauses, rng)]
    if rng.random() < 0.4:
        parts.append(closer)
    text = "。".join(parts) + "。"
    text = text.replace("牛仔裤子", "牛仔裤")
    return text.replace("呢。", "呢？", 1) if text.startswith("谁不想") else text


def _acceptable(text: str, row: list[Attribute]) -> bool:
    """Check length, that every value is there, and that no word is said twice."""
    values = [value for _, value in row]
    if not LENGTH[0] <= len(text) <= LENGTH[1] or any(value not in text for value in values):
        return False
    if "的的" in text or re.search(r"[。，？](，|。|的)", text) or text.count("。") > 4 or text.startswith("，"):
        return False
    if re.search("(有了|选)这件[^，。]*，(作为|这样的|这件)", text):
        return False
    if any(text.count(char) > limit for char, limit in LIMITS.items()):
        return False
    if re.search(r"(.)的[^，。]{0,3}的[^，。]{0,3}的", text) or max(len(s) for s in re.split("[。？]", text)) > 52:
        return False
    kind = "半身裙" if "半身裙" in values else row[0][1]
    if kind in g.UNFIT and re.search(g.UNFIT[kind], text):
        return False
    if any(cue in text for cue in g.SUMMER) and any(cue in text for cue in g.WINTER):
        return False
    seen: set[str] = set()
    for i in range(len(text) - 1):
        pair = text[i : i + 2]
        if pair[0] in "，。？" or pair[1] in "，。？":
            continue
        if pair in seen and sum(pair in value for value in values) < 2:
            return False
        seen.add(pair)
    return True


def describe(row: list[Attribute], rng: random.Random) -> str | None:
    """Return an acceptable description, or None after many attempts."""
    for _ in range(120):
        text = _draft(row, rng)
        if _acceptable(text, row):
            return text
    return None


def product_rows(train: int, heldout: int, seed: int) -> tuple[list[dict], list[dict]]:
    """Compose the training and the held-out rows; their attribute combinations are disjoint, also as subsets."""
    rng = random.Random(seed)
    rows: list[tuple[list[Attribute], str]] = []
    combinations: set[frozenset[Attribute]] = set()
    texts: set[str] = set()
    while len(rows) < train + heldout:
        row = sample_attributes(rng)
        if frozenset(row) in combinations:
            continue
        text = describe(row, rng)
        if text is None or text in texts:
            continue
        combinations.add(frozenset(row))
        texts.add(text)
        rows.append((row, text))
    counts: dict[str, int] = {}
    for row, _ in rows:
        for _, value in row:
            counts[value] = counts.get(value, 0) + 1
    order = list(range(len(rows)))
    rng.shuffle(order)
    chosen: set[int] = set()
    sets = [frozenset(row) for row, _ in rows]
    for index in order:
        if len(chosen) == heldout:
            break
        mine = sets[index]
        nested = any(i != index and (mine <= other or other <= mine) for i, other in enumerate(sets))
        if not nested and all(counts[value] > 3 for _, value in rows[index][0]):
            chosen.add(index)
            for _, value in rows[index][0]:
                counts[value] -= 1
    assert len(chosen) == heldout
    as_rows = [{"content": content_of(row), "summary": text} for row, text in rows]
    return [r for i, r in enumerate(as_rows) if i not in chosen], [r for i, r in enumerate(as_rows) if i in chosen]
