"""ChatGLM's tokenizer against outputs of the original, and against transformers' conventions."""

import io
import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer

from chatglm_sft.models.chatglm import ChatGLMTokenizer

SHARED = Path(__file__).parents[1] / "../shared/fixtures"
OFFICIAL = SHARED / "tokenizers/chatglm-6b"
needs_fixtures = pytest.mark.skipif(not OFFICIAL.exists(), reason=f"no official tokenizer: {OFFICIAL} is absent")
PAD, MASK, GMASK, SOP, EOP = 3, 130000, 130001, 130004, 130005


@pytest.fixture(scope="module")
def official():
    return AutoTokenizer.from_pretrained(OFFICIAL)


def golden(name):
    """One entry of golden.json; empty where the fixtures are absent, so that collecting tests works without them."""
    path = SHARED / "chatglm/golden.json"
    return json.loads(path.read_text())[name] if path.exists() else []


@pytest.fixture(scope="module")
def small_model_file(tmp_path_factory):
    """A SentencePiece model with ChatGLM's special pieces, trained here on a few sentences."""
    return write_small_model(tmp_path_factory.mktemp("small") / "ice_text.model")


def write_small_model(path, control=("[MASK]", "[gMASK]", "<sop>", "<eop>")):
    model = io.BytesIO()
    sentences = ["我们是受到郑振铎先生、阿英先生著作的启示。", "北京的天安门", "hello world, this is a test"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=PAD,
        control_symbols=list(control),
        user_defined_symbols=["<n>", "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))],
        minloglevel=2,
        num_threads=1,
    )
    path.write_bytes(model.getvalue())
    return path


# ---- golden files ----


@needs_fixtures
def test_special_tokens(official):
    assert type(official) is ChatGLMTokenizer
    assert official.vocab_size == golden("vocab_size") and len(official) == golden("len")
    for name, expected in golden("special_tokens").items():
        assert (getattr(official, name), getattr(official, f"{name}_id")) == (expected["token"], expected["id"])
    assert official.all_special_tokens == golden("all_special_tokens")
    assert official.padding_side == golden("padding_side")
    # Positions are the model's business here, see `to_original_format`.
    assert [*official.model_input_names, "position_ids"] == golden("model_input_names")


@needs_fixtures
@pytest.mark.parametrize("case", golden("tokenizer"), ids=lambda case: ascii(case["text"])[:24])
def test_texts(official, case):
    ids, with_special = case["ids"], case["ids_with_special"]
    assert official.tokenize(case["text"]) == case["tokens"]
    assert official.encode(case["text"], add_special_tokens=False) == ids
    assert official.encode(case["text"]) == with_special
    cleaned = {"clean_up_tokenization_spaces": True}
    assert official.decode(ids, **cleaned) == case["decode"]
    assert official.decode(with_special, **cleaned) == case["decode_with_special"]
    assert official.decode(ids, **cleaned, skip_special_tokens=True) == case["decode_skip_special"]
    assert official.decode(with_special, **cleaned, skip_special_tokens=True) == case["decode_skip_special"]
    assert official.decode(ids) == case["decode_no_cleanup"] == case["decode_other_revision"]


@needs_fixtures
def test_there_are_46_texts_and_16_id_lists():
    assert len(golden("tokenizer")) == 46 and len(golden("decode")) == 16


@needs_fixtures
@pytest.mark.parametrize("case", golden("decode"), ids=lambda case: str(case["ids"])[:24])
def test_decoding(official, case):
    ids, cleaned = case["ids"], {"clean_up_tokenization_spaces": True}
    assert official.convert_ids_to_tokens(ids) == case["tokens"]
    assert official.convert_tokens_to_ids(case["tokens"]) == ids
    assert official.decode(ids, **cleaned) == case["decode"]
    assert official.decode(ids, **cleaned, skip_special_tokens=True) == case["decode_skip_special"]
    assert official.decode(ids) == case["decode_no_cleanup"] == case["decode_other_revision"]
    assert official.batch_decode(torch.tensor([ids, ids])) == [case["decode_no_cleanup"]] * 2


@needs_fixtures
@pytest.mark.parametrize("case", golden("padding"), ids=lambda case: str(case["kwargs"]))
def test_padding(official, case):
    batch = official(case["batch"], **case["kwargs"], return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == case["input_ids"]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != PAD).long())
    original = official.to_original_format(batch)
    assert original["input_ids"].tolist() == case["input_ids"]
    assert original["position_ids"].tolist() == case["position_ids"]
    assert original["attention_mask"].dtype == torch.bool
    assert list(original["attention_mask"].shape) == case["attention_mask_shape"]
    assert original["attention_mask"].int().tolist() == case["attention_mask"]


