"""Exported models: merged, written, reloaded by plain transformers, and refused where they answer otherwise."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.cli import parse
from common.config import PredictFlags
from common.conversation import templates
from common.conversation.render import ANSWER, FRAME, QUESTION, Piece, encode_text, special_id, template_text
from common.conversation.turns import Turn, in_order, said
from common.errors import UserError
from common.export import folder, merging, proof
from common.inference.answerer import Sampling
from common.model import loading
from gemma_sft import prompt as gemma_prompt

# families whose exported folder plain transformers loads; a family more is one entry more
FAMILIES = ["gemma_sft.ft_gemma", "qwen2_sft.ft_qwen2"]
DATA = Path(__file__).resolve().parents[1] / "data"
ROWS, QUESTIONS = f"{DATA / 'product_train.jsonl'}#80", str(DATA / "product_heldout.jsonl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(family): a short run on the family's embedded base, made once."""
    folders = {}

    def train(family):
        if family not in folders:
            parent = tmp_path_factory.mktemp("trained")
            flags = ["--data_path", ROWS, "--eval_data_path", QUESTIONS, "--max_steps", 16]
            flags += ["--model_save_dir", parent / "run"]
            flags += ["--eval_rows", 0, "--val_set_size", 0, "--micro_batch_size", 4, "--batch_size", 4]
            importlib.import_module(f"{family}.train").main([*map(str, flags), "--cache_dir", str(parent / "cache")])
            folders[family] = parent / "run"
        return folders[family]

    return train


def exported(family, run, *flags):
    importlib.import_module(f"{family}.export").main(["--model_save_dir", str(run), *map(str, flags)])


