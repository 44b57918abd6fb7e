"""ChatGLM-6B (v1) on transformers 5: the official parameter names, today's caches, attention and generation.

Shapes: B rows, S tokens of this call, K keys (cached ones included), D hidden size, H heads of width d = D / H,
V vocabulary rows, n position rows (2, or 1 with `position_encoding_2d=False`).

What differs from a usual pre-norm decoder:
- the prompt attends to itself in both directions, the answer causally (layout.py);
- positions have two rows, each rotating its half of every head;
- residuals add alpha = sqrt(2 * layers) times the NORMALISED input of a sub-layer;
- the rows of `query_key_value` are ordered head by head: q, k, v of head 0, then of head 1, ...
"""

from functools import cache
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from common.versions import CACHE, slice_logits_to_keep

from .configuration_chatglm import ChatGLMConfig
from .layout import (
    build_blocked_mask,
    build_position_ids,
    context_from_positions,
    find_context,
    grow_position_ids,
    keep_from_blocked,
    move_pads_left,
)


@cache
def inverse_frequencies(width: int) -> tuple[float, ...]:
    """The width / 2 rotary frequencies 10000^(-2j / width), ROUNDED TO FP16 as the checkpoint was trained.

    Plain floats instead of a buffer: no `.to(dtype)`, meta device or stored `inv_freq` can change them.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return tuple((1.0 / 10000**exponents).half().tolist())


def rotary_tables(position_ids: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, n, width] in `dtype`, for positions [B, n, S].

    The angle, position times frequency, is fp32 in fp32 and bf16 models. In an fp16 model it is rounded to fp16, as
    the original's `.half()` does: that is how ChatGLM-6B was usually run, off by up to 0.43 at position 2047.
    """
    angle_dtype = torch.float16 if dtype == torch.float16 else torch.float32
    frequencies = torch.tensor(inverse_frequencies(width), dtype=angle_dtype, device=position_ids.device)
    angles = position_ids.transpose(1, 2)[:, None, :, :, None].to(angle_dtype) * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [B, H, S, d], each of the head's n slices rotated by its own position row."""
    slices = states.unflatten(-1, cos.shape[-2:])
    first, second = slices.chunk(2, -1)
    return (slices * cos + torch.cat([-second, first], -1) * sin).flatten(-2)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, under whichever of its two names it was given: transformers' until 5.23, and since 5.24."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: pass one of them")
    return past_key_values if cache is None else cache


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_
) -> tuple[Tensor, Tensor]:
    """Attention output [B, S, H, d] and probabilities [B, H, S, K]; `attention_mask` is True where a key is visible.

    The scores are taken small and scaled up again in fp32, so that deep layers do not overflow fp16.
    """
    shrink = module.layer_idx + 1
    scores = (query * (scaling / shrink)) @ key.transpose(-1, -2)
    scores = scores.float() * shrink
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1).to(value.dtype)
    return (probabilities @ value).transpose(1, 2), probabilities


