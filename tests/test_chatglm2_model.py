"""The model of ChatGLM2 and 3 against outputs of the original implementation, and against transformers' conventions."""

import json
import shutil
from pathlib import Path

import glm2
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import create_causal_mask

from chatglm_sft.models.chatglm import ChatGLMConfig
from chatglm_sft.models.chatglm2 import ChatGLM2Config, ChatGLM2ForCausalLM, ChatGLM2Model
from chatglm_sft.models.chatglm2.modeling_chatglm2 import rotary_tables, token_positions
from common.versions import CACHE

FIXTURES = Path(__file__).parents[1] / "../shared/fixtures/chatglm2"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason=f"no golden files: {FIXTURES} is absent")
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
GREEDY = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}
LAYER = {  # names and shapes of a layer of ChatGLM2-6B
    "input_layernorm.weight": (4096,),
    "self_attention.query_key_value.weight": (4608, 4096),
    "self_attention.query_key_value.bias": (4608,),
    "self_attention.dense.weight": (4096, 4096),
    "post_attention_layernorm.weight": (4096,),
    "mlp.dense_h_to_4h.weight": (27392, 4096),
    "mlp.dense_4h_to_h.weight": (4096, 13696),
}
OTHERS = {
    "transformer.embedding.word_embeddings.weight": (65024, 4096),
    "transformer.encoder.final_layernorm.weight": (4096,),
    "transformer.output_layer.weight": (65024, 4096),
}


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


def load_golden(**kwargs):
    """The fixture, whose config.json names no model_type, so that no Auto class reads it as it is."""
    return ChatGLM2ForCausalLM.from_pretrained(FIXTURES, **({"dtype": torch.float32} | kwargs)).eval()


def tiny_model(seed=0, attention="sdpa", **changes):
    torch.manual_seed(seed)
    # wide weights, so that attention (and with it masks and positions) matters
    net = glm2.make_model(512, **({"initializer_range": 0.3} | changes)).eval()
    net.set_attn_implementation(attention)
    return net


def rows(lengths=(13, 7, 11), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 500, (length,), generator=generator).tolist() for length in lengths]


def padded(rows, side, value=0):
    width = max(map(len, rows))
    pads = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)])


def batch_of(rows, side):
    labels = [[-100] * 3 + row[3:] for row in rows]
    mask = padded([[1] * len(row) for row in rows], side)
    return {"input_ids": padded(rows, side), "attention_mask": mask, "labels": padded(labels, side, -100)}


# ---- golden files ----


@needs_fixtures
@BOTH
@torch.no_grad()
def test_one_row(golden, attention):
    out = load_golden(attn_implementation=attention)(
        golden["single.input_ids"], output_hidden_states=True, use_cache=True
    )
    assert_close(out.logits, golden["single.logits"], atol=1e-4, rtol=0)
    assert len(out.hidden_states) == 4 and isinstance(out[CACHE], DynamicCache)
    for number, states in enumerate(out.hidden_states):
        assert_close(states.transpose(0, 1), golden[f"single.hidden_states.{number}"], atol=1e-4, rtol=0)
    for number, layer in enumerate(out[CACHE].layers):
        for name, states in (("key", layer.keys), ("value", layer.values)):
            assert_close(states.permute(2, 0, 1, 3), golden[f"single.past.{number}.{name}"], atol=1e-4, rtol=0)


