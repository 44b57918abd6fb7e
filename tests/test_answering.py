"""What makes answering faster and changes no answer: a cache with room, weights of 16 bits read as such."""

import copy
import importlib
import io
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from common.engine.kv_batch import KVBatch
from common.engine.replay import record
from common.inference.cache import ROOM, RoomyLayer, with_roomy_cache
from common.inference.products import ENGINES, HalfLinear, quicken
from common.model.adapter import attach
from common.model.token_rows import mend
from common.serving import adapters

HALF = torch.backends.quantized.engine in ENGINES
needs_half = pytest.mark.skipif(not HALF, reason="torch without FBGEMM")


def columns(count, seed=0):
    return torch.randn(2, 3, count, 4, generator=torch.Generator().manual_seed(seed))


def test_a_cache_with_room_holds_what_transformers_holds():
    """Also where it has to grow, and where what it holds is cut or put in its place."""
    theirs, ours = DynamicLayer(), RoomyLayer()
    for step, count in enumerate([5, 1, 1, ROOM, 1, 2 * ROOM, 1]):
        new = columns(count, step), columns(count, 100 + step)
        for expected, found in zip(theirs.update(*new), ours.update(*new), strict=True):
            assert torch.equal(expected, found)
        if step == 4:
            for layer in (theirs, ours):
                layer.keys, layer.values = layer.keys[:, :, 3:], layer.values[[1, 0], :, 3:]
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_a_column_is_written_where_there_is_room_and_nothing_taken_out_changes():
    layer = RoomyLayer()
    layer.update(columns(5), columns(5))
    layer.update(columns(1), columns(1))
    place, taken = layer.keys.data_ptr(), layer.keys[:1, :, :4]
    before = taken.clone()
    layer.update(columns(1, 1), columns(1, 1))
    assert layer.keys.data_ptr() == place and layer.keys.shape[2] == 7  # no copy of the others
    layer.keys = taken  # as whoever lets rows go
    layer.update(columns(1, 2)[:1], columns(1, 2)[:1])
    assert layer.keys.data_ptr() != place and torch.equal(taken, before)


def test_a_batch_steps_as_with_transformers_own_cache(small_qwen):
    net = AutoModelForCausalLM.from_pretrained(small_qwen).float().eval()
    prompts = [list(range(10, 30)), list(range(20, 27))]
    with torch.inference_mode():
        ours, theirs = (KVBatch(net, [None, None], prompts, 0) for _ in range(2))
        theirs.cache = DynamicCache(config=net.config)
        for batch in (ours, theirs):
            batch.prefill(512)
        for id_ in range(5, 15):
            assert torch.equal(ours.step([id_, id_ + 1]), theirs.step([id_, id_ + 1]))


def test_generate_gets_a_cache_with_room(small_qwen):
    """… where its class makes its cache of layers of attention; a model with states makes its own."""
    (cache,) = with_roomy_cache(AutoModelForCausalLM.from_pretrained(small_qwen)).values()
    assert {type(one) for one in cache.layers} == {RoomyLayer}
    assert with_roomy_cache(torch.nn.Identity()) == {}


@needs_half
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (0, 24)])
def test_weights_of_bfloat16_lose_nothing(bias, shape):
    layer = torch.nn.Linear(24, 40, bias=bias).requires_grad_(False)
    layer.weight.data = torch.randint(-127, 128, (40, 24)) / 512
    net = quicken(torch.nn.Sequential(copy.deepcopy(layer)))
    assert type(net[0]) is HalfLinear and torch.equal(net[0].weight, layer.weight)
    assert net[0].bias is None if not bias else torch.equal(net[0].bias, layer.bias)
    x = torch.randn(shape)
    torch.testing.assert_close(net(x), layer(x))
    assert len(list(net.parameters())) == bias  # the weights are held once


