"""Model classes that the recipes take, each made small and random in the official layout, towers and all."""

import importlib
import json
from typing import NamedTuple

import glm4
import torch
import transformers
from conftest import CHARACTERS
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from common.cli import parse
from common.config import PredictFlags
from gemma_sft.make_embedded import make_tokenizer as make_gemma_tokenizer
from qwen2_sft.make_embedded import make_tokenizer as make_qwen_tokenizer

IDS = (torch.arange(2 * 24).view(2, 24) * 7) % 90 + 5
TEXT = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
TEXT |= dict(intermediate_size=64, max_position_embeddings=1024)
TWO = TEXT | {"num_hidden_layers": 2}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FOUR_SLIDING = TEXT | SLIDING | {"layer_types": 2 * SLIDING["layer_types"]}
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
LINEAR |= dict(layer_types=["linear_attention", "full_attention"])
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
LINEAR_OF_35 = LINEAR | {"rope_parameters": ROTARY | {"mrope_interleaved": True}}
ONE_OF_FOUR = LINEAR_OF_35 | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
EXPERTS = dict(moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
OF_GLM = dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)
OF_GLM |= dict(first_k_dense_replace=1, n_group=1, topk_group=1)
COMPRESSED = dict(
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, num_key_value_heads=2
)
INDEXED = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=64, indexer_compress_ratio=2)
SHARING = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
VISUAL = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32)
EAR = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, subsampling_conv_channels=[8, 8])
PATCHES = dict(patch_size=2, pooling_kernel_size=2, mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32)


def without(config, name):
    return {key: value for key, value in config.items() if key != name}


class Class(NamedTuple):
    """A family's recipes, the config of the text model, what the config of the whole has besides, and its towers."""

    family: str
    text: dict
    others: dict | None = None  # None: a model of text alone
    towers: str = ""  # as the line says that names what is left out
    packs: bool = True  # rows in a pack do not see each other
    reached: bool = True  # the family's own target_modules are in every layer
    served: bool = True  # its rows can join and leave


