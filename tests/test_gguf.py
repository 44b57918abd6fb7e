"""GGUF files: what they hold, that llama.cpp gives the model's text from them, and which models are refused."""

import importlib
import json

import classes
import gguf
import numpy as np
import pytest
import torch
from exports import KINDS, assert_ended, measured, model_of
from gguf import GGMLQuantizationType as Type
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config import ExportFlags
from common.elsewhere import asking
from common.errors import UserError
from common.export import folder, gguf_file, gguf_tensors, gguf_tokenizer, llama_cpp, proof
from gemma_sft import prompt as gemma_prompt
from qwen2_sft import prompt as qwen_prompt


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def once(request):
    """(the Kind, its prompt module, its Expected, its weights)."""
    return ready(request.param, request)


@pytest.fixture(scope="module")
def expected(request):
    """The Expected of the first Kind."""
    return ready(next(iter(KINDS.values())), request)[2]


def ready(kind, request):
    base = request.getfixturevalue(kind.fixture)
    prompt, net = importlib.import_module(kind.family), model_of(kind, AutoTokenizer.from_pretrained(base))
    return kind, prompt, measured(base, prompt, net), {name: one.clone() for name, one in net.state_dict().items()}


@pytest.fixture
def made(once):
    """(the Kind, its prompt module, its Expected), with the weights of before."""
    *found, expected, weights = once
    expected.tuned.net.load_state_dict(weights)
    return *found, expected


@pytest.fixture
def rough(monkeypatch):
    """Random weights this large make a small rounding a large one; how near each tensor is, is asked of itself."""
    for dtype in (torch.bfloat16, torch.float16, torch.int8):
        monkeypatch.setitem(proof.TOLERANCE, dtype, 0.5)


