"""A run's folder: started or resumed under a lock, saved into, and marked as finished."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from common import distributed, files
from common.config import SFTConfig
from common.errors import UserError
from common.files import write_json
from common.knobs import FREE, SHAPING
from common.launch import rank
from common.model import verify
from common.model.adapter import saved_alone
from common.runs.checkpoints import by_step, is_whole, last_whole_checkpoint, step_of
from common.runs.lineage import generations
from common.runs.manifest import MANIFEST, describe, read_manifest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.conversation.family import Family
    from common.data.dataset import TrainingData

DRAFT = "adapter.part"
CARRIED = ("trainer_log.jsonl", "samples.jsonl", "pissa_start.safetensors")  # of a run that goes on from a checkpoint
DISK_FULL = re.compile(
    "No space left|File too large|Disk quota|os error (27|28|122)|PytorchStreamWriter|unexpected pos"
)


class Run(NamedTuple):
    """A run under way: its folder, its manifest, the lock that keeps others out, and where to go on from.

    Only the first of several processes has the lock and writes.
    """

    folder: Path
    manifest: dict[str, Any]
    lock: FileLock | None
    checkpoint: Path | None


def start(
    cfg: SFTConfig,
    resume: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Family,
    rows: TrainingData,
    resume_anyway: bool = False,
    parent: Path | None = None,
) -> Run:
    """Open the run's folder for this run alone and write its manifest and rejected.jsonl: the Run.

    resume: "auto" goes on from the last whole checkpoint of an unfinished run; "never" starts anew; or a checkpoint's
    folder. An earlier run's files are moved aside, never overwritten. UserError where the data or options differ from
    the run to be resumed (except with resume_anyway, where they fit its weights), or another process trains into the
    folder. parent: folder of the adapter that the run starts from.
    """
    folder, manifest = Path(cfg.model_save_dir), describe(cfg, tokenizer, prompt, rows)
    if parent:
        manifest["lineage"] = generations(parent, cfg.base, prompt)
    opened = distributed.first(lambda: _open(folder, manifest, resume, rows, resume_anyway))
    lock, checkpoint = opened or (None, None)
    return Run(folder, _seen_by_all(folder, manifest), lock, distributed.share(checkpoint))


def _open(
    folder: Path, manifest: dict[str, Any], resume: str, rows: TrainingData, resume_anyway: bool
) -> tuple[FileLock, Path | None]:
    """(lock, checkpoint to go on from or None), the folder being ready to be written to."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder}: 另一个训练正在写入 another run is writing here; give another --model_save_dir"
        ) from None
    try:
        if resume in ("auto", "never"):
            checkpoint = _checkpoint_in(folder, manifest, resume, resume_anyway)
        else:
            checkpoint = _chosen_checkpoint(Path(resume), manifest, resume_anyway)
            _go_back(folder, checkpoint)
    except UserError:
        lock.release()
        raise
    write_json(folder / MANIFEST, manifest)
    files.write_jsonl(folder / "rejected.jsonl", (row._asdict() for row in rows.rejected))
    return lock, checkpoint


