"""A run as one whole model: merged in fp32, written in the dtype asked for, reloaded, compared, then published."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import AutoConfig, GenerationConfig

from common import files
from common.conversation import templates
from common.conversation.turns import Turn
from common.device import device
from common.errors import UserError
from common.evaluation import evaluate
from common.inference.answerer import fitted
from common.inference.tuned import open_run
from common.model.adapter import load_tuned, merge_reasons
from common.model.layers import causal_of
from common.model.loading import load_whole, pad_id_of
from common.runs.checkpoints import step_of
from common.runs.places import check_writable

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.config import ExportFlags, SFTConfig
    from common.conversation.family import Family

# largest difference of a logit, as a share of the largest logit: fp32 rounds sums only, the others each weight too
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes
NEW_TOKENS, QUESTIONS, SHARD = 32, 8, "5GB"
FALLBACK = (
    "你好",
    "1+1=",
    "请介绍一下你自己。",
    "类型#裙*颜色#黑色",
    "写一句诗。",
    "Hello!",
    "天为什么是蓝的？",
    "再见",
)


class Tuned(NamedTuple):
    """A run's model in fp32, adapter and all, with what else an export needs."""

    net: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    manifest: dict[str, Any]
    prompts: list[list[int]]  # ids of each prompt the export is proven on
    stop_ids: list[int]
    rank: int  # of the adapter; 0 where the run tuned the weights themselves
    merge_reasons: list[str]  # why the adapter alone cannot be served, see adapter.merge_reasons


class Expected(NamedTuple):
    """How the run answers: for each prompt the greedy ids, and the fp32 logits [ids + 1, vocabulary] they came from."""

    tuned: Tuned
    answers: list[list[int]]
    logits: list[torch.Tensor]


def load(cfg: SFTConfig, prompt: Family) -> Tuned:
    """The Tuned of the finished run in `cfg.model_save_dir`, on the unquantised base; errors as in tuned.open_run."""
    manifest, trained, tokenizer = open_run(cfg, prompt)
    if trained.bits:
        print("合并到未量化的基座 merging into the unquantised base: not bit for bit what the adapter was trained on")
    _say("加载 loading: 训练后的模型 the tuned model, in float32")
    net = load_tuned(trained._replace(bits=0), cfg.model_save_dir, "float32")
    adapter = getattr(net, "peft_config", {}).get("default")
    causal_of(net).generation_config = GenerationConfig()  # the checkpoint's own would mix with ours
    turns = _questions(cfg, manifest)
    style, limit = trained.prompt_style, trained.max_length_q
    prompts = [fitted(tokenizer, prompt, asked, style, limit)[0] for asked in turns]
    rank, reasons = (adapter.r, merge_reasons(net)) if adapter else (0, [])
    return Tuned(net, tokenizer, manifest, prompts, manifest["stop_ids"], rank, reasons)


def measure(tuned: Tuned) -> Expected:
    """The Expected answers and logits of a run, which the exported model has to repeat."""
    _say(f"回答 answering: {len(tuned.prompts)} 个提示 prompts, to compare with")
    answers = [_greedy(tuned.net, tuned, ids) for ids in tuned.prompts]
    logits = [_logits(tuned.net, ids, new) for ids, new in zip(tuned.prompts, answers, strict=True)]
    return Expected(tuned, answers, logits)


def merge(tuned: Tuned) -> PreTrainedModel:
    """The base model with the adapter added to its weights, in fp32; a run without adapter is merged as it is.

    A head tied to the embeddings is untied first where the adapter changes one or the other: merged into the matrix
    they share, the change of one would change both.
    """
    if not tuned.rank:
        return tuned.net
    _say("合并 merging: 适配器并入基座 the adapter into the base")
    untie(causal_of(tuned.net))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on tied heads, followed above
        return tuned.net.merge_and_unload(safe_merge=True)


def untie(causal: PreTrainedModel) -> None:
    """Give the head a matrix of its own where an adapter sits on it or on the embeddings it is tied to."""
    ends = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    if causal.config.tie_word_embeddings and any(
        isinstance(end, BaseTunerLayer | ModulesToSaveWrapper) for end in ends
    ):
        head = getattr(ends[1], "original_module", ends[1])
        head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        causal.config.tie_word_embeddings = False


def check_merge(whole: PreTrainedModel, expected: Expected) -> None:
    """UserError where the merged fp32 model answers otherwise than base and adapter."""
    _say("比较 comparing: 合并后的模型 the merged model, in float32")
    print(f"合并 merged: {compare(whole, expected, torch.float32)}")