def values(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", gguf_file.TYPES)
def test_a_file_holds_the_model(made, tmp_path, name, rough):
    kind, prompt, expected = made
    net, file = expected.tuned.net, tmp_path / "x.gguf"
    count = sum(tensor.numel() for tensor in net.state_dict().values())
    if net.config.tie_word_embeddings and not prompt.GGUF[net.config.model_type].own_head:
        count -= net.get_output_embeddings().weight.numel()
    verdict = gguf_file.write(net, expected, file, name, prompt)
    assert "greedy answers equal 8/8" in verdict or name != "f32"
    assert gguf_file.limit_of(file) == proof.TOLERANCE[gguf_file.DTYPES[name]], "--verify takes its rounding for a tie"
    tensors, found = [t for t in gguf.GGUFReader(file).tensors if t.name != "rope_freqs.weight"], values(file)
    assert sum(int(tensor.n_elements) for tensor in tensors) == count, "each weight once"
    wanted = gguf_file.TYPES[name]
    exact = {t.name for t in tensors if "gate_inp" in t.name or "conv1d" in t.name}
    assert {t.tensor_type for t in tensors if len(t.shape) > 1 and t.name not in exact} == {wanted}
    assert {t.tensor_type for t in tensors if t.name in exact} <= {Type.F32}
    assert {t.tensor_type for t in tensors if len(t.shape) == 1} == {Type.F32}
    arch = found["general.architecture"]
    assert found[f"{arch}.rope.freq_base"] == kind.expected["rope_theta"]
    assert found[f"{arch}.attention.key_length"] == kind.options.get("global_head_dim", 16)
    assert np.ravel(found[f"{arch}.attention.head_count_kv"])[-1] == 1
    assert found["tokenizer.chat_template"] == expected.tuned.tokenizer.chat_template
    stops = {found.get(f"tokenizer.ggml.{one}_token_id") for one in ("eos", "eot", "eom")} - {None}
    assert stops == set(expected.tuned.stop_ids)


@pytest.mark.parametrize("name", ["f32", "q8_0"])
def test_llama_cpp_gives_the_models_text(made, tmp_path, name, rough):
    pytest.importorskip("xllamacpp")
    kind, prompt, expected = made
    gguf_file.write(expected.tuned.net, expected, tmp_path / "x.gguf", name, prompt)
    verdict = llama_cpp.prove(tmp_path / "x.gguf", expected, proof.TOLERANCE[gguf_file.DTYPES[name]])
    assert "200 段文字的编号一致" in verdict and (name != "f32" or "equal 8/8" in verdict)
    assert len(set(map(tuple, expected.answers))) > 5, "the answers must tell something"


def penalised(expected, penalty):
    tuned = expected.tuned
    manifest = tuned.manifest | {"config": tuned.manifest["config"] | {"repetition_penalty": penalty}}
    return expected._replace(tuned=tuned._replace(manifest=manifest))


def test_a_file_has_the_runs_penalty(expected, tmp_path):
    for penalty in (1.0, 1.5):
        gguf_file.write(expected.tuned.net, penalised(expected, penalty), tmp_path / f"{penalty}", "f32", gemma_prompt)
    found = values(tmp_path / "1.5")
    assert found["general.sampling.penalty_repeat"] == 1.5 and found["general.sampling.penalty_last_n"] == 65536
    assert not any(name.startswith("general.sampling") for name in values(tmp_path / "1.0"))


def test_llama_cpp_answers_with_the_runs_penalty(expected, tmp_path):
    """And of the whole text, as transformers does; the file is proven without it."""
    pytest.importorskip("xllamacpp")
    tuned, file = expected.tuned, tmp_path / "x.gguf"
    gguf_file.write(tuned.net, penalised(expected, 1.5), file, "f32", gemma_prompt)
    ids = [number for one in tuned.prompts for number in one]  # many further back than the 64 that llama.cpp looks at
    given, size = torch.tensor([ids]), {"max_new_tokens": 48, "eos_token_id": None, "do_sample": False}
    asked = {"prompt": ids, "n_predict": 48, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    with llama_cpp.served(file, 512) as ask:
        found = ask("/completion", asked)["tokens"]
    answers = [tuned.net.generate(given, repetition_penalty=one, **size)[0, len(ids) :].tolist() for one in (1.5, 1.0)]
    assert len(ids) > 100 and found == answers[0] != answers[1]
    assert "equal 8/8" in llama_cpp.prove(file, expected, proof.TOLERANCE[torch.float32])


WRONG = {"rope_freq_base": 100.0, "layer_norm_rms_eps": 0.1, "sliding_window": 3, "expert_used_count": 1}
NEEDS = {"sliding_window": "sliding_window", "expert_used_count": "num_experts"}  # what a Kind must have


@pytest.mark.parametrize("key", WRONG)
def test_llama_cpp_finds_a_hyperparameter_that_is_wrong(made, tmp_path, key, monkeypatch):
    """All tensors are right there: only an answer tells."""
    pytest.importorskip("xllamacpp")
    kind, prompt, expected = made
    if key in NEEDS and NEEDS[key] not in kind.options:
        return
    add = getattr(gguf.GGUFWriter, f"add_{key}")
    monkeypatch.setattr(gguf.GGUFWriter, f"add_{key}", lambda self, value: add(self, WRONG[key]))
    gguf_file.write(expected.tuned.net, expected, tmp_path / "x.gguf", "f32", prompt)
    with pytest.raises(UserError, match="the exported model's greedy answer differs"):
        llama_cpp.prove(tmp_path / "x.gguf", expected, 1e-4)


def test_a_value_that_changes_is_found(made, tmp_path, monkeypatch):
    _, prompt, expected = made
    quantize = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda values, kind: quantize(values * 1.02, kind))
    with pytest.raises(UserError, match="differs from what was written"):
        gguf_file.write(expected.tuned.net, expected, tmp_path / "x.gguf", "q8_0", prompt)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0])
def test_a_type_rounds_no_further_than_it_is_allowed_to(kind):
    source = (np.random.default_rng(0).standard_normal((64, 256)) * np.logspace(-6, 3, 64)[:, None]).astype(np.float32)
    read = gguf.quants.dequantize(gguf.quants.quantize(source, kind), kind)
    off, allowed = np.abs(read - source), gguf_file.rounding(source, kind)
    assert (off <= allowed).all() and (kind == Type.F32 or (off > allowed / 4).any())


