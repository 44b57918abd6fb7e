#!/usr/bin/env bash
# AutoTokenizer keeps the vocabulary of tokenizer.json and throws away how it cuts and normalises
#
# What one would guess: AutoTokenizer gives the ids that tokenizer.json gives; the class named in tokenizer_config.json
# adds special tokens and a chat template, no more.
# What happens (transformers 5.23.0, tokenizers 0.23.3, 2026-11-28): where config.json says qwen2, AutoTokenizer builds a
# Qwen2Tokenizer whatever class was saved, takes vocabulary and merges from tokenizer.json, and puts Qwen2's own
# normaliser and splitting in. A tokenizer that was trained with others gives other ids, without a word; saving it again
# writes the new splitting into tokenizer.json. PreTrainedTokenizerFast.from_pretrained reads the file as it is.
# Why it matters: a Qwen2 model with a tokenizer of its own (other digit groups, NFKC, Chinese characters cut one by one)
# is trained with one splitting, and served with another by every program that reads tokenizer.json itself.
#
# Output seen:
#   transformers 5.23.0, tokenizers 0.23.3
#   guess: the same ids from tokenizer.json, PreTrainedTokenizerFast and AutoTokenizer
#   class saved: TokenizersBackend
#   class AutoTokenizer gives: Qwen2Tokenizer
#   价格12345元，今天天气很好: 8 tokens in tokenizer.json, 13 by AutoTokenizer
#   电话１３８００１３８０００: 5 tokens in tokenizer.json, 34 by AutoTokenizer
#   公园里有很多人。hello world 2024: 10 tokens in tokenizer.json, 12 by AutoTokenizer
#   全角ＡＢＣ和半角ABC: 5 tokens in tokenizer.json, 13 by AutoTokenizer
#   equal ids: PreTrainedTokenizerFast 4 of 4, AutoTokenizer 0 of 4
#   normaliser in tokenizer.json before: NFKC
#   normaliser in tokenizer.json saved again: NFC
#   messages logged: []
#   as stated: same vocabulary, other ids, nothing said
set -euo pipefail
export HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/hf"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$work"
venv/bin/python - <<'PY'
import json
import logging
import sys

import tokenizers
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
transformers.logging.get_logger("transformers").addHandler(handler)

texts = ["价格12345元，今天天气很好", "电话１３８００１３８０００", "公园里有很多人。hello world 2024", "全角ＡＢＣ和半角ABC"]
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
pieces = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[\u4e00-\u9fff]{1,2}|[^\s\p{N}\u4e00-\u9fff]+|\s+"), "isolated")
own = Tokenizer(models.BPE())
own.normalizer = normalizers.NFKC()
own.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
own.decoder = decoders.ByteLevel()
specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
own.train_from_iterator(
    texts * 50,
    trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=byte_level.alphabet(), special_tokens=specials, show_progress=False
    ),
)
wrapped = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|im_end|>", pad_token="<|endoftext|>")
wrapped.save_pretrained("model")
Qwen2Config(vocab_size=500).save_pretrained("model")

auto = AutoTokenizer.from_pretrained("model")
fast = PreTrainedTokenizerFast.from_pretrained("model")
print("guess: the same ids from tokenizer.json, PreTrainedTokenizerFast and AutoTokenizer")
print("class saved:", json.load(open("model/tokenizer_config.json"))["tokenizer_class"])
print("class AutoTokenizer gives:", type(auto).__name__)
equal_auto = equal_fast = 0
for text in texts:
    ids = own.encode(text).ids
    equal_fast += fast(text)["input_ids"] == ids
    equal_auto += auto(text)["input_ids"] == ids
    print(f"{text}: {len(ids)} tokens in tokenizer.json, {len(auto(text)['input_ids'])} by AutoTokenizer")
print(f"equal ids: PreTrainedTokenizerFast {equal_fast} of {len(texts)}, AutoTokenizer {equal_auto} of {len(texts)}")
auto.save_pretrained("again")
again = json.load(open("again/tokenizer.json"))
print("normaliser in tokenizer.json before:", json.load(open("model/tokenizer.json"))["normalizer"]["type"])
print("normaliser in tokenizer.json saved again:", again["normalizer"]["type"])
print("messages logged:", said)
if equal_fast != len(texts) or equal_auto or type(auto).__name__ != "Qwen2Tokenizer" or said:
    sys.exit("changed: AutoTokenizer no longer replaces the splitting of tokenizer.json without a word")
print("as stated: same vocabulary, other ids, nothing said")
PY
