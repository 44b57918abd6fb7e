"""How other engines serve what was exported: only commands that a run has shown to give transformers' text."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from common.config import ROOT
from common.errors import UserError
from common.export import older
from common.export.folder import place_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from common.config import ExportFlags
    from common.conversation.family import Family
    from common.export.proof import Tuned

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes
COMMANDS = {
    "mlx": "mlx_lm.generate --model {folder} --prompt 你好",
    "keras": 'keras_hub.models.CausalLM.from_preset("{folder}")',
    "ctranslate2": "ct2-transformers-converter --model {folder} --output_dir {folder}_ct2",
    "onnx": "python -m onnxruntime_genai.models.builder -i {folder} -o {folder}_onnx -p fp32 -e cpu",
    "openvino": "optimum-cli export openvino --model {folder} {folder}_openvino",
    "llama.cpp": "python {script} --model_save_dir {run} --format gguf",
    "ollama": "cd {gguf} && ollama create {gguf_name} -f Modelfile  (之后 after the line above)",
    "vllm": "vllm serve {folder}",
}
TRIED = {  # the versions that gave the text, as benchmarks/engines.txt installs them
    "mlx": "mlx-lm 0.32.2",
    "keras": "keras-hub 0.32.0, JAX",
    "ctranslate2": "ctranslate2 4.8.5",
    "onnx": "onnxruntime-genai 0.18.0",
    "openvino": "openvino-genai 2026.4.1, optimum-intel 2.2.0, transformers 5.5.4",
    "llama.cpp": "xllamacpp 2026.10.11549",
}
OF_FILE = {
    "llama.cpp": "llama-cli -m {folder}/{name}.gguf",
    "ollama": "cd {folder} && ollama create {name} -f Modelfile && ollama run {name}",
}


def show(tuned: Tuned, folder: Path, flags: ExportFlags, prompt: Family) -> None:
    """Print how engines run the export in `folder`, which of them cannot and why, and which were not tried here."""
    base = tuned.manifest["base"]["path"]
    configs = [AutoConfig.from_pretrained(path) for path in (base, folder)] if flags.format == "safetensors" else []
    if flags.format == "gguf-lora":
        chat = " --chat-template-file {folder}/chat_template.jinja" if (folder / older.TEMPLATE).is_file() else ""
        _line("llama.cpp", ("llama-cli -m BASE.gguf --lora {folder}/{name}.gguf --jinja" + chat), tuned, folder, prompt)
    elif flags.format == "gguf":
        for engine in ("llama.cpp", "ollama")[: 1 + (folder / "Modelfile").is_file()]:
            _line(engine, OF_FILE[engine], tuned, folder, prompt)
    elif configs[0].get_text_config() is not configs[0]:
        print("  多模态模型里的语言模型 the text model of one of images or sound: 只在 only tried in transformers")
    else:
        untied = configs[0].tie_word_embeddings and not configs[1].tie_word_embeddings
        _show_folder(tuned, folder, prompt, configs[1], untied)


def _show_folder(tuned: Tuned, folder: Path, prompt: Family, config: PreTrainedConfig, untied: bool) -> None:
    """Print the commands for a folder of safetensors. untied: its head has a matrix of its own, the base's has not."""
    engines = prompt.ENGINES.get(config.model_type, {})
    able = {name: file for name, file in engines.items() if not untied or name in prompt.UNTIED_ENGINES}
    reasons = {engine: _why_no_gguf(tuned, prompt, config) for engine in OF_FILE if engine in able}
    reasons |= _why_not_computed(able, config)
    lacking = older.add_pieces(folder, tuned.manifest["base"]["path"], tuned.tokenizer)
    reasons |= {engine: f"需要 needs {file}; {lacking}" for engine, file in able.items() if file and lacking}
    for engine in able:
        if why := reasons.get(engine):
            print(f"  {engine + ':':<13}不能 cannot: {why}")
        elif engine != "ollama" or (folder / "Modelfile").is_file():
            tried = f"  (试过 tried: {TRIED[engine]})" if engine in TRIED else ""
            _line(engine, COMMANDS[engine] + tried, tuned, folder, prompt)
    if not able:
        alone = "没有在其他引擎上跑过 run in no other engine"
        why = "输出层不再与嵌入共享 the head is no longer tied to the embeddings" if untied else alone
        print(f"  只有 only transformers: {why}")
    for engine in () if untied and not prompt.UNTIED_ENGINES else prompt.UNTRIED_ENGINES:
        _line(engine, COMMANDS[engine] + "  (没有在这里跑过 not run here)", tuned, folder, prompt)
        if tuned.rank:
            _show_adapter(tuned, Path(tuned.manifest["config"]["model_save_dir"]))


def _why_not_computed(engines: Iterable[str], config: PreTrainedConfig) -> dict[str, str]:
    """{engine: why it would compute otherwise or end in an error}, of those that do not look at it themselves."""
    reasons = {}
    rope = getattr(config, "rope_parameters", None) or {}  # a config of one's own may have none
    types = {one["rope_type"] for one in ([rope] if "rope_type" in rope else rope.values())}
    if types - {"default"}:  # CTranslate2 leaves out a scale without a word
        scaled = "位置有缩放 its positions are scaled: 没有给出相同的文字 no run there gave the same text"
        reasons = {engine: scaled for engine in engines if engine not in OF_FILE}
    if "onnx" in engines:  # a config whose layers differ has no one size, and is of none of these engines
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if head % 16:
            reasons["onnx"] = f"注意力头的大小 {head} 不是 16 的倍数 the head size is no multiple of 16"
    return reasons


def _line(engine: str, command: str, tuned: Tuned, folder: Path, prompt: Family) -> None:
    run = Path(tuned.manifest["config"]["model_save_dir"])
    gguf = place_of(str(run), "", "gguf")
    names = {"folder": folder, "name": folder.name, "run": run, "gguf": gguf, "gguf_name": gguf.name}
    names |= {"script": _typed(ROOT / prompt.RECIPES / "export.py")}
    quoted = {key: str(name) if engine == "keras" else shlex.quote(str(name)) for key, name in names.items()}
    print(f"  {engine + ':':<13}{command.format(**quoted)}")


def _typed(path: Path) -> str:
    """A path as one types it in the current folder: absolute or from there, whichever is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def _why_no_gguf(tuned: Tuned, prompt: Family, config: PreTrainedConfig) -> str:
    """Why the model cannot be written as GGUF, "" where it can."""
    from common.export import gguf_file

    try:
        gguf_file.check_all(config, tuned, prompt)
    except UserError as problem:
        return str(problem).removeprefix("--format gguf: ")
    return ""


def _show_adapter(tuned: Tuned, adapter: Path) -> None:
    """Print how vLLM serves the run's own folder `adapter` beside the base, or why it does not."""
    if tuned.merge_reasons:
        print(f"  适配器不能单独服务 the adapter alone is not served by vLLM: {', '.join(tuned.merge_reasons)}")
        return
    rank = next((rank for rank in VLLM_RANKS if rank >= tuned.rank), tuned.rank)
    serve = f"vllm serve {shlex.quote(tuned.manifest['base']['path'])} --enable-lora --max-lora-rank {rank}"
    print(f"  适配器单独 the adapter alone: {serve} --lora-modules {shlex.quote(f'{adapter.name}={adapter}')}")
