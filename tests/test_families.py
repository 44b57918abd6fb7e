"""What every family must do: the whole road on a small random model of its own architecture. One more is a line."""

import importlib
import json
import re
import signal
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from commands import wait_for
from safetensors.torch import load_file

from common.cli import parse
from common.config import EvaluationFlags, PredictFlags
from common.conversation.turns import Turn
from common.errors import UserError
from common.evaluation import evaluate
from common.inference.answerer import Sampling
from common.inference.text import decode
from common.model.loading import load_base
from common.training import guards, trainer

ROOT = Path(__file__).resolve().parents[1]


class Family(NamedTuple):
    """A family's recipes and what its small model's adapter holds."""

    package: str
    fixture: str
    tensors: int  # layers × targets × (A, B)
    imports: str = ""  # what plain transformers needs before it knows the model


FAMILIES = {
    "gemma": Family("gemma_sft.ft_gemma", "small_gemma", 2 * 3 * 2),
    "qwen": Family("qwen2_sft.ft_qwen2", "small_qwen", 2 * 3 * 2),
    "chatglm": Family("chatglm_sft.ft_chatglm", "small_chatglm", 2 * 1 * 2, "import chatglm_sft.models.chatglm"),
    "chatglm2": Family("chatglm_sft.ft_chatglm2", "small_chatglm2", 2 * 1 * 2, "import chatglm_sft.models.chatglm2"),
    "chatglm3": Family("chatglm_sft.ft_chatglm3", "small_chatglm3", 2 * 1 * 2, "import chatglm_sft.models.chatglm2"),
    "glm4": Family("chatglm_sft.ft_glm4", "small_glm4", 2 * 3 * 2),
}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


def module(family, name):
    return importlib.import_module(f"{family.package}.{name}")


