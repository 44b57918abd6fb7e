"""README and docs/: links, flags, tables and rows are true, both languages show the same, every command runs."""

import json
import re
from dataclasses import fields

import pytest
from commands import ROOT, Project, blocks, commands, flags_in, known_flags, pages, text_of

STEMS = "chatglm data engines evaluation knobs memory methods models new_family prompts service".split()
LEARNT = "--data_path my.jsonl --epochs 1 --eval_rows 0"
RUNS = (  # the runs of README, which the pages ask, score and serve
    f"python gemma_sft/ft_gemma/train.py --path_model_pretrain google/gemma-2b-it --model_save_dir out {LEARNT}",
    f"python chatglm_sft/ft_chatglm/train.py --path_model_pretrain THUDM/chatglm-6b --model_save_dir out_glm {LEARNT}",
)
CHOICE, SUM = 'id,question,A,B,C,D,answer\n0,"1+1=",1,2,3,4,B\n', '{"question": "1+1=?", "answer": "#### 2"}\n'
FILES = {"ceval/val/sums_val.csv": CHOICE, "ceval/dev/sums_dev.csv": CHOICE, "gsm8k.jsonl": 2 * SUM}  # of benchmarks


# --- what is written --------------------------------------------------------------------------------------------------


def test_each_subject_has_its_page_in_both_languages():
    found = {file.stem for file in (ROOT / "docs").glob("*.md")}
    assert found == {name for stem in STEMS for name in (stem, f"{stem}_zh")}


@pytest.mark.parametrize(("english", "chinese"), pages())
def test_both_languages_show_the_same_blocks(english, chinese):
    assert commands(english)
    for language in ("bash", "json", "yaml"):
        assert blocks(english, language) == blocks(chinese, language)


@pytest.mark.parametrize("page", [page for pair in pages() for page in pair] + ["data/README.md"])
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    assert [link for link in links if "://" not in link and not (ROOT / page).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("page", [page for pair in pages() for page in pair])
def test_every_flag_exists(page):
    assert flags_in(text_of(page)) - known_flags() == set()


@pytest.mark.parametrize("page", ["docs/data.md", "docs/data_zh.md"])
def test_every_row_shown_is_read(page):
    from common.data.formats import read_row

    rows = [line for block in blocks(page, "json") for line in block.splitlines()]
    assert len(rows) == 20 and all(read_row(json.loads(row)).conversations for row in rows)


@pytest.mark.parametrize("page", ["docs/knobs.md", "docs/knobs_zh.md"])
def test_the_tables_of_knobs_are_those_of_the_code(page):
    """Every knob and flag, with its default; every alias."""
    from common import config, knobs

    classes = (config.SFTConfig, config.TrainFlags, config.PredictFlags, config.EvaluationFlags)
    classes += (config.ServeFlags, config.ExportFlags)
    found = re.findall(r"^\| `(\w+)` \| ([^|]*) \| [^|]+ \|$", text_of(page), flags=re.M)
    none = "无" if "_zh" in page else "none"
    expected = [
        (field.name, shown(field.default) or none)
        for cls in classes
        for field in fields(cls)
        if not field.metadata.get("hidden")
    ]
    assert sorted(found) == sorted(expected)
    assert all(f"| `{alias}` | `{name}` |" in text_of(page) for alias, name in knobs.ALIASES.items())


def shown(default):
    """A default as the tables show it."""
    from common.cli import as_text

    text = as_text(default).lower() if isinstance(default, bool) else as_text(default)
    return f"`{text}`" if text else ""


# --- what it does -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory, small_models, environment, warm):
    """A copy of the project with README's runs in it, and the small files the pages name."""
    project = Project(tmp_path_factory.mktemp("docs") / "clone", small_models, environment, warm)
    for name, text in FILES.items():
        file = project.folder / "tasks" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (project.folder / "my.yaml").write_text(project.here("".join(blocks("docs/knobs.md", "yaml"))))
    for line in RUNS:
        project.run(line)
    yield project
    project.end()


@pytest.mark.slow
@pytest.mark.parametrize("page", [f"docs/{stem}.md" for stem in STEMS])
def test_every_command_runs(project, page):
    outputs = {line: project.run(line) for line in commands(page)}
    project.end()
    for line, output in outputs.items():
        assert output or not line.startswith(("python", "curl")), line
        assert not line.startswith("curl") or not output.startswith('{"error"'), line
    if page in CHECKS:
        CHECKS[page](project.folder, outputs)


def manifest(folder):
    return json.loads((folder / "run_manifest.json").read_text(encoding="utf-8"))


def check_knobs(folder, outputs):
    """The file gives way to flags; aliases set the knobs."""
    ranks = {name: manifest(folder / name)["config"]["lora_r"] for name in ("out_yaml", "out_yaml_16", "out_habit")}
    assert ranks == {"out_yaml": 8, "out_yaml_16": 16, "out_habit": 8}
    checked = next(json.loads(output) for line, output in outputs.items() if line.endswith("--json"))
    assert checked["verdict"] == "good"


def check_methods(folder, outputs):
    """Adapters, whole models and checkpoints are where the page says."""
    for name in ("linear", "dora", "pissa", "qlora", "packed", "schedule", "early", "ddp", "zero2", "fsdp2"):
        assert (folder / f"out_{name}/adapter_model.safetensors").is_file(), name
    assert all((folder / f"out_{name}/model.safetensors").is_file() for name in ("full", "freeze"))
    assert set(manifest(folder / "out_steps")["resumed_anyway"]) == {"learning_rate"}
    assert [one["folder"] for one in manifest(folder / "out_on")["lineage"]] == [str(folder / "out_linear")]


def check_prompts(folder, outputs):
    shown = [json.loads(output)["text"] for line, output in outputs.items() if "--print_prompt" in line]
    gemma, qwen, plain, glm4 = shown
    assert gemma == "<bos><start_of_turn>user\n你好<end_of_turn>\n<start_of_turn>model\n"
    assert qwen.startswith("<|im_start|>system\n你是翻译。<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n")
    assert plain == "<bos>你好"
    assert glm4 == "[gMASK]<sop><|user|>\n你好<|assistant|>\n"


def check_service(folder, outputs):
    listed = [json.loads(output)["data"] for line, output in outputs.items() if "/v1/models" in line]
    assert [[one["id"] for one in models] for models in listed] == [["tuned", "base"], ["tuned", "base", "second"]]
    streamed = next(output for line, output in outputs.items() if '"stream": true' in line)
    assert streamed.rstrip().endswith("data: [DONE]") and '"usage"' in streamed
    assert (folder / "out_whole/Modelfile").is_file()
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 8 and all(line["question"] == f"{int(line['reference']) - 1}+1=" for line in answers)


def check_evaluation(folder, outputs):
    results = json.loads((folder / "out/all_results.json").read_text(encoding="utf-8"))
    assert results["held_out"]["rows"] == 8 and "tuned" in results
    last = next(output for line, output in outputs.items() if "--temperature 0.7" in line)
    assert "base" not in results and "left out: base" in last, "the last call drew its answers"
    assert {name: set(found) for name, found in results["tasks"].items() if name != "change"} == {
        "base": {"probe"},
        "tuned": {"probe", "ceval", "gsm8k"},
    }


CHECKS = {
    "docs/evaluation.md": check_evaluation,
    "docs/knobs.md": check_knobs,
    "docs/methods.md": check_methods,
    "docs/prompts.md": check_prompts,
    "docs/service.md": check_service,
}
