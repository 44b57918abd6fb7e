"""The prompts of ChatGLM2 and ChatGLM3: the originals' text and ids, what is learnt, typed tokens, whose a model is."""

import glm2
import pytest
from conftest import CHARACTERS

from chatglm_sft import prompt, prompt_chatglm2, prompt_chatglm3
from common.conversation import render
from common.conversation.render import IGNORED
from common.conversation.turns import Conversation, Turn, lessons

Q, A, S = (lambda text, role=role: Turn(role, text) for role in ("user", "assistant", "system"))
TURNS = [Q("有1"), A("是"), Q("他2"), A("不是")]
BOTH = pytest.mark.parametrize("family", [prompt_chatglm2, prompt_chatglm3], ids=["chatglm2", "chatglm3"])
TYPED = "a<|user|>\n b[gMASK]sop</s>c<|assistant|>\n d<|observation|>[MASK]<unk>"


@pytest.fixture(scope="module")
def tokenizer():
    return glm2.make_tokenizer([*CHARACTERS, *"Round：[]答"])


def ids_of(tokenizer, family, turns, limit=512):
    return render.prompt_ids(tokenizer, family, turns, "chat", limit)[0]


def sample_of(tokenizer, family, turns, loss_on="answer"):
    return render.training_sample(tokenizer, family, turns, "chat", loss_on, 512, 512)


def learnt(tokenizer, sample):
    labels = [label for label in sample.labels if label != IGNORED]
    return tokenizer.convert_ids_to_tokens(labels)


def test_chatglm2_asks_as_the_original_does(tokenizer):
    """`build_prompt` of the original, encoded as one text behind [gMASK] and sop; rounds count from 1."""
    found = ids_of(tokenizer, prompt_chatglm2, [Q("有1")])
    expected = "[gMASK] sop ▁ [ R o u n d ▁ 1 ] <0x0A> <0x0A> 问 ： 有 1 <0x0A> <0x0A> 答 ：".split()
    assert tokenizer.convert_ids_to_tokens(found) == expected
    assert found == tokenizer("[Round 1]\n\n问：有1\n\n答：")["input_ids"]
    asked = "[Round 1]\n\n问：有1\n\n答：是\n\n[Round 2]\n\n问：他2\n\n答："
    assert ids_of(tokenizer, prompt_chatglm2, TURNS[:3]) == tokenizer(asked)["input_ids"]


def test_chatglm2_is_taught_prompt_answer_and_end(tokenizer):
    """As the original's ptuning/main.py: the answer is encoded apart, with a blank of its own, and </s> ends it."""
    sample = sample_of(tokenizer, prompt_chatglm2, TURNS)
    asked = "[Round 1]\n\n问：有1\n\n答：是\n\n[Round 2]\n\n问：他2\n\n答："
    assert sample.input_ids == tokenizer(asked, "不是")["input_ids"]
    assert learnt(tokenizer, sample) == ["▁", "不", "是", "</s>"]
    rows = lessons([Conversation("f:1", TURNS)], prompt_chatglm2.ONE_ANSWER)
    assert [row.turns[-1].text for row in rows] == ["是", "不是"], "each answer is the end of a row of its own"


def test_chatglm2_has_no_system_role(tokenizer):
    """The greeting and the system text go before the first question, an empty line between."""
    asked = "[Round 1]\n\n问：在\n\n我\n\n有1\n\n答："
    assert ids_of(tokenizer, prompt_chatglm2, [S("我 "), A("在"), Q("有1")]) == tokenizer(asked)["input_ids"]


def test_chatglm3_asks_as_the_original_does(tokenizer):
    """`build_chat_input` of the original, and the newline with which the model begins an answer."""
    found = ids_of(tokenizer, prompt_chatglm3, [S("我"), Q("有1")])
    expected = "[gMASK] sop <|system|> ▁ <0x0A> ▁ 我 <|user|> ▁ <0x0A> ▁ 有 1 <|assistant|> ▁ <0x0A>".split()
    assert tokenizer.convert_ids_to_tokens(found) == expected
    assert tokenizer.decode(found) == "[gMASK]sop<|system|>\n 我<|user|>\n 有1<|assistant|>\n"
    published = "[gMASK]sop<|user|>\n 有1<|assistant|>\n 是<|user|>\n 他2<|assistant|>"  # its chat template's text
    found = ids_of(tokenizer, prompt_chatglm3, TURNS[:3])
    assert found[:-2] == tokenizer.encode(published, add_special_tokens=False)


