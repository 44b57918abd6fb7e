"""Memory: what a step needs is tried, not guessed; recomputing activations is decided by it and said with numbers."""

import gc
import json
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch
from transformers import Trainer, TrainingArguments

from common.knobs import OPTIMIZERS
from common.model import frozen_head, loading
from common.model.loss import logits_alive, supervised
from common.training import batches, memory, tuning
from gemma_sft.ft_gemma import train
from gemma_sft.ft_gemma.config import Config

ROW = {"where": "f:1"}


@pytest.fixture
def net(small_gemma):
    net = tuning.make_trainable(loading.load_base(small_gemma, "float32"), Config(lora_dropout=0.1))
    with supervised(net.train()):
        yield net


def batch(rows, length):
    ids = torch.randint(7, 300, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def kept_by(net, rows, length):
    """Bytes of a forward pass for its backward pass, counted in the graph itself."""
    return memory.kept_by(net, batch(rows, length))[0]


def test_the_estimate_of_a_long_batch_comes_from_short_ones(net, monkeypatch):
    monkeypatch.setattr(memory, "HEAP", 1.0)
    found = memory.estimate(net, batch(2, 16), batch(2, 64), rows=8, length=400)
    real = kept_by(net, 8, 400)
    layers = 2
    assert found.activations == pytest.approx(real * (1 + 1 / layers), rel=0.1)
    assert found.recomputed < found.activations
    assert found.states == 12 * 5120, "gradients and two moments in fp32 of the LoRA weights"
    assert found.logits == 3 * 4 * 512 * 314
    assert found.total(False) == found.states + found.logits + found.activations


@pytest.mark.parametrize(
    "targets, modules, dora",
    [
        (("q_proj",), (), False),
        (("lm_head",), (), False),
        (("lm_head",), (), True),
        (("q_proj",), ("lm_head",), False),
    ],
)
def test_the_logits_alive_are_those_of_the_loss(small_gemma, targets, modules, dora):
    """A head that is not trained is walked over; one that is, or has DoRA, makes its logits a few rows at a time."""
    config = Config(target_modules=targets, modules_to_save=modules, use_dora=dora)
    net = tuning.make_trainable(loading.load_base(small_gemma, "float32"), config)
    in_chunks = modules or dora
    rows = 128 if in_chunks else 512
    assert [logits_alive(net, where) for where in ("cpu", "cuda")] == [rows * 314, 512 * 314]
    walked = frozen_head.POSITIONS * frozen_head.block_rows("cpu")
    net.config.vocab_size = 262_144
    assert logits_alive(net, "cpu") == (64 * 262_144 if in_chunks else walked)


def test_moments_are_counted_by_optimizer(net):
    found = memory.estimate(net, batch(1, 8), batch(1, 16), rows=1, length=8, moments=OPTIMIZERS["sgd"].moments)
    assert found.states == 4 * 5120, "gradients alone"


@pytest.mark.parametrize("name", [name for name, optim in OPTIMIZERS.items() if optim.package in ("", "bitsandbytes")])
def test_what_an_optimizer_keeps_is_what_it_is_said_to_keep(tmp_path, name):
    if OPTIMIZERS[name].package:
        pytest.importorskip("bitsandbytes")
    layer = torch.nn.Linear(256, 256, bias=False)
    args = TrainingArguments(str(tmp_path), optim=name, use_cpu=True)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, layer)
    optimizer = kind(layer.parameters(), **options)
    layer(torch.ones(1, 256)).sum().backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        optimizer.step()
    kept = sum(v.nbytes for v in optimizer.state[layer.weight].values() if isinstance(v, torch.Tensor))
    assert OPTIMIZERS[name].moments - 1 < kept / layer.weight.numel() <= OPTIMIZERS[name].moments + 0.001


def test_trying_changes_nothing(net):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    weights = [p.detach().clone() for p in net.parameters()]
    memory.estimate(net, batch(1, 8), batch(1, 16), rows=1, length=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), weights, strict=True))
    assert all(p.grad is None for p in net.parameters())


def test_trying_keeps_nothing(net):
    def alive():
        gc.collect()
        return sum(thing.nbytes for thing in gc.get_objects() if type(thing) is torch.Tensor)

    before = alive()
    memory.estimate(net, batch(1, 8), batch(1, 16), rows=1, length=8)
    assert alive() == before


