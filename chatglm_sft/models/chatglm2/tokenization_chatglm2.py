"""The tokenizer of ChatGLM2-6B and ChatGLM3-6B: SentencePiece (`tokenizer.model`), and control tokens behind it."""

import re
from itertools import groupby

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken
from transformers.tokenization_python import Trie
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

# Their ids follow those of the SentencePiece pieces, in this order. ChatGLM2 has learnt the first five only.
WORDS = ("sop", "eop")
CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", *WORDS, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
BEHIND_MASK = re.compile(rf"(?<=MASK\])({'|'.join(WORDS)})")


class ChatGLM2Tokenizer(SentencePieceBackend):
    """Text to ids and back, as the originals do it.

    - A prompt is `[gMASK] sop text`, a pair `[gMASK] sop text answer </s>`; padding goes on the left, with <unk> (0).
    - Control tokens in a text are read as such, as the originals do for a chat template; `sop` and `eop` behind
      another control token only, for they are parts of words. `split_special_tokens=True` reads all of them as
      ordinary characters, as the originals do elsewhere: use it for text that users typed.
    - Every text, and every text behind a control token, gets SentencePiece's dummy blank in front.

    Raises ValueError for lower-casing or blank removal (which the released tokenizers have switched off), and for a
    SentencePiece model that is missing or has no </s>.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None,
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        pad_token: str = "<unk>",
        **kwargs,
    ):
        if vocab_file is None:
            raise ValueError("tokenizer.model is missing: it must lie in the folder the tokenizer is loaded from")
        for name in ("do_lower_case", "remove_space"):
            if kwargs.get(name):
                raise ValueError(f"{name}=True is not supported: ChatGLM2 and 3 were trained with {name}=False")
        kwargs.pop("auto_map", None)  # the checkpoint's own python files, which this port replaces
        others = [token for token in kwargs.pop("extra_special_tokens", None) or [] if str(token) not in CONTROL]
        first = SentencePieceProcessor(model_file=vocab_file).get_piece_size()
        added = kwargs.pop("added_tokens_decoder", {})  # the published file has some of the control tokens, not special
        added = {id_: token for id_, token in added.items() if str(token) not in CONTROL}
        control = [AddedToken(token, normalized=False, special=True) for token in CONTROL]
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            vocab_file=vocab_file,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            extra_special_tokens=[*CONTROL, *others],
            added_tokens_decoder=dict(enumerate(control, first)) | added,
            **kwargs,
        )
        if self.sp_model.piece_to_id(str(eos_token)) == self.sp_model.unk_id():
            raise ValueError(f"{vocab_file} is not the tokenizer of ChatGLM2 or 3: it has no piece {eos_token}")

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None):
        """As in transformers, without the words among the control tokens."""
        tokens = [*self._added_tokens_encoder, *self.all_special_tokens, *(unique_no_split_tokens or [])]
        self.tokens_trie = Trie(token for token in tokens if token not in WORDS)

    def tokenize(self, text: str, **kwargs) -> list[str]:
        """The pieces of a text, and the control tokens in it."""
        if kwargs.get("split_special_tokens", self.split_special_tokens):
            return super().tokenize(text, **kwargs)
        tokens = []
        for number, part in enumerate(BEHIND_MASK.split(text)):
            tokens += self._tokenize(part) if part in WORDS and not number % 2 else super().tokenize(part, **kwargs)
        return tokens

    def _convert_id_to_token(self, index: int) -> str:
        """The piece; <unk> for the embedding rows beyond the vocabulary, which an untrained model may emit."""
        return self.sp_model.id_to_piece(index) if index < self.vocab_size else str(self.unk_token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of `tokens`, control tokens as they are written; loose bytes become "�"."""
        runs = groupby(tokens, lambda token: token in self._added_tokens_encoder)
        return "".join("".join(run) if control else self.sp_model.decode(list(run)) for control, run in runs)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop A`, or `[gMASK] sop A B </s>`."""
        prompt = [*self.convert_tokens_to_ids(["[gMASK]", "sop"]), *token_ids_0]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 at the tokens `build_inputs_with_special_tokens` adds, 0 elsewhere."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        mask = [1, 1] + [0] * len(token_ids_0)
        return mask if token_ids_1 is None else mask + [0] * len(token_ids_1) + [1]


__all__ = ["ChatGLM2Tokenizer"]
