"""The chunked loss equals a plain full-logits cross entropy: value and every gradient."""

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

from common.model import frozen_head, frozen_layers, loading, loss
from common.model.loss import IGNORED, supervised
from common.model.token_rows import Rows

SHAPE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True, "initializer_range": 0.3}


def make_model(kind, train_head):
    torch.manual_seed(0)
    if kind == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**SHAPE, **HEADS))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, **HEADS, final_logit_softcapping=2.0))
    model.lm_head.weight.requires_grad_(train_head)
    return model.train()


def make_batch(counted):
    """Four padded rows; `counted` says which ids are supervised, as loss_on does."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (4, 150), generator=generator)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, IGNORED)
    for row, length in enumerate((150, 90, 33, 7)):
        mask[row, length:] = 0
        start = {"all": 1, "answer": length // 2, "last": length - 3}[counted]
        labels[row, start:length] = ids[row, start:length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_loss(model, batch):
    """Cross entropy over [batch, length, vocabulary] logits, written as plainly as can be."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORED
    )


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("counted", ["all", "answer", "last"])
@pytest.mark.parametrize("kind", ["gemma", "gemma2 with soft cap"])
def test_equals_plain_cross_entropy(kind, counted, train_head, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 64 * 300)  # several chunks
    monkeypatch.setattr(frozen_head, "BLOCK", 64)  # the last one of 44
    monkeypatch.setattr(frozen_head, "POSITIONS", 48)
    model, batch = make_model(kind, train_head), make_batch(counted)
    expected = plain_loss(model, batch)
    expected.backward()
    expected_gradients = gradients(model)
    with supervised(model):
        found = model(**batch).loss
        found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found_gradients = gradients(model)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-5 * scale, name


def test_softcap_changes_the_loss():
    with_cap, batch = make_model("gemma2 with soft cap", False), make_batch("all")
    without = make_model("gemma2 with soft cap", False)
    without.config.final_logit_softcapping = None
    with supervised(with_cap), supervised(without):
        assert abs(with_cap(**batch).loss.item() - without(**batch).loss.item()) > 1e-4


@pytest.mark.parametrize("train_head", [False, True], ids=["frozen head", "trained head"])
def test_never_makes_all_logits(monkeypatch, train_head):
    """No tensor of the forward or backward pass has more numbers than a chunk of logits; all are 60,000."""
    monkeypatch.setattr(loss, "LOGITS", 64 * 300)
    monkeypatch.setattr(frozen_head, "BLOCK", 64)
    head = torch.nn.Linear(8, 300, bias=False).requires_grad_(train_head)
    hidden, targets = torch.randn(200, 8, requires_grad=True), torch.arange(200)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            leaves = torch.utils._pytree.tree_leaves(result)
            sizes.extend(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor))
            return result

    with Watch():
        loss.token_losses(hidden, targets, head, 300, None if train_head else head.weight).sum().backward()
    assert 200 * 44 < max(sizes) <= 64 * 300