@needs_half
@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_that_brings_layers_of_its_own_is_attached_over_weights_of_16_bits(bias, tmp_path):
    """modules_to_save: peft copies the base's layer and puts the adapter's weights into the copy."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=64, num_key_value_heads=1, **shape)  # q_proj has a bias, lm_head none
    base = Qwen2ForCausalLM(config).bfloat16().float().eval()
    whole, ids = ["q_proj" if bias else "lm_head"], torch.arange(8, 20)[None]
    for name, own in (("one", {}), ("two", {"modules_to_save": whole})):
        lora = LoraConfig(target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **own)
        made = get_peft_model(copy.deepcopy(base), lora).eval()
        for weight in made.parameters():
            weight.data += 0.01 * weight.requires_grad
        made.save_pretrained(tmp_path / name, save_embedding_layers=False)
    net = attach(quicken(attach(base, tmp_path / "one")), tmp_path / "two", "two")
    net.set_adapter("two")
    with torch.inference_mode():
        torch.testing.assert_close(net(ids).logits, made(ids).logits, atol=1e-5, rtol=1e-4)


@needs_half
def test_weights_that_a_later_dora_reads_at_each_call_are_kept_again(small_qwen, tmp_path):
    """They would be made anew for each token."""
    config = LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(small_qwen).bfloat16().float()
    made = get_peft_model(copy.deepcopy(base), config).eval()
    made.save_pretrained(tmp_path)
    plain = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    answer, ids = SimpleNamespace(net=quicken(plain.eval())), torch.arange(8, 20)[None]
    adapters.load(answer, [f"second={tmp_path}"])
    answer.net.set_adapter("adapter_2")
    kinds = {name.split(".")[-2]: type(m) for name, m in answer.net.named_modules() if name.endswith("base_layer")}
    assert kinds == {"q_proj": torch.nn.Linear, "down_proj": torch.nn.Linear}
    with torch.inference_mode():
        torch.testing.assert_close(answer.net(ids).logits, made(ids).logits, atol=1e-5, rtol=1e-4)


@needs_half
def test_trained_rows_of_a_head_do_not_ask_for_its_weights(small_qwen, monkeypatch):
    """… which are made anew for whoever asks: seconds for each token where the vocabulary is large."""
    base = AutoModelForCausalLM.from_pretrained(small_qwen).bfloat16().float()
    net = get_peft_model(base, LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6, 9])).eval()
    mend(net)
    for name, weight in net.named_parameters():
        if "trainable_tokens_delta" in name:
            weight.data += 1
    ids = torch.arange(4, 20)[None]
    with torch.inference_mode():
        expected = net(ids).logits
        quicken(net)
        monkeypatch.setattr(HalfLinear, "__getattr__", torch.nn.Module.__getattr__)
        torch.testing.assert_close(net(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_weights_that_float16_does_not_hold_stay():
    fine, large, small = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))
    torch.nn.init.constant_(large.weight, 1e5)
    torch.nn.init.constant_(small.weight, 2.0**-26)  # less than a step of float16, as bfloat16 may hold
    with torch.no_grad():
        small.weight[0] = 1
    net = quicken(torch.nn.Sequential(fine, large, small))
    assert type(net[0]) is type(net[1]) is torch.nn.Linear
    assert type(net[2]) is (HalfLinear if HALF else torch.nn.Linear)


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-8])
def test_a_layer_of_small_numbers_alone_computes_the_same(scale):
    """float16's steps are as large as they are: a layer of 1e-8 would be one of zeros."""
    layer = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    torch.nn.init.uniform_(layer.weight, -scale, scale)
    x = torch.randn(3, 64)
    expected = torch.nn.functional.linear(x, layer.weight)
    torch.testing.assert_close(quicken(torch.nn.Sequential(layer))(x) / scale, expected / scale)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_a_large_layer_of_float32_computes_the_same(rows):
    layer = torch.nn.Linear(512, 2048).requires_grad_(False)
    x = torch.randn(rows, 1, 512)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    net = quicken(torch.nn.Sequential(layer))
    assert "forward" in vars(net[0])
    torch.testing.assert_close(net(x), expected)


@needs_half
def test_another_engine_of_torch_leaves_layers_as_they_are(monkeypatch):
    layer = torch.nn.Linear(8, 8)
    layer.weight.data = layer.weight.data.bfloat16().float()
    monkeypatch.setattr(torch.backends.quantized, "engine", "onednn")
    assert type(quicken(torch.nn.Sequential(layer))[0]) is torch.nn.Linear