@pytest.mark.parametrize(
    ("tried", "rows", "length", "bytes_"),
    [
        ([((1, 10), 100), ((1, 20), 200)], 2, 100, 2000),  # linear in the length
        ([((1, 10), 200), ((1, 20), 600)], 1, 30, 1200),  # 10 T + T²
        ([((2, 10), 200), ((2, 10), 200)], 1, 30, 300),  # two of one length
        ([((1, 10), 110), ((1, 20), 210)], 1, 40, 420),  # with a constant part: never less than linear
    ],
)
def test_bytes_are_fitted(monkeypatch, tried, rows, length, bytes_):
    monkeypatch.setattr(memory, "HEAP", 1.0)
    assert memory.fitted(tried, rows, length) == bytes_


@pytest.mark.parametrize(
    ("free", "knob", "on", "printed"),
    [
        (1 << 40, "auto", False, "gradient_checkpointing off (auto)"),
        (1 << 20, "auto", True, "可用 free 1 MiB: gradient_checkpointing on (auto)"),
        (1 << 20, "false", False, ""),
        (1 << 40, "true", True, ""),
    ],
)
def test_recomputing_is_decided_by_the_memory(net, monkeypatch, capsys, tokenizer, free, knob, on, printed):
    monkeypatch.setattr(memory, "free", lambda: free)
    lengths = [8, 16, 30, 12]
    ids = [[7 + n % 200 for n in range(length)] for length in lengths]
    rows = SimpleNamespace(train=fake_dataset([ROW | {"input_ids": i, "labels": i, "length": len(i)} for i in ids]))
    sampler = batches.LengthGroupedSampler(lengths, 2, seed=1)
    cfg = Config(gradient_checkpointing=knob, micro_batch_size=2)
    assert memory.needs_checkpointing(cfg, net, rows, tokenizer, sampler) is on
    out = capsys.readouterr().out
    assert printed in out and ("the heaviest step needs about" in out) == (knob == "auto")


def test_what_is_free_is_looked_at_without_the_copies_of_the_trial(net, monkeypatch, tokenizer):
    """The copies in bfloat16 were counted twice."""
    dtypes = set()
    monkeypatch.setattr(memory, "free", lambda: dtypes.update(p.dtype for p in net.parameters()) or 1 << 40)
    ids = [*range(7, 37)]
    rows = SimpleNamespace(train=fake_dataset([ROW | {"input_ids": ids, "labels": ids, "length": 30}] * 4))
    assert memory.step_memory(Config(dtype="bfloat16"), net, rows, tokenizer, (2, 8)) and dtypes == {torch.float32}


def fake_dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def test_sharded_weights_are_recomputed(monkeypatch, capsys, net, tokenizer):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sampler = batches.LengthGroupedSampler([8], 1, seed=1)
    rows = SimpleNamespace(train=fake_dataset([{"length": 8}]))
    assert memory.needs_checkpointing(Config(), net, rows, tokenizer, sampler) is True
    assert "the weights are sharded" in capsys.readouterr().out


def test_a_run_recomputes_where_it_must_and_learns_the_same(small_gemma, tmp_path, monkeypatch, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"query": f"{n}", "response": f"{n + 1}"}) + "\n" for n in range(8)))
    flags = ["--path_model_pretrain", small_gemma, "--data_path", data, "--max_steps", 2, "--val_set_size", 0]
    flags = [str(flag) for flag in [*flags, "--eval_rows", 0, "--cache_dir", tmp_path / "cache"]]
    train.main([*flags, "--model_save_dir", str(tmp_path / "kept")])
    monkeypatch.setattr(memory, "free", lambda: 1000)
    train.main([*flags, "--model_save_dir", str(tmp_path / "recomputed")])
    out = capsys.readouterr().out
    assert "gradient_checkpointing off (auto)" in out and "gradient_checkpointing on (auto)" in out
    kept, recomputed = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("kept", "recomputed"))
    assert kept == recomputed


@pytest.mark.parametrize(("limit", "used", "free"), [("5000\n", "1000\n", 4000), ("max\n", "1000\n", 9000)])
def test_a_containers_limit_counts(monkeypatch, tmp_path, limit, used, free):
    monkeypatch.setattr(memory, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=9000))
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text(used)
    assert memory.free() == free
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.free() == free // 2


def test_the_peak_is_seen():
    with memory.Peak() as used:
        block = numpy.ones(40 << 20, dtype=numpy.uint8)
        del block
    assert used.peak - used.before >= 30 << 20
