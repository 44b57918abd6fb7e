"""LoRA training here and in TRL's SFTTrainer: the same random model, rows and precision, in turn, in fresh processes.

python benchmarks/train.py                                    # both models, five rounds, the tables of README.md
python benchmarks/train.py --model head --rounds 1 --rows 16  # a quick look
python benchmarks/train.py --curves                           # the loss of every step on the same batches
python benchmarks/train.py --model 2b --length 1024 --dtype bfloat16 --runs "trl, grouped" "trl, Liger" ours   # a GPU

ours                  common/training/trainer.py as train.py calls it
ours, checkpointing   the same with --gradient_checkpointing
trl                   SFTTrainer at its defaults
trl, no checkpointing the same without checkpointing
trl, grouped          without checkpointing, with batches grouped by length
trl, Liger            that with Liger's kernels, which need a GPU
trl, our batches      without checkpointing, on the very batches ours takes (--curves)

All: loss on the answers only, micro batch 4, LoRA r 16 on q/k/v, AdamW, no dropout, the same --dtype. Packing is left
out: without FlashAttention, TRL's packed rows would see each other.
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from measure import MIB, ROOT, machine, run, table

MODELS = {
    "quarter": dict(hidden_size=512, num_hidden_layers=18, intermediate_size=4096, vocab_size=64_000),
    "head": dict(hidden_size=256, num_hidden_layers=4, intermediate_size=2048, vocab_size=256_000),
    "2b": dict(hidden_size=2048, num_hidden_layers=18, intermediate_size=16_384, vocab_size=256_000),  # for a GPU
    "small": dict(hidden_size=64, num_hidden_layers=2, intermediate_size=128, vocab_size=2_000),  # to try this script
}
OURS, OURS_CHECKPOINTING = "ours", "ours, checkpointing"
TRL, TRL_PLAIN, TRL_GROUPED = "trl", "trl, no checkpointing", "trl, grouped"
TRL_LIGER, TRL_OUR_BATCHES = "trl, Liger", "trl, our batches"
RUNS = (TRL, OURS, TRL_PLAIN, OURS_CHECKPOINTING, TRL_GROUPED)
OTHERS = (TRL_LIGER, TRL_OUR_BATCHES)
MICRO, SEED = 4, 0


def main():
    args = arguments()
    if args.one:
        print(json.dumps(train(args.one, args)))
        return
    print(machine())
    for name in [args.model] if args.model else ("quarter", "head"):
        with tempfile.TemporaryDirectory() as folder:
            make_model(MODELS[name], folder)
            if args.curves:
                compare_curves(name, folder, args)
            else:
                compare_speed(name, folder, args)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="one of the models")
    parser.add_argument("--rounds", type=int, default=5, help="times each run is made, in turn")
    parser.add_argument("--rows", type=int, default=128, help="rows trained on in a run")
    parser.add_argument("--length", type=int, help="ids of every row, in place of rows of many lengths")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=(*RUNS, *OTHERS))
    parser.add_argument("--curves", action="store_true", help="compare losses on the same batches instead of speed")
    parser.add_argument("--one", choices=(*RUNS, *OTHERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare_speed(name, folder, args):
    """Print the table of one model: medians over the rounds, and ratios to TRL."""
    found = {which: [] for which in args.runs}
    for round_ in range(args.rounds):
        for which in args.runs:
            found[which].append(start(which, folder, args))
            shown = {key: value for key, value in found[which][-1].items() if key != "losses"}
            print(f"{name}, round {round_ + 1}, {which}: {shown}", file=sys.stderr, flush=True)
    median = {
        which: {key: statistics.median(r[key] for r in results) for key in results[0] if key != "losses"}
        for which, results in found.items()
    }
    first = median[args.runs[0]]
    rows = [
        [which, f"{m['tokens_per_second']:.0f}", f"{m['supervised_per_second']:.0f}", f"{m['padding']:.1%}"]
        + [f"{m['peak_mib']:.0f}", f"{m['matrix_rate']:.0f}", f"{m['share']:.0%}"]
        + [f"{m['tokens_per_second'] / first['tokens_per_second']:.2f}", f"{m['peak_mib'] / first['peak_mib']:.2f}"]
        for which, m in median.items()
    ]
    print(f"\n{name}: {MODELS[name]}, {args.rows} rows, {args.dtype}, median of {args.rounds}\n")
    header = ["run", "tokens/s", "supervised/s", "padding", "peak MiB", "GFLOP/s of a matrix product", "share of it"]
    print(table([*header, f"speed, {args.runs[0]} = 1", "memory"], rows))


def compare_curves(name, folder, args):
    """Print the largest relative difference of the two losses of a step on the same batches."""
    ours, theirs = (start(which, folder, args)["losses"] for which in (OURS, TRL_OUR_BATCHES))
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    print(f"\n{name}: {len(ours)} steps, loss {ours[0]:.5f} to {ours[-1]:.5f}, TRL {theirs[0]:.5f} to {theirs[-1]:.5f}")
    print(f"largest relative difference of a step: {max(apart):.1e}")


def start(which, folder, args):
    command = [Path(__file__), "--one", which, "--folder", folder, "--rows", args.rows, "--dtype", args.dtype]
    command += ["--length", args.length] if args.length else []
    return run(command)[0]


def make_model(shape, folder):
    """A random Gemma and a random adapter, the same for every run."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(num_attention_heads=8, num_key_value_heads=1, head_dim=256, tie_word_embeddings=True, **shape)
    torch.manual_seed(SEED)
    GemmaForCausalLM(config).save_pretrained(folder)


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
    from common.model import loading
    from common.training import tuning

    rate = matrix_rate(args.dtype)
    net = loading.load_base(args.folder, args.dtype)
    net = tuning.make_trainable(net, config(args, which))
    rows = make_rows(args.rows, net.config.vocab_size, args.length)
    timed = train_ours if which.startswith(OURS) else train_trl
    seconds, losses, batches = timed(which, net, rows, args)
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


def config(args, which):
    from gemma_sft.ft_gemma.config import Config

    return Config(
        path_model_pretrain=args.folder,
        model_save_dir=args.folder,
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
    log = files.read_jsonl(Path(args.folder) / "trainer_log.jsonl")
    return log[-1]["seconds"], [record["loss"] for record in log], our_sampler(rows, cfg).batches()


def our_sampler(rows, cfg):
    from common.training.batches import sampler_of

    return sampler_of([row["length"] for row in rows], cfg)


def train_trl(which, net, rows, args):
    """(seconds, loss of each step, batches) of TRL's SFTTrainer on the same ids."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Recorder(TrainerCallback):
        times, losses = [], []

        def on_train_begin(self, *_, **__):
            self.times.append(time.monotonic())

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                self.times.append(time.monotonic())
                self.losses.append(logs["loss"])

    class OurBatches(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return our_sampler(rows, config(args, which))

    settings = SFTConfig(
        output_dir=args.folder,
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
    trainer = make(net, settings, train_dataset=data, processing_class=tokenizer(net), callbacks=[Recorder()])
    batches = [list(part) for part in trainer.get_train_dataloader().batch_sampler]
    trainer.train()
    return Recorder.times[-1] - Recorder.times[0], Recorder.losses, batches


def mask_of(row):
    return [int(label != -100) for label in row["labels"]]


def tokenizer(net):
    """SFTTrainer asks for one; the rows are ids already."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "gemma_sft/embedded")


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


if __name__ == "__main__":
    main()
