"""Knobs: a frozen dataclass whose comments are its help texts, read from defaults < config.py < --config file < flags.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import argparse
import difflib
import importlib.util
import inspect
import json
import os
import re
import sys
import typing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

from common.launch import let_first_speak, world_size

Names = tuple[str, str]  # typed as one value or two, kept as two: in Chinese, in other languages

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


@dataclass(frozen=True)
class SFTConfig:
    """The knobs every family shares. A family's config.py overrides the values that are its own."""

    # model
    path_model_pretrain: str = "embedded"  # base model: a folder, a hub id, or "embedded" (small, shipped here)
    repo_id: str = ""  # hub id of the base, used where path_model_pretrain is not given
    model_save_dir: str = "model_sft"  # folder for the adapter, checkpoints, logs and pictures
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 where the GPU has it, or float32
    prompt_style: str = "chat"  # how turns become ids: chat is the model's official template
    # data
    data_path: tuple[str, ...] = (str(DATA / "product_train.jsonl"),)  # files or URLs to train on; path#N samples N
    eval_data_path: tuple[str, ...] = (str(DATA / "product_heldout.jsonl"),)  # held-out rows scored after training
    eval_rows: int = 50  # held-out rows on which base and tuned are compared after training; 0: none
    val_set_size: float = 0.02  # kept out of training for the validation loss: rows (1 or more) or a share (below 1)
    max_length_q: int = 512  # longest prompt in tokens; older turns, then the question's middle, are cut
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
    epochs: int = 3  # passes over the data
    max_steps: int = -1  # stop after so many optimizer steps; -1: epochs decide
    micro_batch_size: int = 4  # rows in one forward pass on one device
    batch_size: int = 16  # rows in one optimizer step over all devices and accumulation
    weight_decay: float = 0.0  # AdamW's
    adam_beta1: float = 0.9  # AdamW's memory of gradients
    adam_beta2: float = 0.999  # AdamW's memory of their squares
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    label_smoothing_factor: float = 0.0  # share of the target given to all pieces alike; not in the validation loss
    neftune_noise_alpha: float = 0.0  # NEFTune's noise on the embeddings while training, 5 is usual; 0: none
    packing: bool = False  # rows share sequences of max_length_q + max_length_a, which batches then count
    gradient_checkpointing: Literal["auto", "true", "false"] = "auto"  # recompute activations; auto: only if needed
    logging_steps: int = 5  # steps between two lines of trainer_log.jsonl
    save_steps: int = 200  # steps between two checkpoints and validation losses
    save_total_limit: int = 3  # newest checkpoints kept; the best by validation loss is kept besides
    early_stopping_patience: int = 0  # stop after so many validation losses without a new best, save the best; 0: off
    report_to: tuple[str, ...] = ()  # tensorboard, wandb: each an optional package
    seed: int = 42  # of weights, order and samples
    deepspeed: str = ""  # DeepSpeed's JSON file (configs/deepspeed/zero2.json); train.py is then started by torchrun
    # what is trained
    tuning: Literal["lora", "qlora", "full", "freeze"] = "lora"  # qlora: quantised base; freeze: only the last layers
    quantization_bit: Literal[4, 8] = 4  # of qlora's base: 4 is nf4 with double quantisation, 8 is LLM.int8
    freeze_trainable_layers: int = 2  # how many of the last layers freeze trains
    lora_r: int = 16  # rank
    lora_alpha: int = 32  # scale is lora_alpha / lora_r
    lora_dropout: float = 0.05  # on the adapter's input
    use_rslora: bool = False  # scale is lora_alpha / sqrt(lora_r): larger ranks learn as fast
    use_dora: bool = False  # train each weight's magnitude too (DoRA)
    use_pissa: bool = False  # start from the base's largest singular vectors; saved as plain LoRA of twice the rank
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # layers to adapt: names, or all-linear
    modules_to_save: tuple[str, ...] = ()  # modules trained in full and saved with the adapter: names, all-norm, …
    # answers
    max_new_tokens: int = 256  # longest answer generated
    do_sample: bool = True  # console and service sample; evaluation is greedy unless this is given
    temperature: float = 0.8  # of sampling
    top_p: float = 0.95  # nucleus
    top_k: int = 50  # candidates
    repetition_penalty: float = 1.0  # above 1: fewer repetitions
    num_beams: int = 1  # beams
    eval_batch_size: int = 32  # prompts generated together in evaluation
    # service
    host: str = "127.0.0.1"  # address post_api.py listens on
    port: int = 8000  # and its port

    given: frozenset = field(default=frozenset(), repr=False, metadata={"hidden": True})

    EMBEDDED_DIR: ClassVar[Path] = ROOT  # a family's small base model
    EMBEDDED: ClassVar[dict] = {}  # values for it, where the user set nothing

    @property
    def base(self):
        """The base model's folder or hub id."""
        if self.path_model_pretrain == "embedded":
            return str(self.EMBEDDED_DIR)
        return self.path_model_pretrain

    @property
    def bits(self):
        """Bits of a quantised base's weights; 0 where it is not quantised."""
        return self.quantization_bit if self.tuning == "qlora" else 0

    @property
    def accumulation(self):
        """Micro batches per optimizer step and process."""
        return self.batch_size // (self.micro_batch_size * world_size())


