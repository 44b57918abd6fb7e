"""ChatGLM's model against outputs of the original implementation, and against transformers' conventions."""

import json
import logging
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from chatglm_sft.models.chatglm import ChatGLMConfig, ChatGLMForCausalLM
from chatglm_sft.models.chatglm.layout import (
    build_blocked_mask,
    build_position_ids,
    find_context,
    grow_position_ids,
    keep_from_blocked,
)
from chatglm_sft.models.chatglm.modeling_chatglm import ChatGLMMLP, inverse_frequencies, rotary_tables
from common.versions import CACHE

SHARED = Path(__file__).parents[1] / "../shared/fixtures"
FIXTURES = SHARED / "chatglm"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason=f"no golden files: {FIXTURES} is absent")
# peft 0.21 asks transformers 5.23 for a property it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PAD, MASK, GMASK, BOS, EOS = 3, 500, 501, 504, 505
READINGS = pytest.mark.parametrize("prefix, alpha_depth", [("", 3), ("alpha28.", 28)])
GREEDY = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: a second thread only costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def golden():
    return load_file(FIXTURES / "golden.safetensors")


def load_golden(alpha_depth=3, **kwargs):
    """The 3-layer fixture checkpoint; `alpha_depth` chooses between the two recorded readings of alpha."""
    kwargs = {"dtype": torch.float32, "alpha_num_layers": alpha_depth} | kwargs
    return AutoModelForCausalLM.from_pretrained(FIXTURES, **kwargs).eval()


