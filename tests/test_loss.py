"""The chunked loss equals a plain full-logits cross entropy: value and every gradient."""

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

from common.model import frozen_layers, loading, loss
from common.model.loss import IGNORED, supervised

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
    """No tensor of the forward or backward pass has more rows of the vocabulary's width than a chunk."""
    monkeypatch.setattr(loss, "LOGITS", 64 * 300)
    model, batch = make_model("gemma", train_head), make_batch("all")
    rows = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == 300:
                    rows.append(tensor.numel() // 300)
            return result

    with supervised(model), Watch():
        model(**batch).loss.backward()
    assert 0 < max(rows) <= 64 < int((batch["labels"] != IGNORED).sum())


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
