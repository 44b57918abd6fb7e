"""Small random models of each kind that is exported, and what is known of them."""

import time

import psutil
import torch
import transformers

from common.conversation import templates
from common.conversation.turns import Turn
from common.export import proof
from common.export.proof import Tuned
from common.inference.answerer import fitted
from common.model import loading

SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
TWO_THETAS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "rope_theta": 5e5}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16, linear_value_head_dim=16)
LINEAR |= {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}}
FIRST = ["sliding_attention"] * 2 + ["full_attention"]


class Kind:
    """A model with random weights of a family's tokenizer, and the older names its config.json is to have."""

    def __init__(self, fixture, family, name, expected, **options):
        self.fixture, self.family, self.name, self.expected, self.options = fixture, family, name, expected, options


KINDS = {
    "gemma": Kind("small_gemma", "gemma_sft.prompt", "Gemma", {"rope_theta": 1e4}),
    "gemma3": Kind(
        "small_gemma",
        "gemma_sft.prompt",
        "Gemma3",
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 3,
        },
        rope_parameters=TWO_THETAS,
        layer_types=FIRST,
        num_hidden_layers=3,
        query_pre_attn_scalar=16,
        sliding_window=24,
    ),
    "gemma2": Kind(
        "small_gemma",
        "gemma_sft.prompt",
        "Gemma2",
        {"rope_theta": 1e4},
        query_pre_attn_scalar=16,
        sliding_window=24,
    ),
    "gemma4": Kind(
        "small_gemma",
        "gemma_sft.prompt",
        "Gemma4",
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "partial_rotary_factor": 0.25, "sliding_window_pattern": 3},
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_hidden_layers=6,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        global_head_dim=32,
        hidden_size_per_layer_input=32,
        sliding_window=20,
        final_logit_softcapping=30.0,
    ),
    "gemma4_large": Kind(
        "small_gemma",
        "gemma_sft.prompt",
        "Gemma4",
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "partial_rotary_factor": 0.25, "sliding_window_pattern": 2},
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_key_value_heads=2,
        num_global_key_value_heads=1,
        global_head_dim=32,
        sliding_window=24,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=64,
    ),
    "qwen2": Kind(
        "small_qwen",
        "qwen2_sft.prompt",
        "Qwen2",
        {"rope_theta": 7e3},
        rope_parameters={"rope_type": "default", "rope_theta": 7e3},
    ),
    "qwen3": Kind(
        "small_qwen",
        "qwen2_sft.prompt",
        "Qwen3",
        {"rope_theta": 5e5, "rope_scaling": {name: value for name, value in YARN.items() if name != "rope_theta"}},
        rope_parameters=YARN,
    ),
    "qwen2_moe": Kind(
        "small_qwen",
        "qwen2_sft.prompt",
        "Qwen2Moe",
        {"rope_theta": 1e4},
        **EXPERTS,
        shared_expert_intermediate_size=96,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": Kind(
        "small_qwen",
        "qwen2_sft.prompt",
        "Qwen3Moe",
        {"rope_theta": 1e4},
        **EXPERTS,
        norm_topk_prob=True,
    ),
    "qwen3_5": Kind(
        "small_qwen35",
        "qwen2_sft.prompt",
        "Qwen3_5",
        {"rope_theta": 3e4, "partial_rotary_factor": 0.5},
        **LINEAR,
        num_hidden_layers=4,
    ),
    "qwen3_5_moe": Kind(
        "small_qwen35",
        "qwen2_sft.prompt",
        "Qwen3_5Moe",
        {"rope_theta": 3e4, "partial_rotary_factor": 0.5},
        **LINEAR | EXPERTS,
        layer_types=["linear_attention", "full_attention"],
        shared_expert_intermediate_size=96,
    ),
    "glm": Kind(
        "small_glm4",
        "chatglm_sft.prompt_glm4",
        "Glm",
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        pad_token_id=0,
    ),
    "glm4": Kind(
        "small_glm4",
        "chatglm_sft.prompt_glm4",
        "Glm4",
        {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        pad_token_id=0,
    ),
}


def assert_ended(file):
    """The process whose id is in `file` is gone. Where there is no file the limit was over before it began."""
    for _ in range(200 if file.exists() else 0):
        try:
            if psutil.Process(int(file.read_text())).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.05)
    assert not file.exists(), "what the engine has started goes on"


def model_of(kind, tokenizer):
    """A model whose answers vary: its layers outweigh the last token, which a tied head would repeat."""
    of_text = f"{kind.name}TextConfig"  # of what has towers too
    name = of_text if hasattr(transformers, of_text) else f"{kind.name}Config"
    options = {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 1024} | SIZES
    torch.manual_seed(0)
    if kind.options.get("hidden_size_per_layer_input"):
        options["vocab_size_per_layer_input"] = len(tokenizer)
    config = getattr(transformers, name)(**options | kind.options)
    net = getattr(transformers, f"{kind.name}ForCausalLM")(config).eval()
    scalars = [pair for pair in net.named_buffers() if pair[0].endswith("layer_scalar")]
    for part, weight in [*net.named_parameters(), *scalars]:
        if weight.dim() == 1 and part.endswith("q_norm.weight") and kind.name == "Gemma4":
            weight.data.fill_(0.25)  # its queries are not scaled: a large product would hear one id alone
        elif weight.dim() == 1:
            weight.data += 0.3 * torch.randn_like(weight) - (4 if "A_log" in part else 0)  # a state that lasts
        else:
            large = part.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
            # a rounding may choose another expert: that is to change no more than roundings do
            size = 8 if large else 0.3 if "embed" in part else 1 if "experts" in part else 2
            weight.data.normal_(0, size * weight.shape[-1] ** -0.5)
    return net


def tuned_of(base, prompt, net=None, path=None, **more):
    """A Tuned of the folder `base` as if it had been trained."""
    tokenizer = loading.load_tokenizer(base, prompt)
    manifest = {"template": {"style": "chat"}, "config": {"model_save_dir": "out"}, "base": {"path": str(path or base)}}
    parts = dict(
        questions=[],
        prompts=[],
        max_length_q=500,
        stop_ids=prompt.stop_ids(tokenizer, "chat"),
        rank=0,
        merge_reasons=[],
    )
    return Tuned(net, tokenizer, manifest, **parts | more)


def measured(base, prompt, net):
    """The Expected of a model that answers eight questions."""
    tuned = tuned_of(base, prompt, net)
    tuned.tokenizer.chat_template = templates.chat_template(tuned.tokenizer, prompt, "chat")
    questions = [[Turn("user", text)] for text in proof.FALLBACK]
    prompts = [fitted(tuned.tokenizer, prompt, turns, "chat", 500)[0] for turns in questions]
    return proof.measure(tuned._replace(questions=questions, prompts=prompts))
