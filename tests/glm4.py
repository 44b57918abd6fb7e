"""GLM-4 made small: a byte-level tokenizer with its control tokens, a random model, templates of its three forms."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTROL = (
    "<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> <|observation|> /nothink"
).split()
THOUGHT = ["<think>", "</think>"]  # added, but not special
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# what the official templates show of system, user and assistant; the first ends a prompt with <|assistant|> alone
PLAIN = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OFF = "enable_thinking is defined and not enable_thinking"
GLM45 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}"
    "{% if m.role == 'assistant' %}<think></think>{{ '\n' + m.content.strip() }}{% else %}{{ m.content }}{% endif %}"
    "{% if m.role == 'user' and OFF and not m.content.endswith('/nothink') %}/nothink{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if OFF %}{{ '\n<think></think>' }}{% endif %}{% endif %}"
).replace("OFF", OFF)
GLM47 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}</think>{{ m.content.strip() }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if OFF %}</think>{% else %}<think>{% endif %}{% endif %}"
).replace("OFF", OFF)


def make_tokenizer(texts, template=PLAIN):
    """Byte-level BPE with one piece for each text, such as a character; GLM-4's words and control tokens."""
    byte_pieces = bytes_to_unicode()
    pieces, merges = list(byte_pieces.values()), {}
    for text in texts:
        first, *rest = (byte_pieces[byte] for byte in text.encode())
        for byte in rest:
            merges[first, byte] = None
            first += byte
    pieces += ["".join(pair) for pair in merges]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, list(merges)))
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token=None
    )
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.add_tokens(THOUGHT)
    tokenizer.chat_template = template
    return tokenizer


def make_model(tokenizer):
    """A random Glm4ForCausalLM of 40,000 parameters."""
    from transformers import Glm4Config, Glm4ForCausalLM

    return Glm4ForCausalLM(
        Glm4Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|user|>")],
        )
    )