class ChatGLMAttention(nn.Module):
    """Multi-head attention over one fused projection; the cache holds rotated keys."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

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
        heads = self.query_key_value(hidden_states).unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2)
        query, key, value = heads.chunk(3, -1)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if (cache := one_cache(cache, past_key_values)) is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, probabilities = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.dense(output.flatten(-2)), probabilities


class ChatGLMMLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them; no gate."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer. Both residuals carry the normalised states, times alpha."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.alpha = sqrt(2 * config.alpha_num_layers)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """[B, S, D] to [B, S, D]; the keyword arguments go to the attention."""
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.attention(normed, **kwargs)
        normed = self.post_attention_layernorm(self.alpha * normed + attended)
        return self.alpha * normed + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What the trunk and the language model tell transformers about themselves."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    # The official checkpoint stores one per layer; they are recomputed here, see `inverse_frequencies`.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, layers and final norm: ids to hidden states."""

    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$", r"^lm_head\."]

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ChatGLMBlock(config, index) for index in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
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
        """Hidden states [B, S, D] after the final norm.

        input_ids: [B, S]; each row holds [gMASK] or [MASK], and <sop> where its answer starts.
        attention_mask: [B, K], 1 = token, 0 = pad, on either side; or the original's bool [B, 1, S, K], True =
            blocked. Without one every token counts, pads too.
        position_ids: [B, 2, S] ([B, S] in 1-D mode); built from the ids when absent, required with a filled cache.
        inputs_embeds: [B, S, D] in place of the embedded ids. The ids may come along, for masks and positions only;
            without them pass position_ids (and, in 1-D mode, a blocked mask).
        cache: the keys and values of earlier tokens; past_key_values is its other name.

        Raises ValueError where the layout of a row cannot be known.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("pass input_ids, inputs_embeds, or both (then the ids only give masks and positions)")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        cache = one_cache(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None and cache.is_compileable:
            raise ValueError("static caches are not supported: use transformers.DynamicCache, the default")

        past_length = 0 if cache is None else cache.get_seq_length()
        length = inputs_embeds.shape[1]
        keep, blocked = self._read_mask(attention_mask, length, past_length)
        position_ids = self._read_positions(input_ids, position_ids, keep, length, past_length)
        if blocked is None:
            blocked = self._build_mask(input_ids, position_ids, keep, past_length)

        hidden_states = inputs_embeds
        rows = position_ids if self.config.position_encoding_2d else position_ids[:, None]
        position_embeddings = rotary_tables(rows, self.config.rotary_width, hidden_states.dtype)
        visible = _visible_keys(blocked)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=visible,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(self.final_layernorm(hidden_states), **{CACHE: cache})

    def _read_mask(self, mask: Tensor | None, length: int, past_length: int) -> tuple[Tensor | None, Tensor | None]:
        """The caller's mask as (`keep` [B, K], blocked [B, 1, S, K]), either None where unknown."""
        keys = past_length + length
        if mask is None:
            return None, None
        if mask.dim() == 2 and mask.shape[1] == keys:
            return mask.bool(), None
        if mask.dim() == 4 and mask.shape[1:] == (1, length, keys) and mask.dtype == torch.bool:
            return keep_from_blocked(mask), mask
        raise ValueError(
            f"attention_mask is {mask.dtype} {list(mask.shape)}; expected 0/1 [B, {keys}] (1 = token), "
            f"or bool [B, 1, {length}, {keys}] (True = blocked)"
        )

    def _read_positions(
        self, input_ids: Tensor | None, position_ids: Tensor | None, keep: Tensor | None, length: int, past_length: int
    ) -> Tensor:
        """The caller's positions, checked, or those of the ids."""
        if position_ids is not None:
            tail = (2, length) if self.config.position_encoding_2d else (length,)
            if position_ids.shape[1:] != tail:
                raise ValueError(f"position_ids are {list(position_ids.shape)}; expected [B, {str(tail)[1:-1]}]")
            return position_ids
        if past_length:
            raise ValueError("with a filled cache pass position_ids: generate() does, or grow_position_ids()")
        if input_ids is None:
            raise ValueError("inputs_embeds alone do not tell masks and positions: pass input_ids or position_ids too")
        return build_position_ids(input_ids, keep, self.config)

    def _build_mask(
        self, input_ids: Tensor | None, position_ids: Tensor, keep: Tensor | None, past_length: int
    ) -> Tensor | None:
        """Blocked mask [B or 1, 1, S, K], or None where one new token sees everything."""
        rows, length = len(position_ids), position_ids.shape[-1]
        if past_length == 0:
            context = self._find_context(input_ids, position_ids)
        elif length == 1 and keep is None:
            return None
        elif length > 1 and self.config.position_encoding_2d and (position_ids[:, 1] == 0).any():
            raise ValueError("a prompt must be read in one call: its tokens attend to each other in both directions")
        else:  # the prompt lies in the cache, wholly in the past of the new tokens
            context = position_ids.new_zeros(rows)
        if keep is None:
            keep = torch.ones(rows, past_length + length, dtype=torch.bool, device=position_ids.device)
        return build_blocked_mask(context, keep, past_length)

    def _find_context(self, input_ids: Tensor | None, position_ids: Tensor) -> Tensor:
        if input_ids is not None:
            return find_context(input_ids, self.config.bos_token_id)
        if self.config.position_encoding_2d:
            return context_from_positions(position_ids)
        raise ValueError("1-D positions do not tell where the answer starts: pass input_ids or a blocked mask too")


