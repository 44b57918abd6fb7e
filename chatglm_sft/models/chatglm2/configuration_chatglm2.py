"""Configuration of ChatGLM2-6B and ChatGLM3-6B, with the field names of the official config.json."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from common.versions import CACHE

GLM4_ROWS = 151552  # of the embedding of GLM-4 in its first form, whose config has the fields of ChatGLM3's
ONLY: dict[str, Any] = {  # field of config.json: the one value that is computed here, as in the released checkpoints
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "rope_ratio": 1,
    "pre_seq_len": None,
    "quantization_bit": 0,
}
INSTEAD = {  # what to do where such a field has another value
    "rope_ratio": "32k checkpoints stretch positions, each generation in another way: take the one without 32k",
    "pre_seq_len": "P-tuning v2 prefixes cannot be read: take the base checkpoint and tune it with LoRA",
    "quantization_bit": "int4/int8 checkpoints cannot be read: take the fp16 checkpoint, and --tuning qlora",
}


@strict
class ChatGLM2Config(PreTrainedConfig):
    """Sizes, switches and special ids; the defaults are the released ChatGLM2-6B.

    Heads are `kv_channels` wide. With `multi_query_attention` they share the keys and values of
    `multi_query_group_num` groups, without it each has its own.

    Raises ValueError for a switch that the released checkpoints do not use, and for sizes that do not divide.
    """

    model_type = "chatglm"  # as the checkpoints say; ChatGLM-6B's config hands such a config.json over
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {
        "vocab_size": "padded_vocab_size",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
        "head_dim": "kv_channels",
    }

    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    num_layers: int = 28
    num_attention_heads: int = 32
    kv_channels: int = 128
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    add_qkv_bias: bool = True
    add_bias_linear: bool = False
    layernorm_epsilon: float = 1e-5
    seq_length: int = 32768
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        # Points at the checkpoint's own python files, which this port replaces.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        if self.padded_vocab_size == GLM4_ROWS:
            raise ValueError(
                "this is GLM-4 in its first form, for remote code: take transformers' own form, such as "
                "THUDM/glm-4-9b-chat-hf, with ft_glm4"
            )
        for name, value in ONLY.items():
            if (found := getattr(self, name, value)) != value:
                raise ValueError(f"{name}={found} is not supported, only {value}; {INSTEAD.get(name, '')}".rstrip("; "))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"multi_query_group_num={self.multi_query_group_num} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.kv_channels % 4:
            raise ValueError(f"kv_channels={self.kv_channels} must divide by 4: half a head is rotated, in pairs")

    @property
    def num_key_value_heads(self) -> int:
        """Heads that have keys and values of their own."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads


__all__ = ["ChatGLM2Config"]