def _seen_by_all(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The first process's manifest; UserError in a process that does not find it in its own `folder`."""
    written = distributed.share(manifest)
    if (read_manifest(folder) or {}).get("started") != written["started"]:
        raise UserError(
            f"{folder}: 各机器看到的不是同一个文件夹 not one folder for all machines; put it on a shared disk"
        )
    return written


def save_tuned(net: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save adapter or whole model, and tokenizer, into `folder`; check them; each file appears whole or not at all.

    All processes call it, the first one writes.
    """
    state = verify.whole_state(net) if distributed.is_sharded(net) else None
    if rank():
        return
    draft = Path(folder) / DRAFT
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed here
    with saved_alone(net):
        net.save_pretrained(draft, **({"state_dict": state} if state else {}))
    files.share_weights(draft)
    check = verify.verify_adapter if hasattr(net, "peft_config") else verify.verify_whole
    check(net, draft, state)
    tokenizer.save_pretrained(draft)
    for file in draft.iterdir():
        os.replace(file, Path(folder) / file.name)
    draft.rmdir()


@contextlib.contextmanager
def told_when_full(folder: str | Path) -> Iterator[None]:
    """UserError of one line where writing into `folder` fails because the disk is full; what is half written goes."""
    try:
        yield
    except Exception as problem:  # safetensors and torch raise errors of their own for a failed write
        if isinstance(problem, UserError) or not DISK_FULL.search(f"{problem} {problem.__context__}"):
            raise
        last = None
        if rank() == 0:
            shutil.rmtree(Path(folder) / DRAFT, ignore_errors=True)
            last = last_whole_checkpoint(folder)
        reason = " ".join(str(problem).split())[:120]
        raise UserError(
            f"{folder}: 写不下了，磁盘已满？ cannot be written, the disk is full? ({reason}); "
            f"最近的检查点 last good checkpoint: {last or 'none'}; make room, then the same command resumes"
        ) from None


def finish(work: Run, results: dict[str, Any]) -> None:
    """Mark the run as finished: from now on predict, evaluation and service take its adapter."""
    write_json(work.folder / MANIFEST, work.manifest | {"results": results, "state": "finished"})


def _checkpoint_in(folder: Path, manifest: dict[str, Any], resume: str, anyway: bool) -> Path | None:
    """The checkpoint an unfinished run in `folder` goes on from; None for a fresh start, earlier files moved aside."""
    earlier = read_manifest(folder)
    checkpoint = last_whole_checkpoint(folder) if earlier and earlier["state"] == "training" else None
    if resume == "auto" and checkpoint and earlier:
        _check_same(earlier, manifest, checkpoint, anyway)
        print(f"从检查点继续 resuming from {checkpoint}")
        return checkpoint
    if earlier or any(folder.glob("checkpoint-*")):  # without a manifest: a run that was killed while moved aside
        _move_aside(folder)
    return None


def _chosen_checkpoint(checkpoint: Path, manifest: dict[str, Any], anyway: bool) -> Path:
    """The checkpoint that --resume names; UserError where it is not whole, or of a run that differs."""
    if not is_whole(checkpoint):
        raise UserError(f"--resume {checkpoint}: 不是完整的检查点 not a whole checkpoint")
    earlier = read_manifest(checkpoint.parent)
    if earlier:
        _check_same(earlier, manifest, checkpoint, anyway)
    return checkpoint


def _go_back(folder: Path, checkpoint: Path) -> None:
    """Leave in `folder` what its run had by `checkpoint`; what came later, or is another run's, is moved aside.

    Else a later checkpoint of the earlier run would be taken for the newest of this one.
    """
    source, found, earlier = checkpoint.resolve().parent, by_step(folder), read_manifest(folder)
    own, last = source == folder.resolve(), step_of(checkpoint) or 0
    kept = {checkpoint.name, *(path.name for step, path in found.items() if step <= last)} if own else set()
    state = earlier["state"] if earlier else ""
    if state == "finished" or (state and not own) or any(path.name not in kept for path in found.values()):
        aside = _move_aside(folder, kept)
        source = aside if own else source
    for name in CARRIED:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def _check_same(earlier: dict[str, Any], manifest: dict[str, Any], checkpoint: Path, anyway: bool) -> None:
    """UserError naming what differs between the run that wrote `checkpoint` and the one that would go on from it.

    anyway: what differs is printed and kept in the manifest instead, unless the weights could not be loaded.
    """
    old, new = _flat(earlier), _flat(json.loads(json.dumps(manifest)))
    changed = {
        name: f"{old.get(name)} → {new.get(name)}" for name in sorted(old | new) if old.get(name) != new.get(name)
    }
    told = "; ".join(f"{name}: {values}" for name, values in changed.items())
    unloadable = changed.keys() & (SHAPING | {"base", "adapter_name_or_path"})
    if ever := _joined(earlier.get("resumed_anyway", {}), changed):
        manifest["resumed_anyway"] = ever
    if anyway and changed and not unloadable:
        print(f"照样继续 resuming although data or options differ: {told}")
    elif changed:
        way_out = "" if unloadable else "--resume_anyway 照样继续 resumes all the same, "
        raise UserError(
            f"{checkpoint}: 数据或参数变了 data or options differ from that run ({told}); "
            f"{way_out}--resume never 重新开始 starts anew and keeps the old files"
        )


def _joined(earlier: dict[str, str], changed: dict[str, str]) -> dict[str, str]:
    """All changes of a run that was resumed more than once, in their order, by what was changed."""
    both = sorted(earlier.keys() | changed.keys())
    return {name: "; ".join(one[name] for one in (earlier, changed) if name in one) for name in both}


def _flat(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a resume, as one flat dict."""
    of_old = {"optim": SFTConfig.optim, "thinking": SFTConfig.thinking}  # of runs from before there was a choice
    knobs = {name: value for name, value in (of_old | manifest["config"]).items() if name not in FREE}
    files_read = [f"{Path(source['path']).name} {source['sha256'][:12]}" for source in manifest["data"]]
    data = {f"data {number}": file for number, file in enumerate(files_read)}
    base, tokenizer, template = manifest["base"], manifest["tokenizer_sha256"], manifest["template"]["sha256"]
    shared = {"processes": manifest.get("processes", "1")}
    if "lineage" in manifest:
        shared["adapter_name_or_path"] = manifest["lineage"][-1]["sha256"]
    return knobs | data | shared | {"base": base, "tokenizer": tokenizer, "template": template}


def _move_aside(folder: Path, kept: Collection[str] = ()) -> Path:
    """Move an earlier run's files, those named `kept` left out, into the first free of folder.1, folder.2, …: where."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    aside.mkdir()
    for file in sorted(folder.iterdir(), key=lambda file: file.name == MANIFEST):  # it says what the others are: last
        if file.name not in {".lock", *kept}:
            file.rename(aside / file.name)
    print(f"旧的训练结果移到 the earlier run is kept in {aside}")
    return aside