def _visible_keys(blocked: Tensor | None) -> Tensor | None:
    """The mask attention functions expect, True = visible; a row with nothing to see (a pad) sees everything.

    What SDPA makes of an empty row, 0 or NaN, depends on its kernel. No real token ever looks at such a row.
    """
    if blocked is None:
        return None
    return ~blocked | blocked.all(-1, keepdim=True)


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM with its language-model head, which shares the embedding's weight."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}
    whole_prompts = True  # a prompt attends to itself in both directions: it is read in one call

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        logits_to_keep: the last so many positions, or a tensor of indices; 0 keeps all. See `ChatGLMModel.forward`
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
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
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

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True):
        """Tie the head; while loading, the stored word embedding wins over a stored `lm_head.weight`.

        Official checkpoints hold both. transformers would leave two different matrices untied.
        """
        head, embedding = next(iter(self._tied_weights_keys.items()))
        if missing_keys is not None and embedding not in missing_keys and self.config.tie_word_embeddings:
            missing_keys.add(head)
        super().tie_weights(missing_keys, recompute_mapping)

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """transformers' `generate`; the sequences returned are padded on the left.

        Prompts with a 0/1 mask may be padded on either side: pads behind a prompt are moved in front of it, so that
        its answer follows the text. The original's blocked mask and [B, 2, S] positions are accepted too; of such a
        mask only the padding is used, the ids tell the rest.
        """
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            mask = kwargs["attention_mask"] = keep_from_blocked(mask).long()
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE] = cache
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is not None:
            fixed_layout = kwargs.keys() & {"inputs_embeds", "position_ids", CACHE}
            if mask is not None and mask.shape == input_ids.shape and not fixed_layout:
                input_ids, kwargs["attention_mask"] = move_pads_left(input_ids, mask)
            kwargs["input_ids"] = input_ids
        # Under another name, because transformers would take [B, 2, S] for multimodal positions [3, B, S].
        if (position_ids := kwargs.pop("position_ids", None)) is not None:
            kwargs["prompt_position_ids"] = position_ids
        return super().generate(None, *args, **kwargs)

    def prompt_positions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Positions of whole prompts [B, S] with a 0/1 mask: [B, 2, S], or [B, S] in 1-D mode."""
        return build_position_ids(input_ids, attention_mask.bool(), self.config)

    def next_positions(self, position_ids: Tensor) -> Tensor:
        """Positions of one more token, from those of the last two: [B, 2, 1], or [B, 1] in 1-D mode."""
        return grow_position_ids(position_ids)[..., -1:]

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict) -> Tensor:
        """transformers calls this once the mask is known; the positions of the prompts go into `model_kwargs`."""
        input_ids, mask = model_kwargs.get("input_ids", inputs_tensor), model_kwargs["attention_mask"]
        if input_ids.shape != mask.shape:
            raise ValueError(
                f"generate() needs the whole sequences as input_ids, got {list(input_ids.shape)} with an "
                f"attention_mask {list(mask.shape)}: pass them also beside inputs_embeds or a cache"
            )
        if "prompt_position_ids" not in model_kwargs:
            model_kwargs["prompt_position_ids"] = build_position_ids(input_ids, mask.bool(), self.config)
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        prompt_position_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> dict:
        """As in transformers, with ChatGLM's positions for the whole of `input_ids` instead of 0, 1, 2, ..."""
        if prompt_position_ids is not None:
            generated = input_ids.shape[1] - prompt_position_ids.shape[-1]
            if generated < 0:
                raise ValueError("prefill_chunk_size is not supported: a prompt attends to itself in both directions")
            position_ids = grow_position_ids(prompt_position_ids, generated)
        return super().prepare_inputs_for_generation(
            input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )


__all__ = ["ChatGLMForCausalLM", "ChatGLMModel", "ChatGLMPreTrainedModel"]
