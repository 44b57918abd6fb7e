"""What watches a training: guards that stop it, signals, early stopping, checkpoints marked as whole, the log."""

import re
import signal
import time
from pathlib import Path

import numpy
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from common import distributed, jsonl
from common.errors import UserError
from common.runs import run
from common.training import memory

PARTNERS = {"lora_A": "lora_B", "lora_embedding_B": "lora_embedding_A"}  # {factor: the one that starts at zero}
PARTNER = re.compile("|".join(PARTNERS))
STALL, FALL, RISE = 10, 0.02, 0.1  # logged losses in a window; what counts as fallen, and as risen again, as shares


class Guard(TrainerCallback):
    """Stops before a step that would spoil what is saved, or that would train nothing."""

    def __init__(self, folder, net):
        self.folder, self.losses, self.where, self.norm = folder, [], [], None
        self.gradients = Gradients(net)

    def saw(self, loss, where):
        """Remember a micro batch of the step under way."""
        self.losses.append(loss.detach())
        self.where += where

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        numbers = torch.stack([torch.as_tensor(value).float().cpu() for value in [*self.losses, self.norm]])
        bad = not numbers.isfinite().all() or numbers[-1] < 0  # DeepSpeed's norm is -1 where it is not finite
        if distributed.largest(int(bad)):
            self._stop_non_finite(state.global_step + 1)
        if self.gradients:
            self.gradients.check()
            self.gradients = None
        self.losses, self.where = [], []

    def _stop_non_finite(self, step):
        """UserError naming the rows: those of the processes that have such a loss, or of all where only the norm is."""
        found = distributed.gather(([round(float(loss), 4) for loss in self.losses], self.where))
        bad = [(losses, rows) for losses, rows in found if not numpy.isfinite(losses).all()] or found
        rows = [row for _, rows in bad for row in rows if row]

        def say():
            raise UserError(
                f"第 {step} 步的损失或梯度不是有限数 non-finite loss or gradient at step {step}; "
                f"losses {[loss for losses, _ in bad for loss in losses]}; rows {', '.join(rows[:8])}; "
                "remedy: --dtype float32 or bfloat16, a lower --learning_rate, look at these rows; "
                f"最近的检查点 last good checkpoint: {run.last_whole_checkpoint(self.folder) or 'none'}"
            )

        distributed.first(say)


class Gradients:
    """Which trainable tensors of `net` got a gradient that is not zero in the first step, whoever keeps it.

    DeepSpeed takes gradients away before the step, so hooks see them; FSDP2's do not pass by hooks, but stay.
    """

    def __init__(self, net):
        self.net, self.reached, trained = net, set(), self._trained(net)
        partners = {name: trained.get(PARTNER.sub(lambda found: PARTNERS[found[0]], name)) for name in trained}
        self.waiting = {  # one factor of a LoRA layer has no gradient while the other is zero, as it is at the start
            name
            for name, partner in partners.items()
            if partner is not None and partner is not trained[name] and not partner.any()
        }
        self.hooks = [p.register_hook(self._hook(name)) for name, p in trained.items()]

    @staticmethod
    def _trained(net):
        return {name: p for name, p in net.named_parameters() if p.requires_grad}

    def _hook(self, name):
        def see(gradient):
            if gradient.any():
                self.reached.add(name)

        return see

    def check(self):
        """UserError naming the tensors that no process saw a gradient for."""
        trained = self._trained(self.net)  # FSDP2 has put others in the place of those at the start
        for name, parameter in trained.items():
            gradient = parameter.grad
            if gradient is not None and getattr(gradient, "_local_tensor", gradient).any():
                self.reached.add(name)
        for hook in self.hooks:
            hook.remove()
        reached = self.waiting.union(*distributed.gather(self.reached))
        dead = [name for name in trained if name not in reached]
        if dead:
            raise UserError(
                f"{len(dead)} 个可训练参数没有梯度 trainable tensors got no gradient in the first step, "
                f"e.g. {dead[0]}: they would never learn; is the adapter cut off from the loss "
                "(checkpointing over a frozen base)?"
            )


class Stopped(UserError):
    """A signal ended the training; a checkpoint was saved first."""

    everywhere = True

    def __init__(self, number, folder):
        super().__init__(
            f"收到信号 {signal.Signals(number).name}，检查点已保存 checkpoint saved in {folder}; "
            "the same command resumes"
        )
        self.exit_code = 128 + number