def test_a_file_that_llama_cpp_does_not_open_is_named(expected, tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(UserError, match="llama.cpp does not open x.gguf: .*[Ee]rror"):
        llama_cpp.prove(tmp_path / "x.gguf", expected, 1e-4)


HANGS = """
import subprocess, time, sys
other = subprocess.Popen(["sleep", "60"])  # holds the pipes too
open({file!r}, "w").write(str(other.pid))
sys.stderr.write({said!r})
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("said", "match"),
    [("", ".*still no answer after 2 s"), ("x\nGGML_ASSERT(a) failed\n", "GGML_ASSERT.a. failed")],
)
def test_a_llama_cpp_that_hangs_is_stopped(expected, tmp_path, monkeypatch, said, match):
    (tmp_path / "hangs.py").write_text(HANGS.format(said=said, file=str(tmp_path / "pid")))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(asking, "LIMIT", 2.0)
    monkeypatch.setattr(asking, "LLAMA_SERVER", tmp_path / "hangs.py")
    with pytest.raises(UserError, match=f"llama.cpp does not open x.gguf: {match}"):
        llama_cpp.prove(tmp_path / "x.gguf", expected, 1e-4)
    assert_ended(tmp_path / "pid")


ANSWERS_NOT = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(f"http://127.0.0.1:{server.getsockname()[1]}", flush=True)
sys.stdin.read()
"""


def test_a_llama_cpp_that_answers_no_request_is_told(expected, tmp_path, monkeypatch):
    (tmp_path / "silent.py").write_text(ANSWERS_NOT)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(asking, "LIMIT", 2.0)
    monkeypatch.setattr(asking, "LLAMA_SERVER", tmp_path / "silent.py")
    with pytest.raises(UserError, match=r"llama.cpp gave no answer to /tokenize \(within 2 s\): .*timed out"):
        llama_cpp.prove(tmp_path / "x.gguf", expected, 1e-4)


# ---------------------------------------------------------------- what is refused


OTHERWISE = {
    "gemma3": {"query_pre_attn_scalar": 256, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
    "gemma4": {"vocab_size_per_layer_input": 7, "use_bidirectional_attention": "all"},
    "gemma2": {"query_pre_attn_scalar": 256, "tie_word_embeddings": False},
    "qwen2": {"layer_types": ["full_attention", "sliding_attention"]},
    "qwen3": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "qwen2_moe": {"norm_topk_prob": True, "decoder_sparse_step": 2},
    "qwen3_moe": {"norm_topk_prob": False, "mlp_only_layers": [0]},
    "qwen3_5": {"linear_value_head_dim": 8, "layer_types": ["full_attention", "linear_attention"]},
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in OTHERWISE.items() for key in keys])
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(request, name, key):
    kind = KINDS[name]
    config = model_of(kind, AutoTokenizer.from_pretrained(request.getfixturevalue(kind.fixture))).config
    prompt = importlib.import_module(kind.family)
    gguf_file.check(config, prompt)
    setattr(config, key, OTHERWISE[name][key])
    with pytest.raises(UserError, match="llama.cpp computes it otherwise: " + key.partition("_p")[0]):
        gguf_file.check(config, prompt)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_a_head_that_merging_would_untie_is_refused_before_anything_is_computed(small_gemma, module):
    base = AutoModelForCausalLM.from_pretrained(small_gemma)
    net = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=[module]))
    tuned = proof.Tuned(net, *[None] * 8)
    with pytest.raises(UserError, match="llama.cpp computes it otherwise: tie_word_embeddings false"):
        folder.check_format(tuned, None, ExportFlags(format="gguf"), gemma_prompt)


