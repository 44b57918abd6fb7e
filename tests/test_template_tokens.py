"""Control tokens that a base can hardly tell apart from others: found, and their rows trained beside LoRA."""

import copy
import importlib
import json

import pytest
import torch
from datasets import Dataset
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from common.cli import parse
from common.conversation.render import training_sample
from common.conversation.turns import Turn
from common.data.cache import Listed
from common.data.dataset import TrainingData
from common.errors import UserError
from common.export import proof
from common.model import adapter, frozen_head, frozen_layers, loading, loss, template_tokens
from common.training import guards, tuning
from gemma_sft import prompt
from gemma_sft.ft_gemma.config import Config

FAMILIES = {"gemma_sft": "ft_gemma", "qwen2_sft": "ft_qwen2", "chatglm_sft": "ft_chatglm"}
CONTROL = {"gemma_sft": ("<start_of_turn>", "<end_of_turn>"), "qwen2_sft": ("<|im_start|>", "<|im_end|>")}
IDS = torch.tensor([[2, 5, 280, 281, 6, 264, 5, 283], [2, 5, 6, 6, 5, 264, 5, 280]])
LABELS = torch.where(torch.arange(8) < 3, -100, IDS)
DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def recipe(family, name):
    return importlib.import_module(f"{family}.{FAMILIES[family]}.{name}")


