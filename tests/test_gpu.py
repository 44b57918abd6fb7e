"""What a CUDA card does otherwise than a CPU: `python -m pytest -m gpu` where there is one; elsewhere they are skipped.

The other tests see no card, so that they find the same values on every machine.
"""

import copy
import importlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.cli import parse
from common.config import PredictFlags
from common.conversation.turns import Turn
from common.device import device
from common.inference.answerer import Sampling
from common.model import frozen_layers
from common.model.loss import supervised
from common.training import tuning
from gemma_sft.ft_gemma.config import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card, or `-m gpu` was not asked for"),
]


def batch(device):
    ids = (torch.arange(2 * 24).view(2, 24) * 7) % 200 + 5
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


@pytest.fixture(params=["all-linear", "q_proj"], ids=["trained gates", "frozen gates"])
def nets(request, small_gemma):
    """A model in training on the CPU as transformers makes it, and the same on the card as a run trains it."""
    torch.manual_seed(0)
    config = Config(lora_dropout=0.0, target_modules=(request.param,))
    plain = tuning.make_trainable(AutoModelForCausalLM.from_pretrained(small_gemma), config).train()
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ours = copy.deepcopy(plain).to(device())
    with supervised(plain), supervised(ours), frozen_layers.lean(ours):
        yield plain, ours


def test_loss_and_gradients_are_those_of_the_cpu(nets):
    losses = [net(**batch(net.device)).loss for net in nets]
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    on_cpu, on_card = ({name: p.grad for name, p in net.named_parameters() if p.requires_grad} for net in nets)
    for name, gradient in on_cpu.items():
        torch.testing.assert_close(on_card[name].cpu(), gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_bfloat16_keeps_the_loss_in_float32(nets):
    plain, ours = nets
    expected = plain(**batch("cpu")).loss
    with torch.autocast("cuda", torch.bfloat16):
        found = ours(**batch(ours.device)).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, rtol=0.02, atol=0)
    found.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)


@pytest.fixture(params=["gemma_sft/ft_gemma", "qwen2_sft/ft_qwen2", "chatglm_sft/ft_chatglm"])
def family(request):
    return request.param


@pytest.mark.parametrize("flags", [["lora"], ["full"], ["qlora"], ["qlora", "--quantization_bit", 8]], ids=str)
def test_a_run_on_the_embedded_base_learns_and_answers(family, flags, recipe, tmp_path):
    """dtype auto is bfloat16 here; what is saved is checked by the run itself."""
    common = ["--tuning", *flags, "--model_save_dir", tmp_path / "out", "--max_new_tokens", 8]
    steps = ["--max_steps", 12, "--micro_batch_size", 4, "--batch_size", 4, "--logging_steps", 1, "--eval_rows", 4]
    trained = recipe("train.py", *common, *steps, "--cache_dir", tmp_path / "cache", family=family)
    assert trained.returncode == 0, trained.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/trainer_log.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    answered = recipe("predict.py", *common, "--query", "类型#裙*颜色#黑色", family=family)
    assert answered.returncode == 0, answered.stderr


QUESTIONS = [
    [Turn("user", "类型#裙*颜色#黑色")],
    [Turn("user", "裙" * 40)],
    [Turn("user", "你好"), Turn("assistant", "你好"), Turn("user", "类型#裤")],
]


def test_answers_do_not_depend_on_the_batch(family):
    package = family.replace("/", ".")
    config, predict = (importlib.import_module(f"{package}.{name}") for name in ("config", "predict"))
    answer = predict.load_answer(parse(config.Config, PredictFlags, ["--dtype", "float32"])[0], base=True)
    greedy = Sampling(max_new_tokens=12)
    assert answer.net.device.type == "cuda"
    assert answer(QUESTIONS, greedy) == [answer([turns], greedy)[0] for turns in QUESTIONS]
