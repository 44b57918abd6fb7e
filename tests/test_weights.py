"""Damaged weight files: one line that names the file and the remedy, before anything large is loaded."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.errors import UserError, run_main
from common.model import adapter, loading, verify, weights
from gemma_sft.ft_gemma import evaluation, export, post_api, predict, train

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 5012345678\n"


def cut(file, left=-100):
    file.write_bytes(file.read_bytes()[:left])


def spoil_header(file):
    content = bytearray(file.read_bytes())
    content[20] ^= 0x80
    file.write_bytes(content)


DAMAGES = {
    "empty": (lambda file: file.write_bytes(b""), "文件是空的 the file is empty; download"),
    "cut off": (cut, "文件不完整 is cut off: {size:,} of {whole:,} bytes; download"),
    "cut off in its header": (lambda file: cut(file, 60), "文件不完整 is cut off: 60 bytes, its header alone has"),
    "a pointer": (
        lambda file: file.write_bytes(POINTER),
        "is a Git LFS pointer, not the file itself; there run: git lfs",
    ),
    "a page of HTML": (lambda file: file.write_bytes(b"<!DOCTYPE html><html>" * 9), "不是 safetensors 文件 is not a"),
    "shorter than a header": (lambda file: file.write_bytes(b"1234"), "is not a safetensors file, it begins b'1234'"),
    "a damaged header": (spoil_header, "its safetensors header is damaged; download"),
    "too long": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "is too long: {size:,} of {whole:,} bytes"),
}


@pytest.fixture
def damaged(request):
    """damaged(file): damage it; what is said of it."""
    damage, told = DAMAGES[request.param]

    def spoil(file):
        whole = file.stat().st_size
        damage(file)
        return f"{file}: ", told.format(size=file.stat().st_size, whole=whole)

    return spoil


every_damage = pytest.mark.parametrize("damaged", DAMAGES, indirect=True)


@pytest.fixture
def base(small_gemma, tmp_path):
    """A copy of the small model, to be damaged."""
    return shutil.copytree(small_gemma, tmp_path / "base")


@pytest.fixture
def nothing_loaded(monkeypatch):
    """No model may be loaded."""

    def load(*args, **kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


@pytest.fixture
def line_of(capsys):
    """line_of(main, *flags): the only line on stderr of a recipe that ends with exit code 1."""

    def run(main, *flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: main(list(map(str, flags))))
        assert ended.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("错误 error: ")
        return line

    return run


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": f"{n}+1", "response": str(n + 1)}) + "\n" for n in range(8)))
    return path


@pytest.fixture(scope="module")
def runs(small_gemma, rows_file, tmp_path_factory):
    """runs(tuning): the folder of a short run on a base beside it, made once."""
    folders = {}

    def make(tuning):
        if tuning not in folders:
            parent = tmp_path_factory.mktemp(tuning)
            base = shutil.copytree(small_gemma, parent / "base")
            flags = ["--path_model_pretrain", base, "--data_path", rows_file, "--model_save_dir", parent / "out"]
            flags += ["--eval_rows", 0, "--val_set_size", 0, "--cache_dir", parent / "cache", "--max_steps", 1]
            train.main(list(map(str, [*flags, "--tuning", tuning])))
            folders[tuning] = parent
        return folders[tuning]

    return make


@pytest.fixture
def trained(runs, tmp_path, request):
    """A copy of a run: (its folder, its base)."""
    parent = runs(getattr(request, "param", "lora"))
    folder, base = (
        shutil.copytree(parent / "out", tmp_path / "out"),
        shutil.copytree(parent / "base", tmp_path / "base"),
    )
    manifest = json.loads((folder / "run_manifest.json").read_text())
    manifest["base"]["path"] = str(base)
    (folder / "run_manifest.json").write_text(json.dumps(manifest))
    return folder, base


SCRIPTS = {"predict": predict, "evaluation": evaluation, "post_api": post_api, "export": export}


def command(script, folder, rows_file):
    """What runs one of SCRIPTS on the run in `folder`: its main, and flags."""
    flags = ["--model_save_dir", folder]
    flags += {"predict": ["--query", "1+1"], "evaluation": ["--data_path", rows_file]}.get(script, [])
    return SCRIPTS[script].main, *flags


@every_damage
def test_a_damaged_base_is_named_before_it_is_loaded(base, damaged, rows_file, tmp_path, line_of, nothing_loaded):
    told = damaged(base / "model.safetensors")
    line = line_of(train.main, "--path_model_pretrain", base, "--data_path", rows_file, "--model_save_dir", tmp_path)
    assert all(text in line for text in told)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_damaged_base_of_a_run_is_told_as_that(trained, script, rows_file, line_of, nothing_loaded):
    folder, base = trained
    cut(base / "model.safetensors")
    line = line_of(*command(script, folder, rows_file))
    assert f"{base / 'model.safetensors'}: 文件不完整 is cut off" in line


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("damaged", ["empty", "cut off", "a pointer"], indirect=True)
def test_a_damaged_adapter_is_named_before_its_base_is_loaded(
    trained, damaged, script, rows_file, line_of, nothing_loaded
):
    folder, _ = trained
    told = damaged(folder / "adapter_model.safetensors")
    line = line_of(*command(script, folder, rows_file))
    assert all(text in line for text in told)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("trained", ["full"], indirect=True)
def test_a_damaged_whole_model_is_named(trained, script, rows_file, line_of, nothing_loaded):
    cut(trained[0] / "model.safetensors")
    line = line_of(*command(script, trained[0], rows_file))
    assert f"{trained[0] / 'model.safetensors'}: 文件不完整 is cut off" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_pickled_adapter_is_never_opened(trained, script, rows_file, line_of, nothing_loaded):
    folder, _ = trained
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    line = line_of(*command(script, folder, rows_file))
    assert f"{folder / 'adapter_model.bin'}: 只有 pickle 格式的适配器" in line
    assert "save it as adapter_model.safetensors" in line


def test_an_adapter_without_weights_is_named(trained, rows_file, line_of, nothing_loaded):
    (trained[0] / "adapter_model.safetensors").unlink()
    line = line_of(*command("predict", trained[0], rows_file))
    assert f"{trained[0] / 'adapter_model.safetensors'}: 适配器的权重不在" in line


def test_a_process_ends_with_that_line(base, rows_file, recipe):
    (base / "model.safetensors").write_bytes(POINTER)
    done = recipe("train.py", "--path_model_pretrain", base, "--data_path", rows_file)
    assert done.returncode == 1 and done.stdout == f"基座 base: {base}\n"
    (line,) = done.stderr.splitlines()
    assert f"{base / 'model.safetensors'}: " in line and line.endswith("git lfs pull")


def test_a_tokenizer_that_is_a_pointer_is_named(base, rows_file, line_of):
    (base / "tokenizer.json").write_bytes(POINTER)
    line = line_of(train.main, "--path_model_pretrain", base, "--data_path", rows_file)
    assert f"{base / 'tokenizer.json'}: " in line and line.endswith("git lfs pull")


@pytest.mark.parametrize("alone", [True, False])
def test_a_sentencepiece_file_is_looked_at_where_it_is_read(base, alone):
    (base / "tokenizer.model").write_bytes(POINTER)
    if not alone:
        assert weights.check_tokenizer(base) is None
        return
    (base / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.model: .*git lfs pull"):
        weights.check_tokenizer(base)


# ---------------------------------------------------------------- shards


@pytest.fixture
def shards(base):
    """The base in several files."""
    net = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    net.save_pretrained(base, max_shard_size="40KB")
    return sorted(base.glob("model-*.safetensors"))


def test_a_missing_shard_is_named(base, shards):
    shards[1].unlink()
    told = f"^{shards[1]}: .* 1 of the {len(shards)} that model.safetensors.index.json names"
    with pytest.raises(UserError, match=told):
        loading.load_base(base, "float32")


@every_damage
def test_a_damaged_shard_is_named(base, shards, damaged):
    told = damaged(shards[-1])
    with pytest.raises(UserError) as raised:
        loading.load_base(base, "float32")
    assert all(text in str(raised.value) for text in told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (POINTER, "Git LFS pointer"),
        (b"", "is empty"),
        (b"{}", "is no index"),
        (b"[1", "is no index"),
        (b"\xff", "no index"),
    ],
)
def test_a_damaged_index_is_named(base, shards, content, told):
    (base / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(UserError, match=f"index.json: .*{told}"):
        loading.load_base(base, "float32")


# ---------------------------------------------------------------- weights in pickles


@pytest.fixture(params=[True, False], ids=["zip", "before torch 1.6"])
def pickled(request, base):
    """The base's weights as torch.save writes them, or used to."""
    file = base / "pytorch_model.bin"
    torch.save(load_file(base / "model.safetensors"), file, _use_new_zipfile_serialization=request.param)
    (base / "model.safetensors").unlink()
    return file