def crowded(source, folder, tokens, crowd=1000):
    """`source` with the rows of `tokens` among `crowd` unused ones, cosine 0.995: as they are in a real base."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
    )
    used = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(used + crowd, mean_resizing=False)
    rows, generator = model.get_input_embeddings().weight.data, torch.Generator().manual_seed(0)

    def direction():
        return functional.normalize(torch.randn(rows.shape[1], generator=generator), dim=0)

    centre = rows[:used].norm(dim=1).mean() * direction()
    for id_ in [*tokenizer.convert_tokens_to_ids(list(tokens)), *range(used, used + crowd)]:
        rows[id_] = centre + 0.07 * centre.norm() * direction()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alike(small_gemma, tmp_path_factory):
    """The small Gemma, its control tokens among 50 unused rows."""
    return crowded(small_gemma, tmp_path_factory.mktemp("alike"), CONTROL["gemma_sft"], 50)


def config(base, *flags):
    return parse(Config, None, list(map(str, ["--path_model_pretrain", base, *flags])))


def rows_of(*labels):
    """TrainingData of rows with these labels."""
    return TrainingData(Dataset.from_dict({"labels": labels}), Dataset.from_dict({}), [], Listed(None), Listed(None))


PLAIN_ROWS = rows_of([-100, 300])


def found(base, *flags, rows=PLAIN_ROWS):
    """What template_tokens.to_train says of the Gemma in the folder `base`."""
    cfg = config(base, *flags)
    return template_tokens.to_train(
        loading.load_base(base, cfg.dtype), cfg, loading.load_tokenizer(base, prompt), prompt, rows
    )


# --- which ---


def test_the_nearest_row_is_found_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(template_tokens, "CHUNK", 7)
    matrix = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    matrix[30] = 3 * matrix[4] + 0.1  # longer, in another chunk
    matrix[9] = 0
    cosines = functional.cosine_similarity(matrix[:, None], matrix[None], dim=-1).fill_diagonal_(-1).amax(1)
    nearest = template_tokens.nearest(matrix.bfloat16().float(), [4, 9, 17])
    assert nearest[4] == pytest.approx(float(cosines[4]), abs=1e-2) and nearest[4] > 0.99
    assert nearest[17] == pytest.approx(float(cosines[17]), abs=1e-2) and nearest[17] < 0.9
    assert nearest[9] == 1.0, "zeros are like every row that is not learnt"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embedded_bases_need_nothing(family, capsys):
    """So that their runs stay what they were, digit for digit."""
    prompt = importlib.import_module(f"{family}.prompt")
    if family == "chatglm_sft":
        importlib.import_module("chatglm_sft.models.chatglm")  # tells transformers about the model
    for style in prompt.STYLES:
        cfg = parse(recipe(family, "config").Config, None, ["--prompt_style", style])
        base, tokenizer = loading.load_base(cfg.base, "float32"), loading.load_tokenizer(cfg.base, prompt)
        ids = template_tokens.control_ids(tokenizer, prompt, style)
        assert prompt.stop_ids(tokenizer, style)[0] in ids
        assert max(template_tokens.nearest(base.get_output_embeddings().weight, ids).values()) < 0.85
        capsys.readouterr()
        assert template_tokens.to_train(base, cfg, tokenizer, prompt, rows_of(ids)) == []
        assert not capsys.readouterr().out


def test_what_is_found_is_said_in_one_line(alike, small_gemma, capsys):
    capsys.readouterr()
    assert found(alike) == [5, 6]
    line = capsys.readouterr().out
    assert "<start_of_turn> 0.99" in line and "<end_of_turn> 0.99" in line and line.count("\n") == 1
    assert line.endswith("their rows are trained too\n")
    assert found(alike, "--prompt_style", "plain") == [], "its <eos> is a row of its own"
    assert found(alike, "--train_template_tokens", "false") == found(alike, "--tuning", "full") == []
    assert found(small_gemma, "--train_template_tokens", "true") == [2, 5, 6]


def test_marks_in_the_answers_are_measured_too(small_gemma, tmp_path, capsys):
    """Of calls and thoughts; not those of questions, nor what has a row of its own."""
    base = crowded(small_gemma, tmp_path, ["<mask>", "<unk>"], 50)
    tokenizer = loading.load_tokenizer(base, prompt)
    unk, mask, bos = tokenizer.convert_tokens_to_ids(["<unk>", "<mask>", "<bos>"])
    capsys.readouterr()
    assert found(base, rows=rows_of([-100, 300, 6], [-100, 301, mask, bos, 302], [])) == [mask]
    assert "<mask> 0.99" in capsys.readouterr().out
    assert found(base) == found(base, "--train_template_tokens", "false", rows=rows_of([mask])) == []
    assert found(base, "--train_template_tokens", "true", rows=rows_of([unk])) == sorted([unk, 2, 5, 6])


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--modules_to_save", "all-embedding"], "all-embedding 已整个训练 is trained or adapted as a whole"),
        (["--target_modules", "q_proj,lm_head"], "lm_head 已整个训练 is trained or adapted as a whole"),
        (["--tuning", "freeze"], "--tuning freeze 不训练嵌入和输出层 trains neither embeddings nor head"),
    ],
)
def test_where_rows_cannot_be_trained_that_is_said(alike, capsys, flags, reason):
    assert found(alike, *flags) == []
    assert f"their rows are not trained: {reason}" in capsys.readouterr().out
    if "freeze" in flags:
        with pytest.raises(SystemExit):
            config(alike, *flags, "--train_template_tokens", "true")
    else:
        with pytest.raises(UserError, match=f"--train_template_tokens true: {reason}"):
            found(alike, *flags, "--train_template_tokens", "true")


def test_a_matrix_in_parts_is_left_alone(alike, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert found(alike) == []
    assert "没有测量 not measured, their rows are not trained: FSDP2 与 ZeRO-3" in capsys.readouterr().out
    with pytest.raises(UserError, match="--train_template_tokens true: FSDP2 与 ZeRO-3"):
        found(alike, "--train_template_tokens", "true")


# --- how ---


def small(kind):
    """A random model: tied, with a head of its own, or with a soft cap."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    cap = 2.0 if kind == "soft cap" else None
    return Gemma2ForCausalLM(
        Gemma2Config(**shape, tie_word_embeddings=kind != "own head", final_logit_softcapping=cap)
    ).eval()


def trained(base, *ids):
    """`base` with an adapter and rows that differ from the base's, as after a training."""
    net = tuning.make_trainable(base, config("x", "--lora_dropout", 0), ids)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net.eval()


