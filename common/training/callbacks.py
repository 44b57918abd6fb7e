"""What watches a training: signals, early stopping, checkpoints marked as whole, other processes, the log."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import TrainerCallback

from common import distributed, files
from common.errors import UserError
from common.runs import checkpoints
from common.training import curve, memory

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

SHARES = {"eval_stopped": "自行停止的回答 answers that stop", "eval_looping": "重复的 that loop"}  # of sampled rows


class StoppedError(UserError):
    """A signal ended the training; a checkpoint was saved first."""

    everywhere = True

    def __init__(self, number: int, folder: Path) -> None:
        super().__init__(
            f"收到信号 {signal.Signals(number).name}，检查点已保存 checkpoint saved in {folder}; "
            "the same command resumes"
        )
        self.exit_code = 128 + number


class StopOnSignal(TrainerCallback):
    """SIGTERM or Ctrl-C: finish the step, save a checkpoint, stop. A second signal ends at once.

    Of several processes all stop after the step in which one of them got the signal. There a second signal is ignored:
    the launcher passes on a Ctrl-C that each process has already got from the terminal, and ends slow ones itself.
    """

    def __init__(self) -> None:
        self.received = 0  # number of the signal that came; 0: none
        self.earlier: dict[int, Any] = {}  # {signal: its handler before}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.earlier = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and not distributed.together():
            raise KeyboardInterrupt
        self.received = number
        if not distributed.together():
            print("\n收到信号，做完这一步就保存 finishing this step and saving; once more ends at once", flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        received = distributed.largest(self.received)
        if received:
            self.received = received
            control.should_save = control.should_training_stop = True

    def release(self) -> None:
        """Give the signals back to the handlers they had before."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


class NothingLeftError(Exception):
    """The checkpoint that a run was resumed from was its last."""


class EarlyStop(TrainerCallback):
    """Stops when `patience` validation losses in a row were no new best; with 0 it never does.

    The losses of before a resume count too; where the best checkpoint of before is gone, the best one from there on is
    kept. Raises NothingLeftError where the run that is resumed had stopped early, or has made its last step.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        found = [state.best_model_checkpoint, Path(args.output_dir) / f"checkpoint-{state.best_global_step}"]
        if self.patience and state.best_global_step and not any(path and Path(path).is_dir() for path in found):
            print(
                f"最好的检查点不在了 the best checkpoint so far, of step {state.best_global_step}, is gone: "
                "the best one from here on is kept"
            )
            state.best_global_step = state.best_metric = state.best_model_checkpoint = None
        if state.global_step >= state.max_steps or self._over(_validation_losses(state)):
            raise NothingLeftError

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        losses = _validation_losses(state)
        if self._over(losses):
            control.should_training_stop = control.should_save = True
            print(
                f"\n验证损失没有变好，提前停止 early stop: no new best in {self.patience} validations; "
                f"best {min(losses):.4f}, now {losses[-1]:.4f}"
            )

    def _over(self, losses: list[float]) -> bool:
        return bool(self.patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience


def _validation_losses(state: TrainerState) -> list[float]:
    return [record["eval_token_loss"] for record in state.log_history if "eval_token_loss" in record]


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint as whole once all of it is written, by all processes."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        distributed.wait()
        if state.is_world_process_zero:
            checkpoints.mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class Recorder(TrainerCallback):
    """The progress bar, and trainer_log.jsonl: one object a logged step."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trainer_log.jsonl"
        self.records: list[dict[str, Any]] = []  # all lines of the log
        self.pending: dict[str, Any] | None = None  # the last of them, until it is in the file: a validation adds to it
        self.bar = tqdm(disable=True)  # until the number of steps is known
        self.tokens = 0  # of the parts before a resume
        self.seconds = 0.0  # of the parts before a resume
        self.started = 0.0
        self.logged = 0.0  # when the last line was made, or what came after it was done
        self.aside = 0.0  # seconds of validations and checkpoints after the last line

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step resumed from; those after it are made again."""
        if state.global_step and self.path.exists():
            self.records = [record for record in files.read_jsonl(self.path) if record["step"] <= state.global_step]
        last: dict[str, Any] = self.records[-1] if self.records else {"tokens": 0, "seconds": 0.0}
        self.tokens = last["tokens"]
        self.seconds = last["seconds"]
        self.started = time.monotonic()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="训练 training", unit="step")
        if state.is_world_process_zero:
            files.write_jsonl(self.path, self.records)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(1)
        control.should_log |= control.should_save or control.should_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs:
            return
        self.logged = time.monotonic()
        seconds = self.seconds + self.logged - self.started
        tokens = self.tokens + logs["tokens"]
        last = self.records[-1] if self.records else {"tokens": 0, "seconds": 0.0}
        speed = (tokens - last["tokens"]) / max(seconds - last["seconds"] - self.aside, 1e-9)
        self.aside = 0.0
        self._flush(state)
        self.pending = {
            "step": state.global_step,
            "epoch": round(state.epoch, 4),
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": tokens,
            "tokens_per_second": round(speed, 1),
            "seconds": round(seconds, 3),
            "memory_mib": memory.used() // memory.MIB,
        }
        if "router_loss" in logs:
            self.pending["router_loss"] = logs["router_loss"]  # part of the loss; the rest is cross entropy
        self.records.append(self.pending)
        used = memory.shown(memory.used())
        self.bar.set_postfix_str(
            f"loss {logs['loss']:.4f}, lr {logs['learning_rate']:.1e}, {speed:.0f} token/s, {used}"
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        shares = {name: metrics[name] for name in SHARES if name in metrics}
        self.records[-1] |= {"eval_loss": metrics["eval_token_loss"], **shares}
        self._set_aside()
        self._flush(state)
        if state.is_world_process_zero:
            curve.draw(self.path.parent)
        self.bar.write(
            f"第 {state.global_step} 步 step: 验证损失 validation loss {metrics['eval_token_loss']:.4f}"
            + "".join(f", {SHARES[name]} {share:.0%}" for name, share in shares.items())
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set_aside()
        self._flush(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._flush(state)

    def close(self) -> None:
        """End the bar's line, also after an error."""
        self.bar.close()

    def _set_aside(self) -> None:
        """What took time since the last line is no training."""
        now = time.monotonic()
        self.aside, self.logged = self.aside + now - self.logged, now

    def _flush(self, state: TrainerState) -> None:
        if self.pending and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(files.line_of(self.pending))
        self.pending = None

    def summary(self) -> dict[str, Any]:
        """{train_loss, train_runtime, tokens, tokens_per_second, steps} of the whole run, resumed parts included.

        The speed is that of training, the runtime with validations and checkpoints.
        """
        pairs = list(zip([{"step": 0, "tokens": 0}, *self.records], self.records, strict=False))
        losses = [record["loss"] * (record["step"] - before["step"]) for before, record in pairs]
        seconds = [
            (record["tokens"] - before["tokens"]) / max(record["tokens_per_second"], 0.1) for before, record in pairs
        ]
        last = self.records[-1]
        return {
            "train_loss": sum(losses) / last["step"],
            "train_runtime": last["seconds"],
            "tokens": last["tokens"],
            "tokens_per_second": round(last["tokens"] / sum(seconds), 1),
            "steps": last["step"],
        } | {name: last[name] for name in ("eval_loss", *SHARES) if name in last}
