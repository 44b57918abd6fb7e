"""Ranges of versions, the sets that are tried, and every name of a library that only some of its versions have.

.ci/run runs this file on the oldest and on the newest set too.
"""

import importlib
import re
from inspect import getsource, signature
from pkgutil import resolve_name

import pytest
import torch
from commands import text_of
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import GemmaConfig, GemmaForCausalLM, TrainingArguments

from common import versions
from common.runs.manifest import PACKAGES

FILES = ("requirements.txt", "constraints.txt", ".ci/oldest.txt", ".ci/newest.txt")


def required(file):
    """{package: SpecifierSet} of a file of requirements."""
    lines = [line.split("#")[0].strip() for line in text_of(file).splitlines()]
    return {found.name: found.specifier for found in map(Requirement, filter(None, lines))}


def bound(specifiers, operator):
    """The version behind an operator, or None."""
    return next((one.version for one in specifiers if one.operator == operator), None)


# --- files of versions ------------------------------------------------------------------------------------------------


def test_each_library_has_a_lowest_and_a_highest_version():
    ranges = required("requirements.txt")
    assert [name for name in PACKAGES if not (bound(ranges[name], ">=") and bound(ranges[name], "<"))] == []


@pytest.mark.parametrize("file", FILES[1:])
def test_the_sets_are_exact_and_within_the_ranges(file):
    ranges, pins = required("requirements.txt"), required(file)
    assert pins and all(bound(pin, "==") for pin in pins.values())
    outside = {name: str(pin) for name, pin in pins.items() if name in ranges and bound(pin, "==") not in ranges[name]}
    assert outside == {}


def test_the_tested_set_names_every_requirement_and_the_oldest_is_the_lowest():
    ranges, tested, oldest = map(required, FILES[:3])
    assert ranges.keys() == tested.keys()
    lowest = {name: Version(bound(ranges[name], ">=")) for name in oldest.keys() & set(PACKAGES)}
    assert lowest and lowest == {name: Version(bound(oldest[name], "==")) for name in lowest}


def test_what_is_tested_is_told_in_both_languages():
    ranges = required("requirements.txt")
    for page in ("docs/methods.md", "docs/methods_zh.md"):
        for name in ("torch", "transformers", "peft", "accelerate", "datasets"):
            specifiers = f">={bound(ranges[name], '>=')},<{bound(ranges[name], '<')}"
            tried = bound(required("constraints.txt")[name], "==")
            assert re.search(rf"^\| {name} \| `{re.escape(specifiers)}` \|.*\b{re.escape(tried)}", text_of(page), re.M)


# --- names that some versions have ------------------------------------------------------------------------------------


def test_the_new_name_is_taken_where_there_is_one():
    assert versions.name_taken(lambda new, old: None, "new", "old") == "new"
    assert versions.name_taken(lambda old: None, "new", "old") == "old"


