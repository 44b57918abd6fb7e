"""What other engines need of an export: keys, files, templates, commands; earlier exports mended."""

import importlib
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exports import KINDS, model_of, tuned_of
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common.config import ROOT, ExportFlags
from common.errors import UserError
from common.export import engines, folder, older
from gemma_sft import prompt as gemma_prompt
from gemma_sft.ft_gemma import export as gemma_export
from qwen2_sft import prompt as qwen_prompt


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def saved(request, tmp_path):
    """(the Kind, its model, the folder it was saved to as an export)."""
    kind, base = request.param, request.getfixturevalue(request.param.fixture)
    prompt = importlib.import_module(kind.family)
    net = model_of(kind, AutoTokenizer.from_pretrained(base))
    tuned = tuned_of(base, prompt, net)
    folder.save(net, tuned, tmp_path / "whole", prompt)
    return kind, net, tmp_path / "whole"


def test_an_export_holds_what_older_readers_take(saved):
    kind, net, whole = saved
    config = read(whole / "config.json")
    assert older.older_names(config) == kind.expected and kind.expected.items() <= config.items()
    files = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json".split()
    files += ["chat_template.jinja"] + ["Modelfile"] * ("glm4" not in kind.fixture)
    assert sorted(path.name for path in whole.iterdir()) == sorted(files)
    template = (whole / "chat_template.jinja").read_text(encoding="utf-8")
    assert read(whole / "tokenizer_config.json")["chat_template"] == template
    stops = importlib.import_module(kind.family).stop_ids(AutoTokenizer.from_pretrained(whole), "chat")
    assert read(whole / "generation_config.json")["eos_token_id"] == stops


def test_transformers_reads_equal_logits_from_it(saved):
    _, net, whole = saved
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(whole)(input_ids=ids).logits, net(input_ids=ids).logits)
    assert AutoConfig.from_pretrained(whole).rope_parameters == net.config.rope_parameters


def test_keys_that_would_change_the_positions_are_not_written(saved, monkeypatch):
    kind, _, whole = saved
    if kind.name == "Gemma4":
        pytest.skip("transformers reads no older names of it")
    config = (whole / "config.json").read_text()
    monkeypatch.setattr(older, "older_names", lambda config: {"rope_scaling": {"rope_type": "linear", "factor": 3.0}})
    with pytest.raises(UserError, match="its positions would change with rope_scaling"):
        older.add_rope(whole)
    assert (whole / "config.json").read_text() == config


@pytest.fixture
def with_pieces(small_gemma, tmp_path):
    """with_pieces(other): a base with a tokenizer.model; with `other` not that of its tokenizer."""

    def make(other=False):
        base = shutil.copytree(small_gemma, tmp_path / "base")
        names = AutoTokenizer.from_pretrained(base).convert_ids_to_tokens(list(range(300)))
        model = sentencepiece_model_pb2.ModelProto()
        model.trainer_spec.byte_fallback = True
        for number, name in enumerate(names):
            kind = 2 if name == "<unk>" else 6 if name.startswith("<0x") else 3 if number < 7 else 1
            model.pieces.add(piece=name + "x" * (other and number == 299), score=-number, type=kind)
        (base / "tokenizer.model").write_bytes(model.SerializeToString())
        return base

    return make


