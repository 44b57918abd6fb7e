"""--verify: a server or llama.cpp asked what the run was asked, and its text compared with the run's and the base's.

Some engines serve the base under an adapter's name without a word; that is told apart from rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.errors import UserError
from common.export import llama_cpp, proof
from common.export.proof import Expected
from common.inference.answerer import Sampling
from common.inference.remote import Remote
from common.peft_names import PeftModel

if TYPE_CHECKING:
    from common.config import ExportFlags, SFTConfig
    from common.conversation.family import Family
    from common.export.proof import Tuned

SHOWN = 24  # characters of a text in the table


class Parted(NamedTuple):
    """Where a text leaves the expected one: at the answer's token `step`, whose two best logits are `gap` apart."""

    step: int
    gap: float


def check(cfg: SFTConfig, flags: ExportFlags, prompt: Family) -> None:
    """Print a table of the prompts; UserError where a text parts from the run's at more than a tie.

    At a tie the run's two best logits are within `proof.TOLERANCE` of --dtype (auto: float32), a share of the largest.
    """
    is_url = flags.verify.startswith(("http://", "https://"))
    if not is_url and flags.verify != "llama.cpp":
        raise UserError(f"--verify {flags.verify}: 未知 unknown; give llama.cpp or a URL that ends with /v1")
    if flags.format != "safetensors" or flags.gguf_type != "auto":
        raise UserError("--verify 与 --format 不能同用 cannot go together: nothing is written; leave it out")
    if is_url and flags.output_dir:
        raise UserError("--verify URL 与 --output_dir 不能同用 cannot go together: a server is asked; leave it out")
    file = None if is_url else _file(cfg, flags)
    tuned = proof.load(cfg, prompt)
    expected = proof.measure(tuned)
    limit = proof.TOLERANCE[torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)]
    if file:
        print(f"{file}: {llama_cpp.prove(file, expected, limit)}")
    else:
        _check_server(flags.verify, expected, limit, prompt)


def _file(cfg: SFTConfig, flags: ExportFlags) -> Path:
    """The GGUF file of the run's export; UserError where there is none, or no llama.cpp."""
    folder = Path(flags.output_dir or f"{cfg.model_save_dir}_gguf")
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise UserError(
            f"--verify llama.cpp: {folder} 里应有一个 .gguf holds {len(found)} GGUF files, not one: write it by "
            "--format gguf, or give its folder as --output_dir"
        )
    if not llama_cpp.installed():
        raise UserError(f"--verify llama.cpp 需要 needs {llama_cpp.PACKAGE}: pip install {llama_cpp.PACKAGE}")
    return found[0]


def _check_server(url: str, expected: Expected, limit: float, prompt: Family) -> None:
    """Ask the server for the run's model and, where it serves it, the base; print both tables."""
    tuned, base = expected.tuned, _of_base(expected.tuned)
    remote = Remote(url, tuned.tokenizer, prompt, tuned.manifest["template"]["style"], tuned.max_length_q)
    name, base_name = _names(remote.names, tuned)
    wrong = _compare(remote, name, expected, base, limit, prompt)
    if base and base_name:
        wrong += _compare(remote, base_name, base, None, limit, prompt)
    if wrong:
        raise UserError(f"--verify {url}: " + "; ".join(wrong))
    print(f"{url}: 一致 the same text")


def _of_base(tuned: Tuned) -> Expected | None:
    """How the base answers the same prompts; None where the run tuned the weights themselves."""
    if not isinstance(tuned.net, PeftModel):
        return None
    with tuned.net.disable_adapter():
        return proof.measure(tuned)


def _names(served: Sequence[str], tuned: Tuned) -> tuple[str, str]:
    """(the name under which a server has the run's model, the base's or ""); UserError where it cannot be told."""
    run, path = Path(tuned.manifest["config"]["model_save_dir"]).name, tuned.manifest["base"]["path"]
    base = next((name for name in served if name in ("base", path, Path(path).name)), "")
    others = [name for name in served if name != base]
    named = [name for name in others if Path(name).name.partition(":")[0] in (run, "tuned")]
    if len(named or others) == 1:
        return (named or others)[0], base
    if not others:
        raise UserError(f"--verify: 只有基座 the server has no model but the base: {base}")
    raise UserError(f"--verify: 不知道是哪个 which of {', '.join(others)} is the run's? serve it as {run}")


def _compare(
    remote: Remote, name: str, expected: Expected, other: Expected | None, limit: float, prompt: Family
) -> list[str]:
    """Print how the model `name` answers; what is wrong, in words. other: the base, which must not answer instead."""
    tuned = expected.tuned
    remote.names = [name]
    found = [answer.text for answer in remote(tuned.questions, Sampling(max_new_tokens=proof.NEW_TOKENS))]
    texts = [_text(tuned, ids, prompt) for ids in expected.answers]
    places = [parted(tuned, *one, prompt) for one in zip(found, expected.answers, expected.logits, strict=True)]
    print(f"{name}:  提示 prompt | 相同 same | 差距 top-2 gap | 回答 text")
    wrong = 0
    for number, (text, place, logits) in enumerate(zip(found, places, expected.logits, strict=True), 1):
        tie = place is not None and place.gap <= limit * float(logits.abs().max())
        wrong += place is not None and not tie
        said = "是 yes" if place is None else "平局 tie" if tie else "否 no"
        gap = "" if place is None else f"{place.gap:.3g} (token {place.step + 1})"
        print(f"  {number} | {said} | {gap} | {text[:SHOWN]!r}")
    if not wrong:
        return []
    base = [_text(tuned, ids, prompt) for ids in other.answers] if other else texts
    if base != texts and found == base:
        return [f"{name} 的回答是基座的 answers as the base does, not as the run: the adapter is not applied"]
    return [f"{name}: {wrong} 个回答不同 of {len(found)} answers differ at more than a tie"]


def _text(tuned: Tuned, ids: Sequence[int], prompt: Family) -> str:
    """An answer's ids as text, its stop id left out."""
    kept = ids[:-1] if ids and ids[-1] in tuned.stop_ids else ids
    return prompt.clean(tuned.tokenizer.decode(kept, skip_special_tokens=True))


def parted(tuned: Tuned, found: str, ids: list[int], logits: torch.Tensor, prompt: Family) -> Parted | None:
    """Where `found` leaves the text of the answer `ids`; None where it is that text."""
    if found == _text(tuned, ids, prompt):
        return None
    shared = [step for step in range(len(ids) + 1) if found.startswith(_text(tuned, ids[:step], prompt))]
    step = min(shared[-1], len(logits) - 1)
    best = logits[step].topk(2).values
    return Parted(step, float(best[0] - best[1]))
