"""What runs an exported folder, as the commands to do it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from common.export.older import SENTENCEPIECE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from common.conversation.family import Engine, Family
    from common.export.merging import Tuned

CONVERTED = ("llama.cpp", "ollama")  # run a GGUF file
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


def show_engines(tuned: Tuned, folder: Path, prompt: Family) -> None:
    """Print how the family's engines serve the folder, and whether the adapter alone can be served."""
    base, whole = (AutoConfig.from_pretrained(path) for path in (tuned.manifest["base"]["path"], folder))
    if base.get_text_config() is not base:
        print("  多模态模型里的语言模型 the text model of one of images or sound: 只在 only tried in transformers")
        return
    suited = {name: engine for name, engine in prompt.ENGINES.items() if whole.model_type in engine.model_types}
    untied = base.tie_word_embeddings and not whole.tie_word_embeddings
    embedded = tuned.manifest["config"].get("path_model_pretrain") == "embedded"
    reasons = {name: _why_not(name, engine, folder, whole, untied, embedded) for name, engine in suited.items()}
    commands = _commands(folder)
    for name, reason in reasons.items():
        print(f"  {name + ':':<11}{'不能 no: ' + reason if reason else commands[name]}")
    if all(reasons.values()):
        print("  只有 only transformers 跑过 has been run with it")
    if "vllm" in suited and tuned.rank:
        _show_adapter(tuned, Path(tuned.manifest["config"]["model_save_dir"]))


def _commands(folder: Path) -> dict[str, str]:
    """How each engine runs the folder; llama.cpp's converter is in a checkout of it."""
    name = folder.name
    convert = f"python convert_hf_to_gguf.py {folder} --outfile {folder / name}.gguf"
    return {
        "vllm": f"vllm serve {folder}",
        "llama.cpp": f"{convert} && llama-cli -m {folder / name}.gguf",
        "ollama": f"{convert} && cd {folder} && ollama create {name} -f Modelfile && ollama run {name}",
        "mlx": f"mlx_lm.generate --model {folder} --prompt 你好",
        "keras": f'keras_hub.models.CausalLM.from_preset("{folder}")',
    }


def _why_not(name: str, engine: Engine, folder: Path, whole: PreTrainedConfig, untied: bool, embedded: bool) -> str:
    """Why an engine cannot take the folder, or "". embedded: it was tuned on the base that is shipped here."""
    if untied and not engine.untied:
        return "输出层不再与嵌入共享 the head is no longer tied to the embeddings"
    if whole.model_type in engine.sentencepiece and not (folder / SENTENCEPIECE).exists():
        return f"它要 it needs {SENTENCEPIECE}, 基座没有 and the base has none"
    if embedded and name in CONVERTED:
        return "转换器只认识公开的分词器 its converter knows published tokenizers, not that of the embedded base"
    return ""


def _show_adapter(tuned: Tuned, adapter: Path) -> None:
    """Print how vLLM serves the run's own folder `adapter` beside the base, or why it does not."""
    if tuned.merge_reasons:
        print(f"  适配器不能单独服务 the adapter alone is not served by vLLM: {', '.join(tuned.merge_reasons)}")
        return
    rank = next((rank for rank in VLLM_RANKS if rank >= tuned.rank), tuned.rank)
    serve = f"vllm serve {tuned.manifest['base']['path']} --enable-lora --max-lora-rank {rank}"
    print(f"  适配器单独 the adapter alone: {serve} --lora-modules {adapter.name}={adapter}")
