"""The cheaper forms of layers give the values and gradients of the plain ones, and keep less."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.model import frozen_layers
from common.model.loss import supervised
from common.training import memory, tuning
from gemma_sft.ft_gemma.config import Config


@pytest.fixture(params=["AVX2", "AVX-512"])
def cpu(request, monkeypatch):
    """The products are those of this kind of CPU, on any."""
    monkeypatch.setattr(frozen_layers, "has_avx512", lambda: request.param == "AVX-512")
    return request.param


@pytest.fixture(params=["all-linear", "q_proj"], ids=["trained gates", "frozen gates"])
def nets(request, small_gemma, monkeypatch, cpu):
    """A plain model with LoRA in training, and the same made lean."""
    torch.manual_seed(0)
    monkeypatch.setattr(frozen_layers, "ROWS", 32)  # several parts of a gated layer
    config = Config(lora_dropout=0.0, target_modules=(request.param,))
    plain = tuning.make_trainable(AutoModelForCausalLM.from_pretrained(small_gemma), config).train()
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    cheaper = copy.deepcopy(plain)
    with supervised(plain), supervised(cheaper), frozen_layers.lean(cheaper):
        yield plain, cheaper


def batch(length=24):
    ids = (torch.arange(2 * length).view(2, length) * 7) % 200 + 5
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_loss_and_gradients_are_those_of_the_plain_layers(nets):
    losses = [net(**batch()).loss for net in nets]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in net.named_parameters() if p.requires_grad} for net in nets]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_less_is_kept_for_the_backward_pass(nets):
    plain, cheaper = (memory.kept_by(net, batch(64))[0] for net in nets)
    layers, width = 2, nets[0].config.intermediate_size
    assert plain - cheaper == pytest.approx(layers * 2 * 64 * width * 4, rel=0.1), "act(gate), a layer and id"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products(dtype, cpu):
    x, weight = torch.randn(3, 5, 16).to(dtype), torch.randn(7, 16).to(dtype)
    torch.testing.assert_close(frozen_layers.times_transposed(x, weight), x @ weight.T)
    torch.testing.assert_close(frozen_layers.times_transposed(x, weight.T.contiguous().T), x @ weight.T)


def test_autocast_is_respected():
    x, weight = torch.randn(5, 16), torch.randn(7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen_layers.times_transposed(x, weight).dtype == torch.bfloat16


def test_layers_that_learn_stay_as_they_are(small_gemma):
    net = AutoModelForCausalLM.from_pretrained(small_gemma)
    layer = net.model.layers[0].self_attn.q_proj
    with frozen_layers.lean(net):
        assert "forward" not in vars(layer)
    layer.weight.requires_grad = False
    with frozen_layers.lean(net):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)


def test_gates_that_learn_nothing_are_one_step_of_the_backward_pass(small_gemma):
    net = AutoModelForCausalLM.from_pretrained(small_gemma).requires_grad_(False)
    layer = net.model.layers[0].mlp
    hidden = torch.randn(2, 3, net.config.hidden_size, requires_grad=True)
    with frozen_layers.lean(net):
        assert type(layer(hidden).grad_fn).__name__ == "_FrozenGatedBackward"
    layer.up_proj.weight.requires_grad = True
    with frozen_layers.lean(net):
        assert type(layer(hidden).grad_fn).__name__ != "_FrozenGatedBackward"


def test_the_backward_pass_casts_as_the_forward_pass_did(small_gemma):
    net = AutoModelForCausalLM.from_pretrained(small_gemma).requires_grad_(False)
    plain, layer = copy.deepcopy(net).model.layers[0].mlp, net.model.layers[0].mlp
    hidden = torch.randn(2, 3, net.config.hidden_size, requires_grad=True)
    with frozen_layers.lean(net), torch.autocast("cpu", torch.bfloat16):
        found, expected = layer(hidden), plain(hidden)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.float().square().sum(), hidden)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


def test_a_model_may_change_in_place_what_a_layer_gives(small_gemma):
    net = AutoModelForCausalLM.from_pretrained(small_gemma).requires_grad_(False)
    hidden = torch.randn(2, 3, net.config.hidden_size, requires_grad=True)
    for layer in (net.model.layers[0].self_attn.q_proj, net.model.layers[0].mlp):
        (expected,) = torch.autograd.grad(layer(hidden).mul_(2).square().sum(), hidden)
        with frozen_layers.lean(net):
            (found,) = torch.autograd.grad(layer(hidden).mul_(2).square().sum(), hidden)
        torch.testing.assert_close(found, expected)


def test_few_numbers_of_rows_reach_onednn():
    met = set()
    whole = torch.ops.mkldnn._linear_pointwise

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is whole.default:
                met.add(len(args[0]))
            return function(*args, **(kwargs or {}))

    weight = torch.randn(7, 16)
    with Watch():
        for rows in range(1, 2000):
            x = torch.full((rows, 16), float(rows))
            assert frozen_layers.times_transposed(x, weight).shape == (rows, 7)
            assert 0 <= len(frozen_layers.with_pads(x)) - rows < max(16, rows / 15)
    assert len(met) < 100
    torch.testing.assert_close(frozen_layers.times_transposed(x, weight), x @ weight.T)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_which_products_onednn_makes(cpu):
    x, weight = torch.randn(5, 16), torch.randn(7, 16)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made.append(function is torch.ops.mkldnn._linear_pointwise.default)
            return function(*args, **(kwargs or {}))

    with Watch():
        frozen_layers.times_transposed(x, weight)
        forward = any(made)
        made.clear()
        frozen_layers.times_transposed(x, weight.T.contiguous().T)
    assert forward and any(made) == (cpu == "AVX-512")


@pytest.fixture
def small_weights_too(monkeypatch):
    monkeypatch.setattr(frozen_layers, "LEAST", 1)


def with_lora(base, dtype=None, **knobs):
    """`base` with LoRA in training, its numbers those of `dtype`."""
    net = AutoModelForCausalLM.from_pretrained(base)
    net = net.to(dtype).float() if dtype else net
    net = tuning.make_trainable(net, Config(lora_dropout=0.0, **{"target_modules": ("q_proj",), **knobs})).train()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def step_of(net):
    """The loss and the gradients of one step."""
    net.zero_grad()
    loss = net(**batch()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


KINDS = {
    "q_proj": {},
    "all-linear": {"target_modules": ("all-linear",)},
    "head and embeddings": {"target_modules": ("q_proj", "lm_head", "embed_tokens")},
    "head as a whole": {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_16_bits_hold_lie_in_them_and_no_bit_changes(
    small_gemma, kind, dtype, small_weights_too, monkeypatch
):
    net = with_lora(small_gemma, dtype, **KINDS[kind])
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with supervised(net), monkeypatch.context() as patched:
        patched.setattr(frozen_layers, "HALVES", ())
        with frozen_layers.lean(net):
            assert {p.dtype for p in net.parameters()} == {torch.float32}
            expected = step_of(net)
    with supervised(net), frozen_layers.lean(net):
        stored = {name for name, p in net.named_parameters() if p.dtype == dtype}
        assert any("up_proj" in name for name in stored) and any("embed_tokens" in name for name in stored)
        assert any("q_proj.base_layer" in name for name in stored) == (kind != "DoRA")
        torch.testing.assert_close(step_of(net), expected, rtol=0, atol=0)
        with frozen_layers.widened(net):
            assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert stored == {name for name, p in net.named_parameters() if p.dtype == dtype}
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_other_weights_stay_as_they_are(small_gemma, small_weights_too):
    net = with_lora(small_gemma)  # random in fp32
    with frozen_layers.lean(net):
        assert {p.dtype for p in net.parameters()} == {torch.float32}
    whole = AutoModelForCausalLM.from_pretrained(small_gemma).to(torch.bfloat16).float().requires_grad_(False)
    with frozen_layers.lean(whole):
        assert {p.dtype for p in whole.parameters()} == {torch.float32}, "no adapter: checkpoints have all weights"


def test_an_error_in_the_midst_leaves_fp32(small_gemma, small_weights_too):
    net = with_lora(small_gemma, torch.bfloat16)
    with pytest.raises(RuntimeError, match="midst"), frozen_layers.lean(net), frozen_layers.widened(net):
        raise RuntimeError("midst")
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_weights_in_16_bits_under_checkpointing(small_gemma, small_weights_too):
    net = with_lora(small_gemma, torch.bfloat16)
    with supervised(net), frozen_layers.lean(net):
        expected = step_of(net)
        net.enable_input_require_grads()
        getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)({"use_reentrant": False})
        torch.testing.assert_close(step_of(net), expected, rtol=0, atol=0)
