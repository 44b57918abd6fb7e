"""Training: transformers' Trainer with the chunked loss, batches of like length, and guards."""

import contextlib
import math
import random
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from common import jsonl, memory, packing, processes, run, tuning
from common import model as models
from common.dataset import lengths_of
from common.errors import UserError
from common.launch import world_size
from common.lean import make_lean
from common.loss import use_supervised_loss
from common.pieces import IGNORED

PARTNERS = {"lora_A": "lora_B", "lora_embedding_B": "lora_embedding_A"}  # {factor: the one that starts at zero}
PARTNER = re.compile("|".join(PARTNERS))
STALL, FALL, RISE = 10, 0.02, 0.1  # logged losses in a window; what counts as fallen, and as risen again, as shares
PROBE = 512  # ids of the longest row on which memory is tried
WINDOW = 50  # batches sorted by length together: little padding, yet another order every epoch
BLANK = -1  # number of a row that is none: it fills the last batch of an epoch, so that all processes have one


class Stopped(UserError):
    """A signal ended the training; a checkpoint was saved first."""

    everywhere = True

    def __init__(self, number, folder):
        super().__init__(
            f"收到信号 {signal.Signals(number).name}，检查点已保存 checkpoint saved in {folder}; "
            "the same command resumes"
        )
        self.exit_code = 128 + number


def fit(net, rows, cfg, tokenizer, checkpoint=None):
    """Train `net` on `rows` (dataset.Rows) as `cfg` says, from `checkpoint` where one is given.

    Returns {train_loss (nats a supervised token), train_runtime (seconds), tokens, steps, padding (share of a batch),
    …}. With `cfg.early_stopping_patience` the net ends as it was at its best validation loss, without it as it is after
    the last step. Raises UserError on a non-finite loss or gradient, or one that does not reach the adapter; Stopped on
    SIGTERM or Ctrl-C.
    """
    if cfg.early_stopping_patience and not len(rows.validation):
        raise UserError("--early_stopping_patience 需要验证数据 needs validation rows: --val_set_size above 0")
    use_supervised_loss(net, cfg.label_smoothing_factor)
    make_lean(net)
    data, lengths = training_data(net, rows.train, cfg)
    plan, sampler = make_plan(cfg, len(data)), sampler_of(lengths, cfg)
    padding = sampler.padding(cfg.micro_batch_size)
    show_plan(cfg, plan, padding)
    checkpointing = needs_checkpointing(cfg, net, rows, tokenizer, sampler)
    folder = Path(cfg.model_save_dir)
    recorder, stopper = Recorder(folder), StopOnSignal()
    callbacks = [stopper, recorder, StallWatch(), EarlyStop(cfg.early_stopping_patience), WholeCheckpoints()]
    args = arguments(cfg, plan, bool(len(rows.validation)), checkpointing)
    trainer = make_trainer(net, args, data, rows.validation, sampler, callbacks, tokenizer)
    with run.told_when_full(folder), contextlib.closing(recorder):
        _train(trainer, stopper, checkpoint)
    if stopper.received:
        raise Stopped(stopper.received, folder)
    trained, total = models.parameter_counts(net)
    tuning.settle(net, cfg)
    counts = {"padding": round(padding, 4), "trainable_params": trained, "all_params": total}
    return recorder.summary() | _best(trainer.state, cfg) | counts


class NothingLeft(Exception):
    """The checkpoint that a run was resumed from was its last."""


def _train(trainer, stopper, checkpoint):
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except NothingLeft:  # its weights are loaded; the Trainer would make one step more
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
    except RuntimeError:
        if stopper.received and processes.together():  # the launcher ends this process: another one has failed
            raise SystemExit(128 + stopper.received) from None
        raise
    finally:
        stopper.release()


def _best(state, cfg):
    """{best_step, best_eval_loss, adapter_of_step} of a finished training; {} where nothing was validated."""
    if state.best_global_step is None:
        return {}
    saved = state.best_global_step if cfg.early_stopping_patience else state.global_step
    return {"best_step": state.best_global_step, "best_eval_loss": state.best_metric, "adapter_of_step": saved}


