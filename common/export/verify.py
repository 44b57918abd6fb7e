"""--verify: a server or an engine asked what the run was asked, and its text compared with the run's and the base's.

Some engines serve the base under an adapter's name without a word; that is told apart from rounding. An engine that
takes a folder of safetensors is compared in float32 with that folder's own weights in transformers, which are compared
with the run before: so a tie is one of float32, whatever type the folder has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers import GenerationConfig

from common.elsewhere import asking
from common.errors import UserError
from common.export import gguf_file, llama_cpp, proof
from common.export.folder import place_of
from common.export.proof import Expected
from common.inference.answerer import Sampling
from common.inference.remote import Remote
from common.model.folders import read_object
from common.model.loading import load_whole
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

    At a tie the run's two best logits are within `proof.TOLERANCE` of --dtype, a share of the largest; auto: of a GGUF
    file's own type, else of float32.
    """
    is_url = flags.verify.startswith(("http://", "https://"))
    engine, _, python = flags.verify.partition("=")
    if not is_url and flags.verify != "llama.cpp" and engine not in asking.ENGINES:
        known = ", ".join(("llama.cpp", *asking.ENGINES))
        raise UserError(f"--verify {flags.verify}: 未知 unknown; give {known} or a URL that ends with /v1")
    if flags.format != "safetensors" or flags.gguf_type != "auto":
        raise UserError("--verify 与 --format 不能同用 cannot go together: nothing is written; leave it out")
    if is_url and flags.output_dir:
        raise UserError("--verify URL 与 --output_dir 不能同用 cannot go together: a server is asked; leave it out")
    if not is_url and engine in asking.ENGINES:
        return _check_folder(engine, python, _folder(cfg, flags, engine, python), cfg, prompt)
    file = None if is_url else _file(cfg, flags)
    tuned = proof.load(cfg, prompt)
    expected = proof.measure(tuned)
    if file:
        limit = gguf_file.limit_of(file) if cfg.dtype == "auto" else _limit(cfg)
        print(f"{file}: {llama_cpp.prove(file, expected, limit)}")
    else:
        _check_server(flags.verify, expected, _limit(cfg), prompt)


def _limit(cfg: SFTConfig) -> float:
    return proof.TOLERANCE[torch.float32 if cfg.dtype == "auto" else getattr(torch, cfg.dtype)]


def _file(cfg: SFTConfig, flags: ExportFlags) -> Path:
    """The GGUF file of the run's export; UserError where there is none, or no llama.cpp."""
    folder = place_of(cfg.model_save_dir, flags.output_dir, "gguf")
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise UserError(
            f"--verify llama.cpp: {folder} 里应有一个 .gguf holds {len(found)} GGUF files, not one: write it by "
            "--format gguf, or give its folder as --output_dir"
        )
    if not llama_cpp.installed():
        raise UserError(f"--verify llama.cpp 需要 needs {llama_cpp.PACKAGE}: pip install {llama_cpp.PACKAGE}")
    return found[0]


def _folder(cfg: SFTConfig, flags: ExportFlags, engine: str, python: str) -> Path:
    """The run's export as safetensors; UserError where there is none, or no engine."""
    folder = place_of(cfg.model_save_dir, flags.output_dir, "safetensors")
    if not all((folder / name).is_file() for name in ("export.json", "config.json")):
        raise UserError(
            f"--verify {engine}: {folder} 不是导出的完整模型 is no exported whole model: export the run first, "
            "or give the folder as --output_dir"
        )
    if python and not Path(python).is_file():
        raise UserError(f"--verify {engine}={python}: 没有这个文件 no such file; give the Python that has the engine")
    if not python:
        asking.check_installed(engine)
    return folder


