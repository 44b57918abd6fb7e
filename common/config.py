"""Knobs: a frozen dataclass whose comments are its help texts, read from defaults < config.py < recipe < file < flags.

Nothing heavy is imported here, so that `--help` answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from common.launch import world_size

Names = tuple[str, str] | tuple[()]  # typed as one value or two, kept as two: in Chinese, in other languages
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
Scheduler = Literal[
    "linear",
    "cosine",
    "constant",
    "cosine_with_restarts",  # one a pass over the data
    "cosine_with_min_lr",  # down to a tenth
    "warmup_stable_decay",  # constant, then down over the last tenth of the steps
    "inverse_sqrt",
]

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True)
class SFTConfig:
    """The knobs every family shares. A family's config.py overrides the values that are its own."""

    # model
    path_model_pretrain: str = "embedded"  # base model: a folder, a hub id, or "embedded" (small, shipped here)
    repo_id: str = ""  # hub id of the base, used where path_model_pretrain is not given
    model_save_dir: str = "model_sft"  # folder for the adapter, checkpoints, logs and pictures
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where the GPU has it, or float32
    attn_implementation: Attention = "auto"  # how attention is computed; auto: as transformers chooses for the model
    prompt_style: str = "chat"  # how turns become ids: chat is the model's official template
    thinking: Literal["auto", "keep", "none"] = "auto"  # thoughts: as the template says; all kept; left out
    # data
    data_path: tuple[str, ...] = (str(DATA / "product_train.jsonl"),)  # files, folders or URLs; path#N samples N rows
    eval_data_path: tuple[str, ...] = (str(DATA / "product_heldout.jsonl"),)  # held-out rows scored after training
    eval_rows: int = 50  # held-out rows on which base and tuned are compared after training; 0: none
    val_set_size: float = 0.02  # kept out of training for the validation loss: rows (1 or more) or a share (below 1)
    max_length_q: int = 512  # longest prompt of training, in tokens; older turns, then the question's middle, are cut
    max_length_a: int = 512  # longest answer in tokens, stop token included; rows with longer ones are dropped
    max_dropped: float = 0.5  # stop when a larger share of the rows cannot be trained on
    strict: bool = False  # stop at the first row that cannot be used instead of listing it in rejected.jsonl
    model_name: Names = ()  # fills {{name}} in identity rows; two values: for Chinese rows and for others
    model_author: Names = ()  # fills {{author}} in identity rows; one value or two, as above
    cache_dir: str = "~/.cache/chinese-sft"  # tokenised data, keyed by content
    # training
    loss_on: Literal["all", "answer", "last"] = "answer"  # all ids, every answer, or the last answer
    learning_rate: float = 2e-4  # peak learning rate
    lr_scheduler_type: Scheduler = "cosine"  # how the rate goes on after the warm-up
    warmup_ratio: float = 0.03  # share of the steps over which it rises
    epochs: float = 3  # passes over the data, 0.5 for half of one
    max_steps: int = -1  # stop after so many optimizer steps; -1: epochs decide
    micro_batch_size: int = 4  # rows in one forward pass on one device
    batch_size: int = 16  # rows in one optimizer step over all devices and accumulation
    optim: str = "adamw_torch_fused"  # optimizer, by transformers' name
    weight_decay: float = 0.0  # the optimizer's
    adam_beta1: float = 0.9  # AdamW's memory of gradients
    adam_beta2: float = 0.999  # AdamW's memory of their squares
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    label_smoothing_factor: float = 0.0  # share of the target given to all pieces alike; not in the validation loss
    neftune_noise_alpha: float = 0.0  # NEFTune's noise on the embeddings while training, 5 is usual; 0: none
    packing: bool = False  # rows share sequences of max_length_q + max_length_a, which batches then count
    gradient_checkpointing: Literal["auto", "true", "false"] = "auto"  # recompute activations; auto: only if needed
    logging_steps: int = 5  # steps between two lines of trainer_log.jsonl
    save_steps: int = 200  # steps between two checkpoints and validation losses
    sample_rows: int = 4  # validation rows answered at each validation, into samples.jsonl and the log; 0: none
    save_total_limit: int = 3  # newest checkpoints kept; the best by validation loss is kept besides
    early_stopping_patience: int = 0  # stop after so many validation losses without a new best, save the best; 0: off
    report_to: tuple[str, ...] = ()  # tensorboard, wandb, swanlab, trackio: each an optional package
    seed: int = 42  # of weights, order and samples
    deepspeed: str = ""  # DeepSpeed's JSON file (configs/deepspeed/zero2.json); train.py is then started by torchrun
    # what is trained
    tuning: Literal["lora", "qlora", "full", "freeze"] = "lora"  # qlora: quantised base; freeze: only the last layers
    quantization_bit: Literal[4, 8] = 4  # of qlora's base, or any to answer with: 4 is double nf4, 8 is LLM.int8
    freeze_trainable_layers: int = 2  # how many of the last layers freeze trains
    lora_r: int = 16  # rank
    lora_alpha: int = 32  # scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # on the adapter's input
    use_rslora: bool = False  # scale is lora_alpha / sqrt(lora_r): larger ranks learn as fast
    use_dora: bool = False  # train each weight's magnitude too (DoRA)
    use_pissa: bool = False  # start from the base's largest singular vectors; saved as plain LoRA of twice the rank
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # layers to adapt: names, or all-linear
    modules_to_save: tuple[str, ...] = ()  # modules trained in full and saved with the adapter: names, all-norm, …
    train_template_tokens: Literal["auto", "true", "false"] = "auto"  # rows of control tokens; auto: those like others
    # answers
    max_new_tokens: int = 256  # longest answer generated
    do_sample: bool = True  # console and service sample; evaluation and --output are greedy unless this is given
    temperature: float = 0.8  # of sampling
    top_p: float = 0.95  # nucleus
    top_k: int = 50  # candidates
    min_p: float = 0.0  # candidates below this share of the most probable one's chance are left out; 0: none
    repetition_penalty: float = 1.0  # above 1: fewer repetitions; a run answers with its own
    num_beams: int = 1  # beams
    eval_batch_size: int = 32  # prompts generated together in evaluation and for --output
    # service
    host: str = "127.0.0.1"  # address post_api.py listens on
    port: int = 8000  # and its port

    given: frozenset = field(default=frozenset(), repr=False, metadata={"hidden": True})
    recipe: str = field(default="", metadata={"hidden": True})  # that of TrainFlags, for the manifest

    EMBEDDED_DIR: ClassVar[Path | None] = None  # a family's small base model; None: it ships none
    EMBEDDED: ClassVar[dict] = {}  # values for it, where the user set nothing

    @property
    def base(self) -> str:
        """The base model's folder or hub id, "" where none is given and none is shipped."""
        if self.path_model_pretrain == "embedded":
            return str(self.EMBEDDED_DIR or "")
        return self.path_model_pretrain

    @property
    def bits(self) -> int:
        """Bits of a quantised base's weights; 0 where it is not quantised."""
        return self.quantization_bit if self.tuning == "qlora" or "quantization_bit" in self.given else 0

    @property
    def accumulation(self) -> int:
        """Micro batches per optimizer step and process."""
        return self.batch_size // (self.micro_batch_size * world_size())


