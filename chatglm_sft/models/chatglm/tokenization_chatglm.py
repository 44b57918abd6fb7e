"""ChatGLM-6B's tokenizer: SentencePiece (`ice_text.model`) with pieces for newlines, tabs and runs of blanks."""

import re

import torch
from transformers import AddedToken, BatchEncoding, PreTrainedConfig
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from .. import CHATGLM2_FIELDS
from .layout import build_blocked_mask, first_index, position_rows

NEWLINE, TAB = "<n>", "<|tab|>"
BLANK_RUN = re.compile(" {2,80}")  # greedy: 81 blanks are one run of 80 and an ordinary blank
BLANK_PIECE = re.compile(r"<\|blank_(\d+)\|>")
PLACE = ("cache_dir", "revision", "token", "subfolder", "local_files_only")  # where from_pretrained looks for files


class ChatGLMTokenizer(SentencePieceBackend):
    """Text to ids and back, as the original does it.

    - A prompt is `text [gMASK] <sop>`, a pair `text [gMASK] <sop> answer <eop>`; padding goes on the left.
    - Inside text only `<sop>`, `<eop>`, `<pad>`, `<unk>` and `[MASK]` are read as special tokens, and white space
      beside them is dropped. `split_special_tokens=True` reads them as ordinary characters too: use it for text that
      users typed, and add the control ids yourself.
    - `<n>`, `<|tab|>` and `<|blank_2|>`..`<|blank_80|>` are pieces of the vocabulary: written literally in a text
      they become the white space they stand for, with `split_special_tokens` or without.
    - Every text gets SentencePiece's dummy blank in front, loses one leading or trailing blank, and full-width
      letters and punctuation become half-width.
    - Masks are transformers' [B, S], 1 = token. `to_original_format` gives the original's mask and positions.
    - `decode` leaves blanks before punctuation alone; `clean_up_tokenization_spaces=True` removes them, as the
      original did by default.

    Raises ValueError for `num_image_tokens` other than 0, for lower-casing or blank removal (which the released
    tokenizer has switched off), and for a SentencePiece model that is missing or without ChatGLM's special pieces.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        unk_token: str = "<unk>",
        pad_token: str = "<pad>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        end_token: str = "</s>",
        num_image_tokens: int = 0,
        model_specific_special_tokens: dict[str, str] | None = None,
        **kwargs,
    ):
        if vocab_file is None:
            raise ValueError("ice_text.model is missing: it must lie in the folder the tokenizer is loaded from")
        self._refuse_unsupported(num_image_tokens, kwargs)
        kwargs.pop("auto_map", None)  # the checkpoint's own python files, which this port replaces
        # from_pretrained() hands these two over as special tokens. The original does not match them inside text.
        extra = {"gmask_token": gmask_token, "end_token": end_token} | (model_specific_special_tokens or {})
        self.gmask_token, self.end_token = str(extra["gmask_token"]), str(extra["end_token"])
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            vocab_file=vocab_file,
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            mask_token=mask_token,
            **kwargs,
        )
        self.init_kwargs |= {"gmask_token": self.gmask_token, "end_token": self.end_token, "num_image_tokens": 0}
        self._check_special_pieces()
        self._strip_beside_special_tokens()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *inputs, **kwargs):
        """As in transformers; a folder of ChatGLM2 or 3, which names this class too, gives a ChatGLM2Tokenizer."""
        place = {name: kwargs[name] for name in PLACE if name in kwargs}
        try:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **place)
        except OSError:  # a tokenizer alone
            config = {}
        if CHATGLM2_FIELDS & config.keys():
            from ..chatglm2 import ChatGLM2Tokenizer

            return ChatGLM2Tokenizer.from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *inputs, **kwargs)

    @staticmethod
    def _refuse_unsupported(num_image_tokens: int, kwargs: dict):
        if num_image_tokens != 0:
            raise ValueError(
                f"num_image_tokens={num_image_tokens} shifts every id by that many: it belongs to the older release "
                "with 150,528 embedding rows. With the released 130,528-row checkpoint it must be 0"
            )
        for name in ("do_lower_case", "remove_space"):
            if kwargs.get(name):
                raise ValueError(f"{name}=True is not supported: ChatGLM-6B was trained with {name}=False")

    def _check_special_pieces(self):
        tokens = [*self.all_special_tokens, self.gmask_token, self.end_token, NEWLINE, TAB]
        missing = [token for token in tokens if self.sp_model.id_to_piece(self.sp_model.piece_to_id(token)) != token]
        if missing:
            raise ValueError(f"{self.vocab_file} is not a ChatGLM tokenizer: it has no piece {', '.join(missing)}")

    def _strip_beside_special_tokens(self):
        for token in self.all_special_tokens:
            index = self.sp_model.piece_to_id(token)
            self._added_tokens_decoder[index] = AddedToken(
                token, lstrip=True, rstrip=True, normalized=False, special=True
            )

    @property
    def gmask_token_id(self) -> int:
        """Id of [gMASK], the blank an answer fills."""
        return self.sp_model.piece_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        """Id of </s>, which ends a document; answers end with <eop>."""
        return self.sp_model.piece_to_id(self.end_token)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        text = text.replace("\n", NEWLINE).replace("\t", TAB)
        text = BLANK_RUN.sub(lambda run: f"<|blank_{len(run[0])}|>", text)
        return self.sp_model.encode(text, out_type=str)

    def _convert_id_to_token(self, index: int) -> str:
        """The piece; <unk> for the embedding rows beyond the vocabulary, which an untrained model may emit."""
        return self.sp_model.id_to_piece(index) if index < self.vocab_size else str(self.unk_token)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of `tokens`; control pieces vanish, <unk> becomes " ⁇ ", loose bytes become "�"."""
        text = self.sp_model.decode(tokens)
        text = BLANK_PIECE.sub(lambda piece: " " * int(piece[1]), text)
        return text.replace(NEWLINE, "\n").replace(TAB, "\t")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`A [gMASK] <sop>`, or `A [gMASK] <sop> B <eop>`."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 at the tokens `build_inputs_with_special_tokens` adds, 0 elsewhere."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        mask = [0] * len(token_ids_0) + [1, 1]
        return mask if token_ids_1 is None else mask + [0] * len(token_ids_1) + [1]

    def to_original_format(self, batch: BatchEncoding) -> BatchEncoding:
        """The left-padded `batch` (input_ids and attention_mask [B, S]) as the original tokenizer returns it.

        input_ids [B, S]; attention_mask bool [B, 1, S, S], True = blocked; position_ids [B, 2, S]. As in the
        original, a row without <sop> is all prompt, and [MASK] wins over [gMASK] (in the model it is the reverse).

        Raises ValueError if a row is padded on the right.
        """
        input_ids, keep = (torch.as_tensor(batch[name]) for name in ("input_ids", "attention_mask"))
        keep = keep.bool()
        if not keep[:, -1].all():
            raise ValueError("the original tokenizer pads on the left only: set padding_side='left'")
        context = first_index(input_ids, self.bos_token_id)
        mask_index = first_index(input_ids, self.mask_token_id)
        gmask_index = first_index(input_ids, self.gmask_token_id)
        blank = torch.where(mask_index < input_ids.shape[1], mask_index, gmask_index)
        return BatchEncoding(
            {
                "input_ids": input_ids,
                "attention_mask": build_blocked_mask(context, keep),
                "position_ids": position_rows(context, blank, keep),
            }
        )


__all__ = ["ChatGLMTokenizer"]