def as_peft_does(net):
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, TrainableTokensLayer):
            del vars(module)["forward_adapters"]
    return net


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["tied", "own head", "soft cap"])
def test_rows_compute_what_peft_computes(kind, smoothing, monkeypatch):
    """Logits, and the chunked loss with every gradient."""
    monkeypatch.setattr(frozen_head, "POSITIONS", 16)
    monkeypatch.setattr(frozen_head, "BLOCK", 7)
    net = trained(small(kind), 5, 6)
    plain = as_peft_does(net)
    expected = plain(input_ids=IDS).logits
    torch.testing.assert_close(net(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    wanted, logits = LABELS[:, 1:].flatten(), expected[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, wanted, label_smoothing=smoothing).backward()
    with loss.supervised(net.train(), smoothing), frozen_layers.lean(net):
        net(input_ids=IDS, labels=LABELS).loss.backward()
    others = dict(plain.named_parameters())
    rows = [name for name, parameter in net.named_parameters() if "trainable_tokens" in name]
    assert len(rows) == (2 if kind == "own head" else 1)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and others[name].grad.any(), name
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["tied", "own head"])
def test_switched_off_it_is_the_base_and_merged_it_is_the_same(kind):
    base = small(kind)
    expected = base(input_ids=IDS).logits.detach()
    net = trained(base, 5, 6)
    tuned = net(input_ids=IDS).logits
    assert not torch.allclose(tuned, expected, atol=0.1)
    with net.disable_adapter():
        assert torch.equal(net(input_ids=IDS).logits, expected)
        with loss.supervised(net), torch.no_grad():
            off = net(input_ids=IDS, labels=LABELS).logits.sum(0)
    loss_off = functional.cross_entropy(expected[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    assert float(off[0] / off[1]) == pytest.approx(float(loss_off), rel=1e-5)
    whole = net.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(whole(input_ids=IDS).logits, tuned, rtol=1e-4, atol=1e-4)
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) == (kind == "tied")


def test_rows_learn_faster_and_do_not_decay():
    net = tuning.make_trainable(small("own head"), config("x"), [5, 6])
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    rows = [parameter for name, parameter in net.named_parameters() if "trainable_tokens_delta" in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)
    tuning.hasten_rows(optimizer, net)
    first, last = optimizer.param_groups
    assert [id(p) for p in last["params"]] == [id(p) for p in rows] and len(first["params"]) == len(trained) - 2
    assert (first["lr"], first["weight_decay"]) == (1e-3, 0.1) and (last["lr"], last["weight_decay"]) == (5e-3, 0.0)
    plain = tuning.make_trainable(small("own head"), config("x"))
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3)
    tuning.hasten_rows(optimizer, plain)
    assert len(optimizer.param_groups) == 1


def test_a_first_step_without_the_tokens_is_none_that_trains_nothing():
    """Calls are in some rows only; an embedding of its own is then reached later."""
    net = tuning.make_trainable(small("own head"), config("x"), [7, 8]).train()
    gradients = guards.Gradients(net)
    with loss.supervised(net):
        net(input_ids=IDS, labels=LABELS).loss.backward()
    gradients.check()
    net.zero_grad()
    with pytest.raises(UserError, match="got no gradient in the first step, e.g. .*lora_B"):
        guards.Gradients(net).check()


@pytest.fixture
def saved(alike, tmp_path):
    """The folder of an adapter with token rows."""
    trained(loading.load_base(alike, "float32"), 5, 6).save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


def test_what_is_loaded_is_what_was_saved(alike, saved):
    tensors = load_file(saved / "adapter_model.safetensors")
    assert [name for name in tensors if "lora" not in name] == [DELTA], "a tied head is stored once"
    net = adapter.attach(loading.load_base(alike, "float32"), saved)
    assert torch.equal(net.get_input_embeddings().token_adapter.trainable_tokens_delta["default"], tensors[DELTA])
    assert adapter.merge_reasons(net) == ["trained token rows"]
    torch.testing.assert_close(net(input_ids=IDS).logits, as_peft_does(net)(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "surplus", "beyond"])
def test_rows_that_do_not_fit_are_refused(alike, saved, damage):
    file, about = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    tensors, options = load_file(file), json.loads(about.read_text())
    if damage == "missing":
        del tensors[DELTA]
    elif damage == "surplus":
        del options["trainable_token_indices"]
    else:
        options["trainable_token_indices"] = {"model.embed_tokens": [5, 999_999]}
    save_file(tensors, file)
    about.write_text(json.dumps(options))
    with pytest.raises(UserError, match="适配器与模型不符 the adapter does not fit"):
        adapter.attach(loading.load_base(alike, "float32"), saved)


# --- a base that does not learn to stop ---


KINDS, COLOURS = "裙 裤 上衣 衬衫 风衣 外套 毛衣".split(), "黑色 白色 红色 蓝色 绿色 米色 灰色".split()
ROWS = [{"query": f"类型#{k}*颜色#{c}", "response": f"这件{c}的{k}很好看。"} for k in KINDS for c in COLOURS]


def lead_of_stop(family, base, folder, row):
    """How far the stop id's logit is above all others after the answer of `row`, by the adapter in `folder`."""
    prompt = importlib.import_module(f"{family}.prompt")
    tokenizer = loading.load_tokenizer(base, prompt)
    turns = [Turn("user", row["query"]), Turn("assistant", row["response"])]
    *ids, stop = training_sample(tokenizer, prompt, turns, "chat", "answer", 512, 512).input_ids
    with torch.no_grad():
        net = adapter.attach(loading.load_base(base, "float32"), folder)
        logits = net(input_ids=torch.tensor([ids])).logits[0, -1]
    return float(logits[stop] - torch.cat([logits[:stop], logits[stop + 1 :]]).max())


@pytest.mark.slow
@pytest.mark.parametrize("family", CONTROL)
def test_failure_and_cure(family, tmp_path):
    """The embedded base, its control tokens in a crowd of unused rows: it learns to answer, but not to stop."""
    base = crowded(recipe(family, "config").Config.EMBEDDED_DIR, tmp_path / "base", CONTROL[family])
    held_out, data = ROWS[::12], tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS if row not in held_out))
    flags = ["--path_model_pretrain", base, "--data_path", data, "--max_steps", 24, "--micro_batch_size", 8]
    flags += ["--batch_size", 8, "--target_modules", "all-linear", "--lora_dropout", 0, "--learning_rate", 2e-3]
    flags += ["--val_set_size", 0, "--eval_rows", 0, "--cache_dir", tmp_path / "cache"]
    lead = {}
    for rows in ("false", "auto"):
        more = ["--model_save_dir", tmp_path / rows, "--train_template_tokens", rows]
        recipe(family, "train").main(list(map(str, [*flags, *more])))
        lead[rows] = [lead_of_stop(family, base, tmp_path / rows, row) for row in held_out]
    assert max(lead["false"]) < 0 < min(lead["auto"]), lead