@dataclass(frozen=True)
class TrainFlags:
    """What train.py takes beside the knobs."""

    recipe: str = ""  # values for a task and a size: identity, products, entities or chat with -laptop, -24gb or -8gpu
    resume: str = "auto"  # auto: go on from the last whole checkpoint; never: start anew; or a checkpoint's folder
    resume_anyway: bool = False  # resume although data or options changed since; what changed is kept in the manifest
    adapter_name_or_path: str = ""  # start from this LoRA adapter: a run, its checkpoint, or another tool's
    print_targets: bool = False  # list the linear layers LoRA can attach to, with shapes, and exit
    check: bool = False  # judge every row, try the heaviest step, print time, memory and a verdict; no training
    json: bool = False  # with --check: one JSON object on stdout and nothing else


@dataclass(frozen=True)
class PredictFlags:
    """What predict.py takes beside the knobs."""

    query: str = ""  # answer this one question on stdout and exit
    output: str = ""  # answer all questions of --data_path into this file, as JSON lines, and exit
    checkpoint: str = ""  # answer as this checkpoint of the run: best (by validation loss), last, or a step
    base: bool = False  # talk to the base model without the adapter
    compare: bool = False  # show the base's and the tuned model's answers side by side
    print_prompt: str = ""  # print the prompt's text and ids for this question as JSON; loads no weights
    system: str = ""  # system text put before the conversation
    base_url: str = ""  # ask this OpenAI-compatible server (http://…/v1) instead of loading a model


