"""Text of ids that arrive one by one: equal to the text of all of them at once, and in work that grows with it."""

import importlib
import random

import pytest
import torch
from transformers import AutoTokenizer

from common.conversation.turns import Turn
from common.inference.answerer import Answerer, Sampling
from common.inference.text import Cleaning, Wording, decode

FAMILIES = {
    "small_gemma": "gemma_sft.prompt",
    "small_qwen": "qwen2_sft.prompt",
    "small_chatglm": "chatglm_sft.prompt",
    "small_glm4": "chatglm_sft.prompt_glm4",
}
# pieces of the vocabulary, bytes, and what ChatGLM shows otherwise than it is generated
TEXT = "人有他的一, 这是你好世界\n\n 问答了不?我在[[训练时间]]的 abc 😀好!"


@pytest.fixture(params=FAMILIES)
def family(request):
    """(tokenizer, prompt module): pieces or bytes of Gemma, byte-level Qwen, SentencePiece of ChatGLM."""
    if request.param == "small_chatglm":
        import chatglm_sft.models.chatglm  # noqa: F401
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))
    return tokenizer, importlib.import_module(FAMILIES[request.param])


class Saying:
    """A net whose `generate` says given ids, one at a time."""

    device = torch.device("cpu")

    def __init__(self, ids):
        self.ids = ids

    def generate(self, input_ids, streamer, **kwargs):
        streamer.put(input_ids)
        for id_ in self.ids:
            streamer.put(torch.tensor([id_]))
        streamer.end()
        return input_ids


def streamed(family, count):
    """(text of a stream of `count` ids, those ids)."""
    tokenizer, prompt = family
    some = tokenizer.encode(TEXT, add_special_tokens=False)
    ids = (some * (count // len(some) + 1))[:count]
    answer = Answerer(Saying(ids), tokenizer, prompt, "chat", 64)
    text = "".join(answer.stream([Turn("user", "问")], Sampling(max_new_tokens=count)))
    return text, ids


@pytest.fixture
def decoded_ids(family, monkeypatch):
    """A list of the numbers of ids that the tokenizer has decoded or looked up, an entry a call."""
    tokenizer, _ = family
    counts = []

    def counting(plain):
        def counted(ids, *args, **kwargs):
            counts.append(1 if isinstance(ids, int) else len(ids))
            return plain(ids, *args, **kwargs)

        return counted

    for name in ("decode", "convert_ids_to_tokens"):
        monkeypatch.setattr(tokenizer, name, counting(getattr(tokenizer, name)))
    return counts


def test_four_times_the_ids_are_decoded_with_four_times_the_work(family, decoded_ids):
    tokenizer, prompt = family
    work = []
    for count in (1000, 4000):
        decoded_ids.clear()
        text, ids = streamed(family, count)
        work.append(sum(decoded_ids))
        assert len(ids) == count and text == prompt.clean(decode(tokenizer, ids))
    assert 0 < work[1] <= 5 * work[0]
    assert work[0] <= 40 * 1000


def test_four_times_the_ids_are_cleaned_with_four_times_the_work(family, monkeypatch):
    """A stream that cleans all of its text anew at each id has 16 times as many characters to clean."""
    _, prompt = family
    work, plain = [], prompt.clean

    def counted(text, *args):
        work[-1] += len(text)
        return plain(text, *args)

    monkeypatch.setattr(prompt, "clean", counted)
    for count in (1000, 4000):
        work.append(0)
        streamed(family, count)
    assert 0 < work[1] <= 5 * work[0]


def test_the_work_of_garbage_grows_with_it_too(family, decoded_ids):
    """Bytes that never make a character, and the character U+FFFD itself, are no reason to keep all ids for later."""
    tokenizer, _ = family
    pieces = tokenizer.convert_tokens_to_ids(["<0x80>", "<0xE4>", "Ģ", "ä"])  # the last two are those bytes for Qwen
    garbage = [[id_] for id_ in pieces if id_ not in (None, tokenizer.unk_token_id)]
    assert len(garbage) == 2
    said = tokenizer.encode("\ufffd", add_special_tokens=False)  # ChatGLM's vocabulary has none, and says nothing
    for some in [*garbage, said] if said else garbage:
        words = Wording(tokenizer)
        decoded_ids.clear()
        for id_ in some * 1000:
            words.ids.append(id_)
            words.more()
        assert 0 < sum(decoded_ids) <= 40 * len(words.ids)
        assert words.shown + words.more(ended=True) == decode(tokenizer, words.ids)


@pytest.mark.parametrize("stop", ["", "一二", "\n\n\n"])
def test_the_parts_are_the_text_of_all_ids_cleaned(family, stop):
    """Whatever the ids: characters cut anywhere, runs of blanks, punctuation, half markers, bytes, special ids."""
    tokenizer, prompt = family
    dice = random.Random(0)
    texts = [TEXT, "a\n\n\n", "[[训练", "，,a,你", "a    ", "一二"]
    known = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    different = []
    for _ in range(60):
        ids = []
        while len(ids) < 150:
            some = dice.choice(known)
            ids += dice.choice([some, some * dice.randrange(60), some[dice.randrange(len(some)) :]])
            ids += dice.choices(range(len(tokenizer)), k=dice.randrange(6))
        words, parts = Wording(tokenizer, prompt.clean, (stop,) if stop else ()), []
        for id_ in ids:
            words.ids.append(id_)
            parts.append(words.more())
        parts.append(words.more(ended=True))
        whole = prompt.clean(decode(tokenizer, ids))
        expected = whole.partition(stop)[0] if stop else whole
        if "".join(parts) != expected or words.shown != expected:
            different.append((ids, "".join(parts), expected))
    assert different == []


def test_a_text_cleaned_in_parts_is_the_text_cleaned(family):
    _, prompt = family
    dice, different = random.Random(0), []
    for _ in range(200):
        parts = dice.choices(["你", "a", ",", "，", "!", " ", "\n", "[[训练时间]]", "[[", "训", "]", "好" * 50], k=80)
        cleaning = Cleaning(prompt.clean)
        found = "".join([*map(cleaning.more, parts), cleaning.more("", ended=True)])
        if found != prompt.clean("".join(parts)):
            different.append((parts, found))
    assert different == []