@dataclass(frozen=True)
class TrainFlags:
    """What train.py takes beside the knobs."""

    resume: str = "auto"  # auto: go on from the last whole checkpoint; never: start anew; or a checkpoint's folder
    resume_anyway: bool = False  # resume although data or options changed since; what changed is kept in the manifest
    print_targets: bool = False  # list the linear layers LoRA can attach to, with shapes, and exit
    check: bool = False  # judge every row, try the heaviest step, print time, memory and a verdict; no training
    json: bool = False  # with --check: one JSON object on stdout and nothing else


@dataclass(frozen=True)
class PredictFlags:
    """What predict.py takes beside the knobs."""

    query: str = ""  # answer this one question on stdout and exit
    base: bool = False  # talk to the base model without the adapter
    compare: bool = False  # show the base's and the tuned model's answers side by side
    print_prompt: str = ""  # print the prompt's text and ids for this question as JSON; loads no weights
    system: str = ""  # system text put before the conversation


@dataclass(frozen=True)
class EvaluationFlags:
    """What evaluation.py takes beside the knobs; --data_path is the held-out file here."""

    limit: int = 0  # score only the first rows (of each subject); 0: all
    base: bool = False  # score the base model without the adapter
    compare: bool = False  # score both, side by side
    tasks: tuple[str, ...] = ()  # benchmarks instead of held-out rows: ceval cmmlu mmlu arc gsm8k probe
    task_dir: str = ""  # folder with their files; the probe is shipped in data/
    shots: int = 0  # examples before each question


@dataclass(frozen=True)
class ServeFlags:
    """What post_api.py takes beside the knobs."""

    base: bool = False  # serve the base model without the adapter


@dataclass(frozen=True)
class ExportFlags:
    """What export.py takes beside the knobs."""

    output_dir: str = ""  # new folder for the whole model; default: model_save_dir + _merged