@pytest.fixture(scope="module")
def trained(family, request, tmp_path_factory):
    """The folder of a short run on 60 rows, and its command line."""
    parent = tmp_path_factory.mktemp(family.fixture)
    rows = [{"query": f"{n}+{n * 7 % 50}", "response": str(n + n * 7 % 50) * (1 + n % 4)} for n in range(60)]
    (parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = request.getfixturevalue(family.fixture)
    flags = ["--path_model_pretrain", base, "--data_path", parent / "rows.jsonl", "--model_save_dir", parent / "out"]
    flags += ["--cache_dir", parent / "cache", "--learning_rate", 0.01]
    flags = list(map(str, flags))
    training = ["--max_steps", "12", "--eval_rows", "2", "--max_new_tokens", "4", "--logging_steps", "1"]
    module(family, "train").main([*flags, *training])
    return parent / "out", flags


@pytest.fixture(scope="module")
def answer(family, trained):
    return module(family, "predict").load_answer(parse(module(family, "config").Config, PredictFlags, trained[1])[0])


def test_training_lowers_the_loss_and_saves_an_adapter(family, trained):
    folder, _ = trained
    log = [json.loads(line)["loss"] for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert len(log) == 12 and log[-1] < log[0]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == family.tensors
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    assert {"base", "tuned", "signature"} <= json.loads((folder / "all_results.json").read_text()).keys()


PLAIN_PEFT = """
import sys, torch
{imports}
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, ids = sys.argv[1:]
AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor([list(map(int, ids.split(",")))])).logits
torch.save(logits, adapter + "/logits.pt")
"""


def test_plain_peft_gives_our_logits_in_another_process(family, trained, answer, request, warm):
    folder, _ = trained
    base = request.getfixturevalue(family.fixture)
    ids = answer.fitted_ids([Turn("user", "1+2 是")])
    script = PLAIN_PEFT.replace("{imports}", family.imports)
    status, _, errors = warm.run(["-c", script, base, folder, ",".join(map(str, ids))], ROOT)
    assert status == 0, errors
    with torch.no_grad():
        ours = answer.net(input_ids=torch.tensor([ids])).logits
        untuned = load_base(base, "float32")(input_ids=torch.tensor([ids])).logits
    assert (ours - torch.load(folder / "logits.pt", weights_only=True)).abs().max() == 0
    assert (ours - untuned).abs().max() > 1e-4, "the adapter must do something"


def test_the_lines_of_the_card_load_the_run_in_another_process(trained, warm):
    lines = re.search("```python\n(.*?)```", (trained[0] / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    status, _, errors = warm.run(["-c", lines], ROOT)
    assert status == 0, errors


QUESTIONS = [
    [Turn("user", "1+1")],
    [Turn("user", "问" * 40)],
    [Turn("user", "有"), Turn("assistant", "他"), Turn("user", "3")],
]


def test_answers_do_not_depend_on_the_batch(answer):
    greedy = Sampling(max_new_tokens=12)
    together = answer(QUESTIONS, greedy)
    assert together == [answer([turns], greedy)[0] for turns in QUESTIONS]
    less = Sampling(max_new_tokens=12, repetition_penalty=1.5)
    assert answer(QUESTIONS, less) == [answer([turns], less)[0] for turns in QUESTIONS]
    assert [text.text for text in together] == ["".join(answer.stream(turns, greedy)) for turns in QUESTIONS]


def test_a_character_cut_off_is_never_shown(answer):
    """An untrained model emits bytes at random; whole characters are all that is shown, streamed or not."""
    hot = Sampling(max_new_tokens=40, do_sample=True, temperature=5.0)
    for seed in range(10):
        torch.manual_seed(seed)
        streamed = "".join(answer.stream(QUESTIONS[0], hot))
        torch.manual_seed(seed)
        whole = answer([QUESTIONS[0]], hot)[0].text
        assert streamed == whole and "\ufffd" not in whole


def test_every_prefix_of_a_text_decodes_to_a_prefix(answer):
    ids = answer.tokenizer.encode("a问龘😀b", add_special_tokens=False)
    texts = [decode(answer.tokenizer, ids[:end]).strip() for end in range(len(ids) + 1)]
    assert texts[-1] == "a问龘😀b" and {"a问", "a问龘", "a问龘😀"} <= set(texts)
    assert all(texts[-1].startswith(text) for text in texts)


def test_evaluation_scores_base_and_tuned(family, trained):
    folder, flags = trained
    cfg, asked = parse(module(family, "config").Config, EvaluationFlags, [*flags, "--limit", "3", "--compare"])
    rows = evaluate.rows_to_score(cfg, asked.limit)
    evaluate.report(module(family, "evaluation").load_answer(cfg), rows, cfg, asked)
    results = json.loads((folder / "all_results.json").read_text())
    assert results["held_out"]["rows"] == 3 and results["base"].keys() == results["tuned"].keys()


def test_the_service_answers(family, answer):
    from common.engine.batcher import Batcher
    from common.serving.app import Service, create_app

    batcher = Batcher(answer, {"tuned": "default", "base": None})
    try:
        client = create_app(Service("out", "tuned", batcher)).test_client()
        response = client.post("/nlg/text_generate", json={"text": "1+1=", "do_sample": False, "max_new_tokens": 5})
    finally:
        batcher.close()
    assert response.status_code == 200
    assert response.get_json() == answer([[Turn("user", "1+1=")]], Sampling(max_new_tokens=5))[0].text


def test_print_targets(family, trained, capsys):
    module(family, "train").main([*trained[1], "--print_targets"])
    printed = capsys.readouterr().out
    config = module(family, "config").Config
    for name in config.target_modules:
        assert re.search(rf"^  {name} +\[\d+, 32\]  × 2$", printed, flags=re.M), printed


def test_an_adapter_cut_off_from_the_loss_is_caught(family, trained, monkeypatch, tmp_path):
    """`loss.requires_grad_(True)` on a loss without a graph: it stays at 4.x, whatever the learning rate."""
    given = [*trained[1], "--max_steps", "8", "--eval_rows", "0", "--logging_steps", "1"]
    cut_off = trainer.SupervisedTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        found = cut_off(self, model, inputs, *args, **kwargs)
        return found if isinstance(found, tuple) else found.detach().requires_grad_(True)

    monkeypatch.setattr(trainer.SupervisedTrainer, "compute_loss", compute_loss)
    with pytest.raises(UserError, match="got no gradient in the first step"):
        module(family, "train").main([*given, "--model_save_dir", str(tmp_path / "caught")])
    monkeypatch.setattr(guards.Gradients, "check", lambda self: None)
    with pytest.raises(UserError, match="nothing was learned"):
        module(family, "train").main([*given, "--model_save_dir", str(tmp_path / "unnoticed")])
    log = [json.loads(line) for line in (tmp_path / "unnoticed/trainer_log.jsonl").read_text().splitlines()]
    first, last = (sum(record["loss"] for record in part) / 4 for part in (log[:4], log[4:]))
    assert abs(first - last) < 0.1, "without the guard the run goes on, and learns nothing"


def test_gradient_checkpointing_changes_nothing(family, trained, tmp_path):
    given = [*trained[1], "--max_steps", "3", "--eval_rows", "0", "--lora_dropout", "0"]
    for name, more in (("kept", []), ("recomputed", ["--gradient_checkpointing"])):
        module(family, "train").main([*given, *more, "--model_save_dir", str(tmp_path / name)])
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "recomputed"))
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_scoring_and_serving_run_as_processes(family, trained, forked, warm, tmp_path):
    """Nothing of the project that this process has imported helps them."""
    place, flags = family.package.replace(".", "/"), trained[1]
    done = forked("evaluation.py", *flags, "--limit", "2", "--max_new_tokens", "4", family=place)
    assert done.returncode == 0, done.stderr
    output, errors = tmp_path / "stdout", tmp_path / "stderr"
    words = [str(ROOT / place / "post_api.py"), *flags, "--port", "0"]
    process = warm.start(words, {}, tmp_path, output, errors)
    try:
        wait_for(lambda: output.exists() and "\n" in output.read_text().partition("listening on ")[2], errors)
        url = output.read_text().partition("listening on ")[2].split("/ ")[0]
        body = json.dumps({"text": "1+1", "max_new_tokens": 4}).encode()
        asked = urllib.request.Request(f"{url}/nlg/text_generate", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as response:
            answer = json.load(response)  # sampled; a template that knows thoughts may show one beside the text
            assert response.status == 200 and isinstance(answer if isinstance(answer, str) else answer["text"], str)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    assert status == 0


def test_help_names_the_family_own_port(family, recipe):
    folder = family.package.replace(".", "/")
    ports = {"gemma": "8044", "qwen": "8036", "chatglm": "8033", "glm4": "8034"}
    ports |= {"chatglm2": "8032", "chatglm3": "8035"}
    done = recipe("post_api.py", "--help", family=folder)
    assert done.returncode == 0 and f"[{ports[family.fixture.removeprefix('small_')]}]" in done.stdout


def test_no_verb_names_a_family():
    """A family's peculiarities are passed in."""
    named = [
        f"{file.name}:{number}: {line.strip()}"
        for file in sorted((ROOT / "common").rglob("*.py"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"gemma|qwen|chatglm|\bglm", line, flags=re.I)
    ]
    assert named == []


def test_every_family_has_the_same_files():
    files = {
        name: {path.name for path in (ROOT / f.package.replace(".", "/")).glob("*.py")} for name, f in FAMILIES.items()
    }
    assert set(map(frozenset, files.values())) == {frozenset(files["gemma"])}
    assert {"config.py", "train.py", "predict.py", "evaluation.py", "post_api.py"} <= files["gemma"]