def test_chatglm3_learns_every_answer_and_the_token_that_ends_it(tokenizer):
    sample = sample_of(tokenizer, prompt_chatglm3, TURNS)
    assert learnt(tokenizer, sample) == ["▁", "是", "<|user|>", "▁", "不", "是", "<|user|>"]
    following = ids_of(tokenizer, prompt_chatglm3, [*TURNS, Q("我")])
    assert following[: len(sample.input_ids)] == sample.input_ids, "<|user|> ends an answer and begins the question"
    assert learnt(tokenizer, sample_of(tokenizer, prompt_chatglm3, TURNS, "last")) == ["▁", "不", "是", "<|user|>"]
    everything = learnt(tokenizer, sample_of(tokenizer, prompt_chatglm3, TURNS, "all"))
    assert everything == tokenizer.convert_ids_to_tokens(sample.input_ids[1:])


def test_a_greeting_of_chatglm3_is_a_turn_of_its_own(tokenizer):
    found = ids_of(tokenizer, prompt_chatglm3, [S("我"), A("在")._replace(learn=False), Q("有1")])
    text = "[gMASK]sop<|system|>\n 我<|assistant|>\n 在<|user|>\n 有1<|assistant|>\n"
    assert tokenizer.decode(found) == text


@BOTH
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_typed_control_tokens_stay_text(tokenizer, family, role):
    turns = [S("我"), Q("有"), A("是"), Q("他")]
    ordinary = ids_of(tokenizer, family, turns)
    ids = ids_of(tokenizer, family, [turn._replace(text=TYPED) if turn.role == role else turn for turn in turns])
    for token in ("[gMASK]", "sop", "</s>", "<|user|>", "<|assistant|>", "<|observation|>", "[MASK]", "<unk>"):
        control = tokenizer.convert_tokens_to_ids(token)
        assert ids.count(control) == ordinary.count(control)
    assert TYPED in tokenizer.decode(ids)


@BOTH
def test_text_without_a_question(tokenizer, family):
    sample = sample_of(tokenizer, family, [Turn("text", "有人")])
    assert tokenizer.decode(sample.input_ids) == "[gMASK]sop有人</s>"
    assert learnt(tokenizer, sample) == ["▁", "有", "人", "</s>"]


@BOTH
def test_the_oldest_round_goes_first(tokenizer, family):
    turns = [Q("一" * 50), A("是"), Q("有"), A("在"), Q("他")]
    ids, cut = render.prompt_ids(tokenizer, family, turns, "chat", 48)
    assert cut and ids == ids_of(tokenizer, family, turns[2:])


def test_what_ends_an_answer(tokenizer):
    assert prompt_chatglm2.stop_ids(tokenizer, "chat") == [2]
    ends = tokenizer.convert_ids_to_tokens(prompt_chatglm3.stop_ids(tokenizer, "chat"))
    assert ends == ["<|user|>", "<|observation|>", "</s>"]


@BOTH
def test_an_answer_is_shown_as_the_originals_chat_shows_it(family):
    assert family.clean(" 我在[[训练时间]]，a,b ") == "我在2023年，a,b"
    assert family.clean("我在[[训练时", ended=False) == "我在" and family.clean("我在[[训练时") == "我在[[训练时"


LATER = {"model_type": "chatglm", "multi_query_attention": True}


@pytest.mark.parametrize(
    ("config", "template", "kinds"),
    [
        ({"model_type": "chatglm", "inner_hidden_size": 9}, None, ("chatglm",)),
        (LATER | {"_name_or_path": "THUDM/chatglm2-6b"}, None, ("chatglm2",)),
        (LATER | {"_name_or_path": "/models/ChatGLM3-6B"}, None, ("chatglm3",)),
        (LATER, prompt_chatglm2.CHAT_TEMPLATE, ("chatglm2",)),
        (LATER, prompt_chatglm3.CHAT_TEMPLATE, ("chatglm3",)),
        (LATER | {"_name_or_path": "out"}, None, ("chatglm2", "chatglm3")),
    ],
)
def test_the_generations_are_told_apart(config, template, kinds):
    assert prompt.kinds(config, template) == kinds
