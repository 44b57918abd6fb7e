"""One run of train.py's: LoRA training here, in TRL or in ms-swift, timed, in the process that calls it."""

import resource
import time
from itertools import pairwise
from pathlib import Path

from measure import MIB

OURS, OURS_CHECKPOINTING = "ours", "ours, checkpointing"
TRL, TRL_PLAIN, TRL_GROUPED = "trl", "trl, no checkpointing", "trl, grouped"
TRL_LIGER, TRL_OUR_BATCHES = "trl, Liger", "trl, our batches"
SWIFT, SWIFT_GROUPED, SWIFT_OUR_BATCHES = "swift", "swift, grouped", "swift, our batches"
RUNS = (TRL, OURS, TRL_PLAIN, OURS_CHECKPOINTING, TRL_GROUPED)
OTHERS = (TRL_LIGER, TRL_OUR_BATCHES, SWIFT, SWIFT_GROUPED, SWIFT_OUR_BATCHES)
MICRO, SEED = 4, 0
TARGETS = ("q_proj", "k_proj", "v_proj")
FAMILIES = {"gemma": "gemma_sft", "qwen": "qwen2_sft"}  # by the start of a config's model_type


def make_rows(count, vocabulary, length=None):
    """`count` rows of random ids: prompts of about 40, answers of about 60 ids, log-normal, at most 512 in all.

    Or all of one length, two fifths of it prompt.
    """
    import numpy

    rng, rows = numpy.random.default_rng(SEED), []
    for number in range(count):
        asked, answered = (max(4, min(256, int(rng.lognormal(numpy.log(m), 0.7)))) for m in (40, 60))
        if length:
            asked, answered = length * 2 // 5, length - length * 2 // 5
        ids = rng.integers(10, vocabulary, asked + answered).tolist()
        labels = [-100] * asked + ids[asked:]
        rows.append({"input_ids": ids, "labels": labels, "length": len(ids), "where": f"row {number}"})
    return rows


def train(which, args):
    """Train one epoch and say how fast: what a fresh process does."""
    rate = matrix_rate(args.dtype)
    net, rows, (seconds, losses, batches) = trained(which, args)
    tokens = sum(row["length"] for row in rows)
    supervised = sum(len(row["labels"]) - row["labels"].count(-100) for row in rows)
    width = sum(max(rows[number]["length"] for number in batch) * len(batch) for batch in batches)
    layers = sum(p.numel() for n, p in net.named_parameters() if "layers" in n and p.ndim == 2 and "lora" not in n)
    head = net.config.hidden_size * net.config.vocab_size
    work = 4 * (tokens * layers + supervised * head)  # forward, and the gradient of the inputs; attention left out
    rate = (rate + matrix_rate(args.dtype)) / 2
    return {
        "tokens_per_second": tokens / seconds,
        "supervised_per_second": supervised / seconds,
        "padding": 1 - tokens / width,
        "matrix_rate": rate,
        "share": work / seconds / 1e9 / rate,
        "peak_mib": peak_mib(),
        "losses": losses,
    }


def trained(which, args):
    """(net, rows, (seconds, loss of each step, batches)) of a run."""
    if which.startswith(SWIFT):
        from train_swift import train_swift

        rows = rows_of(which, args)
        net, *found = train_swift(which, rows, args)
        return net, rows, found
    from common.model import loading
    from common.training import tuning

    net = tuning.make_trainable(loading.load_base(args.folder, args.dtype), config(args, which))
    rows = rows_of(which, args)  # after the net, as in train.py: what a tokenizer lets go of is not in its way
    timed = train_ours if which.startswith(OURS) else train_trl
    return net, rows, timed(which, net, rows, args)


def rows_of(which, args):
    """The rows of a run: of the file, or random ids."""
    from transformers import AutoConfig

    if args.data:
        return read_rows(args, which)
    return make_rows(args.rows, AutoConfig.from_pretrained(args.folder).get_text_config().vocab_size, args.length)