def tiny_config(**changes):
    sizes = {"hidden_size": 32, "inner_hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    ids = {"pad_token_id": PAD, "mask_token_id": MASK, "gmask_token_id": GMASK, "bos_token_id": BOS}
    # wide weights, so that attention (and with it masks and positions) matters
    return ChatGLMConfig(**(sizes | ids | {"eos_token_id": EOS, "initializer_range": 0.3} | changes))


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return ChatGLMForCausalLM(tiny_config(**changes)).eval()


def rows(lengths=((7, 6), (3, 4), (11, 2)), seed=1):
    """Random unpadded rows: so many prompt ids, [gMASK], <sop>, so many answer ids."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(10, 400, (n,), generator=generator).tolist()  # noqa: E731
    return [[*draw(prompt), GMASK, BOS, *draw(answer)] for prompt, answer in lengths]


def pad_rows(rows, side, value=PAD):
    width = max(map(len, rows))
    padding = [[value] * (width - len(row)) for row in rows]
    padded = [pad + row if side == "left" else row + pad for row, pad in zip(rows, padding, strict=True)]
    return torch.tensor(padded)


def answer_labels(row):
    start = row.index(BOS) + 1
    return [-100] * start + row[start:]


@contextmanager
def log_of(name="transformers", level=logging.WARNING):
    """Messages that `name` logs at `level` or above inside the block."""
    messages = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger(name).removeHandler(handler)


# ---- golden files: layout ----


@needs_fixtures
@pytest.mark.parametrize("name", ["single", "blank", "both", "batch_selfbuilt"])
def test_masks_and_positions_built_from_ids_alone(golden, name):
    ids = golden[f"{name.removesuffix('_selfbuilt')}.input_ids"]
    config = ChatGLMConfig.from_pretrained(FIXTURES)
    blocked = build_blocked_mask(find_context(ids, BOS), torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(blocked, golden[f"{name}.attention_mask"])
    assert torch.equal(build_position_ids(ids, None, config), golden[f"{name}.position_ids"])


@needs_fixtures
@pytest.mark.parametrize("name", ["batch", "loss_left", "gen_batch"])
def test_masks_and_positions_of_left_padded_rows(golden, name):
    ids, config = golden[f"{name}.input_ids"], ChatGLMConfig.from_pretrained(FIXTURES)
    keep = ids != PAD
    blocked = build_blocked_mask(find_context(ids, BOS), keep)
    assert torch.equal(blocked, golden[f"{name}.attention_mask"])
    assert torch.equal(build_position_ids(ids, keep, config), golden[f"{name}.position_ids"])
    assert torch.equal(keep_from_blocked(blocked), keep)


@needs_fixtures
def test_masks_and_positions_as_grown_by_generation(golden):
    ids, sequences = golden["gen_batch.input_ids"], golden["gen_batch.sequences"]
    grown = grow_position_ids(golden["gen_batch.position_ids"], 16)
    assert torch.equal(grown, golden["gen_batch.final.position_ids"])
    keep = torch.cat([ids != PAD, torch.ones(3, 16, dtype=torch.bool)], 1)
    blocked = build_blocked_mask(find_context(sequences, BOS), keep)
    assert torch.equal(blocked, golden["gen_batch.final.attention_mask"])


@needs_fixtures
@pytest.mark.parametrize("name", ["single", "blank"])
def test_positions_in_1d_mode(golden, name):
    config = ChatGLMConfig.from_pretrained(FIXTURES, position_encoding_2d=False)
    positions = build_position_ids(golden[f"{name}.input_ids"], None, config)
    assert torch.equal(positions, golden[f"pos1d.{name}.position_ids"])
    prompt = find_context(golden[f"{name}.input_ids"], BOS).item() + 1
    assert torch.equal(grow_position_ids(positions[:, :prompt], positions.shape[1] - prompt), positions)


# ---- golden files: numbers ----


@needs_fixtures
def test_rotary_tables(golden):
    positions = golden["rotary64.positions"][None, None]
    assert inverse_frequencies(64) == tuple(golden["rotary64.inv_freq"].tolist())
    for dtype, name in [(torch.float32, "fp32"), (torch.float16, "fp16")]:
        cos, sin = rotary_tables(positions, 64, dtype)
        assert_close(cos[0, 0, :, 0], golden[f"rotary64.{name}.cos"], atol=1e-6, rtol=0)
        assert_close(sin[0, 0, :, 0], golden[f"rotary64.{name}.sin"], atol=1e-6, rtol=0)
    bf16, fp32 = rotary_tables(positions, 64, torch.bfloat16)[0], rotary_tables(positions, 64, torch.float32)[0]
    assert torch.equal(bf16, fp32.bfloat16())  # fp32 angles, only the result is rounded


@needs_fixtures
def test_gelu(golden):
    mlp = ChatGLMMLP(tiny_config(hidden_size=4, inner_hidden_size=1, num_attention_heads=1))
    with torch.no_grad():
        for layer in (mlp.dense_h_to_4h, mlp.dense_4h_to_h):
            layer.weight.fill_(0)
            layer.bias.zero_()
            layer.weight[0, 0] = 1
        x = torch.nn.functional.pad(golden["gelu.x"][:, None], (0, 3))
        assert_close(mlp(x)[:, 0], golden["gelu.y"], atol=1e-6, rtol=0)


@needs_fixtures
@READINGS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_logits(golden, prefix, alpha_depth, attention):
    model = load_golden(alpha_depth, attn_implementation=attention)

    def check(name, expected=None, **inputs):
        ids = inputs["input_ids"]
        expected = golden[prefix + (expected or f"{name}.logits")]
        real = ids != PAD if name != "batch_selfbuilt" else torch.ones_like(ids, dtype=torch.bool)
        assert_close(model(**inputs).logits[real], expected[real], atol=1e-4, rtol=0, msg=lambda m: f"{name}: {m}")

    for name in ("single", "blank", "both"):
        check(name, input_ids=golden[f"{name}.input_ids"])
    check("batch_selfbuilt", input_ids=golden["batch.input_ids"])
    batch = {key: golden[f"batch.{key}"] for key in ("input_ids", "attention_mask", "position_ids")}
    keep = (batch["input_ids"] != PAD).long()
    check("batch", **batch)
    check("batch", input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    check("batch", input_ids=batch["input_ids"], attention_mask=keep)
    check("batch", input_ids=batch["input_ids"], attention_mask=keep.bool(), position_ids=batch["position_ids"])
    check("loss_right", input_ids=golden["loss_right.input_ids"])
    check("gen_single", "gen_single.full_logits", input_ids=golden[prefix + "gen_single.sequences"])
    finished = golden[prefix + "gen_batch.sequences"]
    final = {key: golden[f"gen_batch.final.{key}"] for key in ("attention_mask", "position_ids")}
    check("gen_batch", "gen_batch.full_logits", input_ids=finished, **final)
    check(
        "gen_batch",
        "gen_batch.full_logits",
        input_ids=finished,
        attention_mask=keep_from_blocked(final["attention_mask"]),
    )


@needs_fixtures
@READINGS
@torch.no_grad()
def test_hidden_states_attentions_and_cache(golden, prefix, alpha_depth):
    model = load_golden(alpha_depth, attn_implementation="eager")
    out = model(golden["single.input_ids"], output_hidden_states=True, output_attentions=True, use_cache=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    for i, states in enumerate(out.hidden_states):
        assert_close(states.transpose(0, 1), golden[f"{prefix}single.hidden_states.{i}"], atol=1e-4, rtol=0)
    for i, probabilities in enumerate(out.attentions):
        assert_close(probabilities, golden[f"{prefix}single.attentions.{i}"], atol=1e-5, rtol=0)
    assert isinstance(out[CACHE], DynamicCache)
    for i, layer in enumerate(out[CACHE].layers):
        for name, states in (("key", layer.keys), ("value", layer.values)):
            assert_close(states.permute(2, 0, 1, 3), golden[f"{prefix}single.past.{i}.{name}"], atol=1e-4, rtol=0)


@needs_fixtures
@READINGS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients(golden, prefix, alpha_depth, attention):
    model = load_golden(alpha_depth, attn_implementation=attention)
    loss = model(golden["loss_right.input_ids"], labels=golden["loss_right.labels"]).loss
    loss.backward()
    assert_close(loss, golden[f"{prefix}loss_right.loss"], atol=1e-4, rtol=0)
    start = f"{prefix}loss_right.grad."
    names = [name.removeprefix(start) for name in golden if name.startswith(start)]
    assert len(names) == 6
    for name in names:
        assert_close(model.get_parameter(name).grad, golden[start + name], atol=1e-5, rtol=0)

    left = {key: golden[f"loss_left.{key}"] for key in ("input_ids", "labels", "attention_mask", "position_ids")}
    with torch.no_grad():
        assert_close(model(**left).loss, golden[f"{prefix}loss_left.loss"], atol=1e-4, rtol=0)
        left["attention_mask"] = (left["input_ids"] != PAD).long()
        assert_close(model(**left).loss, golden[f"{prefix}loss_left.loss"], atol=1e-4, rtol=0)


@needs_fixtures
@READINGS
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_greedy_generation(golden, prefix, alpha_depth, cached):
    model = load_golden(alpha_depth)
    settings = GREEDY | {"use_cache": cached, "return_dict_in_generate": True, "output_logits": True}
    batch = {key: golden[f"gen_batch.{key}"] for key in ("input_ids", "attention_mask", "position_ids")}
    plain = {"input_ids": batch["input_ids"], "attention_mask": (batch["input_ids"] != PAD).long()}
    for name, inputs in [("single", {"input_ids": golden["gen_single.input_ids"]}), ("batch", plain), ("batch", batch)]:
        out = model.generate(**inputs, **settings)
        assert torch.equal(out.sequences, golden[f"{prefix}gen_{name}.sequences"])
        steps = torch.stack(out.logits, 1)
        assert_close(steps, golden[f"{prefix}gen_{name}.step_logits"], atol=1e-4, rtol=0)


@needs_fixtures
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_half_precision_is_as_near_to_the_original_half_as_that_is_to_fp32(golden, attention):
    model = load_golden(dtype=torch.float16, attn_implementation=attention)
    batch = {key: golden[f"batch.{key}"] for key in ("input_ids", "attention_mask", "position_ids")}
    for name, inputs in [("single", {"input_ids": golden["single.input_ids"]}), ("batch", batch)]:
        real = inputs["input_ids"] != PAD
        logits, expected = model(**inputs).logits[real], golden[f"half.{name}.logits"][real]
        assert logits.dtype == torch.float16
        assert (logits - expected).abs().max() < 0.1


@needs_fixtures
@torch.no_grad()
def test_1d_positions(golden):
    model = load_golden(position_encoding_2d=False)
    for name in ("single", "blank"):
        logits = model(golden[f"{name}.input_ids"]).logits
        assert_close(logits, golden[f"pos1d.{name}.logits"], atol=1e-4, rtol=0)


@needs_fixtures
def test_positions_of_the_original_tokenizer_are_honoured(golden):
    """With [MASK] and [gMASK] in one prompt the original's tokenizer and model disagree; given positions win."""
    model, ids = load_golden(), golden["both.input_ids"]
    given = {key: golden[f"both.tokenizer.{key}"] for key in ("attention_mask", "position_ids")}
    with torch.no_grad():
        assert (model(ids, **given).logits - model(ids).logits).abs().max() > 1
    prompt = {"attention_mask": given["attention_mask"][..., :8, :8], "position_ids": given["position_ids"][..., :8]}
    sequences = model.generate(ids[:, :8], **prompt, **GREEDY)
    uncached = model.generate(ids[:, :8], **prompt, **GREEDY, use_cache=False)
    assert torch.equal(sequences, uncached)
    assert not torch.equal(sequences, model.generate(ids[:, :8], **GREEDY))


# ---- golden files: the checkpoint's folder ----


@needs_fixtures
def test_names_and_shapes_at_full_size():
    expected = {}
    for line in (FIXTURES / "param_names.txt").read_text().splitlines():
        if match := re.match(r"(\S+)\s+(\(.*?\))\s+x(\d+)$", line):
            name, shape, count = match[1], tuple(map(int, re.findall(r"\d+", match[2]))), int(match[3])
            expected |= {re.sub(r"\{0..27\}", str(i), name): shape for i in range(count)}
    assert len(expected) == 368
    with torch.device("meta"):
        model = ChatGLMForCausalLM(ChatGLMConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == {name: shape for name, shape in expected.items() if not name.endswith("inv_freq")}
    assert inverse_frequencies(model.config.rotary_width) and model.config.rotary_width // 2 == 32
    assert sum(p.numel() for p in model.parameters()) == 6_173_286_400


@needs_fixtures
def test_official_config_is_read_without_remote_code():
    config = AutoConfig.from_pretrained(SHARED / "tokenizers/chatglm-6b")
    assert type(config) is ChatGLMConfig and not hasattr(config, "auto_map")
    stored = json.loads((SHARED / "tokenizers/chatglm-6b/config.json").read_text())
    for name in stored.keys() - {"auto_map", "_name_or_path", "torch_dtype", "transformers_version"}:
        assert getattr(config, name) == stored[name] == getattr(ChatGLMConfig(**stored), name)
    assert config.dtype == torch.float16 and config.tie_word_embeddings


def write_sharded_bin(folder, state):
    """The official layout: config.json, two pytorch_model-*.bin and their index."""
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: state[name].clone() for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 13744473856}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text((FIXTURES / "config.json").read_text())


@needs_fixtures
@pytest.mark.parametrize("layout", ["safetensors", "sharded bin", "head differs"])
@torch.no_grad()
def test_checkpoint_loads_without_a_word(golden, tmp_path, layout):
    state = load_file(FIXTURES / "model.safetensors")
    assert sum(name.endswith("rotary_emb.inv_freq") for name in state) == 3 and "lm_head.weight" in state
    if layout == "head differs":  # the word embedding wins, as in the original
        state["lm_head.weight"] = state["lm_head.weight"] + 1
    if layout == "safetensors":
        folder = FIXTURES
    else:
        folder = tmp_path
        write_sharded_bin(folder, state)
    with log_of() as messages:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert messages == []
    assert not any(info.values()), info
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    logits = model.eval()(golden["single.input_ids"]).logits
    assert_close(logits, golden["alpha28.single.logits"], atol=1e-4, rtol=0)


@needs_fixtures
@torch.no_grad()
def test_trunk_alone_loads(golden):
    with log_of() as messages:
        trunk = AutoModel.from_pretrained(FIXTURES, dtype=torch.float32).eval()
    assert messages == []
    states = trunk(golden["single.input_ids"]).last_hidden_state
    assert_close(states.transpose(0, 1), golden["alpha28.single.hidden_states.3"], atol=1e-4, rtol=0)


@needs_fixtures
@torch.no_grad()
def test_device_map_with_a_layer_on_disk(golden, tmp_path):
    places = {"transformer.word_embeddings": "cpu", "lm_head": "cpu", "transformer.final_layernorm": "cpu"}
    places |= {f"transformer.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    model = load_golden(device_map=places, offload_folder=str(tmp_path))
    assert_close(model(golden["single.input_ids"]).logits, golden["single.logits"], atol=1e-4, rtol=0)
    out = model.generate(golden["gen_single.input_ids"], **GREEDY)
    assert torch.equal(out, golden["gen_single.sequences"])


# ---- without golden files ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_folder_reloads_equal(tmp_path, dtype):
    model = tiny_model().to(dtype)
    with log_of() as messages:
        model.save_pretrained(tmp_path)
        reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert messages == [] and not any(info.values())
    assert reloaded.dtype == dtype and type(reloaded) is ChatGLMForCausalLM
    differs = {"_name_or_path", "architectures", "dtype"}
    ours, theirs = (m.config.to_dict() for m in (model, reloaded))
    assert {name for name in ours if ours[name] != theirs[name]} <= differs
    ours, theirs = model.state_dict(), reloaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == ours.keys() - {"lm_head.weight"}  # tied, stored once
    reloaded.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    fields = json.loads((tmp_path / "config.json").read_text())
    assert {"num_layers", "inner_hidden_size", "max_sequence_length"} < fields.keys()
    assert "num_hidden_layers" not in fields


def test_untied_head_stays_untied(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(reloaded.lm_head.weight, reloaded.get_input_embeddings().weight)


def test_missing_weight_is_reported(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.layers.1.mlp.dense_h_to_4h.bias"]
    save_file(state | {"stranger": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"transformer.layers.1.mlp.dense_h_to_4h.bias"}
    assert info["unexpected_keys"] == {"stranger"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pre_seq_len": 128}, "pre_seq_len=128: P-tuning"),
        ({"quantization_bit": 4}, "quantization_bit=4"),
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"hidden_size": 24}, "divide by 4"),
    ],
)
def test_config_refuses_what_it_cannot_run(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)
    saved = {"model_type": "chatglm", "num_attention_heads": 4} | fields
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_fields_of_chatglm2_are_refused_where_its_own_config_is_not_asked_for():
    with pytest.raises(ValueError, match=r"ChatGLM2/3 config \(it has multi_query_attention, padded_vocab_size\)"):
        tiny_config(padded_vocab_size=65024, multi_query_attention=True)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("two_rows", [True, False], ids=["2d", "1d"])
@torch.no_grad()
def test_left_right_and_unpadded_rows_agree(attention, two_rows):
    model = tiny_model(position_encoding_2d=two_rows, attn_implementation=attention)
    examples = rows()
    sums, texts = {}, {}
    for side in ("left", "right"):
        ids, labels = pad_rows(examples, side), pad_rows([answer_labels(row) for row in examples], side, -100)
        mask = pad_rows([[1] * len(row) for row in examples], side, 0)
        sums[side] = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=1).loss
        prompts = [row[: row.index(BOS) + 1] for row in examples]
        ids, mask = pad_rows(prompts, side), pad_rows([[1] * len(row) for row in prompts], side, 0)
        texts[side] = model.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    single = [
        model(torch.tensor([row]), labels=torch.tensor([answer_labels(row)]), num_items_in_batch=1).loss
        for row in examples
    ]
    assert_close(sums["left"], sum(single), atol=1e-4, rtol=1e-6)
    assert_close(sums["right"], sum(single), atol=1e-4, rtol=1e-6)
    alone = [model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :] for prompt in prompts]
    assert torch.equal(texts["left"], torch.stack(alone))
    assert torch.equal(texts["right"], torch.stack(alone))