def _check_folder(engine: str, python: str, folder: Path, cfg: SFTConfig, prompt: Family) -> None:
    """Compare the folder with the run, ask the engine about it, and print a table.

    UserError where the folder answers otherwise than the run, or the engine otherwise than the folder.
    """
    expected = _of_folder(folder, proof.measure(proof.load(cfg, prompt)))
    tuned = expected.tuned
    proof.say(f"提问 asking: {engine}, in float32")
    messages = [[{"role": turn.role, "content": turn.text} for turn in turns] for turns in tuned.questions]
    questions = asking.Questions(
        prompts=tuned.prompts,
        messages=messages if tuned.tokenizer.chat_template else [None] * len(messages),
        stop_ids=tuned.stop_ids,
        new_tokens=proof.NEW_TOKENS,
        threads=torch.get_num_threads(),
    )
    found = asking.ask(engine, folder, questions, *filter(None, [python]))
    wrong = _table_of_ids(found, expected, _limit(cfg), prompt)
    if wrong:
        raise UserError(f"--verify {engine}: " + "; ".join(wrong))
    print(f"{folder}: 一致 the same text in {', '.join(' '.join(pair) for pair in found.versions.items())}")


def _of_folder(folder: Path, expected: Expected) -> Expected:
    """How the weights in the folder answer in transformers, in float32; UserError where that is not as the run does."""
    record, tuned = read_object(folder / "export.json"), expected.tuned
    net = load_whole(folder, dtype=torch.float32).eval()
    net.generation_config = GenerationConfig()
    known = {str(dtype): dtype for dtype in proof.TOLERANCE}
    try:
        proof.compare(net, expected, known.get(str(record.get("dtype")), torch.float32))
    except UserError:
        raise UserError(f"--verify: {folder} 回答得与训练结果不同 does not answer as the run: export again") from None
    return proof.measure(tuned._replace(net=net))


def _table_of_ids(found: asking.Found, expected: Expected, limit: float, prompt: Family) -> list[str]:
    """Print how an engine answers, prompt by prompt; what is wrong, in words."""
    tuned, wrong, other = expected.tuned, 0, 0
    print("提示 prompt | 编号 its ids | 相同 same | 差距 gap | 回答 text")
    rows = zip(tuned.prompts, found.prompts, found.answers, expected.answers, expected.logits, strict=True)
    for number, (ids, made, answer, new, logits) in enumerate(rows, 1):
        place = parted_ids(answer, new, logits)
        tie = place is not None and place.gap <= limit * float(logits.abs().max())
        differs = made is not None and made != ids and len(made) <= len(ids)  # a longer one was cut by the run
        wrong, other = wrong + (place is not None and not tie), other + differs
        rendered = "–" if made is None else "否 no" if differs else "是 yes"
        print(f"  {number} | {rendered} | {_row(place, tie)} | {_text(tuned, answer, prompt)[:SHOWN]!r}")
    counts = [(wrong, "个回答不同 of {} answers differ at more than a tie")]
    counts += [(other, "个提示的编号不同 of {} prompts get other ids by its template")]
    return [f"{count} {words.format(len(found.answers))}" for count, words in counts if count]


def _row(place: Parted | None, tie: bool) -> str:
    """Whether a text is the same, and how far it is from that, as cells of a table."""
    said = "是 yes" if place is None else "平局 tie" if tie else "否 no"
    return f"{said} | " + ("" if place is None else f"{place.gap:.3g} (token {place.step + 1})")


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
        print(f"  {number} | {_row(place, tie)} | {text[:SHOWN]!r}")
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


def parted_ids(found: Sequence[int], new: Sequence[int], logits: torch.Tensor) -> Parted | None:
    """Where the ids `found` leave the answer `new`, and by how much its best logit is above that of the id found.

    None where they are equal; inf where the found ids end before the answer does.
    """
    pairs = zip([*found, None], [*new, None], strict=False)
    step = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if step is None:
        return None
    best = float(logits[step].max())
    return Parted(step, best - float(logits[step][found[step]]) if step < len(found) else float("inf"))