@needs_half
def test_an_adapter_is_left_as_it_is_over_a_base_that_is_not(small_qwen):
    """… and a second adapter can be attached. DoRA's layers keep their weights, of which it takes norms each time."""
    base = AutoModelForCausalLM.from_pretrained(small_qwen).bfloat16().float()
    config = LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False)
    net = get_peft_model(base, config).eval()
    ids = torch.arange(8, 20)[None]
    with torch.inference_mode():
        expected = net(ids).logits
    quicken(net)
    net.add_adapter("other", LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    kinds = {".".join(name.split(".")[-2:]): type(module) for name, module in net.named_modules()}
    assert kinds["k_proj.base_layer"] is kinds["self_attn.v_proj"] is kinds["model.lm_head"] is HalfLinear
    assert kinds["q_proj.base_layer"] is kinds["down_proj.base_layer"] is torch.nn.Linear
    assert not [name for name, module in net.named_modules() if "lora_" in name and type(module) is HalfLinear]
    with torch.inference_mode():
        torch.testing.assert_close(net(ids).logits, expected, atol=1e-5, rtol=1e-4)


@needs_half
@pytest.mark.parametrize("family", ["gemma_sft.ft_gemma", "qwen2_sft.ft_qwen2", "chatglm_sft.ft_chatglm"])
def test_one_short_answer_does_not_wait_for_what_makes_later_ones_faster(family, monkeypatch):
    """predict.py --query loads a model as it is; every other use of it prepares its weights."""
    predict, asked = importlib.import_module(f"{family}.predict"), []
    load = predict.load_answer
    monkeypatch.setattr(predict, "load_answer", lambda *args, **how: asked.append(load(*args, **how)) or asked[-1])
    monkeypatch.setattr("sys.stdin", io.StringIO("EXIT\n"))
    predict.main(["--base", "--query", "你好", "--max_new_tokens", "2"])
    predict.main(["--base"])
    packed = [any(type(module) is HalfLinear for module in answer.net.modules()) for answer in asked]
    assert packed == [False, True]


@pytest.mark.parametrize("family", ["qwen", "gemma", "glm4"])
def test_a_replayed_step_is_the_models(family, request):
    """Of other rows and columns than were recorded, after rows have come and gone too."""
    package = {"qwen": "qwen2_sft.ft_qwen2", "gemma": "gemma_sft.ft_gemma", "glm4": "chatglm_sft.ft_glm4"}[family]
    config = importlib.import_module(f"{package}.config").Config
    folder = str(request.getfixturevalue(f"small_{family}"))
    cfg = config(path_model_pretrain=folder, model_save_dir="/nowhere")
    net = importlib.import_module(f"{package}.predict").load_answer(cfg, base=True).net
    with torch.inference_mode():
        replay = record(net)
        assert replay
        ours, theirs = (
            [KVBatch(net, "ab", [list(range(9, 30)), [7]], 0), KVBatch(net, "c", [[8] * 50], 0)] for _ in range(2)
        )
        for used, (first, late) in ((replay, ours), (None, theirs)):
            first.prefill(512), late.prefill(512)
            first.step([5, 6], used)
            first.join(late)
            first.step([5, 6, 7], used)
            first.keep([0, 2])
        for id_ in range(5, 5 + 70):
            torch.testing.assert_close(ours[0].step([id_, 9], replay), theirs[0].step([id_, 9]))
        assert torch.equal(ours[0].mask, theirs[0].mask)


def test_a_sliding_window_is_replayed():
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16, "max_position_embeddings": 128}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    net = Gemma3ForCausalLM(Gemma3TextConfig(**shape, layer_types=kinds)).eval()
    with torch.inference_mode():
        replay, (ours, theirs) = record(net), (KVBatch(net, "a", [[3, 4]], 0) for _ in range(2))
        for batch in (ours, theirs):
            batch.prefill(512)
        for id_ in range(5, 40):  # beyond the window
            torch.testing.assert_close(ours.step([id_], replay), theirs.step([id_]))


class Guessing(torch.nn.Module):
    """A head that is one of an even number of rows and another of an odd one, which a recording does not see."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden):
        found = self.head(hidden)
        return -found if len(hidden) % 2 else found


def test_what_the_recording_does_not_hold_is_not_replayed(small_qwen):
    net = AutoModelForCausalLM.from_pretrained(small_qwen).eval()
    net.config.rope_parameters = {**net.config.rope_parameters, "rope_type": "dynamic"}
    with torch.inference_mode():
        assert record(net) is None
        net.config.rope_parameters = {**net.config.rope_parameters, "rope_type": "default"}
        assert record(net)
        net.lm_head = Guessing(net.lm_head)
        assert record(net) is None  # found when other rows are tried


def test_large_layers_of_float32_are_replayed():
    shape = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1}
    net = Qwen2ForCausalLM(Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()
    assert "forward" in vars(quicken(net).lm_head)
    with torch.inference_mode():
        replay, (ours, theirs) = record(net), (KVBatch(net, "ab", [[3, 4], [5]], 0) for _ in range(2))
        for batch in (ours, theirs):
            batch.prefill(512)
        torch.testing.assert_close(ours.step([6, 7], replay), theirs.step([6, 7]))


def test_experts_are_not_replayed():
    """Which of them computes depends on the values."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
    with torch.inference_mode():
        assert record(Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).eval()) is None
