"""What a run leaves for people: the adapter, the loss picture, the model card, the comparison with the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from common import distributed, files
from common.config import LORA
from common.evaluation import evaluate, tables
from common.inference.answerer import Answerer
from common.inference.products import quicken
from common.knobs import BELONGS
from common.launch import rank
from common.model.adapter import TrainedWith, load_tuned, merge_reasons
from common.model.loading import context_of, load_base
from common.runs import run
from common.training import curve

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.config import SFTConfig
    from common.conversation.family import Family
    from common.conversation.turns import Turn


def leave(
    work: run.Run,
    net: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    results: dict[str, Any],
) -> None:
    """Save and check adapter or model, then manifest, all_results.json, picture and card; say how it is served.

    The processes of a run end their group here: the first one alone does what comes after the saving.
    """
    with run.told_when_full(work.folder):
        run.save_tuned(net, tokenizer, work.folder)
    distributed.part()
    if rank():
        return
    results = results | {"serving": serving(net)}
    with run.told_when_full(work.folder):
        curve.draw(work.folder)
        files.write_json(work.folder / "all_results.json", results)
        write_card(work, results, net)
        run.finish(work, results)
    print(f"部署 serving: {results['serving']}")
    print(f"完成 done: 模型与记录在 model and records in {work.folder}")


def compare(
    work: run.Run,
    rows: Sequence[tuple[str, Sequence[Turn]]],
    net: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
    cfg: SFTConfig,
) -> None:
    """Score base and tuned on held-out rows and put both into all_results.json and the card; no rows, no table.

    The net only answers from then on.
    """
    if not rows or rank():
        return
    if distributed.is_sharded(net):
        net = load_tuned(TrainedWith.asked_for(cfg), work.folder, cfg.dtype, cfg.attn_implementation)

    def untuned() -> PreTrainedModel:
        return quicken(load_base(cfg.base, cfg.dtype, attention=cfg.attn_implementation))

    context = context_of(cfg.base)
    answer = Answerer(quicken(net.eval()), tokenizer, prompt, cfg.prompt_style, cfg.max_length_q, untuned, context)
    write_card(work, evaluate.compare(answer, rows, cfg, apart=not cfg.eval_data_path), net)


def serving(net: PreTrainedModel | PeftModel) -> str:
    """One line: whether what was saved can be served as it is, or has to be merged into its base first."""
    if not hasattr(net, "peft_config"):
        return "完整模型 a whole model: transformers loads it as it is"
    reasons = merge_reasons(net)
    if reasons:
        return f"先用 export.py 合并 merge it by export.py first: vLLM serves no adapter with {', '.join(reasons)}"
    return "只有线性层的 LoRA, an engine that takes LoRA for this model can serve it beside its base"


def write_card(work: run.Run, results: dict[str, Any], net: PreTrainedModel | PeftModel) -> None:
    """README.md: what was trained, how to load it, on what, and how it scores."""
    manifest, base = work.manifest, work.manifest["base"]["path"]
    knobs = manifest["config"]
    text = f"""---
base_model: {base}
library_name: {"peft" if knobs["tuning"] in LORA else "transformers"}
pipeline_tag: text-generation
---

# {_title(knobs)} `{base}`

```python
{_loading(knobs, base, work.folder, type(net.config))}
```

Serving: {results["serving"]}.

Prompt (`{manifest["template"]["style"]}`), exactly:

```
{manifest["template"]["text"]}
```

## Data

{_sources(manifest["data"])}{_lineage(manifest)}

## Training

{chr(10).join(f"- {name}: {knobs[name]}" for name in _chosen(knobs))}
- steps: {results["steps"]}, tokens: {results["tokens"]}, train loss: {results["train_loss"]:.4f}

![training loss](training_loss.png)
{_score_table(results)}"""
    (work.folder / "README.md").write_text(text, encoding="utf-8")


def _sources(data: list[dict[str, Any]]) -> str:
    return "\n".join(f"- `{Path(s['path']).name}`: {s['used']} rows, sha256 `{s['sha256'][:12]}`" for s in data)


def _lineage(manifest: dict[str, Any]) -> str:
    """The adapters the run goes back to, the first one first, and on what each was trained; "" where it has none."""
    parts = [
        f"- `{one['folder']}`, adapter's sha256 `{one['sha256'][:12]}`, trained on\n"
        + (indent(_sources(one["data"]), "  ") or "  - what its folder does not say")
        for one in manifest.get("lineage", [])
    ]
    return "\n".join(["", "", "## Started from", "", *parts]) if parts else ""


def _title(knobs: dict[str, Any]) -> str:
    variants = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "use_pissa": "PiSSA"}
    names = [name for knob, name in variants.items() if knobs[knob]] or ["LoRA"]
    return {
        "lora": f"{' + '.join(names)} adapter for",
        "qlora": f"{' + '.join(names)} adapter for the {knobs['quantization_bit']}-bit",
        "full": "All weights tuned:",
        "freeze": f"The last {knobs['freeze_trainable_layers']} layers tuned:",
    }[knobs["tuning"]]


def _loading(knobs: dict[str, Any], base: str, folder: Path, config: type) -> str:
    """The lines of Python that load what was saved; config: the class of the model's configuration."""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    source = base
    options = ""
    if knobs["tuning"] in LORA:
        lines.insert(0, "from peft import PeftModel")
    else:
        source = str(folder)
    if knobs["tuning"] == "qlora":
        lines[1] = "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig"
        four = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
        options = (
            f"quantization_config=BitsAndBytesConfig({four if knobs['quantization_bit'] == 4 else 'load_in_8bit=True'})"
        )
        options = ", " + options
    lines += ["", f'tokenizer = AutoTokenizer.from_pretrained("{folder}")']
    lines += [f'model = AutoModelForCausalLM.from_pretrained("{source}"{options})']
    if knobs["tuning"] in LORA:
        lines += [f'model = PeftModel.from_pretrained(model, "{folder}")']
    package = config.__module__.rpartition(".")[0]
    if not package.startswith("transformers."):
        lines.insert(0, f"import {package}  # of this project, run in its folder: transformers does not know the model")
    return "\n".join(lines)


def _chosen(knobs: dict[str, Any]) -> list[str]:
    """The knobs a reader of the card wants to know."""
    names = [name for name, tunings in BELONGS.items() if knobs["tuning"] in tunings]
    return ["tuning", *names, *"learning_rate epochs max_steps batch_size packing loss_on seed".split()]


def _score_table(results: dict[str, Any]) -> str:
    if "base" not in results:
        return ""
    rows = [
        f"| {name} | {results['base'][name]:.4f} | {results['tuned'][name]:.4f} |"
        for name in tables.metric_names({"base": results["base"], "tuned": results["tuned"]})
    ]
    lines = [
        "",
        "## Held-out rows",
        "",
        "| metric | base | tuned |",
        "|---|---|---|",
        *rows,
        "",
        tables.REST_NOTE,
        "",
        results["signature"],
        "",
    ]
    return "\n".join(lines)
