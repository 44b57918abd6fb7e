"""Experts: LoRA on those that share a tensor, what LoRA reaches, and the loss of their routers."""

import json

import datasets
import pytest
import torch
import transformers
from runs import Family
from safetensors.torch import load_file

from common.config import PredictFlags, TrainFlags
from common.conversation.turns import Turn
from common.engine.batcher import Batcher
from common.engine.request import Ask
from common.errors import UserError
from common.inference.answerer import Sampling
from common.model import layers, loading, loss
from common.runs import chosen
from common.training import batches, packing, tuning
from qwen2_sft.ft_qwen2.config import Config

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16, tie_word_embeddings=False)
TOLD = "LoRA: 专家也训练 on experts too (down_proj, gate_up_proj)"
GREEDY = Sampling(max_new_tokens=6)
ALL = ["--target_modules", "all-linear", "--max_steps", 6, "--logging_steps", 1]


@pytest.fixture(scope="module")
def qwen(small_qwen, tmp_path_factory):
    """Qwen's recipes on a small Qwen3-MoE, whose first layer is dense."""
    parent = tmp_path_factory.mktemp("experts")
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_qwen)
    tokenizer.save_pretrained(parent / "base")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(vocab_size=len(tokenizer), mlp_only_layers=[0], **SIZES, **EXPERTS)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(parent / "base")
    return Family("qwen2_sft.ft_qwen2", parent / "base", parent)


@pytest.fixture(scope="module")
def folder(qwen):
    return qwen.train("first", *ALL)


def logged(folder, name="loss"):
    return [json.loads(line).get(name) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def test_experts_are_trained_without_dropout(qwen, folder):
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapter if ".mlp." in name} == {
        "experts",
        "base_layer",
    }
    assert any(weight.abs().max() > 0 for name, weight in adapter.items() if "experts" in name and "lora_B" in name)
    config = json.loads((folder / "run_manifest.json").read_text())["config"]
    assert config["lora_dropout"] == 0
    assert logged(folder)[-1] < logged(folder)[0] and not any(logged(folder, "router_loss"))
    card = (folder / "README.md").read_text()
    assert "vLLM serves no adapter with LoRA on experts" in card


def test_the_merged_model_is_the_tuned_one(qwen, folder, capsys):
    flags = ["--model_save_dir", str(folder), "--output_dir", str(folder.parent / "whole"), "--dtype", "float32"]
    qwen.recipe("export").main(flags)
    assert capsys.readouterr().out.count("greedy answers equal 8/8") == 2


def test_its_weights_are_trained_on_without_dropout(qwen, folder, capsys):
    again = qwen.train("again", "--adapter_name_or_path", folder, "--max_steps", 2, "--logging_steps", 1, data="other")
    assert TOLD in capsys.readouterr().out
    assert (
        load_file(again / "adapter_model.safetensors").keys() == load_file(folder / "adapter_model.safetensors").keys()
    )


def test_what_is_asked_for_is_kept_or_refused(qwen, capsys):
    base = loading.load_base(str(qwen.base), "float32")

    def fitted(*flags):
        return tuning.fit_targets(qwen.parse(TrainFlags, "--path_model_pretrain", qwen.base, *flags)[0], base)

    assert fitted("--target_modules", "all-linear").lora_dropout == 0
    assert capsys.readouterr().out.startswith(TOLD)
    assert fitted("--target_modules", "all-linear", "--lora_dropout", 0).lora_dropout == 0
    assert fitted("--lora_dropout", 0.1).lora_dropout == 0.1, "attention alone"
    assert fitted("--tuning", "full").lora_dropout > 0 and not capsys.readouterr().out
    with pytest.raises(UserError, match="--lora_dropout 0.1: .*down_proj, gate_up_proj.*: --lora_dropout 0, or"):
        fitted("--target_modules", "all-linear", "--lora_dropout", 0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_experts_that_are_not_quantised_are_told(qwen, capsys, bits):
    net = loading.load_base(qwen.base, "bfloat16", bits)
    told = f"the experts share tensors and are not quantised to {bits} bits: 0.0 MiB in bfloat16"
    assert told in capsys.readouterr().err
    assert net.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16
    loading.load_base(qwen.base, "bfloat16")
    assert "quantised" not in capsys.readouterr().err


# ---------------------------------------------------------------- what LoRA reaches


def sparse(**more):
    """A small Qwen3-MoE all of whose layers have experts, as the published ones."""
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(vocab_size=100, **SIZES | EXPERTS | more))


