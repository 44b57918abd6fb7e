"""Runs of ChatGLM2 and ChatGLM3: resumed, served, exported for plain transformers, given to the other's recipes."""

import pytest
import torch
from runs import Family
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm_sft.models.chatglm2 import ChatGLM2ForCausalLM, ChatGLM2Tokenizer
from common.conversation.turns import Turn
from common.engine.batcher import Batcher
from common.engine.request import Ask
from common.errors import UserError
from common.inference.answerer import Sampling
from common.model import loading

RECIPES = {2: "chatglm_sft.ft_chatglm2", 3: "chatglm_sft.ft_chatglm3"}


@pytest.fixture(params=RECIPES)
def generation(request):
    return request.param


@pytest.fixture
def family(generation, request, tmp_path):
    return Family(RECIPES[generation], request.getfixturevalue(f"small_chatglm{generation}"), tmp_path)


STEPS = ["--max_steps", 4, "--save_steps", 2, "--val_set_size", 0]
QUESTIONS = [
    [Turn("user", "1+1")],
    [Turn("user", "问" * 40)],
    [Turn("user", "有"), Turn("assistant", "他在"), Turn("user", "3")],
]


def test_a_stopped_run_resumes_bit_for_bit_and_is_exported_for_plain_transformers(family, generation):
    whole = family.train("whole", *STEPS)
    family.stop("stopped", 2, *STEPS)
    one, two = (load_file(run / "adapter_model.safetensors") for run in (whole, family.train("stopped", *STEPS)))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    folder = family.parent / "exported"
    family.recipe("export").main(["--model_save_dir", str(whole), "--output_dir", str(folder), "--dtype", "float32"])
    names = load_file(family.base / "model.safetensors").keys()
    assert load_file(folder / "model.safetensors").keys() == names and "transformer.output_layer.weight" in names
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert type(model) is ChatGLM2ForCausalLM and type(tokenizer) is ChatGLM2Tokenizer
    answer = family.recipe("predict").load_answer(family.parse(None, "--model_save_dir", whole))
    assert model.generation_config.eos_token_id == answer.stop_ids
    for turns in QUESTIONS:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        asked = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = tokenizer.apply_chat_template(messages, **asked)
        assert ids["input_ids"][0].tolist() == answer.fitted_ids(turns)
        greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": answer.stop_ids, "pad_token_id": 0}
        said, expected = model.generate(**ids, **greedy), answer.net.generate(**ids, **greedy)
        assert torch.equal(said, expected) and said.shape[1] > ids["input_ids"].shape[1]

    sampling = Sampling(max_new_tokens=12)
    alone = [answer([turns], sampling)[0].text for turns in QUESTIONS]
    batcher = Batcher(answer, {"tuned": "default"})
    tickets = [batcher.submit("tuned", [Ask(batcher.encoder.whole_ids(turns), sampling)]) for turns in QUESTIONS]
    assert ["".join(part.text for parts in ticket.parts() for part in parts) for ticket in tickets] == alone
    batcher.close()

    other = Family(RECIPES[5 - generation], family.base, family.parent)
    for place in (folder, family.base):  # told by its chat template, by the name in its config.json
        with pytest.raises(UserError, match=f"python chatglm_sft/ft_chatglm{generation}/train.py"):
            loading.load_tokenizer(place, other.recipe("predict").prompt)


def test_a_template_without_thoughts_keeps_none(family):
    with pytest.raises(UserError, match="--thinking keep: .*its chat template shows no thought; leave it out"):
        family.train("keep", *STEPS, "--thinking", "keep")
    without = family.train("none", *STEPS, "--thinking", "none")
    assert (
        family.recipe("predict").load_answer(family.parse(None, "--model_save_dir", without)).fitted_ids(QUESTIONS[0])
    )
