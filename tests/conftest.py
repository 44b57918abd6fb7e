"""What the tests share: real fixtures where they are, small models made on the spot, recipes run as processes."""

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT.parent / "shared" / "fixtures"
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # two workers, a core each


def pytest_configure(config):
    """No card is seen but by the tests marked gpu: the others find the same values on every machine."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


LONGEST = "readme processes methods docs training faults families export".split()  # others take a minute or less


def pytest_collection_modifyitems(items):
    """The longest files first, so that both workers end at the same time."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish(session):
    """What is imported is no garbage: Trainer collects four times a run, and to see that took it a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def fixtures():
    """The folder of real tokenizers, golden values and data; its tests are skipped where it is absent."""
    if not FIXTURES.is_dir():
        pytest.skip("../shared/fixtures is not here")
    return FIXTURES


@pytest.fixture(scope="session")
def gemma_tokenizer(fixtures):
    """Gemma's real tokenizer, 256,000 pieces."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fixtures / "tokenizers/gemma")


CHARACTERS = [" ", "\n", *"abcdefghijklmnopqrstuvwxyz0123456789的一是不了人我在有他这问答"]


@pytest.fixture(scope="session")
def tokenizer():
    """A Gemma tokenizer made here: one piece a character, everything else as bytes."""
    from gemma_sft.make_embedded import make_tokenizer

    return make_tokenizer(CHARACTERS)


@pytest.fixture(scope="session")
def small_gemma(tmp_path_factory, tokenizer):
    """A folder with a random GemmaForCausalLM of 30,000 parameters and its tokenizer."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    folder = tmp_path_factory.mktemp("small_gemma")
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    GemmaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_qwen(tmp_path_factory):
    """A folder with a random Qwen2ForCausalLM of 30,000 parameters and its tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from qwen2_sft.make_embedded import make_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("small_qwen"), make_tokenizer(CHARACTERS)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_qwen35(tmp_path_factory, small_qwen):
    """A folder with the tokenizer of small_qwen, its words split as from Qwen3.5 on."""
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

    folder = tmp_path_factory.mktemp("small_qwen35")
    for file in small_qwen.glob("*.json"):
        shutil.copy(file, folder)
    shutil.copy(small_qwen / "chat_template.jinja", folder)
    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    rules["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PRETOKENIZE_REGEX
    (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small_chatglm(tmp_path_factory):
    """A folder with a random ChatGLM of 40,000 parameters and its SentencePiece tokenizer."""
    import torch

    from chatglm_sft.make_embedded import make_model, make_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("small_chatglm"), make_tokenizer(CHARACTERS)
    torch.manual_seed(0)
    config = make_model(tokenizer).config
    config.update({"hidden_size": 32, "inner_hidden_size": 64, "num_layers": 2, "num_attention_heads": 2})
    config.update({"alpha_num_layers": 2})
    from chatglm_sft.models.chatglm import ChatGLMForCausalLM

    ChatGLMForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_glm4(tmp_path_factory):
    """A folder with a random Glm4ForCausalLM of 40,000 parameters and its tokenizer."""
    import glm4
    import torch

    folder, tokenizer = tmp_path_factory.mktemp("small_glm4"), glm4.make_tokenizer(CHARACTERS)
    torch.manual_seed(0)
    glm4.make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_chatglm2(tmp_path_factory):
    """A folder with a random ChatGLM2 of 40,000 parameters and its SentencePiece tokenizer."""
    import glm2

    folder = tmp_path_factory.mktemp("small_chatglm2")
    glm2.write_folder(folder, 2, CHARACTERS)
    return folder


@pytest.fixture(scope="session")
def small_chatglm3(tmp_path_factory):
    """A folder with a random ChatGLM3 of 40,000 parameters and its SentencePiece tokenizer."""
    import glm2

    folder = tmp_path_factory.mktemp("small_chatglm3")
    glm2.write_folder(folder, 3, CHARACTERS)
    return folder


@pytest.fixture(scope="session")
def small_models(small_gemma, small_qwen, small_chatglm, small_chatglm2, small_chatglm3, small_glm4):
    """{hub id: folder of a small random model of that family}, as commands.Project wants it."""
    return {
        "google/gemma-2b-it": small_gemma,
        "Qwen/Qwen1.5-0.5B-Chat": small_qwen,
        "THUDM/chatglm-6b": small_chatglm,
        "THUDM/chatglm2-6b": small_chatglm2,
        "THUDM/chatglm3-6b": small_chatglm3,
        "THUDM/GLM-4-9B-0414": small_glm4,
    }


@pytest.fixture(scope="module", params=["gemma", "qwen", "chatglm"])
def family(request, tmp_path_factory):
    """A runs.Family on its small base, one after the other."""
    return _family(request.param, request, tmp_path_factory)


@pytest.fixture(scope="module")
def gemma(request, tmp_path_factory):
    """A runs.Family on the small Gemma."""
    return _family("gemma", request, tmp_path_factory)


def _family(name, request, tmp_path_factory):
    from runs import FAMILIES, Family

    package, base = FAMILIES[name]
    return Family(package, request.getfixturevalue(base), tmp_path_factory.mktemp(name))


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The environment recipes run in: no hub, and a home of their own, so that caches start empty."""
    home = tmp_path_factory.mktemp("home")
    return os.environ | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def warm(environment):
    """A commands.Warm, which starts Python scripts that need the large libraries soon."""
    from commands import Warm

    warm = Warm(environment)
    yield warm
    warm.close()


@pytest.fixture
def forked(warm, tmp_path):
    """As recipe, for what is run afresh elsewhere too: `warm` starts the process."""

    def run(script, *flags, family="gemma_sft/ft_gemma"):
        words = [ROOT / family / script, *flags]
        return subprocess.CompletedProcess(words, *warm.run(words, tmp_path))

    return run


@pytest.fixture
def recipe(environment, tmp_path):
    """recipe("train.py", *flags) runs gemma_sft/ft_gemma/train.py in an empty folder: the finished process."""

    def run(script, *flags, cwd=tmp_path, family="gemma_sft/ft_gemma", timeout=600, **kwargs):
        command = [sys.executable, str(ROOT / family / script), *map(str, flags)]
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, **kwargs
        )

    return run