def reached(capsys, *targets, base=None, **more):
    """The line of the plan that says what LoRA is on."""
    cfg = Config(target_modules=targets, lora_dropout=0.0, **more)
    layers.show_parameters(tuning.make_trainable(base or sparse(), cfg))
    return capsys.readouterr().out.splitlines()[-1]


def test_names_of_experts_are_targets_where_no_layer_is_dense(capsys):
    layers.show_targets(sparse())
    assert capsys.readouterr().out.endswith("in tensors that experts share: down_proj gate_proj up_proj\n")
    told = "LoRA: down_proj gate_up_proj k_proj o_proj q_proj v_proj 覆盖权重的 reaches 72.8% of the weights; "
    assert reached(capsys, "all-linear").startswith(told)
    assert reached(capsys, "gate_proj", "up_proj", "down_proj").startswith("LoRA: down_proj gate_up_proj 覆盖")
    with pytest.raises(UserError, match="gate_prj: 没有这个模块"):
        reached(capsys, "gate_prj")


def test_what_is_not_reached_is_told_by_kind(capsys):
    base = sparse()
    sizes = {name: parameter.numel() for name, parameter in base.named_parameters()}
    whole = sum(sizes.values())

    def share(*parts):
        return f"{sum(size for name, size in sizes.items() if any(part in name for part in parts)) / whole:.1%}"

    rest = f"embeddings {share('embed')}, head {share('head')}, experts {share('experts')}, linear {share('o_proj')}"
    rest += f", norms {share('norm')}, other {share('gate.weight')}"
    told = f"LoRA: k_proj q_proj v_proj 覆盖权重的 reaches {share('q_proj', 'k_proj', 'v_proj')} of the weights; "
    assert (
        reached(capsys, "q_proj", "k_proj", "v_proj", base=base, modules_to_save=("all-norm",))
        == told + "其余 the rest: " + rest
    )
    tied = reached(capsys, "all-embedding", "q_proj", base=sparse(tie_word_embeddings=True))
    assert tied.startswith("LoRA: embed_tokens q_proj ") and "embeddings" not in tied and "head" not in tied


# ---------------------------------------------------------------- the routers' loss

LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
LINEAR |= dict(layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=16)
ROUTED = {"Qwen2Moe": {}, "Qwen3Moe": {"mlp_only_layers": [0]}, "Qwen3Next": LINEAR, "Qwen3_5Moe": LINEAR}
ROWS = [{"input_ids": list(range(5, end)), "labels": [-100, *range(6, end)], "where": "f:1"} for end in (25, 12, 8)]


def routed(name, **more):
    """A small model of this class whose config asks for the routers' loss, in evaluation mode."""
    of_text = name if hasattr(transformers, f"{name}ForCausalLM") and name != "Qwen3_5Moe" else f"{name}Text"
    options = SIZES | EXPERTS | ROUTED[name] | {"output_router_logits": True, "router_aux_loss_coef": 0.1} | more
    if name == "Qwen3_5Moe":
        options.pop("intermediate_size")
    torch.manual_seed(0)
    config = getattr(transformers, f"{of_text}Config")(vocab_size=100, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ROUTED)
def test_the_loss_of_routers_is_added_as_the_model_adds_it(name):
    net, batch = routed(name), batches.collate(ROWS, pad_id=0)
    batch = {key: batch[key] for key in ("input_ids", "labels", "present")}
    plain = {key: batch[key] for key in ("input_ids", "labels")}
    expected = net(**plain, attention_mask=batch["present"])
    expected.loss.backward()
    gradients = {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    with loss.supervised(net):
        found = net(**batch)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
        cross_entropy = found.logits.sum(0)[0] / found.logits.sum(0)[1]
        torch.testing.assert_close(found.loss - cross_entropy, 0.1 * expected.aux_loss, rtol=1e-4, atol=0)
        found.loss.backward()
        for key, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients.get(key), rtol=1e-4, atol=1e-7)
        assert abs(net(**plain).loss - expected.loss) > 1e-5, "pads are not counted"
        total = (batch["labels"] != -100).sum()
        parts = [net(**{key: value[rows] for key, value in batch.items()}, num_items_in_batch=total) for rows in PARTS]
        added = sum(part.loss - part.logits.sum(0)[0] / total for part in parts)
        assert float(added.detach()) == pytest.approx(0.2, rel=0.05), "once, not once a micro batch"


