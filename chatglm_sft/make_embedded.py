"""Rebuild chatglm_sft/embedded, the small ChatGLM that stands in where no weights are at hand.

python chatglm_sft/make_embedded.py
"""

import io
import sys
import tempfile
import unicodedata
from pathlib import Path

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("chatglm_sft")[0] or "."

import sentencepiece

from chatglm_sft import prompt
from chatglm_sft.ft_chatglm.config import Config
from chatglm_sft.models.chatglm import ChatGLMConfig, ChatGLMForCausalLM, ChatGLMTokenizer
from common.conversation.turns import Turn
from common.training import pretrain

CONTROL = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
BLANKS = ["<n>", "<|tab|>", *(f"<|blank_{width}|>" for width in range(2, 81))]
PHASES = (pretrain.Phase(50_000, 0.1, 0.3, 3e-3), pretrain.Phase(40_000, 0.1, 0.5, 2.5e-3))


def make_tokenizer(characters):
    """ChatGLM's tokenizer on a SentencePiece model with one piece a character, other characters as bytes."""
    forms = (unicodedata.normalize("NFKC", char) for char in characters)
    alphabet = sorted({form for form in forms if len(form) == 1 and not form.isspace()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(alphabet),
        model_writer=model,
        model_type="unigram",
        vocab_size=4 + 256 + len(CONTROL) + len(BLANKS) + len(alphabet) + 1,  # 1: the blank
        max_sentencepiece_length=1,
        character_coverage=1.0,
        required_chars="".join(alphabet),
        normalization_rule_name="nmt_nfkc",
        byte_fallback=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        pad_piece="<pad>",
        control_symbols=CONTROL,
        user_defined_symbols=BLANKS,
        num_threads=1,
        minloglevel=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ice_text.model"
        file.write_bytes(model.getvalue())
        return ChatGLMTokenizer(str(file))


def make_model(tokenizer):
    """1.3 million parameters, the head tied to the embeddings as in ChatGLM-6B."""
    return ChatGLMForCausalLM(
        ChatGLMConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            inner_hidden_size=448,
            num_layers=4,
            num_attention_heads=4,
            alpha_num_layers=4,
            max_sequence_length=2048,
            initializer_range=160**-0.5,  # the usual 0.02 suits a width of 4,096
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            mask_token_id=tokenizer.mask_token_id,
            gmask_token_id=tokenizer.gmask_token_id,
        )
    )


def turns_of(document, rng):
    """A document cut at one of its line breaks into prompt and answer; whole where it has none, and now and then."""
    lines = document.split("\n")
    if len(lines) == 1 or rng.random() < 0.2:
        return pretrain.as_text(document, rng)
    cut = rng.randrange(1, len(lines))
    return [Turn("user", "\n".join(lines[:cut])), Turn("assistant", "\n".join(lines[cut:]))]


if __name__ == "__main__":
    pretrain.build(make_tokenizer, make_model, prompt, Config.EMBEDDED_DIR, PHASES, turns_of)
