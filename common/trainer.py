"""Training: transformers' Trainer with the chunked loss, batches of like length, and guards."""

import math
import random
import signal
import time
from pathlib import Path

import numpy
import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from common import jsonl, run
from common import model as models
from common.config import world_size
from common.dataset import lengths_of
from common.errors import UserError
from common.loss import use_supervised_loss
from common.pieces import IGNORED

WINDOW = 50  # micro batches sorted by length together: little padding, yet another order every epoch


class Stopped(UserError):
    """A signal ended the training; a checkpoint was saved first."""

    def __init__(self, number, folder):
        super().__init__(
            f"收到信号 {signal.Signals(number).name}，检查点已保存 checkpoint saved in {folder}; "
            "the same command resumes"
        )
        self.exit_code = 128 + number


def fit(net, rows, cfg, tokenizer, checkpoint=None):
    """Train `net` on `rows` (dataset.Rows) as `cfg` says, from `checkpoint` where one is given.

    Returns {train_loss (nats a supervised token), train_runtime (seconds), tokens, steps, padding (share of a batch),
    …}. Raises UserError on a non-finite loss or gradient, or one that does not reach the adapter; Stopped on SIGTERM or
    Ctrl-C.
    """
    use_supervised_loss(net)
    pad_id = tokenizer.pad_token_id or 0  # any id will do: padding is masked by length, never by id
    plan = make_plan(cfg, len(rows.train))
    sampler = LengthGroupedSampler(lengths_of(rows.train), cfg.micro_batch_size * world_size(), cfg.seed)
    padding = sampler.padding()
    show_plan(cfg, plan, padding)
    folder = Path(cfg.model_save_dir)
    guard, recorder, stopper = Guard(folder), Recorder(folder), StopOnSignal()
    trainer = SupervisedTrainer(
        sampler,
        guard,
        model=net,
        args=_arguments(cfg, plan, bool(len(rows.validation))),
        data_collator=lambda batch: collate(batch, pad_id),
        train_dataset=rows.train.with_format("numpy"),
        eval_dataset=rows.validation.with_format("numpy") if len(rows.validation) else None,
        compute_metrics=_validation_loss,
        callbacks=[guard, stopper, recorder, WholeCheckpoints()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stopper.received:
        raise Stopped(stopper.received, folder)
    return recorder.summary() | {"padding": round(padding, 4)}


def make_plan(cfg, rows):
    """Steps of a run over `rows` training rows: {accumulation, steps_per_epoch, total_steps, warmup_steps}."""
    batches = math.ceil(rows / (cfg.micro_batch_size * world_size()))
    accumulation = min(cfg.accumulation, batches)
    steps_per_epoch = math.ceil(batches / accumulation)
    total = cfg.max_steps if cfg.max_steps > 0 else cfg.epochs * steps_per_epoch
    return {
        "accumulation": accumulation,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total,
        "warmup_steps": int(cfg.warmup_ratio * total),  # rounded down: the first of few steps must not have rate 0
    }


def show_plan(cfg, plan, padding):
    """Print what will be trained: batches, steps, padding."""
    print(
        f"计划 plan: 每步 batch {cfg.micro_batch_size} × {plan['accumulation']} × {world_size()} 进程 processes, "
        f"每轮 {plan['steps_per_epoch']} 步 steps per epoch, 共 {plan['total_steps']} 步 steps, "
        f"预热 warm-up {plan['warmup_steps']}, 填充 padding {padding:.1%}, 计损失 loss on {cfg.loss_on}"
    )


def _arguments(cfg, plan, validate):
    """Our knobs in today's names of transformers: the one place that maps them."""
    on_cpu = models.device().type == "cpu"
    args = TrainingArguments(
        output_dir=cfg.model_save_dir,
        per_device_train_batch_size=cfg.micro_batch_size,
        per_device_eval_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=plan["accumulation"],
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type=cfg.lr_scheduler_type
        if plan["warmup_steps"] == 0 or cfg.lr_scheduler_type != "constant"
        else "constant_with_warmup",
        warmup_steps=plan["warmup_steps"],
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        activation_checkpointing=cfg.gradient_checkpointing,
        bf16=models.resolve_dtype(cfg.dtype) == torch.bfloat16,
        fp16=models.resolve_dtype(cfg.dtype) == torch.float16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_steps=cfg.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would print 0.0 for NaN
        save_steps=cfg.save_steps,
        save_total_limit=cfg.save_total_limit,
        eval_strategy="steps" if validate else "no",
        eval_steps=cfg.save_steps,
        seed=cfg.seed,
        data_seed=cfg.seed,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several cards are used by torchrun, one process each, never by DataParallel
    return args


def collate(rows, pad_id):
    """A batch of rows, padded on the right by length: input_ids, attention_mask, labels [B, T], and where (names)."""
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    ids = torch.full(shape, pad_id)
    mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[number, :length] = torch.as_tensor(row["input_ids"])
        labels[number, :length] = torch.as_tensor(row["labels"])
        mask[number, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "where": [str(row["where"]) for row in rows]}


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Row numbers in batches of like length; the order depends on (seed, epoch) alone, so that a resume repeats it."""

    def __init__(self, lengths, batch, seed):
        self.lengths, self.batch, self.seed, self.epoch = numpy.asarray(lengths), batch, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        for batch in self.batches():
            yield from batch

    def batches(self):
        """Lists of row numbers, shuffled; a smaller one, if any, comes last."""
        order = numpy.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        window = self.batch * WINDOW
        found = []
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            rows = rows[numpy.argsort(-self.lengths[rows], kind="stable")]
            found += [rows[at : at + self.batch].tolist() for at in range(0, len(rows), self.batch)]
        smaller = [found.pop()] if found and len(found[-1]) < self.batch else []
        random.Random(self.seed + self.epoch).shuffle(found)
        return found + smaller

    def padding(self):
        """Share of the ids in an epoch that are padding."""
        width = sum(int(self.lengths[batch].max()) * len(batch) for batch in self.batches())
        return 1 - int(self.lengths.sum()) / width


class SupervisedTrainer(Trainer):
    """The Trainer with our sampler; it counts tokens and tells the guard which rows a loss came from."""

    def __init__(self, sampler, guard, **kwargs):
        self.sampler, self.guard, self.tokens = sampler, guard, 0
        super().__init__(**kwargs)

    def _get_train_sampler(self, train_dataset=None):
        return self.sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        where = inputs.pop("where")
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.tokens = self.tokens + inputs["attention_mask"].sum()  # a tensor: no waiting for the device
            self.guard.saw(result[0] if return_outputs else result, where)
        return result

    def floating_point_ops(self, inputs):
        return 0  # a count nobody reads, for which all parameters would be visited in every step

    def log(self, logs, start_time=None):
        if "loss" in logs:
            tokens = self.accelerator.reduce(torch.as_tensor(self.tokens, device=self.args.device), "sum")
            logs = {**logs, "tokens": int(tokens)}
        super().log(logs, start_time)


def _validation_loss(prediction):
    """Cross entropy over all supervised tokens of the validation rows, from each row's [sum, count]."""
    sums, counts = numpy.asarray(prediction.predictions).T
    return {"token_loss": float(sums.sum() / counts.sum())}


class Guard(TrainerCallback):
    """Stops before a step that would spoil the weights, or that would train nothing."""

    def __init__(self, folder):
        self.folder, self.losses, self.where, self.proven = folder, [], [], False

    def saw(self, loss, where):
        """Remember a micro batch of the step under way."""
        self.losses.append(loss.detach())
        self.where += where

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        sizes = [torch.nn.utils.get_total_norm(gradients)] if gradients else []
        if not torch.stack([torch.as_tensor(value).float().cpu() for value in [*self.losses, *sizes]]).isfinite().all():
            self._stop_non_finite(state.global_step + 1)
        if not self.proven:
            check_gradients(model)
            self.proven = True
        self.losses, self.where = [], []

    def _stop_non_finite(self, step):
        last = run.last_whole_checkpoint(self.folder)
        raise UserError(
            f"第 {step} 步的损失或梯度不是有限数 non-finite loss or gradient at step {step}; "
            f"losses {[round(float(loss), 4) for loss in self.losses]}; rows {', '.join(self.where[:8])}; "
            "remedy: --dtype float32 or bfloat16, a lower --learning_rate, look at these rows; "
            f"最近的检查点 last good checkpoint: {last or 'none'}"
        )


def check_gradients(model):
    """After the first backward pass: each trainable tensor that can has a gradient that is neither zero nor missing.

    lora_A has none while its lora_B is zero, as it is at the start. UserError names the others.
    """
    parameters = dict(model.named_parameters())
    dead = []
    for name, parameter in parameters.items():
        partner = parameters.get(name.replace("lora_A", "lora_B"))
        waits = "lora_A" in name and partner is not None and not partner.any()
        if parameter.requires_grad and not waits and (parameter.grad is None or not parameter.grad.any()):
            dead.append(name)
    if dead:
        raise UserError(
            f"{len(dead)} 个可训练参数没有梯度 trainable tensors got no gradient in the first step, e.g. {dead[0]}: "
            "they would never learn; is the adapter cut off from the loss (checkpointing over a frozen base)?"
        )


class StopOnSignal(TrainerCallback):
    """SIGTERM or Ctrl-C: finish the step, save a checkpoint, stop. A second signal ends at once."""

    def __init__(self):
        self.received, self.earlier = None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.earlier = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        print("\n收到信号，做完这一步就保存 finishing this step and saving; once more ends at once", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint as whole once all of it is written."""

    def on_save(self, args, state, control, **kwargs):
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
        }
        self.records.append(self.pending)
        self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, lr {logs['learning_rate']:.1e}, {speed:.0f} token/s")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.pending["eval_loss"] = metrics["eval_token_loss"]
        self.bar.write(f"第 {state.global_step} 步 step: 验证损失 validation loss {metrics['eval_token_loss']:.4f}")

    def on_save(self, args, state, control, **kwargs):
        self._flush(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._flush(state)
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