CLASSES = {  # class in the files: how it is made
    "GemmaForCausalLM": Class("gemma", TWO),
    "Gemma2ForCausalLM": Class("gemma", TWO | SLIDING),
    "Gemma3ForCausalLM": Class("gemma", TWO | SLIDING),
    "Gemma3ForConditionalGeneration": Class(
        "gemma",
        FOUR_SLIDING,
        {"vision_config": TOWER | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
        "vision_tower, multi_modal_projector",
    ),
    "Gemma3nForCausalLM": Class(
        "gemma",
        FOUR_SLIDING
        | SHARING
        | dict(laurel_rank=4, activation_sparsity_pattern=[0.95] * 2 + [0.0] * 2, altup_num_inputs=2),
    ),
    "Gemma4ForCausalLM": Class("gemma", FOUR_SLIDING | SHARING | {"global_head_dim": 32}),
    "Gemma4ForConditionalGeneration": Class(
        "gemma",
        FOUR_SLIDING | SHARING | {"global_head_dim": 32},
        {
            "vision_config": TOWER | {"head_dim": 16, "num_key_value_heads": 2, "patch_size": 4},
            "audio_config": EAR | {"output_proj_dims": 32},
        },
        "vision_tower, audio_tower, embed_vision, embed_audio",
    ),
    "Gemma4UnifiedForConditionalGeneration": Class(
        "gemma",
        FOUR_SLIDING | {"global_head_dim": 32},
        {"vision_config": PATCHES, "audio_config": {"output_proj_dims": 32}},
        "embed_vision, embed_audio",
    ),
    "VaultGemmaForCausalLM": Class("gemma", TWO | SLIDING),
    "Qwen2ForCausalLM": Class("qwen", without(TWO, "head_dim") | {"tie_word_embeddings": False}),
    "Qwen2MoeForCausalLM": Class("qwen", without(TWO, "head_dim") | SHARED),
    "Qwen3ForCausalLM": Class("qwen", TWO | {"tie_word_embeddings": True}),
    "Qwen3MoeForCausalLM": Class("qwen", TWO | EXPERTS | {"norm_topk_prob": True}),
    "Qwen3NextForCausalLM": Class("qwen", TWO | LINEAR | SHARED, packs=False, reached=False),
    "Qwen3_5ForCausalLM": Class("qwen", TWO | LINEAR_OF_35, packs=False, reached=False),
    "Qwen3_5ForConditionalGeneration": Class(
        "qwen",
        TEXT | ONE_OF_FOUR,
        {"vision_config": VISUAL, "tie_word_embeddings": True},
        "visual",
        packs=False,
        reached=False,
    ),
    "Qwen3_5MoeForConditionalGeneration": Class(
        "qwen",
        without(TEXT, "intermediate_size") | ONE_OF_FOUR | SHARED,
        {"vision_config": VISUAL},
        "visual",
        packs=False,
        reached=False,
    ),
    "Qwen4ExpForCausalLM": Class(
        "qwen",
        without(TWO, "intermediate_size") | LINEAR_OF_35 | SHARED | INDEXED | dict(hc_count=2, hc_lowrank=8),
        packs=False,
        reached=False,
        served=False,
    ),
    "GlmForCausalLM": Class("glm4", TWO),
    "Glm4ForCausalLM": Class("glm4", TWO),
    "Glm4MoeForCausalLM": Class("glm4", TWO | OF_GLM),
    "Glm4MoeLiteForCausalLM": Class("glm4", without(TWO, "head_dim") | OF_GLM | COMPRESSED, reached=False),
}
RECIPES = {"gemma": "gemma_sft.ft_gemma", "qwen": "qwen2_sft.ft_qwen2", "glm4": "chatglm_sft.ft_glm4"}
TOKENIZERS = {"gemma": make_gemma_tokenizer, "qwen": make_qwen_tokenizer, "glm4": glm4.make_tokenizer}


class Checkpoint:
    """One of CLASSES: its folder, the model whose weights are in it, and its family's recipes."""

    def __init__(self, name, folder):
        self.name, self.folder, self.kind = name, folder, CLASSES[name]
        tokenizer = TOKENIZERS[self.kind.family](CHARACTERS)
        model = getattr(transformers, name)
        text = self.kind.text | {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        if "hidden_size_per_layer_input" in text:
            text["vocab_size_per_layer_input"] = len(tokenizer)
        others = text if self.kind.others is None else self.kind.others | {"text_config": text}
        torch.manual_seed(0)
        self.whole = model(model.config_class(**others)).eval()
        for parameter in self.whole.parameters():  # numbers that bfloat16 holds, as a published checkpoint's
            parameter.data = parameter.data.bfloat16().float()
        self.whole.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def recipe(self, name):
        return importlib.import_module(f"{RECIPES[self.kind.family]}.{name}")

    def flags(self, parent, *more):
        """Of a run on sums, into parent/out."""
        rows = [{"query": f"{n}+{n * 7 % 50}", "response": str(n + n * 7 % 50) * (1 + n % 4)} for n in range(24)]
        (parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = [
            "--path_model_pretrain",
            self.folder,
            "--data_path",
            parent / "rows.jsonl",
            "--eval_rows",
            0,
            "--sample_rows",
            0,
        ]
        flags += ["--model_save_dir", parent / "out", "--cache_dir", parent / "cache", "--learning_rate", 0.02]
        return [str(flag) for flag in [*flags, "--val_set_size", 0, "--logging_steps", 1, *more]]

    def train(self, parent, *more):
        """The folder of a short run."""
        self.recipe("train").main(self.flags(parent, *more))
        return parent / "out"

    def answerer(self, folder):
        flags = ["--model_save_dir", str(folder), "--path_model_pretrain", str(self.folder)]
        return self.recipe("predict").load_answer(parse(self.recipe("config").Config, PredictFlags, flags)[0])


def logits_by_plain_peft(base, folder):
    """Of IDS, as docs/models.md loads a run without this project."""
    config = AutoConfig.from_pretrained(base)
    text = config.get_text_config()
    text.tie_word_embeddings = config.tie_word_embeddings
    names = {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
    net, info = AutoModelForCausalLM.from_pretrained(base, config=text, key_mapping=names, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        return PeftModel.from_pretrained(net, folder)(input_ids=IDS).logits
