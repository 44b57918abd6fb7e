"""What --check prints: counts, defects by line, samples with their mask, the heaviest step, the verdict."""

from __future__ import annotations

import sys
from typing import Any

from common.training import memory

LENGTHS = {
    "tokens": "可用行的 token, of the kept rows",
    "supervised": "其中计损失的 supervised",
    "prompt": "所有行未截断的提问 prompts of all rows, uncut",
    "answer": "所有行的回答 answers of all rows",
}
PLACES = 3  # printed of each kind of defect; --json has all


def show_rows(report: dict[str, Any]) -> None:
    """Print counts, shares, lengths, the defects by line, and the samples with their mask."""
    rows, overlap = report["rows"], report["overlap"]
    print(
        f"数据 data: 读取 rows {rows['rows']}, 可用 kept {rows['kept']} ({report['usable_share']:.1%}), "
        f"截断 cut {rows['cut']}, 剔除 dropped {rows['dropped']}, 重复 duplicates {rows['duplicates']}, "
        f"训练 train {rows.get('train', 0)}, 验证 validation {rows.get('validation', 0)}"
    )
    print(
        f"重叠 overlap: 与留出数据 with held-out {overlap['held_out']} 行 rows "
        f"({overlap['held_out_questions']} 提问 questions), 训练与验证 train and validation {overlap['validation']}"
    )
    print(
        f"计损失 supervised {report['supervised_share']:.1%} 的 token of the tokens; "
        f"以停止符结尾 rows that end with a stop token {report['stop_share']:.1%}"
    )
    for name, values in report["lengths"].items():
        print(f"长度 length ({LENGTHS[name]}): " + ", ".join(f"{key} {value}" for key, value in values.items()))
    if rows["cut"] or report["kinds"].get("over-long"):
        limits = " ".join(f"--{name} {value}" for name, value in report["keep_all"].items())
        print(f"全部保留、不截断 to keep every row whole: {limits}")
    for kind in report["kinds"]:
        _show_kind(kind, [finding for finding in report["findings"] if finding["kind"] == kind])
    for sample in report["samples"]:
        print(f"样本 sample {sample['where']}: {marked(sample['tokens'], sys.stdout.isatty())}")


def _show_kind(kind: str, findings: list[dict[str, Any]]) -> None:
    """Print a kind of defect once, with its count and a few places; first those that differ in their remedy."""
    mark = "✗" if any(finding["bad"] or finding["lost"] for finding in findings) else "!"
    print(f"{mark} [{kind}] {len(findings)} 处 found{'; --json 全部列出 lists all' if len(findings) > PLACES else ''}")
    by_remedy = {finding["remedy"]: finding for finding in reversed(findings)}  # the first of each
    unlike = sorted(by_remedy.values(), key=findings.index)
    for finding in (unlike + [finding for finding in findings if finding not in unlike])[:PLACES]:
        print(f"    {finding['where']}: {finding['found']}")
        print(f"        应为 expected: {finding['expected']}; 办法 remedy: {finding['remedy']}")


def marked(tokens: list[list], colour: bool) -> str:
    """One line of text: what the loss counts is green on a terminal and «so» elsewhere, tokens set apart by a space."""
    shown = []
    for text, counted in tokens:
        text = text.replace("\n", "⏎").replace(" ", "␣")
        if colour:
            shown.append(f"\033[{'30;42' if counted else '2'}m{text}\033[0m")
        else:
            shown.append(f"«{text}»" if counted else text)
    return " ".join(shown)


def show_step(measured: dict[str, Any]) -> None:
    """Print what the rehearsal took, time and memory, and what the run will take."""
    if not measured:
        return
    step, used = measured["step"], measured["memory"]
    print(
        f"最重的一批 heaviest micro batch: {step['rows']} × {step['length']} token, "
        f"前向、反向、更新 forward, backward and step {step['seconds']:.3f} 秒 seconds; "
        f"共 {step['total_steps']} 步 steps, 约 the run takes about {step['run_seconds'] / 60:.1f} 分钟 minutes"
    )
    print(
        f"内存 memory: 峰值 peak {memory.shown(used['peak'])}; 这一步 the step itself: "
        f"估计 estimate {memory.shown(used['estimate'])}, 实测 measured {memory.shown(used['measured'])}; "
        f"可用 free {memory.shown(used['free'])}; "
        f"gradient_checkpointing {'on' if used['gradient_checkpointing'] else 'off'}"
    )


def show_verdict(report: dict[str, Any]) -> None:
    """Print the last line."""
    counts, kept, share = report["problems"] or report["losses"], report["rows"]["kept"], report["usable_share"]
    verdicts = {
        "good": "可以训练 good",
        "usable with losses": f"可以训练，但有损失 usable with losses: {kept} 行可用 rows are usable ({share:.1%})",
        "bad": "有问题 bad",
    }
    listed = "; ".join(f"{count} × {what}" for what, count in counts.items())
    print(f"结论 verdict: {verdicts[report['verdict']]}{': ' + listed if listed else ''}")