PARTS = (slice(0, 1), slice(1, 3))


def test_packed_rows_have_the_routers_loss_of_the_unpacked():
    net, found = routed("Qwen3Moe"), []
    with torch.no_grad(), loss.supervised(net.train()):
        for batch in (batches.collate(ROWS, 0), packing.collate([ROWS], 0), packing.collate([ROWS[:1], ROWS[1:]], 0)):
            found.append(net(**{key: value for key, value in batch.items() if key not in ("tokens", "where")}))
    for one in found[1:]:
        torch.testing.assert_close((one.loss, one.aux_loss), (found[0].loss, found[0].aux_loss), rtol=1e-5, atol=0)


def test_a_batch_of_blank_rows_has_no_routers_loss():
    data = datasets.Dataset.from_list(ROWS).with_format("numpy")
    batch = batches.collate(batches.RowsAndBlanks(data).__getitems__([0, batches.BLANK]), 0)
    assert batch["present"].tolist() == [[1] * 20, [0] * 20]
    net = routed("Qwen3Moe")
    with torch.no_grad(), loss.supervised(net):
        found = net(
            input_ids=batch["input_ids"][1:],
            labels=batch["labels"][1:],
            present=batch["present"][1:],
            num_items_in_batch=9,
        )
    assert found.loss == 0


def test_a_config_that_does_not_ask_and_a_class_without_are_told(capsys):
    for net, told in (
        (
            routed("Qwen3Moe"),
            "cross entropy + 0.1 × 路由器的辅助损失 the routers' auxiliary loss (output_router_logits true",
        ),
        (
            sparse(),
            "cross entropy 不加 without 路由器的辅助损失 the routers' auxiliary loss (output_router_logits false",
        ),
    ):
        loss.show_routers(net)
        assert told in capsys.readouterr().out
    loss.show_routers(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=10, **SIZES)))
    assert not capsys.readouterr().out


def test_a_run_logs_what_routers_add_and_is_asked_without(small_qwen, tmp_path, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(small_qwen)
    tokenizer.save_pretrained(tmp_path / "base")
    asked = {"vocab_size": len(tokenizer), "output_router_logits": True, "router_aux_loss_coef": 0.1}
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | EXPERTS | asked)).save_pretrained(
        tmp_path / "base"
    )
    family = Family("qwen2_sft.ft_qwen2", tmp_path / "base", tmp_path)
    flags = ["--max_steps", 2, "--logging_steps", 1, "--micro_batch_size", 2, "--batch_size", 6, "--val_set_size", 4]
    out = family.train("out", *flags, "--max_new_tokens", 4)
    assert "+ 0.1 × 路由器的辅助损失" in capsys.readouterr().out
    assert logged(out, "router_loss") == pytest.approx([0.2, 0.2], rel=0.1)
    assert all(0 < value < loss for value, loss in zip(logged(out, "router_loss"), logged(out), strict=True))
    assert abs(logged(out, "eval_loss")[-1] - logged(out)[-1] + logged(out, "router_loss")[-1]) < 0.15, "cross entropy"
    cfg = chosen.choose(*family.parse(PredictFlags, "--model_save_dir", out))
    answer = family.recipe("predict").load_answer(cfg)
    alone = [answer([[Turn("user", text)]], GREEDY)[0] for text in ("1+1", "问" * 40)]
    assert answer([[Turn("user", text)] for text in ("1+1", "问" * 40)], GREEDY) == alone
    batcher = Batcher(answer, {"tuned": "default"})
    asks = [Ask(batcher.encoder.whole_ids([Turn("user", text)]), GREEDY) for text in ("1+1", "问" * 40)]
    parts = [
        "".join(part.text for row in ticket.parts() for part in row)
        for ticket in [batcher.submit("tuned", [ask]) for ask in asks]
    ]
    batcher.close()
    assert parts == [one.text for one in alone]
