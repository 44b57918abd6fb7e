"""ChatGLM2 and ChatGLM3 made small: a SentencePiece tokenizer as theirs, a random model, the folder of either."""

import io
import json
import tempfile
from pathlib import Path

import sentencepiece

SIZES = {"hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2, "num_attention_heads": 2, "kv_channels": 16}


def write_pieces(path, characters):
    """tokenizer.model: a piece for each character, bytes for others; blanks and widths stay as they are written."""
    model = io.BytesIO()
    alphabet = sorted({char for char in characters if not char.isspace()})
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(alphabet),
        model_writer=model,
        model_type="unigram",
        vocab_size=3 + 256 + len(alphabet) + 1,  # 1: the blank
        max_sentencepiece_length=1,
        character_coverage=1.0,
        required_chars="".join(alphabet),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        byte_fallback=True,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def make_tokenizer(characters):
    """A ChatGLM2Tokenizer on `write_pieces`."""
    from chatglm_sft.models.chatglm2 import ChatGLM2Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_pieces(Path(folder) / "tokenizer.model", characters)
        return ChatGLM2Tokenizer(str(Path(folder) / "tokenizer.model"))


def make_model(rows, **changes):
    """A random ChatGLM2ForCausalLM of 30,000 parameters, with so many rows in its embedding."""
    from chatglm_sft.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM

    sizes = SIZES | {"multi_query_group_num": 1, "seq_length": 1024, "padded_vocab_size": rows}
    return ChatGLM2ForCausalLM(ChatGLM2Config(**(sizes | changes)))


def write_folder(folder, generation, characters):
    """The folder of a random ChatGLM2 or ChatGLM3, with what the published configs say."""
    import torch

    torch.manual_seed(0)
    tokenizer = make_tokenizer(characters)
    tokenizer.save_pretrained(folder)
    make_model(len(tokenizer) + 3).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": f"THUDM/chatglm{generation}-6b"}))
    settings = {"tokenizer_class": "ChatGLMTokenizer", "remove_space": False, "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
