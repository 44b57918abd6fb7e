"""Facts about knobs, each in one table: what a change of one affects, its other spellings, its range, its place.

Every knob of SFTConfig is in exactly one of IDS, SHAPING, LEARNING and FREE; tests/test_config.py holds this.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from common.config import LORA, TASKS

# what a row's ids and labels depend on, so that tokenised rows are kept under them; equal for a resume
IDS = frozenset("prompt_style thinking loss_on max_length_q max_length_a model_name model_author".split())

# which weights are trained: without the same of these a checkpoint does not load
SHAPING = frozenset(
    "tuning quantization_bit freeze_trainable_layers lora_r use_dora use_pissa target_modules modules_to_save "
    "train_template_tokens".split()
)

# what else decides what is learnt; equal for a resume
LEARNING = frozenset(
    "dtype data_path val_set_size learning_rate lr_scheduler_type warmup_ratio epochs max_steps micro_batch_size "
    "batch_size optim weight_decay adam_beta1 adam_beta2 max_grad_norm label_smoothing_factor neftune_noise_alpha "
    "packing early_stopping_patience seed lora_alpha lora_dropout use_rslora".split()
)

# may change between a stop and a resume; the base itself is compared by its hash, wherever it lies
FREE = frozenset(
    "path_model_pretrain repo_id model_save_dir eval_data_path eval_rows max_dropped strict cache_dir logging_steps "
    "save_steps sample_rows save_total_limit report_to gradient_checkpointing max_new_tokens do_sample temperature "
    "top_p top_k min_p repetition_penalty num_beams eval_batch_size host port deepspeed attn_implementation".split()
)

ALIASES = {  # names people type by habit
    "model_name_or_path": "path_model_pretrain",
    "model": "path_model_pretrain",
    "model_path": "path_model_pretrain",
    "adapter_name_or_path": "model_save_dir",  # where it answers; train.py has a flag of this name
    "output_dir": "model_save_dir",
    "dataset": "data_path",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "finetuning_type": "tuning",
    "quant_bits": "quantization_bit",
    "pissa_init": "use_pissa",
    "label_smoothing": "label_smoothing_factor",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "gradient_clipping": "max_grad_norm",
    "activation_checkpointing": "gradient_checkpointing",
}

STEPS = "gradient_accumulation_steps"  # no knob of its own: batch_size is micro_batch_size × it × processes

LENGTHS = "--max_length_q (提问 prompt), --max_length_a (回答 answer)"
TEMPLATE = "不需要 needs no flag: each family's recipe has its models' own template"
HABITS = {  # other tools' flags that are more or less than a knob here: what to do instead
    "template": TEMPLATE,
    "chat_template": TEMPLATE,
    "cutoff_len": LENGTHS,
    "max_length": LENGTHS,
    "max_seq_length": LENGTHS,
    "per_device_eval_batch_size": "--eval_batch_size",
    "flash_attn": "--attn_implementation flash_attention_2",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "torch_dtype": "--dtype",
    "load_in_4bit": "--tuning qlora --quantization_bit 4",
    "load_in_8bit": "--tuning qlora --quantization_bit 8",
    "warmup_steps": "--warmup_ratio, 占总步数的比例 a share of the steps",
    "checkpoint": "--resume RUN/checkpoint-N, or --adapter_name_or_path RUN/checkpoint-N on new data",
    "checkpoint_dir": "--model_save_dir, --checkpoint; 训练 train.py: --resume",
    "ckpt_dir": "--model_save_dir, --checkpoint; 训练 train.py: --resume",
    "resume_from_checkpoint": "--resume",
}

# a path typed by a user is relative to where the command is called
PATHS = frozenset("model_save_dir adapter_name_or_path output_dir output deepspeed repair".split())
PATH_LISTS = frozenset("data_path eval_data_path".split())  # URLs are left as they are

BELONGS = {  # knobs that do nothing elsewhere: the values of `tuning` they belong to
    "quantization_bit": ("qlora",),
    "freeze_trainable_layers": ("freeze",),
    **dict.fromkeys(
        "lora_r lora_alpha lora_dropout use_rslora use_dora use_pissa target_modules modules_to_save "
        "train_template_tokens".split(),
        LORA,
    ),
}


NO_THOUGHT = (  # filled with the prompt style
    "--thinking keep 对 --prompt_style {} 不起作用 has no effect with it: only --prompt_style chat shows thoughts; "
    "use --thinking auto"
)
DORA_8 = (  # with peft 0.21 and bitsandbytes 0.50 an 8-bit weight has lost its scales by the second forward pass
    "--use_dora 与 --quantization_bit 8 不能同用 cannot go together, the weights would be lost in the second pass: "
    "--quantization_bit 4, or without DoRA"
)


class Optimizer(NamedTuple):
    """What a value of `optim` keeps and needs."""

    moments: int  # bytes kept of each trained weight, at most
    package: str = ""  # module that transformers takes it from, where it is none of torch's or its own
    install: str = ""  # what pip calls that package
    ignores: tuple[str, ...] = ()  # knobs that do not reach it
    projects: bool = False  # keeps less of whole matrices, and of those of LoRA no less than others do


_BETAS = ("adam_beta1", "adam_beta2")
_BNB = ("bitsandbytes", '"bitsandbytes>=0.50,<0.51"')
_GALORE = ("galore_torch", "galore-torch", ("weight_decay", *_BETAS), True)
# left out of transformers' names: those whose gradients are gone before the guard sees them (lomo, layerwise), that
# train other weights than are to be saved (schedule_free), and that belong to other devices
OPTIMIZERS = {
    "adamw_torch_fused": Optimizer(8),
    "adamw_torch": Optimizer(8),
    "adafactor": Optimizer(1, ignores=_BETAS),
    "sgd": Optimizer(0, ignores=_BETAS),
    "adagrad": Optimizer(4, ignores=_BETAS),
    "rmsprop": Optimizer(4, ignores=_BETAS),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), Optimizer(3, *_BNB)),
    "paged_adamw_32bit": Optimizer(8, *_BNB),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit"), Optimizer(4, *_BNB)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit"), Optimizer(2, *_BNB)),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), Optimizer(12, *_BNB)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), Optimizer(4, *_BNB)),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_32bit"), Optimizer(4, *_BNB, _BETAS)),
    "rmsprop_bnb_8bit": Optimizer(2, *_BNB, _BETAS),
    "adamw_torch_8bit": Optimizer(3, "torchao", "torchao"),
    "adamw_torch_4bit": Optimizer(2, "torchao", "torchao"),
    "stable_adamw": Optimizer(8, "optimi", "torch-optimi"),
    "grokadamw": Optimizer(12, "grokadamw", "grokadamw", _BETAS),
    "apollo_adamw": Optimizer(8, "apollo_torch", "apollo-torch", ("weight_decay",), True),
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor"), Optimizer(8, *_GALORE)),
}


REPORTS = ("tensorboard", "wandb", "swanlab", "trackio")  # each by the name of its package


class Range(NamedTuple):
    """Which values a knob or flag may have, and how that is said."""

    allows: Callable[[Any], bool]
    words: str


_AT_LEAST_1 = Range(lambda v: v >= 1, "1 or more")
_NOT_NEGATIVE = Range(lambda v: 0 <= v < float("inf"), "0 or more")
_SHARE = Range(lambda v: 0 <= v < 1, "at least 0 and below 1")
_ABOVE_0 = Range(lambda v: 0 < v < float("inf"), "above 0")
_NAMES = Range(lambda v: len(v) <= 2, "one value, or a Chinese and another")
RANGES = {  # any value of its type where a knob is not named
    **dict.fromkeys(
        "max_length_q max_length_a freeze_trainable_layers micro_batch_size batch_size logging_steps save_steps "
        "lora_r lora_alpha max_new_tokens num_beams eval_batch_size slots gradient_accumulation_steps".split(),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(
        "eval_rows sample_rows val_set_size early_stopping_patience weight_decay top_k limit shots neftune_noise_alpha "
        "queue request_tokens total_tokens drain_seconds".split(),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys("warmup_ratio lora_dropout adam_beta1 adam_beta2 label_smoothing_factor".split(), _SHARE),
    **dict.fromkeys(
        "epochs learning_rate max_grad_norm temperature repetition_penalty request_seconds".split(), _ABOVE_0
    ),
    **dict.fromkeys("model_name model_author".split(), _NAMES),
    "max_steps": Range(lambda v: v == -1 or v >= 1, "-1 or at least 1"),
    "save_total_limit": Range(lambda v: v >= 2, "2 or more, so that a whole checkpoint is there while one is written"),
    "checkpoint": Range(lambda v: v in ("best", "last") or v.isdecimal(), "best, last or a step"),
    "top_p": Range(lambda v: 0 < v <= 1, "above 0 and at most 1"),
    **dict.fromkeys("max_dropped min_p".split(), Range(lambda v: 0 <= v <= 1, "between 0 and 1")),
    "deepspeed": Range(lambda v: not v or os.path.isfile(os.path.expanduser(v)), "a JSON file that is there"),
    "port": Range(lambda v: 0 <= v <= 65535, "a port number"),
    "seed": Range(lambda v: 0 <= v < 2**32, "0 to 2**32 - 1"),
    "optim": Range(lambda v: v in OPTIMIZERS, f"one of {' '.join(OPTIMIZERS)}"),
    "report_to": Range(lambda v: set(v) <= set(REPORTS), f"some of {' '.join(REPORTS)}"),
    "data_path": Range(lambda v: len(v) > 0, "at least one file"),
    "target_modules": Range(lambda v: len(v) > 0, "at least one module"),
    "tasks": Range(lambda v: set(v) <= set(TASKS), f"some of {' '.join(TASKS)}"),
}