@needs_fixtures
@BOTH
@torch.no_grad()
def test_padded_rows_and_their_loss(golden, attention):
    model = load_golden(attn_implementation=attention)
    batch = {name: golden[f"batch.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    real = batch["attention_mask"].bool()
    for positions in ({}, {"position_ids": golden["batch.position_ids"]}):
        out = model(**batch, **positions)
        assert_close(out.logits[real], golden["batch.logits"][real], atol=1e-4, rtol=0)
        assert_close(out.loss, golden["batch.loss"], atol=1e-4, rtol=0)


@needs_fixtures
def test_masks_and_positions(golden):
    config = ChatGLM2Config.from_pretrained(FIXTURES, attn_implementation="eager")
    mask, blocked = golden["batch.attention_mask"], golden["batch.full_attention_mask"]
    positions = token_positions(mask, 14, 0, mask.device)
    assert torch.equal(positions, golden["batch.position_ids"])
    added = create_causal_mask(config, torch.zeros(3, 14, 64), mask, None, position_ids=positions)
    real = mask.bool()
    assert torch.equal((added < 0)[:, 0][real], blocked[:, 0][real])


@needs_fixtures
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_greedy_generation(golden, cached):
    model = load_golden()
    batch = {name: golden[f"batch.{name}"] for name in ("input_ids", "attention_mask")}
    single = model.generate(golden["single.input_ids"], **GREEDY, use_cache=cached)
    assert torch.equal(single, golden["gen_single.sequences"])
    assert torch.equal(model.generate(**batch, **GREEDY, use_cache=cached), golden["gen_batch.sequences"])
    with torch.no_grad():
        assert_close(model(single).logits, golden["gen_single.full_logits"], atol=1e-4, rtol=0)


@needs_fixtures
def test_rotary_tables_are_those_of_fp32_in_every_dtype(golden):
    positions, expected = golden["rotary64.positions"][None], golden["rotary64.fp32.cache"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        cos, sin = rotary_tables(positions, 64, dtype)
        assert torch.equal(torch.stack([cos, sin], -1)[0, 0], expected.to(dtype))


def write_sharded_bin(folder, state):
    """The official layout: config.json, several pytorch_model-*.bin and their index."""
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: state[name].clone() for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@needs_fixtures
@pytest.mark.parametrize("layout", ["safetensors", "sharded bin"])
@torch.no_grad()
def test_the_checkpoint_loads_without_a_word_and_is_saved_under_its_names(golden, tmp_path, caplog, layout):
    state = load_file(FIXTURES / "model.safetensors")
    assert "transformer.rotary_pos_emb.inv_freq" in state
    config = json.loads((FIXTURES / "config.json").read_text())
    official = {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config | official))
    if layout == "safetensors":
        shutil.copy(FIXTURES / "model.safetensors", tmp_path)
    else:
        write_sharded_bin(tmp_path, state)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is ChatGLM2ForCausalLM and not any(info.values()) and not caplog.records
    assert_close(model.eval()(golden["single.input_ids"]).logits, golden["single.logits"], atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    del state["transformer.rotary_pos_emb.inv_freq"]
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    fields = json.loads((tmp_path / "saved/config.json").read_text())
    assert fields["model_type"] == "chatglm" and "auto_map" not in fields
    assert {
        name: fields[name] for name in config.keys() & fields.keys() - {"architectures", "transformers_version"}
    } == {name: config[name] for name in config.keys() & fields.keys() - {"architectures", "transformers_version"}}
    assert config.keys() - fields.keys() <= {"torch_dtype"}
    trunk = AutoModel.from_pretrained(tmp_path / "saved").eval()
    assert type(trunk) is ChatGLM2Model and not caplog.records
    states = trunk(golden["single.input_ids"], output_hidden_states=True).hidden_states[3]
    assert_close(states.transpose(0, 1), golden["single.hidden_states.3"], atol=1e-4, rtol=0)


@needs_fixtures
@torch.no_grad()
def test_device_map_with_a_layer_on_disk(golden, tmp_path):
    places = {"transformer.embedding": "cpu", "transformer.output_layer": "cpu"}
    places |= {"transformer.encoder.final_layernorm": "cpu"}
    places |= {f"transformer.encoder.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    model = load_golden(device_map=places, offload_folder=str(tmp_path))
    assert torch.equal(model.generate(golden["single.input_ids"], **GREEDY), golden["gen_single.sequences"])


# ---- without golden files ----


def test_names_and_shapes_at_full_size():
    """Those of `pytorch_model.bin.index.json` of THUDM/chatglm2-6b, which THUDM/chatglm3-6b shares.

    It lists the seven names of LAYER for layers 0 to 27, OTHERS and `transformer.rotary_pos_emb.inv_freq` (32 values),
    and a total of 12,487,168,064 bytes in fp16. Shapes: the sizes in that folder's config.json.
    """
    expected = OTHERS | {
        f"transformer.encoder.layers.{number}.{name}": shape for number in range(28) for name, shape in LAYER.items()
    }
    with torch.device("meta"):
        model = ChatGLM2ForCausalLM(ChatGLM2Config())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert 2 * (sum(parameter.numel() for parameter in model.parameters()) + 32) == 12_487_168_064


@torch.no_grad()
def test_without_multi_query_attention_each_head_has_its_query_key_and_value_in_turn():
    """The original views the projection as heads of 3 d columns each and splits those in three.

    Rows sorted into all of q, k and v are multi-query attention with a group a head, which golden values hold.
    """
    own = tiny_model(multi_query_attention=False)
    grouped = tiny_model(multi_query_group_num=2)
    state = own.state_dict()
    for name, tensor in state.items():
        if "query_key_value" in name:
            heads = torch.arange(96).view(2, 3, 16)  # 2 heads of q, k, v
            state[name] = tensor[heads.transpose(0, 1).flatten()]
    grouped.load_state_dict(state)
    ids = torch.tensor(rows((9,)))
    assert_close(own(ids).logits, grouped(ids).logits, atol=1e-5, rtol=0)
    assert own.config.num_key_value_heads == 2 and own(ids, use_cache=True)[CACHE].layers[0].keys.shape[1] == 2
    assert torch.equal(own.generate(ids, **GREEDY), own.generate(ids, **GREEDY, use_cache=False))


@pytest.mark.parametrize(
    "changes",
    [{}, {"multi_query_attention": False, "kv_channels": 8}, {"num_attention_heads": 4, "multi_query_group_num": 2}],
    ids=["one group", "no groups", "two groups"],
)
@BOTH
@torch.no_grad()
def test_left_right_and_unpadded_rows_agree(attention, changes):
    model, examples = tiny_model(attention=attention, **changes), rows()
    single = [model(**batch_of([row], "left"), num_items_in_batch=1).loss for row in examples]
    alone = torch.stack([model.generate(torch.tensor([row]), **GREEDY)[0, len(row) :] for row in examples])
    for side in ("left", "right"):
        batch = batch_of(examples, side)
        assert_close(model(**batch, num_items_in_batch=1).loss, sum(single), atol=1e-4, rtol=1e-6)
        del batch["labels"]
        assert torch.equal(model.generate(**batch, **GREEDY)[:, -16:], alone)
        assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False)[:, -16:], alone)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_several_cached_tokens_at_once_equal_the_uncached_forward(name):
    model, batch = tiny_model(), batch_of(rows(), "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
    rest = model(ids[:, 8:], attention_mask=mask, **{name: first[CACHE]})
    assert_close(rest.logits, whole[:, 8:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_a_pack_do_not_see_each_other():
    model, (one, two) = tiny_model(), rows((5, 8))
    positions = torch.tensor([[*range(5), *range(8)]])
    packed = model(torch.tensor([one + two]), position_ids=positions, use_cache=False).logits
    alone = [model(torch.tensor([row]), use_cache=False).logits for row in (one, two)]
    assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_embeddings_logits_to_keep_and_the_trunk():
    model, ids = tiny_model(), torch.tensor(rows((9,)))
    whole = model(ids).logits
    assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:], atol=1e-5, rtol=0)
    states = model.get_decoder()(inputs_embeds=model.get_input_embeddings()(ids)).last_hidden_state
    assert_close(model.get_output_embeddings()(states), whole, atol=1e-5, rtol=0)
    assert model.base_model is model.transformer is model.get_decoder()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    model.resize_token_embeddings(520, mean_resizing=False)
    assert model(ids).logits.shape[-1] == model.config.padded_vocab_size == 520


def gradients(model, batch):
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def recompute(model, options=None):
    """Let the model's layers compute their activations again, by the method's name from 5.23 or the one before."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sdpa_and_eager_give_the_same_gradients(side):
    batch = batch_of(rows(), side)
    sdpa, eager = (gradients(tiny_model(attention=name), batch) for name in ("sdpa", "eager"))
    for name in sdpa:
        assert sdpa[name].isfinite().all()
        assert_close(sdpa[name], eager[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, batch = tiny_model().train(), batch_of(rows(), "right")
    plain = gradients(model, batch)
    recompute(model, {"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    calls = []
    model.transformer.encoder.layers[0].self_attention.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, batch)
    assert len(calls) == 2  # once forward, once recomputed
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_trains_and_generates(dtype):
    model, batch = tiny_model(initializer_range=0.1), batch_of(rows(), "left")
    reference = model(**batch).loss
    out = model.to(dtype)(**batch)
    out.loss.backward()
    assert out.logits.dtype == dtype
    assert_close(out.loss.float(), reference, atol=0.05, rtol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.generate(batch["input_ids"][:1], max_new_tokens=4, min_new_tokens=4).shape == (1, 17)


def test_peft_knows_what_to_adapt_and_reloads(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM"))
    adapted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[-4] for name in adapted} == {"query_key_value"} and len(adapted) == 4
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.tensor(rows((9,)))
    with torch.no_grad():
        expected, plain = model(ids).logits, base(ids).logits
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, expected) and not torch.equal(plain, expected)
        assert_close(again.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rmsnorm": False}, "rmsnorm=False is not supported, only True"),
        ({"post_layer_norm": False}, "post_layer_norm=False"),
        ({"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
        ({"rope_ratio": 50}, "rope_ratio=50 .*32k checkpoints stretch"),
        ({"pre_seq_len": 128}, "pre_seq_len=128 .*P-tuning"),
        ({"quantization_bit": 4}, "quantization_bit=4 .*--tuning qlora"),
        ({"multi_query_group_num": 3}, "multi_query_group_num=3 must divide num_attention_heads=32"),
        ({"kv_channels": 6}, "kv_channels=6 must divide by 4"),
        ({"padded_vocab_size": 151552}, "GLM-4 in its first form.*glm-4-9b-chat-hf"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        ChatGLM2Config(**fields)
    saved = {"model_type": "chatglm", "multi_query_attention": True} | fields
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_each_config_json_becomes_its_own_class(tmp_path):
    for fields, kind in (({"inner_hidden_size": 64}, ChatGLMConfig), ({"ffn_hidden_size": 64}, ChatGLM2Config)):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm"} | fields))
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is kind and config.intermediate_size == 64