def test_a_family_without_gguf_is_refused(small_chatglm):
    from chatglm_sft import prompt

    config = type("Config", (), {"model_type": "chatglm"})()
    with pytest.raises(UserError, match="chatglm is not written as GGUF here; known: none of this family"):
        gguf_file.check(config, prompt)


class Rules:
    """A tokenizer whose rules are given."""

    def __init__(self, text):
        self.backend_tokenizer = self
        self.text = text

    def to_str(self):
        return self.text


def rules_of(folder):
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def refused(rules, prompt, match):
    with pytest.raises(UserError, match=match):
        gguf_tokenizer.read(Rules(json.dumps(rules)), 400, prompt.GGUF_WORDS, "base")


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(small_qwen, small_gemma):
    rules = rules_of(small_qwen)
    assert gguf_tokenizer.read(Rules(json.dumps(rules)), 400, qwen_prompt.GGUF_WORDS, "base").pre == "qwen2"
    rules["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    refused(rules, qwen_prompt, "llama.cpp has no such tokenizer: pre_tokenizer")
    rules = rules_of(small_gemma)
    rules["normalizer"] = {"type": "Lowercase"}
    refused(rules, gemma_prompt, "normalizer")
    rules = rules_of(small_gemma)
    rules["model"]["vocab"]["ab"] = 300
    refused(rules, gemma_prompt, "piece 'ab', which no merge makes")
    rules["model"]["vocab"] |= {"abc": 301, "bc": 302}
    rules["model"]["merges"] = [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]
    refused(rules, gemma_prompt, "merges of 'abc'")
    rules["model"] |= {"type": "Unigram"}
    refused(rules, gemma_prompt, "model Unigram")


def test_merges_become_scores(small_gemma):
    rules = rules_of(small_gemma)
    rules["model"]["vocab"] |= {"ab": 300, "abc": 301, "bc": 302}
    rules["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"]]
    words = gguf_tokenizer.read(Rules(json.dumps(rules)), 400, {}, "base")
    assert [words.scores[number] for number in (302, 300, 301)] == [0, -1, -2]
    assert words.types[300] == gguf.TokenType.NORMAL and words.types[399] == gguf.TokenType.UNUSED
    assert {words.tokens[number] for number, kind in enumerate(words.types) if kind == gguf.TokenType.CONTROL} >= {
        "<bos>"
    }


# ---------------------------------------------------------------- export.py


@pytest.fixture(scope="module")
def run(gemma):
    return gemma.train("run", "--max_steps", 2)


def test_a_run_is_exported_as_one_file(gemma, run, tmp_path, capsys):
    gemma.recipe("export").main(["--model_save_dir", str(run), "--format", "gguf", "--output_dir", str(tmp_path / "m")])
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["Modelfile", "export.json", "m.gguf"]
    assert (tmp_path / "m/Modelfile").read_text().startswith("FROM ./m.gguf\n")
    printed = capsys.readouterr().out
    assert f"llama-cli -m {tmp_path}/m/m.gguf" in printed and "ollama create m -f Modelfile" in printed
    assert json.loads((tmp_path / "m/export.json").read_text())["dtype"] == "f16"
    with pytest.raises(UserError, match="already exists"):
        gemma.recipe("export").main(
            ["--model_save_dir", str(run), "--format", "gguf", "--output_dir", str(tmp_path / "m")]
        )


@pytest.mark.parametrize(
    "name",
    ["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3_5ForConditionalGeneration", "Gemma4ForConditionalGeneration"],
)
def test_a_run_on_a_class_is_exported_and_asked(name, tmp_path, capsys):
    """As in plain use: train.py, export.py, and export.py --verify."""
    checkpoint = classes.Checkpoint(name, tmp_path / "base")
    run = checkpoint.train(tmp_path, "--max_steps", 3)
    flags = ["--model_save_dir", str(run), "--path_model_pretrain", str(tmp_path / "base")]
    checkpoint.recipe("export").main([*flags, "--format", "gguf", "--gguf_type", "f32"])
    printed = capsys.readouterr().out
    assert f"llama-cli -m {run}_gguf/out_gguf.gguf" in printed
    if llama_cpp.installed():
        assert "llama.cpp: 200 段文字的编号一致 texts give the same ids" in printed
        checkpoint.recipe("export").main([*flags, "--verify", "llama.cpp"])
        assert "texts give the same ids, 贪心回答一致 greedy answers equal" in capsys.readouterr().out


