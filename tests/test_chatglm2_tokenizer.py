"""The tokenizer of ChatGLM2 and 3 on a small SentencePiece model: ids, texts, control tokens, saved folders."""

import json
import pickle

import glm2
import pytest
from conftest import CHARACTERS
from transformers import AutoTokenizer

from chatglm_sft.models.chatglm import ChatGLMTokenizer
from chatglm_sft.models.chatglm2 import ChatGLM2Tokenizer

PIECES = [*CHARACTERS, *"Round：答"]
CONTROL = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>".split()
TYPED = "[gMASK]sop<|user|>\n a</s><|assistant|><unk>[MASK] eop"


@pytest.fixture(scope="module")
def tokenizer():
    return glm2.make_tokenizer(PIECES)


@pytest.fixture
def folder(tmp_path):
    """The folder of a small ChatGLM3."""
    glm2.write_folder(tmp_path, 3, PIECES)
    return tmp_path


def test_control_tokens_follow_the_pieces(tokenizer):
    first = tokenizer.sp_model.get_piece_size()
    assert tokenizer.convert_tokens_to_ids(CONTROL) == list(range(first, first + 9))
    assert tokenizer.convert_ids_to_tokens(list(range(first, first + 9))) == CONTROL
    assert len(tokenizer) == first + 9 and set(CONTROL) < set(tokenizer.all_special_tokens)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0, 0)
    assert tokenizer.padding_side == "left"


@pytest.mark.parametrize("text", ["问", "a  b", "\n\n问\n", "  a \t", "龘😀", "sop", "philosophy", TYPED])
def test_texts_come_back_and_typed_control_tokens_stay_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "▁", "every text begins with SentencePiece's blank"
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not set(ids) & {0, 1, 2} and max(ids) < tokenizer.sp_model.get_piece_size()


def test_control_tokens_of_a_template_are_read(tokenizer):
    for text, tokens in {
        "[gMASK]sop[R]\n\n问：sop": "[gMASK] sop ▁ <0x5B> R <0x5D> <0x0A> <0x0A> 问 ： s o p",
        "[gMASK]sop<|user|>\n 问<|assistant|>\n": "[gMASK] sop <|user|> ▁ <0x0A> ▁ 问 <|assistant|> ▁ <0x0A>",
        "a sop[sMASK]eop eop": "▁ a ▁ s o p [sMASK] eop ▁ ▁ e o p",
        "sop": "▁ s o p",
    }.items():
        assert tokenizer.tokenize(text) == tokens.split()
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_prompts_pairs_and_padding(tokenizer):
    gmask, sop = tokenizer.convert_tokens_to_ids(["[gMASK]", "sop"])
    one, two = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", "问问"))
    assert tokenizer("a")["input_ids"] == [gmask, sop, *one]
    assert tokenizer("a", "问问")["input_ids"] == [gmask, sop, *one, *two, 2]
    assert tokenizer.get_special_tokens_mask([9], [9]) == [1, 1, 0, 0, 1]
    batch = tokenizer(["a", "问问"], padding=True)
    assert batch["input_ids"] == [[0, gmask, sop, *one], [gmask, sop, *two]]
    assert batch["attention_mask"] == [[0, 1, 1, 1, 1], [1] * 5]


def test_ids_without_a_piece_are_unknown(tokenizer):
    assert tokenizer.decode([tokenizer.convert_tokens_to_ids("a"), 5000]) == "a<unk>"


def test_an_official_folder_loads_whatever_its_file_says_of_control_tokens(folder, tokenizer):
    """The published tokenizer_config.json names the first ChatGLM's class, and some control tokens as ordinary ones."""
    first = tokenizer.sp_model.get_piece_size()
    plain = {"special": False, "normalized": True, "lstrip": False, "rstrip": False, "single_word": False}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    settings["added_tokens_decoder"] = {str(first + 1): {"content": "[gMASK]"} | plain}
    settings["added_tokens_decoder"] |= {str(first + 3): {"content": "sop"} | plain}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = AutoTokenizer.from_pretrained(folder)
    assert type(loaded) is ChatGLM2Tokenizer and type(ChatGLMTokenizer.from_pretrained(folder)) is ChatGLM2Tokenizer
    assert loaded.added_tokens_decoder == tokenizer.added_tokens_decoder
    for text in (TYPED, "philosophy 问"):
        for options in ({}, {"split_special_tokens": True}):
            assert loaded(text, **options) == tokenizer(text, **options)


def test_what_is_saved_reloads_equal(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = ChatGLM2Tokenizer.from_pretrained(tmp_path)
    for other in (reloaded, pickle.loads(pickle.dumps(tokenizer))):
        assert other(TYPED) == tokenizer(TYPED) and len(other) == len(tokenizer)
    reloaded.add_tokens(["ZZ"])
    assert reloaded.convert_tokens_to_ids("ZZ") == len(tokenizer)
    reloaded.save_pretrained(tmp_path / "more")
    again = ChatGLM2Tokenizer.from_pretrained(tmp_path / "more")
    assert again.tokenize("aZZ[gMASK]sop") == ["▁", "a", "ZZ", "[gMASK]", "sop"] and len(again) == len(reloaded)


def test_what_is_no_tokenizer_of_theirs_is_refused(tokenizer, folder):
    with pytest.raises(ValueError, match="do_lower_case=True is not supported"):
        ChatGLM2Tokenizer.from_pretrained(folder, do_lower_case=True)
    with pytest.raises(ValueError, match=r"is not the tokenizer of ChatGLM2 or 3: it has no piece <eop>"):
        ChatGLM2Tokenizer.from_pretrained(folder, eos_token="<eop>")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.model is missing"):
        AutoTokenizer.from_pretrained(folder)