def compare(net: PreTrainedModel, expected: Expected, dtype: torch.dtype) -> str:
    """How far `net`, in `dtype`, is from the run's logits and greedy answers, as text; UserError beyond TOLERANCE.

    A greedy answer may leave the run's only at a step whose two best ids are within that tolerance of each other.
    """
    tuned = expected.tuned
    largest, scale = 0.0, 0.0  # difference of a logit, and logit
    same = 0  # greedy answers
    for ids, new, logits in zip(tuned.prompts, expected.answers, expected.logits, strict=True):
        limit = TOLERANCE[dtype] * float(logits.abs().max())
        difference = float((_logits(net, ids, new) - logits).abs().max())
        if not difference <= limit:  # NaN is not
            raise UserError(
                f"导出的模型与训练的不同 the exported model differs: a logit by {difference:.3g}, "
                f"more than {limit:.3g} ({dtype}); nothing was written; try --dtype float32"
            )
        largest, scale = max(largest, difference), max(scale, float(logits.abs().max()))
        same += same_answer(_greedy(net, tuned, ids), new, logits, limit)
    return (
        f"最大 logit 差 largest logit difference {largest:.2g} of {scale:.3g} (tolerance {TOLERANCE[dtype]:g} of it), "
        f"贪心回答一致 greedy answers equal {same}/{len(expected.answers)}"
    )


def same_answer(found: Sequence[int], new: Sequence[int], logits: torch.Tensor, limit: float) -> bool:
    """Whether the ids are equal; UserError where they part at a step that was not a tie."""
    if found == new:
        return True
    step = next(n for n, pair in enumerate(zip([*found, None], [*new, None], strict=False)) if pair[0] != pair[1])
    if step < len(found) and float(logits[step].max() - logits[step][found[step]]) <= limit:
        return False
    raise UserError(
        f"导出的模型回答不同 the exported model's greedy answer differs from token {step + 1} on: "
        f"{found[step : step + 8]}, not {new[step : step + 8]}; nothing was written"
    )


def new_folder(cfg: SFTConfig, flags: ExportFlags) -> Path:
    """Where the model goes; UserError where something is there already, or nothing can be written there."""
    exported = Path(cfg.model_save_dir)
    if step_of(exported) is not None:  # not among the checkpoints, but beside the run
        exported = exported.parent.with_name(f"{exported.parent.name}_{exported.name}")
    folder = Path(flags.output_dir or f"{exported}_merged")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: 已经存在 already exists and is not overwritten; give another --output_dir")
    check_writable(folder.parent, "output_dir")
    return folder


def write(whole: PreTrainedModel, expected: Expected, folder: Path, cfg: SFTConfig, prompt: Family) -> None:
    """Write `whole` in the dtype asked for, reload it, compare it, and only then put it in place at `folder`.

    UserError where the reloaded model answers otherwise; nothing is left then.
    """
    tuned, dtype = expected.tuned, _dtype(cfg, expected.tuned.manifest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        draft = Path(scratch) / folder.name
        _say(f"写入 writing: {folder}, in {str(dtype).removeprefix('torch.')}")
        save(whole.to(dtype), tuned, draft, prompt)
        _say("重新加载 reloading: 与训练后的模型比较 and comparing with the tuned model")
        reloaded = load_whole(draft, dtype=dtype).to(device()).eval()
        reloaded.generation_config = GenerationConfig()  # as for the model it is compared with
        verdict = compare(reloaded, expected, dtype)
        record = {"run": cfg.model_save_dir, "base": tuned.manifest["base"], "dtype": str(dtype), "check": verdict}
        files.write_json(draft / "export.json", record)
        os.rename(draft, folder)
    print(f"重新加载 reloaded: {verdict}")
    print(f"完成 done: 完整模型 whole model ({str(dtype).removeprefix('torch.')}) in {folder}")


def save(net: PreTrainedModel, tuned: Tuned, draft: Path, prompt: Family) -> None:
    """Weights, config, generation config, tokenizer with the run's chat template, and the Modelfile, into `draft`."""
    tokenizer, style = tuned.tokenizer, tuned.manifest["template"]["style"]
    pad_id = pad_id_of(tokenizer, tuned.stop_ids[0])
    penalty = tuned.manifest["config"].get("repetition_penalty", 1.0)
    net.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tuned.stop_ids,
        pad_token_id=pad_id,
        **({"repetition_penalty": penalty} if penalty != 1 else {}),
    )
    net.save_pretrained(draft, max_shard_size=SHARD)
    files.share_weights(draft)
    tokenizer.chat_template = templates.chat_template(tokenizer, prompt, style)
    if tokenizer.chat_template is None:
        print(f"没有聊天模板 no chat template is written: none can express prompt_style {style}")
    tokenizer.save_pretrained(draft)
    text = templates.modelfile(tokenizer, prompt, style) if "ollama" in prompt.ENGINES else None
    if text:
        (draft / "Modelfile").write_text(text, encoding="utf-8")


