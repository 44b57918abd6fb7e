"""What makes answering faster and changes no answer: a cache with room, weights of 16 bits read as such."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from common.engine.kv_batch import KVBatch
from common.inference.cache import ROOM, RoomyLayer, roomy_cache
from common.inference.products import HalfLinear, quicken

HALF = "fbgemm" in torch.backends.quantized.supported_engines
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
    config = AutoModelForCausalLM.from_pretrained(small_qwen).config
    assert {type(one) for one in roomy_cache(config).layers} == {RoomyLayer}


@needs_half
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (3, 5, 24), (0, 24)])
def test_weights_of_bfloat16_lose_nothing(bias, shape):
    layer = torch.nn.Linear(24, 40, bias=bias).bfloat16().float().requires_grad_(False)
    net = quicken(torch.nn.Sequential(copy.deepcopy(layer)))
    assert type(net[0]) is HalfLinear and torch.equal(net[0].weight, layer.weight)
    assert net[0].bias is None if not bias else torch.equal(net[0].bias, layer.bias)
    x = torch.randn(shape)
    torch.testing.assert_close(net(x), layer(x))
    assert not list(net.parameters())  # the weights are held once


def test_weights_that_float16_does_not_hold_stay():
    fine, large, small = (torch.nn.Linear(8, 8, bias=False) for _ in range(3))
    torch.nn.init.constant_(large.weight, 1e5)
    torch.nn.init.constant_(small.weight, 2.0**-26)  # less than a step of float16, as bfloat16 may hold
    with torch.no_grad():
        small.weight[0] = 1
    net = quicken(torch.nn.Sequential(fine, large, small))
    assert type(net[0]) is type(net[1]) is torch.nn.Linear
    assert type(net[2]) is (HalfLinear if HALF else torch.nn.Linear)


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
def test_an_adapter_is_left_as_it_is_over_a_base_that_is_not(small_qwen):
    """… DoRA, which asks for the base's weights, too; and a second adapter can be attached."""
    base = AutoModelForCausalLM.from_pretrained(small_qwen).bfloat16().float()
    config = LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False)
    net = get_peft_model(base, config).eval()
    ids = torch.arange(8, 20)[None]
    with torch.inference_mode():
        expected = net(ids).logits
    quicken(net)
    net.add_adapter("other", LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    kinds = {name.rpartition(".")[2]: type(module) for name, module in net.named_modules()}
    assert kinds["base_layer"] is kinds["v_proj"] is kinds["lm_head"] is HalfLinear
    assert not [name for name, module in net.named_modules() if "lora_" in name and type(module) is HalfLinear]
    with torch.inference_mode():
        torch.testing.assert_close(net(ids).logits, expected, atol=1e-5, rtol=1e-4)
