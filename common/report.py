"""What a run leaves for people: the adapter, the loss picture, the model card, the comparison with the base."""

from pathlib import Path

from common import eval_report, evaluate, jsonl, run
from common.answer import Answerer
from common.model import parameter_counts

SMOOTHING = 0.9  # of the running mean in the picture


def leave(work, net, tokenizer, results):
    """Save and check the adapter, then manifest, all_results.json, rejected.jsonl's count, picture and model card."""
    run.save_adapter(net, tokenizer, work.folder)
    trained, total = parameter_counts(net)
    results = results | {"trainable_params": trained, "all_params": total}
    draw_loss(work.folder)
    run.write_json(work.folder / "all_results.json", results)
    write_card(work, results)
    run.finish(work, results)
    print(f"完成 done: 适配器与记录在 adapter and records in {work.folder}")


def compare(work, rows, net, tokenizer, prompt, cfg):
    """Score base and tuned on held-out rows and put both into all_results.json and the card; no rows, no table."""
    if not rows:
        return
    answer = Answerer(net.eval(), tokenizer, prompt, cfg.prompt_style, cfg.max_length_q)
    write_card(work, evaluate.compare(answer, rows, cfg, apart=not cfg.eval_data_path))


def draw_loss(folder):
    """training_loss.png: the loss of each logged step, its running mean, and the validation loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = jsonl.read(folder / "trainer_log.jsonl")
    steps, losses = [r["step"] for r in records], [r["loss"] for r in records]
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="loss of a logged step")
    axes.plot(steps, smoothed(losses), color="tab:blue", label=f"running mean ({SMOOTHING})")
    held = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="tab:orange", label="validation loss")
    axes.set(xlabel="optimizer step", ylabel="cross entropy (nats per supervised token)", title="Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "training_loss.png")
    pyplot.close(figure)


def smoothed(values):
    """Exponential running mean, corrected for its start."""
    mean, weight, found = 0.0, 0.0, []
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        found.append(mean / weight)
    return found


def write_card(work, results):
    """README.md: what the adapter is, how to load it, what it was trained on and how it scores."""
    manifest, base = work.manifest, work.manifest["base"]["path"]
    knobs = manifest["config"]
    data = "\n".join(
        f"- `{Path(s['path']).name}`: {s['used']} rows, sha256 `{s['sha256'][:12]}`" for s in manifest["data"]
    )
    chosen = "lora_r lora_alpha lora_dropout target_modules learning_rate epochs max_steps batch_size loss_on seed"
    text = f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
---

# LoRA adapter for `{base}`

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{work.folder}")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{work.folder}")
```

Prompt (`{manifest["template"]["style"]}`), exactly:

```
{manifest["template"]["text"]}
```

## Data

{data}

## Training

{chr(10).join(f"- {name}: {knobs[name]}" for name in chosen.split())}
- steps: {results["steps"]}, tokens: {results["tokens"]}, train loss: {results["train_loss"]:.4f}

![training loss](training_loss.png)
{_score_table(results)}"""
    (work.folder / "README.md").write_text(text, encoding="utf-8")


def _score_table(results):
    if "base" not in results:
        return ""
    rows = [
        f"| {name} | {results['base'][name]:.4f} | {results['tuned'][name]:.4f} |"
        for name in eval_report.shown({"base": results["base"], "tuned": results["tuned"]})
    ]
    lines = [
        "",
        "## Held-out rows",
        "",
        "| metric | base | tuned |",
        "|---|---|---|",
        *rows,
        "",
        results["signature"],
        "",
    ]
    return "\n".join(lines)