@torch.no_grad()
def test_right_padded_logits_need_no_mask():
    model, examples = tiny_model(), rows()
    ids = pad_rows(examples, "right")
    mask = (ids != PAD).long()
    real = mask.bool()
    assert_close(model(ids).logits[real], model(ids, attention_mask=mask).logits[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("two_rows", [True, False], ids=["2d", "1d"])
@pytest.mark.parametrize("blank", [GMASK, MASK], ids=["gMASK", "MASK"])
def test_cached_generation_equals_uncached(two_rows, blank):
    model = tiny_model(position_encoding_2d=two_rows)
    prompts = [[blank if i == 2 else 20 + i for i in range(n)] + [BOS] for n in (5, 9)]
    ids = pad_rows(prompts, "left")
    inputs = {"attention_mask": (ids != PAD).long(), "return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(ids, **inputs, **GREEDY)
    uncached = model.generate(ids, **inputs, **GREEDY, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-5, rtol=0)


def test_sampling_beams_and_lookup_run():
    model, prompts = tiny_model(), [row[:-6] for row in rows(((7, 6), (9, 6)))]
    ids = pad_rows(prompts, "left")
    inputs = {"attention_mask": (ids != PAD).long(), "max_new_tokens": 8, "min_new_tokens": 8}
    width = ids.shape[1] + 8
    assert model.generate(ids, **inputs, do_sample=True, top_p=0.7, temperature=0.95).shape == (2, width)
    assert model.generate(ids, **inputs, num_beams=3).shape == (2, width)
    assert model.generate(ids, **inputs, num_beams=3, num_return_sequences=2, do_sample=True).shape == (4, width)
    beams = model.generate(ids, **inputs, num_beams=3)
    alone = model.generate(torch.tensor(prompts[:1]), max_new_tokens=8, min_new_tokens=8, num_beams=3)
    assert torch.equal(beams[0, -8:], alone[0, -8:])
    greedy = model.generate(ids[1:], max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(model.generate(ids[1:], prompt_lookup_num_tokens=3, max_new_tokens=8, min_new_tokens=8), greedy)


def test_embeddings_with_ids_or_positions():
    model, ids = tiny_model(), pad_rows(rows(((4, 0), (7, 0))), "left")
    keep = (ids != PAD).long()
    embeds = model.get_input_embeddings()(ids)
    positions = build_position_ids(ids, keep.bool(), model.config)
    with torch.no_grad():
        expected = model(ids, attention_mask=keep).logits
        assert torch.equal(model(input_ids=ids, inputs_embeds=embeds, attention_mask=keep).logits, expected)
        assert torch.equal(model(inputs_embeds=embeds, position_ids=positions, attention_mask=keep).logits, expected)
    sequences = model.generate(ids, attention_mask=keep, **GREEDY)
    from_embeds = model.generate(input_ids=ids, inputs_embeds=embeds, attention_mask=keep, **GREEDY)
    assert torch.equal(sequences, from_embeds)
    with pytest.raises(ValueError, match="inputs_embeds alone"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="whole sequences"):
        model.generate(inputs_embeds=embeds, **GREEDY)
    flat = tiny_model(position_encoding_2d=False)
    with pytest.raises(ValueError, match="1-D positions do not tell"):
        flat(inputs_embeds=embeds, position_ids=positions[:, 0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": torch.tensor([[9, GMASK, BOS], [9, GMASK, 8]])}, r"row\(s\) \[1\] .* no <sop> \(id 504\)"),
        ({"input_ids": torch.tensor([[9, 8, BOS]])}, r"neither \[gMASK\] \(id 501\) nor \[MASK\] \(id 500\)"),
        ({"input_ids": None}, "pass input_ids, inputs_embeds, or both"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask is torch.float32 \[1, 4\]; expected 0/1 \[B, 3\]"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "True = blocked"),
        ({"position_ids": torch.arange(3)[None]}, r"position_ids are \[1, 3\]; expected \[B, 2, 3\]"),
    ],
)
def test_errors_say_what_to_pass(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**({"input_ids": torch.tensor([[9, GMASK, BOS]])} | change))


def test_cache_errors_say_what_to_pass():
    model, ids = tiny_model(), torch.tensor([rows()[0]])
    first = model(ids[:, :9], use_cache=True)
    with pytest.raises(ValueError, match="with a filled cache pass position_ids"):
        model(ids[:, 9:], cache=first[CACHE])
    early = model(ids[:, :9], use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="a prompt must be read in one call"):
        model(ids[:, :9], cache=early, position_ids=build_position_ids(ids[:, :9], None, model.config))
    with pytest.raises(ValueError, match="static caches are not supported"):
        model.generate(ids[:, :9], cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="prefill_chunk_size is not supported"):
        model.generate(ids[:, :9], prefill_chunk_size=4, **GREEDY)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_several_cached_tokens_at_once_equal_the_uncached_forward(name):
    model, examples = tiny_model(), rows(((7, 6), (9, 6)))
    ids = pad_rows(examples, "left")
    mask = (ids != PAD).long()
    positions = build_position_ids(ids, mask.bool(), model.config)
    whole = model(ids, attention_mask=mask).logits
    cut = ids.shape[1] - 6
    first = model(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
    rest = model(
        ids[:, cut:],
        attention_mask=mask,
        position_ids=positions[..., cut:],
        **{name: first[CACHE]},
    )
    assert_close(rest.logits, whole[:, cut:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_logits_to_keep_and_the_trunk():
    model, ids = tiny_model(), torch.tensor([rows()[0]])
    whole = model(ids).logits
    assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:], atol=1e-5, rtol=0)
    index = torch.tensor([8, 10, 11])
    assert_close(model(ids, logits_to_keep=index).logits, whole[:, index], atol=1e-5, rtol=0)
    assert model.base_model is model.transformer
    states = model.base_model(ids, use_cache=False).last_hidden_state
    assert_close(model.get_output_embeddings()(states), whole, atol=1e-5, rtol=0)
    assert CACHE not in model(ids, use_cache=False)


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def recompute(model, options=None):
    """Let the model's layers compute their activations again, by the method's name from 5.23 or the one before."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(options)


def training_batch():
    examples = rows()
    ids, labels = pad_rows(examples, "left"), pad_rows([answer_labels(row) for row in examples], "left", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != PAD).long()}


@torch.no_grad()
def test_sdpa_equals_eager_even_at_pads():
    batch = training_batch()
    sdpa, eager = (tiny_model(attn_implementation=name)(**batch).logits for name in ("sdpa", "eager"))
    assert_close(sdpa, eager, atol=1e-5, rtol=0)


def test_sdpa_and_eager_give_the_same_gradients():
    batch = training_batch()
    sdpa, eager = (gradients(tiny_model(attn_implementation=name), batch) for name in ("sdpa", "eager"))
    for name in sdpa:
        assert sdpa[name].isfinite().all()
        assert_close(sdpa[name], eager[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, batch = tiny_model().train(), training_batch()
    plain = gradients(model, batch)
    recompute(model, {"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    model.transformer.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, batch)
    assert len(calls) == 2  # once forward, once recomputed
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_trains_and_generates(dtype):
    model, batch = tiny_model(), training_batch()
    reference = model(**batch).loss
    model = model.to(dtype)
    out = model(**batch)
    out.loss.backward()
    assert out.logits.dtype == dtype
    assert_close(out.loss.float(), reference, atol=0.05, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.generate(batch["input_ids"][:1, :9], max_new_tokens=4, min_new_tokens=4).shape == (1, 13)


def test_autocast_runs():
    model, batch = tiny_model(), training_batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert_close(loss, model(**batch).loss, atol=0.05, rtol=0)


def test_lora_on_query_key_value_trains_saves_and_reloads(tmp_path):
    base, batch = tmp_path / "base", training_batch()
    tiny_model().save_pretrained(base)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).train()
    recompute(model)
    model.enable_input_require_grads()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trainable) == 2 * 4 * (32 + 96)
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    model.eval().save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**batch).logits, model(**batch).logits)
    prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    merged = reloaded.merge_and_unload()
    assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-4, rtol=0)
    assert torch.equal(merged.generate(**prompt, **GREEDY), model.generate(**prompt, **GREEDY))


def test_peft_knows_the_family():
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == {"query_key_value"}


def test_resizing_the_vocabulary_keeps_the_head_tied():
    model = tiny_model()
    model.resize_token_embeddings(520, mean_resizing=False)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight and len(model.lm_head.weight) == 520