@pytest.mark.parametrize("rows", [0, 2], ids=["frozen", "two rows trained"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_walk_over_the_head_equals_all_its_logits_at_once(monkeypatch, softcap, smoothing, rows):
    """Losses and every gradient, rows that are trained and wanted included, in float64's eyes."""
    monkeypatch.setattr(frozen_head, "BLOCK", 64)
    monkeypatch.setattr(frozen_head, "POSITIONS", 32)
    torch.manual_seed(0)
    hidden, weight, ids = torch.randn(70, 8) * 3, torch.randn(300, 8), torch.tensor([5, 130])[:rows]
    values, targets = torch.randn(rows, 8), torch.randint(0, 300, (70,))
    targets[:3] = torch.tensor([5, 130, 299])
    found_in = [hidden.clone().requires_grad_(), values.clone().requires_grad_()]
    trained = Rows(ids, found_in[1]) if rows else None
    found = loss.token_losses(found_in[0], targets, lambda x: x, 300, weight, softcap, smoothing, trained)
    expected_in = [hidden.double().requires_grad_(), values.double().requires_grad_()]
    logits = expected_in[0] @ weight.double().index_copy(0, ids, expected_in[1]).T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.rand(70)
    (found * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for one, other in zip(found_in[: 1 + bool(rows)], expected_in, strict=False):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["gemma", "gemma2 with soft cap"])
def test_lora_on_the_head_equals_plain_cross_entropy(kind, smoothing, monkeypatch):
    """Value and every gradient, through the walk over the frozen head; the base is as large as what LoRA adds."""
    monkeypatch.setattr(frozen_head, "BLOCK", 64)
    monkeypatch.setattr(frozen_head, "POSITIONS", 48)
    walks = []
    monkeypatch.setattr(frozen_head, "with_pads", lambda flat: walks.append(len(flat)) or frozen_layers.with_pads(flat))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head", "embed_tokens"])
    net = get_peft_model(make_model(kind, False), config)
    torch.nn.init.normal_(net.get_output_embeddings().lora_B["default"].weight)
    batch = make_batch("answer")
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=smoothing
    )
    expected.backward()
    expected_gradients = gradients(net)
    with supervised(net, smoothing):
        found = net(**batch).loss
        found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    found_gradients = gradients(net)
    assert walks and found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        scale = expected_gradients[name].abs().max()
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-5 * scale, name


def test_no_position_is_learnt_from():
    hidden = torch.randn(0, 8, requires_grad=True)
    found = loss.token_losses(hidden, torch.arange(0), lambda x: x, 300, torch.randn(300, 8))
    found.sum().backward()
    assert found.shape == (0,) and hidden.grad.shape == (0, 8)


def test_what_a_sure_position_teaches_is_not_lost_in_bfloat16():
    """The gradient is (p - 1) × the wanted row there; p alone is rounded by more than 1 - p."""
    weight = torch.eye(16)
    hidden = 9 * torch.eye(16)[:4]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        x = hidden.to(dtype).detach().clone().requires_grad_()
        loss.token_losses(x, torch.arange(4), lambda y: y, 16, weight.to(dtype)).sum().backward()
        gradients.append(x.grad.float())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=1e-6)


def test_eight_micro_batches_of_one_equal_one_of_eight():
    """Sum over supervised ids / their number, whatever the split: not a mean of means."""
    model, batch = make_model("gemma", False), make_batch("answer")
    count = (batch["labels"] != IGNORED).sum()
    with supervised(model):
        model(**batch, num_items_in_batch=count).loss.backward()
        whole = gradients(model)
        for row in range(4):
            model(**{k: v[row : row + 1] for k, v in batch.items()}, num_items_in_batch=count).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-7)


def test_evaluation_returns_the_sums_of_each_row():
    model, batch = make_model("gemma", False).eval(), make_batch("answer")
    expected = plain_loss(model, batch)
    with torch.no_grad(), supervised(model):
        sums, counts = model(**batch).logits.T
    assert counts.tolist() == (batch["labels"] != IGNORED).sum(1).tolist()
    torch.testing.assert_close(sums.sum() / counts.sum(), expected, rtol=1e-5, atol=0)


def test_bfloat16_autocast_is_close():
    model, batch = make_model("gemma", False), make_batch("answer")
    with supervised(model):
        expected = model(**batch).loss
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**batch).loss
        found.backward()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


def test_without_labels_the_forward_is_the_models_own():
    model, batch = make_model("gemma", False).eval(), make_batch("answer")
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected = model(**ids).logits
    with supervised(model):
        assert torch.equal(model(**ids).logits, expected)
        assert model(**ids).loss is None


def test_afterwards_the_model_is_as_it_was(small_gemma):
    model = loading.load_base(small_gemma, "float32").requires_grad_(False)
    patched = ("forward", "_original_forward", "accepts_loss_kwargs")
    batch = {"input_ids": torch.tensor([[2, 5, 9, 11]]), "labels": torch.tensor([[-100, 5, 9, 11]])}
    expected = model(**batch)
    with pytest.raises(RuntimeError, match="in the midst"), loss.supervised(model), frozen_layers.lean(model):
        assert model(**batch).logits.shape == (1, 2)
        assert "forward" in vars(model.model.layers[0].mlp) and "forward" in vars(model.lm_head)
        model._original_forward = model.forward  # what accelerate does to a model it prepares for bf16
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
        assert model(input_ids=batch["input_ids"]).logits.dtype == torch.float32
        raise RuntimeError("in the midst")
    assert not [name for module in model.modules() for name in patched if name in vars(module)]
    found = model(**batch)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize(
    "vocabulary, where, rows", [(256_000, "cpu", 64), (64_000, "cpu", 128), (256_000, "cuda", 256), (10**9, "cpu", 16)]
)
def test_a_chunk_of_logits_has_at_most_so_many_bytes_and_rows(vocabulary, where, rows):
    assert loss.chunk_rows(vocabulary, where) == rows