def training_data(net, rows, cfg):
    """(what batches are made of, its lengths): rows, or packs proven on the first not to let rows see each other."""
    if not cfg.packing:
        return rows.with_format("numpy"), lengths_of(rows)
    capacity = cfg.max_length_q + cfg.max_length_a
    packs = packing.Packs(rows, capacity, cfg.seed)
    print(f"打包 packing: {len(rows)} 行 rows → {len(packs)} 个序列 sequences of {capacity} ids at most")
    packing.check_apart(net, packs, models.resolve_dtype(cfg.dtype))
    return packs, packs.lengths


def make_trainer(net, args, train, validation, sampler, callbacks, tokenizer):
    """The SupervisedTrainer over `train` in the sampler's order, its Guard before the other callbacks."""
    pad_id = tokenizer.pad_token_id or 0  # any id will do: padding is masked by length, never by id
    guard = Guard(Path(args.output_dir), net)
    trainer = SupervisedTrainer(
        sampler,
        guard,
        model=net,
        args=args,
        data_collator=lambda batch: collate(batch, pad_id),
        train_dataset=RowsAndBlanks(train),
        eval_dataset=validation.with_format("numpy") if len(validation) else None,
        compute_metrics=_validation_loss,
        callbacks=[guard, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    _keep_loss_exact(trainer)
    return trainer


def estimate_memory(net, rows, tokenizer, heaviest):
    """memory.Estimate of a step on `heaviest` (rows, length), tried on two pairs of shorter rows of `rows.train`."""
    lengths = lengths_of(rows.train)
    order = numpy.argsort(lengths, kind="stable")
    short = order[lengths[order] <= PROBE].tolist() or order[:1].tolist()
    pairs = [[short[0], short[len(short) // 4]], [short[0], short[-1]]]
    tried = [collate([rows.train[number] for number in pair], tokenizer.pad_token_id or 0) for pair in pairs]
    for batch in tried:
        del batch["where"], batch["tokens"]
    return memory.estimate(net, *tried, *heaviest)


def sampler_of(lengths, cfg):
    """The order in which a run of `cfg` takes rows of these lengths."""
    together = cfg.micro_batch_size * world_size() if world_size() > 1 else 1  # one process takes what is left
    return LengthGroupedSampler(lengths, cfg.batch_size, cfg.seed, together)


def _keep_loss_exact(trainer):
    """FSDP2 would hand the loss over as bf16, three digits of it, and add up the processes' gradients in bf16."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin and trainer.args.bf16:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


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
    split = f"{cfg.micro_batch_size} × {plan['accumulation']} × {processes.describe(cfg)}"
    print(
        f"计划 plan: 每步 batch {split} 进程 processes, "
        f"每轮 {plan['steps_per_epoch']} 步 steps per epoch, 共 {plan['total_steps']} 步 steps, "
        f"预热 warm-up {plan['warmup_steps']}, 填充 padding {padding:.1%}, 计损失 loss on {cfg.loss_on}"
    )


class StepMemory(NamedTuple):
    """What a step on the heaviest micro batch needs beside the model, what is free (bytes), and what follows."""

    estimate: memory.Estimate
    free: int
    checkpointing: bool  # activations are to be recomputed


def step_memory(cfg, net, rows, tokenizer, heaviest):
    """The StepMemory of `cfg`, `heaviest` the heaviest micro batch (rows, length); None where it cannot be tried."""
    if processes.shards_weights():
        return None
    estimate, free = estimate_memory(net.train(), rows, tokenizer, heaviest), memory.free()
    needed = estimate.total(False) > memory.SPARE * free
    asked = cfg.gradient_checkpointing
    return StepMemory(estimate, free, needed if asked == "auto" else asked == "true")


def needs_checkpointing(cfg, net, rows, tokenizer, sampler):
    """Whether activations are to be recomputed: what the knob says, or what the memory says, which is printed."""
    if cfg.gradient_checkpointing != "auto":
        return cfg.gradient_checkpointing == "true"
    found = step_memory(cfg, net, rows, tokenizer, sampler.shape(sampler.by_weight(cfg.micro_batch_size, 1)[-1]))
    if found is None:
        print("内存 memory: 参数分片 the weights are sharded and cannot be tried: gradient_checkpointing on (auto)")
        return True
    print(
        f"内存 memory: 最重的一步约需 the heaviest step needs about {memory.shown(found.estimate.total(False))} beside "
        f"the model ({memory.shown(found.estimate.total(True))} recomputing), 可用 free {memory.shown(found.free)}: "
        f"gradient_checkpointing {'on' if found.checkpointing else 'off'} (auto)"
    )
    return found.checkpointing


def arguments(cfg, plan, validate, checkpointing):
    """Our knobs in today's names of transformers, the one place that maps them.

    validate: score validation rows too. checkpointing: recompute activations.
    """
    on_cpu = models.device().type == "cpu"
    args = TrainingArguments(
        output_dir=cfg.model_save_dir,
        per_device_train_batch_size=cfg.micro_batch_size,
        per_device_eval_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=plan["accumulation"],
        num_train_epochs=cfg.epochs,
        max_steps=cfg.max_steps,
        learning_rate=cfg.learning_rate,
        **_schedule(cfg, plan),
        warmup_steps=plan["warmup_steps"],
        weight_decay=cfg.weight_decay,
        adam_beta1=cfg.adam_beta1,
        adam_beta2=cfg.adam_beta2,
        neftune_noise_alpha=cfg.neftune_noise_alpha or None,
        max_grad_norm=cfg.max_grad_norm,
        activation_checkpointing=checkpointing,
        bf16=models.resolve_dtype(cfg.dtype) == torch.bfloat16,
        fp16=models.resolve_dtype(cfg.dtype) == torch.float16,
        deepspeed=cfg.deepspeed or None,
        ddp_find_unused_parameters=False,  # there are none, and looking for them takes time
        use_cpu=on_cpu,
        dataloader_pin_memory=models.device().type == "cuda",
        logging_steps=cfg.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would print 0.0 for NaN
        save_steps=cfg.save_steps,
        save_total_limit=cfg.save_total_limit,
        eval_strategy="steps" if validate else "no",
        eval_steps=cfg.save_steps,
        metric_for_best_model="token_loss" if validate else None,  # its checkpoint is never deleted
        greater_is_better=False,
        load_best_model_at_end=validate and cfg.early_stopping_patience > 0,
        seed=cfg.seed,
        data_seed=cfg.seed,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to=list(cfg.report_to) or "none",
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # several cards are used by torchrun, one process each, never by DataParallel
    if on_cpu and processes.strategy(cfg) == "FSDP2":  # accelerate knows FSDP on cards only, and would copy the model
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return args


def _schedule(cfg, plan):
    """The learning rate's course as transformers' two arguments."""
    name = cfg.lr_scheduler_type
    if name == "constant" and plan["warmup_steps"]:
        name = "constant_with_warmup"
    shapes = {
        "cosine_with_restarts": {"num_cycles": cfg.epochs},
        "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "warmup_stable_decay": {"num_decay_steps": max(1, plan["total_steps"] // 10)},
    }
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": shapes.get(name, {})}


def collate(rows, pad_id):
    """A batch of rows, or of packs, padded on the right by length.

    Rows give input_ids and labels [B, T], tokens (neither padding nor blank ones), where (names). No attention mask:
    no row looks at what is right of it, and nothing is learnt from what pads give.
    """
    if isinstance(rows[0], list):
        return packing.collate(rows, pad_id)
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[number, :length] = torch.as_tensor(row["input_ids"])
        labels[number, :length] = torch.as_tensor(row["labels"])
    where = [str(row["where"]) for row in rows]
    tokens = sum(len(row["input_ids"]) for row, name in zip(rows, where, strict=True) if name)
    return {"input_ids": ids, "labels": labels, "tokens": tokens, "where": where}


class RowsAndBlanks(torch.utils.data.Dataset):
    """The rows, or packs, of `rows`; number BLANK is a row that is not counted: the first one, its labels ignored."""

    def __init__(self, rows):
        self.rows = rows
        self.blank = _blank(rows.__getitems__([0])[0])

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, numbers):
        kept = [number for number in numbers if number != BLANK]
        return (self.rows.__getitems__(kept) if kept else []) + [self.blank] * (len(numbers) - len(kept))


def _blank(row):
    """A row, or a pack's first one, as one that teaches nothing and has no name."""
    if isinstance(row, list):
        return [_blank(row[0])]
    return {"input_ids": row["input_ids"], "labels": [IGNORED] * len(row["input_ids"]), "where": ""}


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Row numbers in batches (of an optimizer step) of like length.

    The order depends on lengths, batch, seed and epoch alone: a resume repeats it, and so does another split into micro
    batches and processes. Blank rows at the end of an epoch make its rows a multiple of `multiple`.
    """

    def __init__(self, lengths, batch, seed, multiple=1):
        self.lengths, self.batch, self.seed, self.epoch = numpy.asarray(lengths), batch, seed, 0
        self.blanks = -len(self.lengths) % multiple

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths) + self.blanks

    def __iter__(self):
        for batch in self.batches():
            yield from batch
        yield from [BLANK] * self.blanks

    def batches(self):
        """Lists of row numbers, shuffled; the longest row's comes first, a smaller one, if any, last.

        So what does not fit into memory is seen at once, and a CPU's memory is taken once, not in pieces that grow.
        """
        order = numpy.random.default_rng((self.seed, self.epoch)).permutation(len(self.lengths))
        window = self.batch * WINDOW
        found = []
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            rows = rows[numpy.argsort(-self.lengths[rows], kind="stable")]
            found += [rows[at : at + self.batch].tolist() for at in range(0, len(rows), self.batch)]
        smaller = [found.pop()] if found and len(found[-1]) < self.batch else []
        random.Random(self.seed + self.epoch).shuffle(found)
        if found:
            longest = max(range(len(found)), key=lambda number: self.lengths[found[number][0]])
            found.insert(0, found.pop(longest))
        return found + smaller

    def by_weight(self, micro, passes):
        """Row numbers of the micro batches of so many passes, those of the fewest ids first, padding included."""
        found = []
        for self.epoch in range(passes):
            found += [batch[at : at + micro] for batch in self.batches() for at in range(0, len(batch), micro)]
        return sorted(found, key=self.ids_in)

    def shape(self, numbers):
        """(rows, length) of a batch of these rows."""
        return len(numbers), int(self.lengths[numbers].max())

    def ids_in(self, numbers):
        """Ids of a batch of these rows, padding included."""
        return math.prod(self.shape(numbers))

    def padding(self, micro):
        """Share of the ids in an epoch that are padding, `micro` rows in one forward pass."""
        parts = [batch[at : at + micro] for batch in self.batches() for at in range(0, len(batch), micro)]
        width = sum(int(self.lengths[part].max()) * len(part) for part in parts)
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
        where, tokens = inputs.pop("where"), inputs.pop("tokens")
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self.tokens += tokens
            self.guard.saw(result[0] if return_outputs else result, where)
        return result

    def _get_grad_norm(self, model, grad_norm=None):
        self.guard.norm = super()._get_grad_norm(model, grad_norm)
        return self.guard.norm

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
        if processes.largest(int(bad)):
            self._stop_non_finite(state.global_step + 1)
        if self.gradients:
            self.gradients.check()
            self.gradients = None
        self.losses, self.where = [], []

    def _stop_non_finite(self, step):
        """UserError naming the rows: those of the processes that have such a loss, or of all where only the norm is."""
        found = processes.gather(([round(float(loss), 4) for loss in self.losses], self.where))
        bad = [(losses, rows) for losses, rows in found if not numpy.isfinite(losses).all()] or found
        rows = [row for _, rows in bad for row in rows if row]

        def say():
            raise UserError(
                f"第 {step} 步的损失或梯度不是有限数 non-finite loss or gradient at step {step}; "
                f"losses {[loss for losses, _ in bad for loss in losses]}; rows {', '.join(rows[:8])}; "
                "remedy: --dtype float32 or bfloat16, a lower --learning_rate, look at these rows; "
                f"最近的检查点 last good checkpoint: {run.last_whole_checkpoint(self.folder) or 'none'}"
            )

        processes.first(say)


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
        reached = self.waiting.union(*processes.gather(self.reached))
        dead = [name for name in trained if name not in reached]
        if dead:
            raise UserError(
                f"{len(dead)} 个可训练参数没有梯度 trainable tensors got no gradient in the first step, "
                f"e.g. {dead[0]}: they would never learn; is the adapter cut off from the loss "
                "(checkpointing over a frozen base)?"
            )


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
        if self.received and not processes.together():
            raise KeyboardInterrupt
        self.received = number
        if not processes.together():
            print("\n收到信号，做完这一步就保存 finishing this step and saving; once more ends at once", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        received = processes.largest(self.received or 0)
        if received:
            self.received = received
            control.should_save = control.should_training_stop = True

    def release(self):
        """Give the signals back to those who had them."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)


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
        processes.wait()
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
