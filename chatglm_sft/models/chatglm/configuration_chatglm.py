"""Configuration of ChatGLM-6B (v1), with the field names of the official config.json."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from common.versions import CACHE

from .. import CHATGLM2_FIELDS


@strict
class ChatGLMConfig(PreTrainedConfig):
    """Sizes, switches and special ids; the defaults are the released 130,528-row ChatGLM-6B.

    `alpha_num_layers` is the depth n in the residual factor alpha = sqrt(2 n). The original code uses 28 whatever
    the model's depth is; set it to `num_layers` for a shallow model whose alpha follows its depth.

    Raises ValueError for a ChatGLM2/3 config, a P-tuning prefix, a quantised checkpoint and impossible head sizes.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    inner_hidden_size: int = 16384
    num_layers: int = 28
    num_attention_heads: int = 32
    alpha_num_layers: int = 28
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    # config.json does not say so, but the checkpoint was always run with its head tied to the embedding.
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 130004
    eos_token_id: int | list[int] | None = 130005
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    quantization_bit: int = 0

    def __post_init__(self, **kwargs):
        if foreign := sorted(CHATGLM2_FIELDS & kwargs.keys()):
            raise ValueError(
                f"this is a ChatGLM2/3 config (it has {', '.join(foreign)}): its class is ChatGLM2Config, "
                "of chatglm_sft.models.chatglm2"
            )
        # Points at the checkpoint's own python files, which this port replaces.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        self._refuse_unsupported()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in transformers; the config.json of ChatGLM2 or 3, which says "chatglm" too, becomes a ChatGLM2Config."""
        if CHATGLM2_FIELDS & config_dict.keys():
            from ..chatglm2 import ChatGLM2Config

            return ChatGLM2Config.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """Columns of a head rotated by one position row: half a head with 2-D positions, else the whole head."""
        return self.head_dim // 2 if self.position_encoding_2d else self.head_dim

    def _refuse_unsupported(self):
        if self.pre_seq_len:
            raise ValueError(
                f"pre_seq_len={self.pre_seq_len}: P-tuning v2 prefixes are not supported. "
                "Load the base checkpoint (pre_seq_len null) and fine-tune it with LoRA"
            )
        if self.quantization_bit:
            raise ValueError(
                f"quantization_bit={self.quantization_bit}: the int4/int8 checkpoints of ChatGLM-6B hold packed "
                "weights that cannot be read. Load the fp16 checkpoint and quantise it with bitsandbytes"
            )
        if self.hidden_size % self.num_attention_heads or self.rotary_width % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_attention_heads={self.num_attention_heads} must be whole "
                f"and divide by {4 if self.position_encoding_2d else 2}: the rotary embedding pairs its columns"
            )


__all__ = ["ChatGLMConfig"]