def test_an_adapter_is_exported_alone(gemma, run, tmp_path, capsys):
    flags = ["--model_save_dir", str(run), "--format", "gguf-lora", "--output_dir", str(tmp_path / "a")]
    gemma.recipe("export").main(flags)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "a/a.gguf").tensors}
    own = load_file(run / "adapter_model.safetensors")
    assert len(tensors) == len(own)
    one = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    assert np.array_equal(tensors["blk.1.attn_v.weight.lora_b"], own[one].numpy()) and torch.any(own[one])
    assert values(tmp_path / "a/a.gguf")["adapter.lora.alpha"] == 32
    assert "--lora" in capsys.readouterr().out


def test_an_adapter_that_llama_cpp_leaves_out_is_refused(tmp_path):
    checkpoint = classes.Checkpoint("Gemma4ForCausalLM", tmp_path / "base")
    run = checkpoint.train(tmp_path, "--max_steps", 1, "--target_modules", "q_proj,per_layer_model_projection")
    flags = ["--model_save_dir", str(run), "--path_model_pretrain", str(tmp_path / "base"), "--format", "gguf-lora"]
    with pytest.raises(UserError, match="llama.cpp adds no adapter to per_layer_model_proj; use --format gguf"):
        checkpoint.recipe("export").main(flags)


def test_an_adapter_has_the_order_of_the_file_it_belongs_to(tmp_path):
    """Linear attention: llama.cpp has other rows and columns than the model where its value heads are."""
    checkpoint = classes.Checkpoint("Qwen3_5ForCausalLM", tmp_path / "base")
    run = checkpoint.train(tmp_path, "--max_steps", 2)
    flags = ["--model_save_dir", str(run), "--path_model_pretrain", str(tmp_path / "base")]
    for more in (["--format", "gguf", "--gguf_type", "f32"], ["--format", "gguf-lora"]):
        checkpoint.recipe("export").main([*flags, *more])
    base = dict(gguf_tensors.parts(checkpoint.whole, qwen_prompt.GGUF["qwen3_5_text"]))
    (merged, adapter) = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(f"{run}_{end}/out_{end}.gguf").tensors}
        for end in ("gguf", "lora_gguf")
    )
    halves = {name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")}
    assert {"blk.0.attn_qkv.weight", "blk.0.ssm_out.weight", "blk.0.ssm_beta.weight", "blk.1.attn_q.weight"} <= halves
    config = json.loads((run / "adapter_config.json").read_text())
    for name in halves:
        change = adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"] * (config["lora_alpha"] / config["r"])
        assert np.abs(change).max() > 1e-3, name
        assert np.allclose(base[name].make() + change, merged[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--gguf_type", "f16"], "belongs to --format gguf"),
        (["--format", "gguf", "--dtype", "float16"], "--dtype .* has no effect with it; use --gguf_type"),
        (["--format", "gguf-lora", "--gguf_type", "q8_0"], "whose rows are too short"),
    ],
)
def test_flags_that_do_not_go_together(gemma, run, tmp_path, flags, match):
    with pytest.raises(UserError, match=match):
        gemma.recipe("export").main(["--model_save_dir", str(run), "--output_dir", str(tmp_path / "x"), *flags])


def test_a_run_of_whole_weights_has_no_adapter(gemma, tmp_path):
    whole = gemma.train("whole", "--tuning", "full", "--max_steps", 1)
    with pytest.raises(UserError, match="the run has no adapter: use --format gguf"):
        gemma.recipe("export").main(
            ["--model_save_dir", str(whole), "--format", "gguf-lora", "--output_dir", str(tmp_path / "x")]
        )
    assert list(tmp_path.iterdir()) == []
