"""Rebuild qwen2_sft/embedded, the small Qwen that stands in where no weights are at hand.

python qwen2_sft/make_embedded.py
"""

import sys

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("qwen2_sft")[0] or "."

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.training import pretrain
from qwen2_sft import prompt
from qwen2_sft.ft_qwen2.config import Config

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def make_tokenizer(characters):
    """Qwen's byte-level BPE with one piece a character: merges join a character's bytes, and nothing more.

    Pieces of several characters, learnt on unsegmented text, would hide the words a small model has to copy.
    """
    byte_pieces = bytes_to_unicode()
    pieces = list(byte_pieces.values())
    merges: dict[tuple[str, str], None] = {}
    for char in characters:
        first, *rest = (byte_pieces[byte] for byte in char.encode())
        for byte in rest:
            merges[first, byte] = None
            first += byte
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: number for number, piece in enumerate([*CONTROL, *pieces])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=list(merges), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = prompt.CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer):
    """1.4 million parameters, the head tied to the embeddings as in the small Qwen1.5."""
    hidden_size = 160
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=hidden_size**-0.5,  # the usual 0.02 suits a width of 2,048
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


if __name__ == "__main__":
    pretrain.build(make_tokenizer, make_model, prompt, Config.EMBEDDED_DIR)