def test_the_bases_pieces_are_copied(with_pieces, tmp_path, capsys):
    base = with_pieces()
    tuned = tuned_of(base, gemma_prompt, AutoModelForCausalLM.from_pretrained(base))
    folder.save(tuned.net, tuned, tmp_path / "whole", gemma_prompt)
    assert (tmp_path / "whole/tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    engines.show(tuned, tmp_path / "whole", ExportFlags(), gemma_prompt)
    assert f'keras:       keras_hub.models.CausalLM.from_preset("{tmp_path}/whole")' in capsys.readouterr().out


def test_pieces_of_another_vocabulary_are_not(with_pieces, tmp_path, capsys):
    base = with_pieces(other=True)
    tuned = tuned_of(base, gemma_prompt, AutoModelForCausalLM.from_pretrained(base))
    folder.save(tuned.net, tuned, tmp_path / "whole", gemma_prompt)
    assert not (tmp_path / "whole/tokenizer.model").exists()
    engines.show(tuned, tmp_path / "whole", ExportFlags(), gemma_prompt)
    printed = capsys.readouterr().out
    assert "keras:       不能 cannot" in printed and "holds another vocabulary than its tokenizer" in printed


def test_only_engines_that_can_are_named(saved, request, capsys):
    kind, net, whole = saved
    prompt = importlib.import_module(kind.family)
    engines.show(tuned_of(whole, prompt), whole, ExportFlags(), prompt)
    found = [line.split(":")[0].strip() for line in capsys.readouterr().out.splitlines()]
    able = prompt.ENGINES[net.config.model_type]
    assert "ollama" not in able or (whole / "Modelfile").exists()
    assert found == [*able, *prompt.UNTRIED_ENGINES]


def test_a_folder_with_a_space_can_be_pasted(small_qwen, tmp_path, capsys):
    whole = tmp_path / "my 模型"
    shutil.copytree(small_qwen, whole)
    engines.show(tuned_of(small_qwen, qwen_prompt), whole, ExportFlags(), qwen_prompt)
    commands = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert str(whole) in shlex.split(commands["  mlx"])
    assert str(whole) in shlex.split(commands["  vllm"])


def command_of(engine, base, whole, capsys):
    """The words of an engine's command."""
    engines.show(tuned_of(base, qwen_prompt), whole, ExportFlags(), qwen_prompt)
    lines = capsys.readouterr().out.splitlines()
    return shlex.split(next(line for line in lines if line.startswith(f"  {engine}:")).partition(":")[2])


@pytest.mark.parametrize("inside", [True, False])
def test_the_script_can_be_called_from_where_one_is(small_qwen, tmp_path, capsys, monkeypatch, inside):
    monkeypatch.chdir(ROOT / "docs" if inside else tmp_path)
    script = command_of("llama.cpp", small_qwen, small_qwen, capsys)[1]
    assert Path(script).resolve() == ROOT / "qwen2_sft/ft_qwen2/export.py"
    assert not inside or script == "../qwen2_sft/ft_qwen2/export.py"


def test_a_project_in_a_folder_with_a_space_can_be_called(small_qwen, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engines, "ROOT", tmp_path / "my 项目")
    script = command_of("llama.cpp", small_qwen, small_qwen, capsys)[1]
    assert Path(script).resolve() == tmp_path / "my 项目/qwen2_sft/ft_qwen2/export.py"


def test_a_model_that_cannot_be_written_as_gguf_is_named(small_qwen, tmp_path, capsys):
    shutil.copytree(small_qwen, tmp_path / "whole")
    config = read(tmp_path / "whole/config.json")
    config["layer_types"][0] = "sliding_attention"
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    (tmp_path / "whole/Modelfile").write_text("x")
    engines.show(tuned_of(small_qwen, qwen_prompt), tmp_path / "whole", ExportFlags(), qwen_prompt)
    printed = capsys.readouterr().out
    assert "llama.cpp:   不能 cannot: llama.cpp 不这样计算" in printed and "ollama:      不能 cannot" in printed
    assert "mlx_lm.generate" in printed


def test_what_an_engine_would_compute_otherwise_is_named(small_qwen, tmp_path, capsys):
    """Scaled positions, and heads that ONNX Runtime's attention does not take; llama.cpp asks for itself."""
    shutil.copytree(small_qwen, tmp_path / "whole")
    config = read(tmp_path / "whole/config.json")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    for change, engines_not in (({}, ()), ({"rope_parameters": scaled}, "mlx ctranslate2 keras onnx openvino".split())):
        (tmp_path / "whole/config.json").write_text(json.dumps(config | change))
        engines.show(tuned_of(small_qwen, qwen_prompt), tmp_path / "whole", ExportFlags(), qwen_prompt)
        printed = capsys.readouterr().out
        assert [line.split(":")[0].strip() for line in printed.splitlines() if "are scaled" in line] == [*engines_not]
    config = config | {"hidden_size": 48}
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    engines.show(tuned_of(small_qwen, qwen_prompt), tmp_path / "whole", ExportFlags(), qwen_prompt)
    assert "onnx:        不能 cannot: 注意力头的大小 24 不是 16 的倍数" in capsys.readouterr().out


def test_why_an_engine_is_not_named(small_gemma, small_qwen, tmp_path, capsys):
    path = str(tmp_path / "untied")
    for base, prompt, named in ((small_gemma, gemma_prompt, False), (small_qwen, qwen_prompt, True)):
        shutil.rmtree(path, ignore_errors=True)
        config = AutoConfig.from_pretrained(base)
        config.tie_word_embeddings = False
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        shutil.copy(base / "tokenizer.json", path)
        engines.show(tuned_of(base, prompt, rank=8, merge_reasons=["DoRA"]), tmp_path / "untied", ExportFlags(), prompt)
        printed = capsys.readouterr().out
        assert ("only transformers: 输出层不再与嵌入共享 the head is no longer tied" in printed) is not named
        assert (f"vllm serve {path}" in printed) is named
        assert ("the adapter alone is not served by vLLM: DoRA" in printed) is named
    none = SimpleNamespace(ENGINES={}, UNTIED_ENGINES=(), UNTRIED_ENGINES=(), RECIPES="x")
    engines.show(tuned_of(small_gemma, gemma_prompt), small_gemma, ExportFlags(), none)
    assert capsys.readouterr().out == "  只有 only transformers: 没有在其他引擎上跑过 run in no other engine\n"


# ---------------------------------------------------------------- --repair


@pytest.fixture
def earlier(with_pieces, tmp_path):
    """A folder as an earlier version exported it, of a base that has a tokenizer.model."""
    base, old = with_pieces(), tmp_path / "old"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(old)
    AutoTokenizer.from_pretrained(base).save_pretrained(old)
    (old / "Modelfile").write_text("FROM .\nTEMPLATE x\n")
    (old / "export.json").write_text(json.dumps({"run": "out", "base": {"path": str(base)}}))
    return old


def test_an_earlier_export_is_mended(earlier, capsys):
    weights = (earlier / "model.safetensors").read_bytes()
    gemma_export.main(["--repair", str(earlier)])
    printed = capsys.readouterr().out
    mended = ["config.json: rope_theta", "tokenizer_config.json: chat_template", "tokenizer.model"]
    mended.append("Modelfile: FROM ./old.gguf")
    assert all(f"已补 mended: {one}" in printed for one in mended) and "已补 4 处 mended" in printed
    assert read(earlier / "config.json")["rope_theta"] == 1e4 and (earlier / "tokenizer.model").is_file()
    assert (earlier / "Modelfile").read_text() == "FROM ./old.gguf\nTEMPLATE x\n"
    assert (earlier / "model.safetensors").read_bytes() == weights
    gemma_export.main(["--repair", str(earlier)])
    assert capsys.readouterr().out == f"{earlier}: 没有可补的 nothing to mend\n"


def test_what_cannot_be_mended_is_said(earlier, tmp_path, capsys):
    (earlier / "chat_template.jinja").unlink()
    shutil.rmtree(tmp_path / "base")
    gemma_export.main(["--repair", str(earlier)])
    printed = capsys.readouterr().out
    assert "不能补 cannot be mended: chat_template.jinja" in printed
    assert "不能补 cannot be mended: tokenizer.model (keras)" in printed


def test_what_is_no_export_is_refused(small_gemma, tmp_path, earlier):
    with pytest.raises(UserError, match="no such folder"):
        gemma_export.main(["--repair", str(tmp_path / "none")])
    with pytest.raises(UserError, match="it has no export.json"):
        gemma_export.main(["--repair", str(small_gemma)])
    with pytest.raises(UserError, match="--repair 与 --output_dir 不能同用"):
        gemma_export.main(["--repair", str(earlier), "--output_dir", str(tmp_path / "new")])