def show_engines(tuned: Tuned, folder: Path, prompt: Family) -> None:
    """Print how the family's engines serve the folder, and whether the adapter alone can be served."""
    configs = [AutoConfig.from_pretrained(path) for path in (tuned.manifest["base"]["path"], folder)]
    if configs[0].get_text_config() is not configs[0]:
        print("  多模态模型里的语言模型 the text model of one of images or sound: 只在 only tried in transformers")
        return
    untied = configs[0].tie_word_embeddings and not configs[1].tie_word_embeddings
    engines = prompt.UNTIED_ENGINES if untied else prompt.ENGINES
    name = folder.name
    commands = {
        "vllm": f"vllm serve {folder}",
        "llama.cpp": f"python convert_hf_to_gguf.py {folder} --outfile {name}.gguf && llama-cli -m {name}.gguf",
        "ollama": f"cd {folder} && ollama create {name} -f Modelfile && ollama run {name}",
        "mlx": f"mlx_lm.generate --model {folder} --prompt 你好",
        "keras": f'keras_hub.models.CausalLM.from_preset("{folder}")',
    }
    for engine in engines:
        print(f"  {engine + ':':<11}{commands[engine]}")
    if not engines:
        alone = "没有在其他引擎上跑过 run in no other engine"
        why = "输出层不再与嵌入共享 the head is no longer tied to the embeddings" if untied else alone
        print(f"  只有 only transformers: {why}")
    if "vllm" in prompt.ENGINES and tuned.rank:
        _show_adapter(tuned, Path(tuned.manifest["config"]["model_save_dir"]))


def _show_adapter(tuned: Tuned, adapter: Path) -> None:
    """Print how vLLM serves the run's own folder `adapter` beside the base, or why it does not."""
    if tuned.merge_reasons:
        print(f"  适配器不能单独服务 the adapter alone is not served by vLLM: {', '.join(tuned.merge_reasons)}")
        return
    rank = next((rank for rank in VLLM_RANKS if rank >= tuned.rank), tuned.rank)
    serve = f"vllm serve {tuned.manifest['base']['path']} --enable-lora --max-lora-rank {rank}"
    print(f"  适配器单独 the adapter alone: {serve} --lora-modules {adapter.name}={adapter}")


def _say(stage: str) -> None:
    """Print what comes next, at once: with a large model it takes minutes."""
    print(stage, flush=True)


def _questions(cfg: SFTConfig, manifest: dict[str, Any]) -> list[Sequence[Turn]]:
    """Conversations to prove the export on: the run's held-out rows as far as they can be read, then fixed ones."""
    try:
        rows = evaluate.rows_to_score(cfg, QUESTIONS)
    except UserError:
        rows = []
    fixed = [[Turn("user", text)] for text in FALLBACK]
    return [*(turns[:-1] for _, turns in rows), *fixed][:QUESTIONS]


def _greedy(net: PreTrainedModel | PeftModel, tuned: Tuned, ids: list[int]) -> list[int]:
    """The ids `net` answers a prompt with, greedily, NEW_TOKENS at most."""
    asked = torch.tensor([ids], device=net.device)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=tuned.stop_ids, pad_token_id=0)
    with torch.inference_mode():
        output = net.generate(input_ids=asked, attention_mask=torch.ones_like(asked), generation_config=config)
    return output[0, len(ids) :].tolist()


def _logits(net: PreTrainedModel | PeftModel, ids: list[int], new: list[int]) -> torch.Tensor:
    """fp32 logits [len(new) + 1, vocabulary] from the prompt's last id on, `new` fed as the answer."""
    with torch.inference_mode():
        output = net(input_ids=torch.tensor([[*ids, *new]], device=net.device), logits_to_keep=len(new) + 1)
    return output.logits[0].float().cpu()


def _dtype(cfg: SFTConfig, manifest: dict[str, Any]) -> torch.dtype:
    """The torch dtype to write: --dtype, or that of the base model's own files."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    return AutoConfig.from_pretrained(manifest["base"]["path"]).dtype or torch.float32