TRANSFORMERS_ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
answers, logits = [], []
with torch.no_grad():
    for text in prompts:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                            return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=24, do_sample=False)
        answers.append(tokenizer.decode(output[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
        logits.append(model(**ids).logits[0, -1])
torch.save(torch.stack(logits), folder + "/../logits.pt")
print(json.dumps([answers, "peft" in sys.modules, "common" in sys.modules]))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_gives_the_adapters_answers(family, trained, tmp_path, capsys, monkeypatch):
    run = trained(family)
    monkeypatch.setattr(folder, "SHARD", "3MB")
    exported(family, run, "--output_dir", tmp_path / "whole", "--dtype", "float32")
    shards = list((tmp_path / "whole").glob("model-*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_mode & 0o044 for shard in shards)
    printed = capsys.readouterr().out
    stages = "loading: answering: merging: comparing: writing: reloading:".split()
    assert [word for word in printed.split() if word in stages] == stages
    assert printed.count("greedy answers equal 8/8") == 2 and "done: 完整模型 whole model (float32)" in printed
    prompts = [json.loads(line)["content"] for line in Path(QUESTIONS).read_text().splitlines()[:8]]
    command = [sys.executable, "-c", TRANSFORMERS_ALONE, str(tmp_path / "whole"), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers, *foreign = json.loads(done.stdout.splitlines()[-1])
    assert foreign == [False, False]
    predict = importlib.import_module(f"{family}.predict")
    answer = predict.load_answer(
        parse(importlib.import_module(f"{family}.config").Config, PredictFlags, ["--model_save_dir", str(run)])[0]
    )
    questions = [[Turn("user", text)] for text in prompts]
    with torch.no_grad():
        ids = [torch.tensor([answer.fitted_ids(turns)]) for turns in questions]
        expected = torch.stack([answer.net(input_ids=row).logits[0, -1] for row in ids])
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert (theirs - expected).abs().max() < 1e-4 * expected.abs().max()
    greedy = Sampling(max_new_tokens=24)
    assert [text.strip() for text in answers] == [answer([turns], greedy)[0].text for turns in questions]
    assert len(set(answers)) > 4, "the prompts must tell something"


def test_the_folder_is_what_engines_load(trained, tmp_path, capsys):
    run = shutil.copytree(trained("gemma_sft.ft_gemma"), tmp_path / "moved/run")
    exported("gemma_sft.ft_gemma", run, "--output_dir", tmp_path / "whole")
    whole = tmp_path / "whole"
    weights = load_file(whole / "model.safetensors")
    assert "lm_head.weight" not in weights, "mlx-lm and keras-hub refuse a tied head written twice"
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}, "the dtype of the base's own files"
    config = json.loads((whole / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["dtype"] == "bfloat16"
    generation = json.loads((whole / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [6, 1] and generation["bos_token_id"] == 2 and generation["pad_token_id"] == 0
    assert (whole / "chat_template.jinja").read_text() == gemma_prompt.CHAT_TEMPLATE.replace("\\n", "\n")
    assert (whole / "Modelfile").read_text() == (
        "FROM ./whole.gguf\n"
        'TEMPLATE """{{ if .System }}<start_of_turn>user\n{{ .System }}\n\n{{ else }}<start_of_turn>user\n'
        "{{ end }}{{ .Prompt }}<end_of_turn>\n<start_of_turn>model\n{{ .Response }}<end_of_turn>\n"
        '"""\nPARAMETER stop "<end_of_turn>"\nPARAMETER stop "<eos>"\nPARAMETER repeat_penalty 1.0\n'
    )
    printed = capsys.readouterr().out
    lines = (
        f"vllm serve {whole}",
        f"export.py --model_save_dir {run} ",
        f"cd {run}_gguf && ollama create run_gguf -f",
        "mlx_lm.generate --model",
    )
    assert all(line in printed for line in lines)
    assert "keras:       不能 cannot: 需要 needs tokenizer.model" in printed
    assert f"--enable-lora --max-lora-rank 16 --lora-modules run={run}" in printed


def test_nothing_is_overwritten(trained, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists and is not overwritten"):
        exported("gemma_sft.ft_gemma", trained("gemma_sft.ft_gemma"), "--output_dir", tmp_path / "whole")
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["mine.txt"]


def test_a_run_that_is_not_whole_is_refused(trained, tmp_path):
    with pytest.raises(UserError, match="no trained run here"):
        exported("gemma_sft.ft_gemma", tmp_path / "none")
    run = tmp_path / "run"
    run.mkdir()
    for file in trained("gemma_sft.ft_gemma").iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((run / "run_manifest.json").read_text())
    (run / "run_manifest.json").write_text(json.dumps(manifest | {"base": manifest["base"] | {"sha256": "other"}}))
    with pytest.raises(UserError, match="基座模型 base model 与训练时不同"):
        exported("gemma_sft.ft_gemma", run)
    (run / "run_manifest.json").write_text(json.dumps(manifest | {"state": "training"}))
    with pytest.raises(UserError, match="the run is not finished"):
        exported("gemma_sft.ft_gemma", run)
    assert not (tmp_path / "run_merged").exists()


def test_a_merge_that_changes_the_answers_is_refused(trained, tmp_path, monkeypatch):
    merged = merging.merge

    def without_the_adapter(tuned):
        merged(tuned)
        return loading.load_base(tuned.manifest["base"]["path"], "float32")

    monkeypatch.setattr(merging, "merge", without_the_adapter)
    with pytest.raises(UserError, match="the exported model differs: a logit by"):
        exported("gemma_sft.ft_gemma", trained("gemma_sft.ft_gemma"), "--output_dir", tmp_path / "whole")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [0.5, float("nan")])
def test_a_written_folder_that_reloads_otherwise_is_removed(trained, tmp_path, monkeypatch, damage):
    save = folder.save

    def spoiled(net, *rest):
        net.get_input_embeddings().weight.data[:300] += damage
        save(net, *rest)

    monkeypatch.setattr(folder, "save", spoiled)
    with pytest.raises(UserError, match="the exported model differs: a logit by"):
        exported("gemma_sft.ft_gemma", trained("gemma_sft.ft_gemma"), "--output_dir", tmp_path / "whole")
    assert list(tmp_path.iterdir()) == []


def test_an_answer_may_only_part_at_a_tie():
    logits = torch.tensor([[0.0, 5.0, 4.999], [0.0, 1.0, 9.0], [7.0, 0.0, 0.0]])
    assert proof.same_answer([1, 2], [1, 2], logits, 0.01) is True
    assert proof.same_answer([2, 0], [1, 2], logits, 0.01) is False
    with pytest.raises(UserError, match="differs from token 2 on"):
        proof.same_answer([1, 1], [1, 2], logits, 0.01)
    with pytest.raises(UserError, match="differs from token 2 on"):
        proof.same_answer([1], [1, 2], logits, 0.01)


class Numbered:
    """A family whose rounds are numbered: no constant texts around a question."""

    @staticmethod
    def render(tokenizer, turns, style):
        spoken = [turn for turn in turns if turn.role != "system"]
        return [
            Piece(encode_text(tokenizer, f"[{number // 2}]{turn.text}"), QUESTION) for number, turn in enumerate(spoken)
        ]


class WithDefault:
    """A family whose template has a system text of its own where the user gives none."""

    @staticmethod
    def render(tokenizer, turns, style):
        start, end = special_id(tokenizer, "<start_of_turn>"), special_id(tokenizer, "<end_of_turn>")
        turns = turns if turns[0].role == "system" else [Turn("system", "我在"), *turns]
        pieces = []
        for turn in turns:
            answer = turn.role == "assistant"
            header = [] if answer else [start, *encode_text(tokenizer, turn.role + "\n")]
            body = Piece(encode_text(tokenizer, turn.text) + [end], ANSWER if answer else QUESTION)
            model = [start, *encode_text(tokenizer, "model\n")] if turn.role == "user" else []
            newline = encode_text(tokenizer, "\n")
            pieces += [Piece(header, FRAME), body, Piece([*newline, *model], FRAME)]
        return pieces if turns[-1].role == "user" else pieces[:-1]

    @staticmethod
    def stop_ids(tokenizer, style):
        return [special_id(tokenizer, "<end_of_turn>")]


def ollama(modelfile, turns):
    """What Ollama's template engine makes of a conversation: the template once a round, the last cut at the answer."""
    body = modelfile.split('TEMPLATE """')[1].split('"""')[0]
    given, rest = body.removeprefix("{{ if .System }}").split("{{ else }}")
    header, rest = rest.split("{{ end }}")
    default = modelfile.split('SYSTEM """')[1].split('"""')[0] if "SYSTEM" in modelfile else ""
    system = turns[0].text if turns[0].role == "system" else default
    spoken = turns[1:] if turns[0].role == "system" else turns
    text = ""
    for number in range(0, len(spoken), 2):
        text += given.replace("{{ .System }}", system) if system and number == 0 else header
        text += rest.replace("{{ .Prompt }}", spoken[number].text)
        if number + 1 < len(spoken):
            text = text.replace("{{ .Response }}", spoken[number + 1].text)
    return text.partition("{{ .Response }}")[0]


ROUNDS = [
    Turn("user", "在吗"),
    Turn("assistant", "在"),
    Turn("user", "你是"),
    Turn("assistant", "我"),
    Turn("user", "好"),
]
CONVERSATIONS = [ROUNDS[:1], ROUNDS[:3], ROUNDS, [Turn("system", "有问有答"), *ROUNDS]]


@pytest.mark.parametrize("family", [(gemma_prompt, "chat"), (gemma_prompt, "plain"), (WithDefault, "chat")])
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_templates_say_what_the_renderer_says(tokenizer, family, turns):
    prompt, style = family
    ids = [id_ for piece in prompt.render(tokenizer, turns, style) for id_ in piece.ids]
    text = tokenizer.decode(ids)
    assert (
        "<bos>" * (prompt is gemma_prompt) + ollama(templates.modelfile(tokenizer, prompt, style, "./x.gguf"), turns)
        == text
    )
    made = templates.jinja_of(templates.layout(tokenizer, prompt, style))
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert (
        tokenizer.apply_chat_template(messages, chat_template=made, add_generation_prompt=True, tokenize=False) == text
    )


S, G = Turn("system", " 有问有答\n"), Turn("assistant", "\n您好，在的 ")
ORDERS = {
    f"{name}, {length // 2 + 1} questions": [*start, *ROUNDS[:length]]
    for name, start in {"plain": [], "system": [S], "greeting": [G], "system and greeting": [S, G]}.items()
    for length in (1, 3, 5)
}
ALL_STYLES = [  # (fixture with the tokenizer or its folder, its prompt, style); qwen's log style has no template
    *(("small_gemma", "gemma_sft.prompt", style) for style in ("chat", "log", "plain")),
    *(("small_qwen", "qwen2_sft.prompt", style) for style in ("chat", "plain")),
    ("small_chatglm", "chatglm_sft.prompt", "chat"),
    ("small_chatglm2", "chatglm_sft.prompt_chatglm2", "chat"),
    ("small_chatglm3", "chatglm_sft.prompt_chatglm3", "chat"),
    ("small_glm4", "chatglm_sft.prompt_glm4", "chat"),
]


def test_the_orders_are_those_of_conversations():
    for turns in ORDERS.values():
        assert said(in_order(turns, answered=False)[0]) == said(turns)


@pytest.mark.parametrize(("fixture", "family", "style"), ALL_STYLES, ids=lambda value: value)
def test_in_every_order_of_turns_a_template_says_what_the_renderer_says(request, fixture, family, style):
    prompt = importlib.import_module(family)
    if family == "chatglm_sft.prompt":
        importlib.import_module("chatglm_sft.models.chatglm")
    tokenizer = loading.load_tokenizer(request.getfixturevalue(fixture), prompt)
    strip = str if style == "chat" else str.strip  # in a chat the templates take off the blanks the renderer takes off
    wrong = []
    for name, given in ORDERS.items():
        turns = [turn._replace(text=strip(turn.text)) for turn in given]
        ids = [id_ for piece in prompt.render(tokenizer, turns, style) for id_ in piece.ids]
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        made = {"chat_template": templates.chat_template(tokenizer, prompt, style), "add_generation_prompt": True}
        if family == "chatglm_sft.prompt":  # [gMASK] and <sop> are the tokenizer's: no template gives their ids
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            found = tokenizer(text).input_ids
        else:
            found = tokenizer.apply_chat_template(messages, return_dict=False, **made)
        wrong += [] if found == ids else [(name, tokenizer.decode(found), tokenizer.decode(ids))]
    assert wrong == []


@pytest.mark.parametrize("family", [(gemma_prompt, "chat"), (gemma_prompt, "plain"), (WithDefault, "chat")])
def test_a_template_made_here_says_so_too(tokenizer, family):
    prompt, style = family
    made = templates.jinja_of(templates.layout(tokenizer, prompt, style))
    for given in ORDERS.values():
        turns = [turn._replace(text=turn.text.strip()) for turn in given]
        text = tokenizer.decode([id_ for piece in prompt.render(tokenizer, turns, style) for id_ in piece.ids])
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        asked = {"chat_template": made, "add_generation_prompt": True, "tokenize": False}
        assert tokenizer.apply_chat_template(messages, **asked) == text


def test_a_template_that_refuses_a_greeting_gives_way_to_the_familys(tokenizer, monkeypatch):
    """As the official ones do that want user and assistant in turn."""
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}" + gemma_prompt.CHAT_TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    assert templates.chat_template(tokenizer, gemma_prompt, "chat") == gemma_prompt.CHAT_TEMPLATE


def test_the_chat_template_is_the_runs_style(tokenizer):
    assert templates.chat_template(tokenizer, gemma_prompt, "chat") == gemma_prompt.CHAT_TEMPLATE
    plain = templates.chat_template(tokenizer, gemma_prompt, "plain")
    messages = [{"role": "user", "content": "你好"}]
    rendered = tokenizer.apply_chat_template(messages, chat_template=plain, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos>你好"
    assert template_text(tokenizer, gemma_prompt, "plain").startswith("<bos>{system}\n\n{question 1}")


def test_numbered_rounds_have_no_template(tokenizer):
    assert templates.layout(tokenizer, Numbered, "chat") is None
    assert templates.modelfile(tokenizer, Numbered, "chat", "./x.gguf") is None