def test_whole_pickles_are_loaded(base, pickled, small_gemma):
    net, expected = loading.load_base(base, "float32"), loading.load_base(small_gemma, "float32")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("left", [-10, 40_000, 100])
def test_a_pickle_cut_off_is_one_line(base, pickled, left):
    cut(pickled, left)
    with pytest.raises(UserError) as raised:
        loading.load_base(base, "float32")
    assert "\n" not in str(raised.value) and str(base) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "is empty"), (POINTER, "git lfs pull"), (b"<html>", "is not a weight file of torch, it begins b'<htm'")],
)
def test_what_is_no_pickle_is_named(base, pickled, content, told):
    pickled.write_bytes(content)
    with pytest.raises(UserError, match=f"pytorch_model.bin: .*{told}"):
        loading.load_base(base, "float32")


def test_a_pickle_beside_safetensors_is_not_looked_at(base):
    (base / "pytorch_model.bin").write_bytes(POINTER)
    assert loading.load_base(base, "float32").num_parameters() > 0


# ---------------------------------------------------------------- where files are opened


@every_damage
def test_what_was_saved_and_cannot_be_read_is_named(trained, damaged):
    folder, base = trained
    net = adapter.attach(loading.load_base(base, "float32"), folder)
    told = damaged(folder / "adapter_model.safetensors")
    for reopen in (lambda: verify.verify_adapter(net, folder), lambda: adapter.attach(net, folder, "second")):
        with pytest.raises(UserError) as raised:
            reopen()
        assert all(text in str(raised.value) for text in told)


@every_damage
def test_a_whole_model_that_cannot_be_read_is_named(damaged, base):
    net = loading.load_base(base, "float32")
    told = damaged(base / "model.safetensors")
    with pytest.raises(UserError) as raised:
        verify.verify_whole(net, base)
    assert all(text in str(raised.value) for text in told)


def test_what_only_safetensors_sees_is_one_line(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F99"'))
    with pytest.raises(UserError, match=f"^{file}: 无法读取 cannot be read"), weights.readable(file):
        load_file(file)
    with pytest.raises(UserError, match="无法加载模型 model cannot be loaded"):
        loading.load_base(base, "float32")


def test_hub_ids_are_left_to_the_hub():
    weights.check_model("google/gemma-2b-it")