class StopOnSignal(TrainerCallback):
    """SIGTERM or Ctrl-C: finish the step, save a checkpoint, stop. A second signal ends at once.

    All processes stop together after the step in which one of them was told to. There a second signal is none: a
    launcher hands on what the terminal has already sent to all, and ends them itself when they take too long.
    """

    def __init__(self):
        self.received, self.earlier = None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.earlier = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number, frame):
        if self.received and not distributed.together():
            raise KeyboardInterrupt
        self.received = number
        if not distributed.together():
            print("\n收到信号，做完这一步就保存 finishing this step and saving; once more ends at once", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        received = distributed.largest(self.received or 0)
        if received:
            self.received = received
            control.should_save = control.should_training_stop = True

    def release(self):
        """Give the signals back to those who had them."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


class NothingLeft(Exception):
    """The checkpoint that a run was resumed from was its last."""


class EarlyStop(TrainerCallback):
    """Stops when `patience` validation losses in a row were no new best; 0 never does. A resume counts on.

    Raises NothingLeft where the run that is resumed has stopped so, or has made its last step.
    """

    def __init__(self, patience):
        self.patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps or self._over(_validation_losses(state)):
            raise NothingLeft

    def on_evaluate(self, args, state, control, **kwargs):
        losses = _validation_losses(state)
        if self._over(losses):
            control.should_training_stop = control.should_save = True
            print(
                f"\n验证损失没有变好，提前停止 early stop: no new best in {self.patience} validations; "
                f"best {min(losses):.4f}, now {losses[-1]:.4f}"
            )

    def _over(self, losses):
        return bool(self.patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience


def _validation_losses(state):
    return [record["eval_token_loss"] for record in state.log_history if "eval_token_loss" in record]


class StallWatch(TrainerCallback):
    """Says, once, that the loss does not fall, or rises again, and why that usually is."""

    def __init__(self):
        self.losses, self.told = [], False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or self.told or not state.is_world_process_zero:
            return
        self.losses.append(logs["loss"])
        if len(self.losses) < 2 * STALL:
            return
        first, last = (sum(part) / STALL for part in (self.losses[:STALL], self.losses[-STALL:]))
        best = min(sum(self.losses[n : n + STALL]) / STALL for n in range(len(self.losses) - STALL + 1))
        if last > (1 - FALL) * first or last > (1 + RISE) * best:
            self.told = True
            print(
                f"\n第 {state.global_step} 步，损失没有下降 the loss is not falling: at first {first:.4f}, "
                f"best {best:.4f}, last {last:.4f} (means of {STALL} logged losses); likely causes: --learning_rate "
                f"(now {logs['learning_rate']:.1e}) too small or too large, answers that do not follow from questions, "
                "too few --target_modules or too small a --lora_r, data the base already knows"
            )


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint as whole once all of it is written, by all processes."""

    def on_save(self, args, state, control, **kwargs):
        distributed.wait()
        if state.is_world_process_zero:
            run.mark_whole(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class Recorder(TrainerCallback):
    """The progress bar, and trainer_log.jsonl: one object a logged step."""

    def __init__(self, folder):
        self.path, self.records, self.pending, self.bar = folder / "trainer_log.jsonl", [], None, None

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the lines up to the step resumed from; those after it are made again."""
        if state.global_step and self.path.exists():
            self.records = [record for record in jsonl.read(self.path) if record["step"] <= state.global_step]
        last = self.records[-1] if self.records else {"tokens": 0, "seconds": 0.0}
        self.tokens, self.seconds, self.started = last["tokens"], last["seconds"], time.monotonic()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="训练 training", unit="step")
        if state.is_world_process_zero:
            jsonl.write(self.path, self.records)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)
        control.should_log |= control.should_save or control.should_evaluate

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        seconds = self.seconds + time.monotonic() - self.started
        tokens = self.tokens + logs["tokens"]
        last = self.records[-1] if self.records else {"tokens": 0, "seconds": 0.0}
        speed = (tokens - last["tokens"]) / max(seconds - last["seconds"], 1e-9)
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
        self.records.append(self.pending)
        used = memory.shown(memory.used())
        self.bar.set_postfix_str(
            f"loss {logs['loss']:.4f}, lr {logs['learning_rate']:.1e}, {speed:.0f} token/s, {used}"
        )

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.pending["eval_loss"] = metrics["eval_token_loss"]
        self.bar.write(f"第 {state.global_step} 步 step: 验证损失 validation loss {metrics['eval_token_loss']:.4f}")

    def on_save(self, args, state, control, **kwargs):
        self._flush(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._flush(state)

    def close(self):
        """End the bar's line, also after an error."""
        if self.bar is not None:
            self.bar.close()

    def _flush(self, state):
        if self.pending and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(jsonl.line_of(self.pending))
        self.pending = None

    def summary(self):
        """{train_loss, train_runtime, tokens, tokens_per_second, steps} of the whole run, resumed parts included."""
        steps = [0] + [record["step"] for record in self.records]
        losses = [
            record["loss"] * (now - before) for record, before, now in zip(self.records, steps, steps[1:], strict=False)
        ]
        last = self.records[-1]
        return {
            "train_loss": sum(losses) / last["step"],
            "train_runtime": last["seconds"],
            "tokens": last["tokens"],
            "tokens_per_second": round(last["tokens"] / last["seconds"], 1),
            "steps": last["step"],
        } | ({"eval_loss": last["eval_loss"]} if "eval_loss" in last else {})