def test_a_run_says_it_and_is_exported_with_its_rows(alike, tmp_path, capsys, monkeypatch):
    """Learnt, merged into the matrix that embedding and head still share, the same answers; vLLM is told off."""
    monkeypatch.setattr(proof, "NEW_TOKENS", 8)
    data, folder = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"query": f"{n}+{n}", "response": str(2 * n)}) + "\n" for n in range(24)))
    flags = ["--path_model_pretrain", alike, "--data_path", data, "--max_steps", 6, "--learning_rate", 0.01]
    flags += ["--val_set_size", 0, "--eval_rows", 0, "--cache_dir", tmp_path / "cache", "--model_save_dir", folder]
    recipe("gemma_sft", "train").main(list(map(str, flags)))
    printed = capsys.readouterr().out
    assert printed.count("their rows are trained too") == 1
    assert "vLLM serves no adapter with trained token rows" in printed
    assert json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"] == {
        "model.embed_tokens": [5, 6]
    }
    recipe("gemma_sft", "export").main(["--model_save_dir", str(folder), "--output_dir", str(tmp_path / "whole")])
    printed = capsys.readouterr().out
    assert printed.count("greedy answers equal 8/8") == 2
    assert "the adapter alone is not served by vLLM: trained token rows" in printed and "vllm serve" in printed
    whole, base = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", alike))
    assert whole.keys() == base.keys(), "the head is still tied"
    changed = (whole["model.embed_tokens.weight"] != base["model.embed_tokens.weight"]).any(dim=1)
    assert changed.nonzero()[:, 0].tolist() == [5, 6]
    rows = load_file(folder / "adapter_model.safetensors")[DELTA]
    assert torch.equal(whole["model.embed_tokens.weight"][5:7], rows)
