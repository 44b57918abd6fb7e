"""Rebuild gemma_sft/embedded, the small Gemma that stands in where no weights are at hand.

python gemma_sft/make_embedded.py
"""

import sys

if __name__ == "__main__":  # finds common/ from any directory
    sys.path[0] = __file__.rpartition("gemma_sft")[0] or "."

from transformers import GemmaConfig, GemmaForCausalLM, GemmaTokenizer

from common.training import pretrain
from gemma_sft import prompt
from gemma_sft.ft_gemma.config import Config

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")


def make_tokenizer(characters):
    """Gemma's tokenizer with one piece a character: no merges, other characters as bytes.

    Pieces of several characters, learnt on unsegmented text, would hide the words a small model has to copy.
    """
    pieces = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *(char.replace(" ", "▁") for char in characters)]
    tokenizer = GemmaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = prompt.CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer):
    """1.4 million parameters, the head tied to the embeddings as in every Gemma."""
    hidden_size = 160
    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=40,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            initializer_range=hidden_size**-0.5,  # the usual 0.02 suits a width of 2,048
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


if __name__ == "__main__":
    pretrain.build(make_tokenizer, make_model, prompt, Config.EMBEDDED_DIR)
