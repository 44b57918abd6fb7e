"""Several adapters in one process: each name answers as its run does alone, whatever the others are doing."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from common.conversation.turns import Turn
from common.engine.batcher import Batcher
from common.engine.request import Ask
from common.errors import UserError
from common.inference.answerer import Answerer, Sampling
from common.model import adapter, loading
from common.serving import adapters
from common.serving.app import Service, create_app
from gemma_sft import prompt

QUESTIONS = [f"{n}+{n}=有他问答" for n in range(6)]


@pytest.fixture(scope="module")
def runs(small_gemma, tmp_path_factory):
    """Folders of four adapters that make a difference."""
    folders = []
    for seed, modules, rows in ((1, None, None), (2, None, None), (3, ["norm"], None), (6, None, [5, 280])):
        folders.append(tmp_path_factory.mktemp("run"))
        torch.manual_seed(seed)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=modules)
        lora.trainable_token_indices = rows
        net = get_peft_model(loading.load_base(small_gemma, "float32"), lora)
        for name, parameter in net.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        net.save_pretrained(folders[-1])
    return folders


def answerer(base, *folders):
    net = loading.load_base(base, "float32")
    if folders:
        net = adapter.attach(net, folders[0])
    return Answerer(net, loading.load_tokenizer(base, prompt), prompt, "chat", 512)


def test_each_name_answers_as_its_run_alone(small_gemma, runs):
    greedy = Sampling(max_new_tokens=16)
    alone = {"base": answerer(small_gemma), "tuned": answerer(small_gemma, runs[0])}
    alone |= {name: answerer(small_gemma, run) for name, run in zip(("a.b", "1", "c"), runs[1:], strict=True)}
    expected = {
        name: [one([[Turn("user", question)]], greedy)[0].text for question in QUESTIONS] for name, one in alone.items()
    }
    assert len({tuple(texts) for texts in expected.values()}) == 5
    answer = answerer(small_gemma, runs[0])
    names = adapters.load(answer, [f"a.b={runs[1]}", f"1={runs[2]}", f"c={runs[3]}"])
    assert list(names) == ["tuned", "base", "a.b", "1", "c"] and names["base"] is None
    batcher = Batcher(answer, names)
    ids = [batcher.encoder.whole_ids([Turn("user", question)]) for question in QUESTIONS]
    tickets = [(name, batcher.submit(name, [Ask(one, greedy)])) for one in ids for name in names]
    found = {name: [] for name in names}
    for name, ticket in tickets:
        found[name].append("".join(part.text for parts in ticket.parts() for part in parts))
    batcher.close()
    assert found == expected


def test_adapters_beside_the_base_alone(small_gemma, runs):
    answer = answerer(small_gemma)
    assert adapters.load(answer, [f"a={runs[1]}"], "base") == {"base": None, "a": "adapter_1"}


@pytest.mark.parametrize("spec", ["a", "=x", "base=x", "tuned=x", "a b=x", "default=x", "a/b=x", "客服=x"])
def test_names(small_gemma, runs, spec):
    with pytest.raises(UserError, match="name=folder.* A-Z a-z 0-9 .*not yet taken .*default"):
        adapters.load(answerer(small_gemma, runs[0]), [spec])


def test_what_does_not_fit_is_refused(small_gemma, runs, tmp_path):
    answer = answerer(small_gemma, runs[0])
    with pytest.raises(UserError, match="--adapters .*no adapter"):
        adapters.load(answer, [f"a={tmp_path}"])
    with pytest.raises(UserError, match="not yet taken"):
        adapters.load(answer, [f"a={runs[1]}", f"a={runs[2]}"])
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    manifest = {"base": {"sha256": "0", "path": "another"}, "template": {"style": "chat"}}
    (run / "run_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="trained on another"):
        adapters.load(answer, [f"c={run}"])


def test_each_answers_with_the_penalty_it_was_trained_by(small_gemma, runs, tmp_path):
    """Unless the service, or a request, has another."""
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    told = {"base": {"path": "x"}, "template": {}, "config": {"repetition_penalty": 1.9}}
    (run / "run_manifest.json").write_text(json.dumps(told))
    answer = answerer(small_gemma)
    batcher = Batcher(answer, adapters.load(answer, [f"a={runs[1]}"], "base"))
    penalties = adapters.penalties([f"a={run}", f"b={runs[2]}"])
    assert penalties == {"a": 1.9}
    client = create_app(Service("m", "base", batcher, Sampling(max_new_tokens=24), penalties)).test_client()

    def said(**fields):
        body = {"messages": [{"role": "user", "content": "有他问答"}], "temperature": 0, **fields}
        return client.post("/v1/chat/completions", json=body, buffered=True).json["choices"][0]["message"]["content"]

    own, base = said(model="a"), said(model="base")
    assert own == said(model="a", repetition_penalty=1.9) != said(model="a", repetition_penalty=1)
    assert base == said(model="base", repetition_penalty=1) == said()
    batcher.close()


def test_rows_of_one_adapter_are_not_left_to_another(small_gemma, runs):
    """Whichever is loaded first."""
    ids = torch.tensor([[2, 5, 280, 6, 281, 5, 283]])
    alone = [adapter.attach(loading.load_base(small_gemma, "float32"), run)(input_ids=ids).logits for run in runs[2:]]
    net = adapter.attach(loading.load_base(small_gemma, "float32"), runs[3], "rows")
    net = adapter.attach(net, runs[2], "none")
    for name, expected in (("none", alone[0]), ("rows", alone[1]), ("none", alone[0])):
        net.set_adapter(name, inference_mode=True)
        assert torch.equal(net(input_ids=ids).logits, expected), name
    with net.disable_adapter():
        assert torch.equal(net(input_ids=ids).logits, loading.load_base(small_gemma, "float32")(input_ids=ids).logits)
