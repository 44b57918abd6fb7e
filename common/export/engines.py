"""How other engines serve what was exported: only commands that a run has shown to give transformers' text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig

from common.export import older

if TYPE_CHECKING:
    from common.config import ExportFlags
    from common.conversation.family import Family
    from common.export.proof import Tuned

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes
COMMANDS = {
    "mlx": "mlx_lm.generate --model {folder} --prompt 你好",
    "keras": 'keras_hub.models.CausalLM.from_preset("{folder}")',
    "ctranslate2": "ct2-transformers-converter --model {folder} --output_dir {folder}_ct2",
    "llama.cpp": "python {recipes}/export.py --model_save_dir {run} --format gguf",
    "ollama": "python {recipes}/export.py --model_save_dir {run} --format gguf",
    "vllm": "vllm serve {folder}",
}
OF_FILE = {
    "llama.cpp": "python {recipes}/export.py --model_save_dir {run} --format gguf",
    "ollama": "python {recipes}/export.py --model_save_dir {run} --format gguf",
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
        _show_folder(tuned, folder, prompt, configs[1].model_type, untied)


def _show_folder(tuned: Tuned, folder: Path, prompt: Family, model_type: str, untied: bool) -> None:
    """Print the commands for a folder of safetensors. untied: its head has a matrix of its own, the base's has not."""
    engines = prompt.ENGINES.get(model_type, {})
    able = {name: file for name, file in engines.items() if not untied or name in prompt.UNTIED_ENGINES}
    lacking = older.add_pieces(folder, tuned.manifest["base"]["path"], tuned.tokenizer)
    for engine, needed in able.items():
        if needed and lacking:
            print(f"  {engine + ':':<13}不能 cannot: 需要 needs {needed}; {lacking}")
        elif engine != "ollama" or (folder / "Modelfile").is_file():
            _line(engine, COMMANDS[engine], tuned, folder, prompt)
    if not able:
        alone = "没有在其他引擎上跑过 run in no other engine"
        why = "输出层不再与嵌入共享 the head is no longer tied to the embeddings" if untied else alone
        print(f"  只有 only transformers: {why}")
    for engine in () if untied and not prompt.UNTIED_ENGINES else prompt.UNTRIED_ENGINES:
        _line(engine, COMMANDS[engine] + "  (没有在这里跑过 not run here)", tuned, folder, prompt)
        if tuned.rank:
            _show_adapter(tuned, Path(tuned.manifest["config"]["model_save_dir"]))


def _line(engine: str, command: str, tuned: Tuned, folder: Path, prompt: Family) -> None:
    run = tuned.manifest["config"]["model_save_dir"]
    print(f"  {engine + ':':<13}{command.format(folder=folder, name=folder.name, run=run, recipes=prompt.RECIPES)}")


def _show_adapter(tuned: Tuned, adapter: Path) -> None:
    """Print how vLLM serves the run's own folder `adapter` beside the base, or why it does not."""
    if tuned.merge_reasons:
        print(f"  适配器不能单独服务 the adapter alone is not served by vLLM: {', '.join(tuned.merge_reasons)}")
        return
    rank = next((rank for rank in VLLM_RANKS if rank >= tuned.rank), tuned.rank)
    serve = f"vllm serve {tuned.manifest['base']['path']} --enable-lora --max-lora-rank {rank}"
    print(f"  适配器单独 the adapter alone: {serve} --lora-modules {adapter.name}={adapter}")