def read_rows(args, which):
    """`args.rows` rows of the file, drawn by the seed, as train.py of the model's family makes ids of them."""
    import importlib

    from transformers import AutoConfig

    from common.data import dataset
    from common.model import loading

    kind = AutoConfig.from_pretrained(args.folder).model_type
    family = next((family for start, family in FAMILIES.items() if kind.startswith(start)), None)
    if family is None:
        raise SystemExit(f"{args.folder}: {kind}: --data takes models of {' '.join(FAMILIES)}")
    prompt, cfg = importlib.import_module(f"{family}.prompt"), config(args, which)
    return dataset.prepare(cfg, loading.load_tokenizer(args.folder, prompt), prompt).train.to_list()


def config(args, which):
    from gemma_sft.ft_gemma.config import Config

    return Config(
        path_model_pretrain=args.folder,
        data_path=(f"{args.data}#{args.rows}",) if args.data else (),
        val_set_size=0,
        model_save_dir=args.output_dir,
        target_modules=tuple(args.targets),
        dtype=args.dtype,
        micro_batch_size=MICRO,
        batch_size=MICRO,
        epochs=1,
        lora_dropout=0.0,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=10_000,
        gradient_checkpointing="true" if which == OURS_CHECKPOINTING else "auto",
        seed=SEED,
    )


def train_ours(which, net, rows, args):
    """(seconds, loss of each step, batches) of common/training/trainer.py."""
    from types import SimpleNamespace

    from datasets import Dataset

    from common import files
    from common.data.dataset import TrainingData
    from common.training.trainer import fit

    data = Dataset.from_list(rows)
    cfg = config(args, which)
    fit(net, TrainingData(data, data.select([]), [], [], []), cfg, SimpleNamespace(pad_token_id=0))
    log = files.read_jsonl(Path(args.output_dir) / "trainer_log.jsonl")
    return log[-1]["seconds"], [record["loss"] for record in log], our_sampler(rows, cfg).batches()


def our_sampler(rows, cfg):
    from common.training.batches import sampler_of

    return sampler_of([row["length"] for row in rows], cfg)


def train_trl(which, net, rows, args):
    """(seconds, loss of each step, batches) of TRL's SFTTrainer on the same ids."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class OurBatches(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return our_sampler(rows, config(args, which))

    settings = SFTConfig(
        output_dir=args.output_dir,
        per_device_train_batch_size=MICRO,
        num_train_epochs=1,
        learning_rate=config(args, which).learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=args.dtype == "bfloat16",
        completion_only_loss=True,
        seed=SEED,
        gradient_checkpointing=which == TRL,
        train_sampling_strategy="group_by_length" if which in (TRL_GROUPED, TRL_LIGER) else "random",
        use_liger_kernel=which == TRL_LIGER,
    )
    data = Dataset.from_list([{"input_ids": r["input_ids"], "completion_mask": mask_of(r)} for r in rows])
    make = OurBatches if which == TRL_OUR_BATCHES else SFTTrainer
    tokenizer = AutoTokenizer.from_pretrained(args.folder)  # it asks for one; the rows are ids already
    record = recorder()
    trainer = make(net, settings, train_dataset=data, processing_class=tokenizer, callbacks=[record])
    batches = [list(part) for part in trainer.get_train_dataloader().batch_sampler]
    trainer.train()
    return record.times[-1] - record.times[0], record.losses, batches


def recorder():
    """A callback of transformers' Trainer: when the training and the logs of its steps were (`times`), and `losses`."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        times, losses = [], []

        def on_train_begin(self, *_, **__):
            self.times.append(time.monotonic())

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                self.times.append(time.monotonic())
                self.losses.append(logs["loss"])

    return Recorder()


def mask_of(row):
    return [int(label != -100) for label in row["labels"]]


def matrix_rate(dtype):
    """GFLOP/s of a large matrix product in `dtype`, best of ten."""
    import torch

    from common.device import device

    kind = {"device": device(), "dtype": getattr(torch, dtype)}
    side = 1024 if kind["device"].type == "cpu" else 8192
    a, b = torch.randn(side, side, **kind), torch.randn(side, 4 * side, **kind)

    def product():
        a @ b
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    product()
    times = [time.perf_counter()]
    for _ in range(10):
        product()
        times.append(time.perf_counter())
    return 2 * 4 * side**3 / min(after - before for before, after in pairwise(times)) / 1e9


def peak_mib():
    """MiB this process used at most: of its card, or of the machine."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