@needs_fixtures
def test_one_text_in_the_original_format(official):
    expected = golden("single_call_padding_true")
    original = official.to_original_format(official(["你好"], padding=True))
    assert sorted(original) == expected["keys"]
    assert list(original["attention_mask"].shape[:2]) == expected["attention_mask_shape"][:2]
    assert list(original["position_ids"].shape[:2]) == expected["position_ids_shape"][:2]


@needs_fixtures
def test_pairs_and_special_tokens(official):
    pair = golden("pair")
    assert official(pair["a"], pair["b"])["input_ids"] == pair["input_ids"]
    for case in golden("build_inputs_with_special_tokens"):
        assert official.build_inputs_with_special_tokens(case["a"], case["b"]) == case["out"]
    assert official.get_special_tokens_mask([7, 8]) == [0, 0, 1, 1]
    assert official.get_special_tokens_mask([7, 8], [9]) == [0, 0, 1, 1, 0, 1]
    assert official.get_special_tokens_mask([7, GMASK, SOP], already_has_special_tokens=True) == [0, 0, 1]
    assert official.num_special_tokens_to_add() == 2 and official.num_special_tokens_to_add(pair=True) == 3


@needs_fixtures
def test_truncation(official):
    case = golden("truncation")
    batch = official([case["text"]], max_length=case["max_length"], truncation=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [case["out"]["input_ids"]]
    original = official.to_original_format(batch)
    assert original["attention_mask"][0].tolist() == case["out"]["attention_mask"]
    assert original["position_ids"][0].tolist() == case["out"]["position_ids"]


@needs_fixtures
def test_chat_prompts(official):
    assert len(golden("chat")) == 3
    for case in golden("chat"):
        assert official.encode(case["prompt"]) == case["input_ids"]


@needs_fixtures
def test_training_example(official):
    example = golden("sft_example")
    ids = official(f"{example['instruct']}\n{example['query']}", example["answer"])["input_ids"]
    assert ids == example["input_ids"]


@needs_fixtures
def test_typed_control_tokens_stay_text(official):
    typed = "<sop>你好<eop>[MASK][gMASK]<pad><unk></s>"
    ids = official.encode(typed, add_special_tokens=False, split_special_tokens=True)
    assert not set(ids) & {0, 1, 2, PAD, *range(130000, 130008)}
    assert official.decode(ids) == typed
    assert official(typed, split_special_tokens=True)["input_ids"] == [*ids, GMASK, SOP]
    # Not control tokens, but pieces of the vocabulary: their text is lost with or without the switch.
    assert official.encode("a<n>b", add_special_tokens=False, split_special_tokens=True) == [104, 4, 178]
    assert official.decode(official.encode("a<|blank_4|>b", split_special_tokens=True)) == "a    b"


@needs_fixtures
def test_embedding_rows_beyond_the_vocabulary_decode(official):
    assert official.decode([5, 74874, 130344, 130527]) == "你好 ⁇  ⁇ "


@needs_fixtures
def test_saved_folder_reloads_equal(official, tmp_path):
    official.save_pretrained(tmp_path)
    assert (tmp_path / "ice_text.model").read_bytes() == (OFFICIAL / "ice_text.model").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert "auto_map" not in config and config["tokenizer_class"] == "ChatGLMTokenizer"
    assert (config["gmask_token"], config["end_token"], config["num_image_tokens"]) == ("[gMASK]", "</s>", 0)
    for reloaded in (ChatGLMTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert type(reloaded) is ChatGLMTokenizer
        assert reloaded.special_tokens_map == official.special_tokens_map
        for case in golden("tokenizer"):
            assert reloaded(case["text"]) == official(case["text"])
            assert reloaded.decode(case["ids"]) == case["decode_no_cleanup"]
    reloaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer_config.json").read_text() == (tmp_path / "tokenizer_config.json").read_text()


@needs_fixtures
def test_shifted_ids_are_refused():
    with pytest.raises(ValueError, match=r"num_image_tokens=20000 .* 150,528 .* must be 0"):
        AutoTokenizer.from_pretrained(OFFICIAL, num_image_tokens=20000)


# ---- without golden files ----


@pytest.fixture(scope="module")
def small(small_model_file):
    return ChatGLMTokenizer(str(small_model_file))


@pytest.mark.parametrize(
    "text",
    [
        "你好",
        "a\n\nb",
        "\tx\t\ty",
        "a  b   c",
        f"x{80 * ' '}y",
        f"x{81 * ' '}y",
        f"x{163 * ' '}y",
        "emoji 👋",
        "  两个",
    ],
)
def test_white_space_survives(small, text):
    assert small.decode(small.encode(text)) == text


def test_runs_of_blanks(small):
    runs = [token for token in small.tokenize(f"a{83 * ' '}b{81 * ' '}c") if "blank" in token]
    assert runs == ["<|blank_80|>", "<|blank_3|>", "<|blank_80|>"]


def test_masks_are_zero_and_one(small):
    batch = small(["北京", "北京的天安门 hello"], padding=True, return_tensors="pt")
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != small.pad_token_id).long())
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    assert batch["input_ids"][:, -2:].tolist() == [[small.gmask_token_id, small.bos_token_id]] * 2
    right = small(["北京", "北京的天安门 hello"], padding=True, padding_side="right")
    assert right["attention_mask"][0][0] == 1 and right["attention_mask"][0][-1] == 0
    with pytest.raises(ValueError, match="pads on the left only"):
        small.to_original_format(right)
    padded = small.pad([{"input_ids": [9]}, {"input_ids": [9, 9]}], return_tensors="pt")
    assert padded["input_ids"].tolist() == [[small.pad_token_id, 9], [9, 9]]


