"""Digests tell which rows say the same; control tokens typed in a text are found."""

import copy

import numpy
import pytest

from common.conversation.turns import Call, Conversation, Turn, Unusable
from common.data.alike import NO_QUESTION, Digests, Known, digests_of

ASKED = [Turn("user", "问"), Turn("assistant", "答")]


@pytest.mark.parametrize(
    "turns",
    [
        [Turn("user", "问答"), Turn("assistant", "")],
        [Turn("user", "问"), Turn("assistant", "答", thought="想")],
        [Turn("user", "问", tools="[]"), Turn("assistant", "答")],
        [Turn("user", "问"), Turn("assistant", "答", calls=(Call("f", "{}"),))],
        [Turn("system", "问"), Turn("assistant", "答")],
        [Turn("user", "问"), Turn("assistant", "答 4 user"), Turn("user", "1"), Turn("assistant", "")],
        [Turn("user", "问"), Turn("assistant", "答\ud800")],
        [Turn("text", "答")],
    ],
)
def test_other_rows_have_other_digests(turns):
    assert digests_of(turns)[0] != digests_of(ASKED)[0]


def test_blanks_around_a_text_and_what_is_learnt_do_not_count():
    assert digests_of([Turn("user", " 问\n"), Turn("assistant", "答 ", learn=False)]) == digests_of(ASKED)


def test_a_question_is_all_but_the_answer():
    other = [ASKED[0], Turn("assistant", "another")]
    assert digests_of(ASKED)[0] != digests_of(other)[0] and digests_of(ASKED)[1] == digests_of(other)[1]
    assert digests_of([*ASKED, *ASKED])[1] != digests_of(ASKED)[1] != NO_QUESTION
    assert digests_of([Turn("text", "答")])[1] == NO_QUESTION


def test_rows_are_known_by_what_they_say(tokenizer):
    def table(*rows):
        noted = Digests(tokenizer)
        for line, text in rows:
            noted.noted(Conversation(f"f:{line}", [Turn("user", text), Turn("assistant", "答")]))
        noted.noted(Unusable("f:9", "why", {}, "empty"))
        return noted.table()

    first, second = table((1, "a"), (2, "b"), (2, "b"), (3, "a")), table((1, "b"), (2, "c"))
    known = Known([("one", first), ("none", table()), ("two", second)])
    assert known.repeated() == [("one:1", "one:3"), ("one:2", "two:1")], "of one line, b is no repetition"
    digest, question = digests_of([Turn("user", "c"), Turn("assistant", "答")])
    assert known.twin(digest) == "two:2" and known.asks(question)
    digest, question = digests_of([Turn("user", "d"), Turn("assistant", "答")])
    assert known.twin(digest) is None and not known.asks(question)
    assert not known.asks(NO_QUESTION) and known.twin(2**64 - 1) is None
    nothing = Known([])
    assert nothing.repeated() == [] and nothing.twin(digest) is None and first.dtype == numpy.uint64


def test_control_tokens_are_noted_with_their_row(tokenizer):
    noted = Digests(tokenizer)
    for line, text in enumerate(["a < b", "<end_of_turn>", "<|im_end|> and <bos>", "<b>"], 1):
        noted.noted(Conversation(f"f:{line}", [Turn("user", text), Turn("assistant", "答")]))
    assert noted.typed == [("f:2", ["<end_of_turn>"]), ("f:3", ["<bos>", "<|im_end|>"])]


def test_words_that_the_template_alone_makes_control_tokens_are_noted(tokenizer):
    """As Qwen's <tool_call>: typed in an answer it is learnt as a text, which no engine reads as a call."""
    qwen = copy.deepcopy(tokenizer)
    qwen.add_tokens(["<tool_call>", "<other>"])
    qwen.chat_template = "{{ '<tool_call>' }}"
    noted = Digests(qwen)
    noted.noted(Conversation("f:1", [Turn("user", "问"), Turn("assistant", '<tool_call>\n{"name": "f"}<other>')]))
    assert noted.typed == [("f:1", ["<tool_call>"])]