ALIASES = {
    "model_name_or_path": "path_model_pretrain",
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

TASKS = ("ceval", "cmmlu", "mmlu", "arc", "gsm8k", "probe")

# name: (test, what is allowed)
_AT_LEAST_1 = (lambda v: v >= 1, "1 or more")
_NOT_NEGATIVE = (lambda v: 0 <= v < float("inf"), "0 or more")
_SHARE = (lambda v: 0 <= v < 1, "at least 0 and below 1")
_ABOVE_0 = (lambda v: 0 < v < float("inf"), "above 0")
RANGES = {
    **dict.fromkeys(
        "max_length_q max_length_a epochs freeze_trainable_layers micro_batch_size batch_size logging_steps save_steps "
        "lora_r lora_alpha max_new_tokens num_beams eval_batch_size".split(),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(
        "eval_rows val_set_size early_stopping_patience weight_decay top_k limit shots neftune_noise_alpha".split(),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys("warmup_ratio lora_dropout adam_beta1 adam_beta2 label_smoothing_factor".split(), _SHARE),
    **dict.fromkeys("learning_rate max_grad_norm temperature repetition_penalty".split(), _ABOVE_0),
    "max_steps": (lambda v: v == -1 or v >= 1, "-1 or at least 1"),
    "save_total_limit": (lambda v: v >= 2, "2 or more, so that a whole checkpoint is there while one is written"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "max_dropped": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "deepspeed": (lambda v: not v or os.path.isfile(os.path.expanduser(v)), "a JSON file that is there"),
    "port": (lambda v: 0 <= v <= 65535, "a port number"),
    "seed": (lambda v: 0 <= v < 2**32, "0 to 2**32 - 1"),
    **dict.fromkeys(("model_name", "model_author"), (lambda v: len(v) <= 2, "one value, or a Chinese and another")),
    "report_to": (lambda v: set(v) <= {"tensorboard", "wandb"}, "tensorboard, wandb or both"),
    "data_path": (lambda v: len(v) > 0, "at least one file"),
    "target_modules": (lambda v: len(v) > 0, "at least one module"),
    "tasks": (lambda v: set(v) <= set(TASKS), f"some of {' '.join(TASKS)}"),
}

LORA = ("lora", "qlora")
BELONGS = {  # knobs that do nothing elsewhere: the values of `tuning` they belong to
    "quantization_bit": ("qlora",),
    "freeze_trainable_layers": ("freeze",),
    **dict.fromkeys(
        "lora_r lora_alpha lora_dropout use_rslora use_dora use_pissa target_modules modules_to_save".split(), LORA
    ),
}
WHOLE_RATE = 0.1  # of the learning rate, where the user set none: all weights take smaller steps than an adapter does


def parse(config_class, flags_class=None, argv=None):
    """Read `argv` (default: the command line) into `config_class`, and into `flags_class` where one is given.

    Returns the config, or (config, flags). `config.given` holds the names the user set in a file or by a flag.
    A wrong flag, type or value prints one line and exits with code 2.
    """
    classes = [config_class] + ([flags_class] if flags_class else [])
    knobs = {f.name: (f, _types(cls)[f.name]) for cls in classes for f in fields(cls) if not f.metadata.get("hidden")}
    parser = _parser(classes, knobs)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"无法识别的参数 unrecognized argument {unknown[0]}{_nearest(unknown[0], knobs)}")
    values = _read_config_file(args.config, knobs, parser.error) if args.config else {}
    values |= {name: value for name, value in vars(args).items() if name in knobs and value is not None}
    _check_values(values, parser.error)
    config = _build(config_class, values, parser.error)
    if flags_class is None:
        return config
    return config, flags_class(**{k: _absolute(k, v) for k, v in values.items() if k in _types(flags_class)})


def _types(cls):
    return typing.get_type_hints(cls)


def _build(cls, values, error):
    values = {k: v for k, v in values.items() if k in _types(cls)}
    if "repo_id" in values and "path_model_pretrain" not in values:
        values["path_model_pretrain"] = values["repo_id"]
    given = frozenset(values)
    if "data_path" in given and "eval_data_path" not in given:
        values["eval_data_path"] = ()  # the shipped held-out rows say nothing about other data
    values |= {name: (tuple(values[name]) * 2)[:2] for name in ("model_name", "model_author") if name in values}
    for package in values.get("report_to", ()):
        if not importlib.util.find_spec(package):
            error(f"--report_to {package}: 没有安装 the package is not installed; remedy: pip install {package}")
    config = cls(**{k: _absolute(k, v) for k, v in values.items()}, given=given)
    if config.path_model_pretrain == "embedded":
        config = replace(config, **{k: v for k, v in cls.EMBEDDED.items() if k not in given})
    _check_tuning(config, error)
    if config.tuning not in LORA and "learning_rate" not in given:
        config = replace(config, learning_rate=config.learning_rate * WHOLE_RATE)
    return _fit_batches(config, error)


def _check_tuning(config, error):
    """Knobs that would do nothing, or cannot go together, are errors."""
    for name in sorted(config.given & BELONGS.keys()):
        if config.tuning not in BELONGS[name]:
            error(
                f"--{name} 对 --tuning {config.tuning} 不起作用 has no effect with it: "
                f"it belongs to --tuning {' or '.join(BELONGS[name])}"
            )
    if config.use_pissa and config.bits:
        error("--use_pissa 需要未量化的基座 splits the base's weights, which qlora has quantised: use --tuning lora")
    if config.use_pissa and config.use_dora:
        error("--use_pissa 与 --use_dora 不能同用 cannot go together: DoRA's magnitudes would be of the split base")


def _fit_batches(config, error):
    """Whole micro batches in a batch: what the user left open gives way, what the user set is an error.

    The micro batch gives way first: then several processes learn what one would.
    """
    micro = config.micro_batch_size * world_size()
    whole = micro * -(-config.batch_size // micro)
    if config.batch_size == whole:
        return config
    if "micro_batch_size" not in config.given and config.batch_size % world_size() == 0:
        share = config.batch_size // world_size()
        largest = max(n for n in range(1, config.micro_batch_size + 1) if share % n == 0)
        return replace(config, micro_batch_size=largest)
    if "batch_size" not in config.given:
        return replace(config, batch_size=whole)
    error(
        f"--batch_size {config.batch_size} 不是 --micro_batch_size × 进程数 = {micro} 的倍数 "
        f"is not a multiple of micro_batch_size × processes; use {whole}"
    )


def _absolute(name, value):
    """Paths typed by a user are relative to where the command is called; hub ids and URLs stay."""
    if name in ("data_path", "eval_data_path"):
        return tuple(v if "://" in v else os.path.abspath(os.path.expanduser(v)) for v in value)
    if name == "path_model_pretrain" and value != "embedded" and os.path.isdir(os.path.expanduser(value)):
        return os.path.abspath(os.path.expanduser(value))
    if name in ("model_save_dir", "output_dir", "deepspeed") and value:
        return os.path.abspath(os.path.expanduser(value))
    return value


def _parser(classes, knobs):
    doc = inspect.getdoc(sys.modules["__main__"]) or ""
    parser = _Parser(
        description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=True
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with knobs; flags win over it")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    help_texts = {name: text for cls in classes for name, text in _comments(cls).items()}
    spellings = {name: [f"--{name}"] for name in knobs}
    for alias, name in ALIASES.items():
        if name in spellings and alias not in knobs:
            spellings[name].append(f"--{alias}")
    for name, (knob, kind) in knobs.items():
        default = "" if knob.default in ("", ()) else f" [{_shown(knob.default)}]"
        parser.add_argument(
            *spellings[name],
            dest=name,
            default=None,
            help=(help_texts.get(name, "") + default).replace("%", "%%"),
            **_argument(kind),
        )
    return parser


def _argument(kind):
    """argparse's keywords for a knob of type `kind`."""
    if kind == Names:
        return {"nargs": "+", "metavar": "TEXT", "type": str}
    if typing.get_origin(kind) is tuple:
        return {"nargs": "+", "action": _Listed, "metavar": "X"}
    if typing.get_origin(kind) is Literal:
        bare = {"nargs": "?", "const": "true"} if "true" in typing.get_args(kind) else {}
        return {"choices": typing.get_args(kind), "type": type(typing.get_args(kind)[0]), **bare}
    if kind is bool:
        return {"nargs": "?", "const": True, "type": _boolean, "metavar": "true|false"}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


class _Listed(argparse.Action):
    """Lists may be written with blanks or commas: `--target_modules q_proj,k_proj` or `q_proj k_proj`."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, _split(values))


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """Print one line and exit with code 2."""
        let_first_speak()
        print(f"{Path(sys.argv[0]).name}: 参数错误 error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


def _split(values):
    return tuple(part for value in values for part in value.split(",") if part)


def _boolean(text):
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} 应为 true 或 false must be true or false")
    return values[text.lower()]


def _shown(value):
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    text = str(value)
    return os.path.relpath(text, ROOT) if text.startswith(str(ROOT)) else text


def _nearest(flag, knobs):
    name = flag.split("=")[0].lstrip("-")
    near = difflib.get_close_matches(name, [*knobs, *ALIASES], n=1, cutoff=0.5)
    return f"; 是否想写 did you mean --{near[0]} ?" if near else "; --help 列出全部参数 lists all"


def _check_values(values, error):
    for name, value in values.items():
        test, allowed = RANGES.get(name, (None, None))
        if test and not test(value):
            error(f"--{name} {_shown(value)} 超出范围 out of range: must be {allowed}")


def _read_config_file(path, knobs, error):
    """Knobs from a YAML or JSON file, their types checked as flags are."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.endswith((".yaml", ".yml")):
            import yaml

            loaded = yaml.safe_load(text)
        else:
            loaded = json.loads(text)
    except (OSError, ValueError) as problem:
        error(f"--config {path}: 无法读取 cannot be read: {problem}")
    except Exception as problem:  # yaml.YAMLError, whose module is only imported for YAML
        if type(problem).__module__.partition(".")[0] != "yaml":
            raise
        error(f"--config {path}: 不是有效的 YAML not valid YAML: {problem}")
    if not isinstance(loaded, dict):
        error(f"--config {path}: 应为键值表 must be a mapping of knobs to values")
    values = {}
    for key, value in loaded.items():
        name = ALIASES.get(key, key)
        if name not in knobs:
            error(f"--config {path}: 未知参数 unknown knob {key}{_nearest(str(key), knobs)}")
        values[name] = _typed(value, knobs[name][1], lambda why, key=key: error(f"--config {path}: {key}: {why}"))
    return values


def _typed(value, kind, error):
    """`value` from a file as a knob of type `kind`; an int is a good float, and 1e-4 in YAML is a string."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(items) if kind == Names else _split(items)
    elif origin is Literal:
        value = str(value).lower() if isinstance(value, bool) else value  # YAML reads true as a boolean
        if value in typing.get_args(kind):
            return value
        kind = "|".join(map(str, typing.get_args(kind)))
    elif kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif type(value) is kind:
        return value
    error(f"{value!r} 类型不符 is not {getattr(kind, '__name__', kind)}")


def _comments(cls):
    """Each field's trailing comment in the class source and its parents': {name: text}."""
    found = {}
    for parent in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(parent).splitlines():
            match = re.match(r"    (\w+): .*?  # (.+)$", line)
            if match:
                found[match[1]] = match[2]
    return found