@pytest.fixture(scope="module")
def net():
    """A random Gemma of one layer."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_attention_heads=1, num_key_value_heads=1, head_dim=16)
    return GemmaForCausalLM(GemmaConfig(vocab_size=32, num_hidden_layers=1, pad_token_id=0, **sizes)).eval()


@torch.no_grad()
def test_a_model_takes_its_cache_by_that_name_and_gives_it_back(net):
    ids = torch.arange(1, 9)[None]
    first = net(input_ids=ids[:, :5], use_cache=True)
    assert first[versions.CACHE].get_seq_length() == 5
    rest = net(input_ids=ids[:, 5:], use_cache=True, **{versions.CACHE: first[versions.CACHE]})
    torch.testing.assert_close(rest.logits, net(input_ids=ids).logits[:, 5:])


@pytest.mark.parametrize("asked", [True, False])
def test_activations_are_computed_again_where_asked(asked, tmp_path):
    name = versions.name_taken(TrainingArguments, "activation_checkpointing", "gradient_checkpointing")
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: asked})
    assert args.gradient_checkpointing is asked


def test_positions_are_kept_as_asked():
    hidden, index = torch.randn(2, 5, 3), torch.tensor([0, 3])
    assert torch.equal(versions.slice_logits_to_keep(hidden, 0), hidden)
    assert torch.equal(versions.slice_logits_to_keep(hidden, 2), hidden[:, -2:])
    assert torch.equal(versions.slice_logits_to_keep(hidden, index), hidden[:, index])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_repetition_penalty_counts_prompts_and_answers_and_no_pads(beams):
    """Of prompts 5 and 3 4 5, answered 0 and 6, with the pad 0."""
    prompts, mask = torch.tensor([[0, 0, 5], [3, 4, 5]]), torch.tensor([[0, 0, 1], [1, 1, 1]])
    (penalty,) = versions.repetition_penalty(2.0, mask)

    def lowered(*answers):
        ids = torch.cat([prompts.repeat_interleave(beams, 0), *(one.repeat_interleave(beams, 0) for one in answers)], 1)
        scores = penalty(ids, torch.ones(2 * beams, 8))
        return [(row < 1).nonzero().flatten().tolist() for row in scores[::beams]]

    assert lowered() == [[5], [3, 4, 5]] and lowered(torch.tensor([[0], [6]])) == [[0, 5], [3, 4, 5, 6]]
    assert versions.repetition_penalty(1.0, mask) == []


# --- private interfaces of libraries ----------------------------------------------------------------------------------

TRAINER, ROWS, WRAPPER = "transformers.Trainer", "peft.tuners.trainable_tokens.TrainableTokensLayer", "peft.utils.other"
PRIVATE = {  # a method that is ours or calls theirs: (its parameters, the module that calls it)
    f"{TRAINER}._get_train_sampler": ("self train_dataset", "transformers.trainer"),
    f"{TRAINER}._get_grad_norm": ("self model grad_norm", "transformers.trainer"),
    f"{TRAINER}._save": ("self output_dir state_dict", "transformers.trainer"),
    f"{TRAINER}._load_best_model": ("self", "transformers.trainer"),
    f"{ROWS}.forward_adapters": ("self x active_adapters", "peft.tuners.trainable_tokens.layer"),
    f"{WRAPPER}.TrainableTokensWrapper.adapter_state_dict": (
        "self adapter_name state_dict",
        "peft.utils.save_and_load",
    ),
    f"{WRAPPER}.TrainableTokensWrapper.adapter_state_dict_load_map": ("self adapter_name", "peft.utils.save_and_load"),
    "transformers.GenerationMixin._prepare_position_ids_for_generation": (
        "self inputs_tensor model_kwargs",
        "transformers.generation.utils",
    ),
    "transformers.tokenization_utils_sentencepiece.SentencePieceBackend._update_trie": (
        "self unique_no_split_tokens",
        "transformers.tokenization_utils_sentencepiece",
    ),
    "waitress.channel.HTTPChannel.error_task_class": ("channel request", "waitress.channel"),
}
OTHERS = {
    "_n_gpu",
    "_linear_pointwise",
    "linear_dynamic_fp16",
    "trace",
    "support_avx512bf16_for_cpu",
    "__compatible_ops__",
    "_weight_conversions",
}  # tested one by one


@pytest.mark.parametrize("path", PRIVATE)
def test_a_private_method_is_as_we_call_it_and_still_called(path):
    parameters, caller = PRIVATE[path]
    names = [name for name in signature(resolve_name(path)).parameters if name not in ("args", "kwargs")]
    assert names[: len(parameters.split())] == parameters.split()
    assert re.search(rf"\w\.{path.rpartition('.')[2]}\b", getsource(importlib.import_module(caller)))


def test_the_number_of_cards_is_set_in_one_place(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    args._n_gpu = min(args.n_gpu, 1)
    assert args.n_gpu == args._n_gpu == 0
    args._n_gpu = 1
    assert args.n_gpu == 1


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_a_product_of_one_dnn():
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    made = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    torch.testing.assert_close(made, x @ weight.T)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="torch without FBGEMM")
def test_a_product_of_fbgemm_is_float32_over_weights_of_16_bits():
    x, weight, bias = torch.randn(4, 8), torch.randn(3, 8).bfloat16().float(), torch.randn(3)
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    assert torch.equal(torch.ops.quantized.linear_unpack_fp16(packed)[0], weight)
    torch.testing.assert_close(torch.ops.quantized.linear_dynamic_fp16(x, packed), x @ weight.T + bias)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_still_records_what_a_function_does():
    traced = torch.jit.trace(lambda x: x.narrow(0, 0, 2) + 1, torch.ones(3), check_trace=False)
    assert torch.equal(traced(torch.zeros(5)), torch.ones(2))


def test_bitsandbytes_is_told_to_leave_the_weights_alone():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64)
    assert "support_avx512bf16_for_cpu" in vars(layer)
    assert "self.support_avx512bf16_for_cpu" in getsource(bitsandbytes.nn.modules)


def test_deepspeed_is_told_what_it_cannot_compile():
    pytest.importorskip("deepspeed")
    assert "deepspeed_shm_comm" in importlib.import_module("deepspeed.ops").__compatible_ops__


def test_each_private_name_is_listed_for_who_changes_them():
    part = text_of("CONTRIBUTING.md").partition("## Private interfaces we touch")[2].partition("\n\nPublic names")[0]
    listed = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", part)}
    assert listed == {path.rpartition(".")[2] for path in PRIVATE} | OTHERS