@dataclass(frozen=True)
class EvaluationFlags:
    """What evaluation.py takes beside the knobs; --data_path is the held-out file here."""

    limit: int = 0  # score only the first rows (of each subject); 0: all
    checkpoint: str = ""  # answer as this checkpoint of the run: best (by validation loss), last, or a step
    base: bool = False  # score the base model without the adapter
    compare: bool = False  # score both, side by side
    tasks: tuple[str, ...] = ()  # benchmarks instead of held-out rows: ceval cmmlu mmlu arc gsm8k probe
    task_dir: str = ""  # folder with their files; the probe is shipped in data/
    shots: int = 0  # examples before each question
    base_url: str = ""  # ask this OpenAI-compatible server (http://…/v1) instead of loading a model


@dataclass(frozen=True)
class ServeFlags:
    """What post_api.py takes beside the knobs."""

    checkpoint: str = ""  # answer as this checkpoint of the run: best (by validation loss), last, or a step
    base: bool = False  # serve the base model without the adapter
    adapters: tuple[str, ...] = ()  # more runs on the same base, name=folder each; requests choose by `model`
    api_key: tuple[str, ...] = ()  # clients must send one of these as a Bearer token; --config keeps them off ps
    slots: int = 16  # answers generated together
    queue: int = 128  # answers that may wait for a slot; beyond it requests get 429
    request_tokens: int = 0  # longest prompt and answer together; 0: the model's context
    total_tokens: int = 0  # most tokens in the cache, padding and kept prefixes included; 0: no limit
    request_seconds: float = 600.0  # time limit of one request
    drain_seconds: float = 30.0  # after SIGTERM: time for answers under way
    cors: str = ""  # origin of web pages that may call the service, or *; none may by default
    log_text: bool = False  # write questions and answers into the log


@dataclass(frozen=True)
class ExportFlags:
    """What export.py takes beside the knobs."""

    checkpoint: str = ""  # answer as this checkpoint of the run: best (by validation loss), last, or a step
    output_dir: str = ""  # new folder for the whole model; default: the one exported + _merged, _gguf or _lora_gguf
    format: Literal["safetensors", "gguf", "gguf-lora"] = "safetensors"  # gguf: one file; gguf-lora: the adapter alone
    gguf_type: Literal["auto", "f16", "bf16", "q8_0", "f32"] = "auto"  # of weights in it; auto: f16, an adapter's f32
    repair: str = ""  # mend this folder, exported by an earlier version, for other engines, and exit
    verify: str = ""  # compare what an engine (llama.cpp, mlx …) or a server (http://…/v1) answers, and exit


TASKS = ("ceval", "cmmlu", "mmlu", "arc", "gsm8k", "probe")
LORA = ("lora", "qlora")
ANSWERING = (PredictFlags, EvaluationFlags, ServeFlags)