def test_white_space_beside_special_tokens_is_dropped(small):
    assert small.tokenize("<sop>  北京\n<eop>") == ["<sop>", *small.tokenize("北京"), "<eop>"]
    assert "[gMASK]" not in small.tokenize("[gMASK]") and "</s>" not in small.tokenize("</s>")


def test_small_folder_reloads(small, tmp_path):
    small.save_pretrained(tmp_path)
    reloaded = ChatGLMTokenizer.from_pretrained(tmp_path)
    text = "<sop>  北京\n<eop> hello"
    assert reloaded(text) == small(text) and len(reloaded) == len(small)
    assert pickle.loads(pickle.dumps(small))(text) == small(text)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_image_tokens": 20000}, "num_image_tokens=20000"),
        ({"do_lower_case": True}, "do_lower_case=True is not supported"),
        ({"remove_space": True}, "remove_space=True is not supported"),
    ],
)
def test_refused_settings(small_model_file, settings, message):
    with pytest.raises(ValueError, match=message):
        ChatGLMTokenizer(str(small_model_file), **settings)


def test_missing_model_file_is_named(small, tmp_path):
    small.save_pretrained(tmp_path)
    (tmp_path / "ice_text.model").unlink()
    with pytest.raises(ValueError, match="ice_text.model is missing"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_foreign_sentencepiece_model_is_refused(tmp_path):
    path = write_small_model(tmp_path / "ice_text.model", control=("[MASK]", "<sop>", "<eop>"))
    with pytest.raises(ValueError, match=r"is not a ChatGLM tokenizer: it has no piece \[gMASK\]"):
        ChatGLMTokenizer(str(path))
