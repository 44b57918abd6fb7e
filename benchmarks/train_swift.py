"""One run of train.py's in ms-swift, timed, in the process that calls it, which has ms-swift's Python."""

import torch
from datasets import Dataset
from swift.arguments import SftArguments
from swift.pipelines import SwiftSft
from train_once import MICRO, SEED, SWIFT, SWIFT_GROUPED, SWIFT_OUR_BATCHES, config, our_sampler, recorder


class Swift(SwiftSft):
    """What `swift sft` calls, on rows that are ids already; it notes what the tables need."""

    def __init__(self, settings, rows):
        super().__init__(settings)
        self.rows = rows

    def _prepare_dataset(self):
        rows = [{"input_ids": r["input_ids"], "labels": r["labels"], "lengths": r["length"]} for r in self.rows]
        return [Dataset.from_list(rows), None]

    def prepare_model(self, *args, **kwargs):
        torch.manual_seed(SEED)  # as ours does, so that LoRA starts alike
        return super().prepare_model(*args, **kwargs)

    def train(self, trainer):
        self.record = recorder()
        trainer.add_callback(self.record)
        self.batches = list(trainer.get_train_dataloader().batch_sampler)
        return super().train(trainer)


def train_swift(which, rows, args):
    """(net, seconds, loss of each step, batches) of `swift sft` on the same ids."""
    cfg, ours = config(args, which), []
    if which == SWIFT_OUR_BATCHES:
        ours = our_sampler(rows, cfg).batches()
        rows = [rows[number] for batch in ours for number in batch]
    settings = SftArguments(
        model=args.folder,
        dataset=["none"],
        torch_dtype=args.dtype,
        attn_impl=None if which == SWIFT else "sdpa",
        tuner_type="lora",
        target_modules=list(args.targets),
        lora_rank=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=cfg.weight_decay,
        adam_beta2=cfg.adam_beta2,
        logging_steps=1,
        save_strategy="no",
        report_to=["none"],
        split_dataset_ratio=0.0,
        check_model=False,
        gradient_checkpointing=which == SWIFT,
        group_by_length=which == SWIFT_GROUPED,
        train_dataloader_shuffle=which != SWIFT_OUR_BATCHES,
        seed=SEED,
        output_dir=args.output_dir,
    )
    swift = Swift(settings, rows)
    swift.main()
    return swift.model, swift.record.times[-1] - swift.record.times[0], swift.record.losses, ours or swift.batches
