"""ChatGLM2-6B and ChatGLM3-6B on transformers 5: the official parameter names, today's caches, attention, generation.

Shapes: B rows, S tokens of this call, K keys (cached ones included), D hidden size, H heads of width d, G heads with
keys and values of their own, V vocabulary rows.

A pre-norm decoder as is usual today, except that
- only the first half of each head is rotated, and there in interleaved pairs (columns 0 and 1, 2 and 3, ...);
- queries, keys and values come from one matrix: all of q, then k, then v; without multi-query attention head by head;
- gate and input of the MLP come from one matrix too;
- the output layer lies inside the trunk, beside embedding and encoder.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from common.versions import CACHE, slice_logits_to_keep

from ..chatglm.layout import move_pads_left
from ..chatglm.modeling_chatglm import one_cache
from .configuration_chatglm2 import ChatGLM2Config


@cache
def inverse_frequencies(width: int) -> tuple[float, ...]:
    """The width / 2 rotary frequencies 10000^(-2j / width), in fp32.

    Plain floats instead of a buffer: no `.to(dtype)`, meta device or stored `inv_freq` can change them.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return tuple((1.0 / 10000**exponents).tolist())


def rotary_tables(position_ids: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, width / 2] in `dtype`, for positions [B, S].

    Angles are fp32 in every dtype, as in ChatGLM3's original; ChatGLM2's rounds them too in a model of half precision.
    """
    frequencies = torch.tensor(inverse_frequencies(width), device=position_ids.device)
    angles = position_ids[:, None, :, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [B, H, S, d], the first columns of each head rotated in pairs, the others as they are."""
    width = 2 * cos.shape[-1]
    even, odd = states[..., :width:2], states[..., 1:width:2]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([rotated, states[..., width:]], -1)


def token_positions(mask: Tensor | None, length: int, past_length: int, device: torch.device) -> Tensor:
    """Positions [B, S] of the new tokens, counted from each row's first token; [1, S] without a 0/1 mask [B, K]."""
    if mask is None or mask.dim() != 2:
        return torch.arange(past_length, past_length + length, device=device)[None]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past_length : past_length + length]


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_
) -> tuple[Tensor, Tensor]:
    """Attention output [B, S, H, d] and probabilities [B, H, S, K]; `attention_mask` is added to the scores."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, 1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (probabilities @ value).transpose(1, 2), probabilities


class ChatGLM2Attention(nn.Module):
    """Attention over one fused projection; the cache holds rotated keys."""

    is_causal = True

    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.kv_channels**-0.5
        width = config.kv_channels * config.num_attention_heads
        fused = width + 2 * config.kv_channels * config.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, fused, bias=config.add_qkv_bias or config.add_bias_linear)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.add_bias_linear)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, S, D] and, from eager attention only, the probabilities [B, H, S, K]."""
        query, key, value = self._apart(self.query_key_value(hidden_states))
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if (cache := one_cache(cache, past_key_values)) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, probabilities = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.dense(output.flatten(-2)), probabilities

    def _apart(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, S, d], keys and values [B, G, S, d] of their common projection [B, S, (H + 2G) d]."""
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        states = fused.unflatten(-1, (-1, self.config.kv_channels)).transpose(1, 2)
        if self.config.multi_query_attention:
            return states.split([heads, groups, groups], 1)
        return states[:, ::3], states[:, 1::3], states[:, 2::3]


class ChatGLM2MLP(nn.Module):
    """SwiGLU; the gate is the first half of `dense_h_to_4h`."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        gate, states = self.dense_h_to_4h(hidden_states).chunk(2, -1)
        return self.dense_4h_to_h(silu(gate) * states)


class ChatGLM2Block(GradientCheckpointingLayer):
    """One layer."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = ChatGLM2Attention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLM2MLP(config)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """[B, S, D] to [B, S, D]; the keyword arguments go to the attention."""
        attended, _ = self.self_attention(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ChatGLM2Embedding(nn.Module):
    """Where the checkpoint keeps its embedding."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)


class ChatGLM2Encoder(nn.Module):
    """Where the checkpoint keeps its layers and the final norm."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.layers = nn.ModuleList([ChatGLM2Block(config, index) for index in range(config.num_layers)])
        self.final_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)


class ChatGLM2PreTrainedModel(PreTrainedModel):
    """What the trunk and the language model tell transformers about themselves."""

    config_class = ChatGLM2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLM2Block"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # The official checkpoint stores it; it is recomputed here, see `inverse_frequencies`.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$"]
    _can_record_outputs = {"hidden_states": ChatGLM2Block, "attentions": ChatGLM2Attention}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, [V, D]."""
        return self.base_model.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module):
        """Put another embedding in its place."""
        self.base_model.embedding.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, [V, D]."""
        return self.base_model.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Module):
        """Put another output layer in its place."""
        self.base_model.output_layer = new_embeddings


class ChatGLM2Model(ChatGLM2PreTrainedModel):
    """Embedding, layers and final norm: ids to hidden states. It holds the output layer too, and does not use it."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        self.embedding = ChatGLM2Embedding(config)
        self.encoder = ChatGLM2Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def layers(self) -> nn.ModuleList:
        """The layers, where other models' trunks have them."""
        return self.encoder.layers

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, S, D] after the final norm; the last of `output_hidden_states` is the one before it.

        input_ids: [B, S], or inputs_embeds [B, S, D] instead.
        attention_mask: [B, K], 1 = token, 0 = pad, on either side; without one every token counts.
        position_ids: [B, S]; without them they count from each row's first token.
        cache: the keys and values of earlier tokens; past_key_values is its other name.

        Raises ValueError where both or neither of input_ids and inputs_embeds are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embedding.word_embeddings(input_ids)
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = 0 if cache is None else cache.get_seq_length()
            position_ids = token_positions(attention_mask, inputs_embeds.shape[1], past_length, inputs_embeds.device)

        visible = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids=position_ids)
        position_embeddings = rotary_tables(position_ids, self.config.kv_channels // 2, inputs_embeds.dtype)
        hidden_states = inputs_embeds
        for layer in self.encoder.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=visible,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(self.encoder.final_layernorm(hidden_states), **{CACHE: cache})


class ChatGLM2ForCausalLM(ChatGLM2PreTrainedModel, GenerationMixin):
    """ChatGLM2 or ChatGLM3 as a language model; its output layer is the trunk's."""

    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLM2Config):
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] and, with `labels` [B, S], the mean cross entropy over labels that are not -100.

        Labels are aligned with input_ids and shifted here: position i predicts label i + 1.
        logits_to_keep: the last so many positions, or a tensor of indices; 0 keeps all. See `ChatGLM2Model.forward`
            for the other arguments and the errors raised.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=one_cache(cache, past_key_values),
            **kwargs,
        )
        logits = self.transformer.output_layer(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """transformers' `generate`; prompts with a 0/1 mask may be padded on either side.

        Pads behind a prompt are moved in front of it, so that its answer follows the text: the sequences returned are
        padded on the left.
        """
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        fixed_layout = kwargs.keys() & {"inputs_embeds", "position_ids", CACHE}
        if input_ids is not None and mask is not None and mask.shape == input_ids.shape and not fixed_layout:
            input_ids, kwargs["attention_mask"] = move_pads_left(input_ids, mask)
        return super().generate(input_ids, *args, **kwargs)


__all__ = ["ChatGLM2ForCausalLM", "ChatGLM2Model", "ChatGLM2PreTrainedModel"]
