"""What was read is kept: the answers are those of a model that reads every prompt anew."""

import copy
import functools
import importlib
import random
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from common import distributed
from common.conversation.turns import Turn
from common.engine.batcher import Batcher
from common.engine.request import Ask
from common.inference import prefix_cache
from common.inference.answerer import Sampling
from common.inference.prefix_cache import BLOCK, PrefixCache
from common.inference.products import quicken
from common.versions import CACHE

FAMILIES = {
    "gemma": "gemma_sft.ft_gemma",
    "qwen": "qwen2_sft.ft_qwen2",
    "chatglm": "chatglm_sft.ft_chatglm",
    "chatglm2": "chatglm_sft.ft_chatglm2",
    "chatglm3": "chatglm_sft.ft_chatglm3",
    "glm4": "chatglm_sft.ft_glm4",
}
WORDS = "的一是不了人我在有他问答"


def answerer(family, folder):
    recipe = importlib.import_module(FAMILIES[family] + ".predict")
    config = importlib.import_module(FAMILIES[family] + ".config").Config
    return recipe.load_answer(config(path_model_pretrain=str(folder), model_save_dir="/nowhere"), base=True)


def text_of(dice, length):
    return "".join(dice.choices(WORDS, k=length))


@pytest.fixture(scope="module", params=FAMILIES)
def answer(request):
    return answerer(request.param, request.getfixturevalue(f"small_{request.param}"))


@pytest.fixture(scope="module")
def gemma(small_gemma):
    return answerer("gemma", small_gemma)


@pytest.fixture
def batcher_of():
    """batcher_of(answerer, **knobs): a Batcher, closed after the test."""
    made = []

    def make(answer, models=("base",), **knobs):
        made.append(Batcher(answer, {name: None if name == "base" else name for name in models}, **knobs))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


def sampling(tokens):
    """Greedy, and a random model does not say the same piece again and again."""
    return Sampling(max_new_tokens=tokens, repetition_penalty=1.5)


def submit(batcher, ids, tokens=12, model="base", client=""):
    return batcher.submit(model, [Ask(ids, sampling(tokens), logprobs=0)], client=client)


def row_of(ticket):
    """The only row of a ticket, once it has ended; `said` are the log probabilities of its ids."""
    entries = [entry for parts in ticket.parts() for part in parts for entry in part.entries]
    ticket.rows[0].said = torch.tensor([entry.logprob for entry in entries])
    return ticket.rows[0]


def plain(net, ids, answer):
    """Log probabilities of the ids of an answer by one forward pass over prompt and answer."""
    with torch.inference_mode():
        logits = net(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def generated(answer, ids, tokens=12):
    (row,) = answer.generate([ids], sampling(tokens))
    return cut(answer, row)


def cut(answer, row):
    """Generated ids up to the first that ends an answer."""
    ends = [number for number, id_ in enumerate(row) if id_ in answer.stop_ids]
    return row[: ends[0]] if ends else row


# --- the service ------------------------------------------------------------------------------------------------------


def test_ten_turns_are_those_of_a_model_that_reads_all_of_them(answer, batcher_of):
    """… and most of each prompt is not read again, but where it attends to itself in both directions."""
    batcher, dice, turns, read = batcher_of(answer), random.Random(0), [], 0
    for _ in range(10):
        turns.append(Turn("user", text_of(dice, 40)))
        ids = batcher.encoder.whole_ids(turns)
        row = row_of(submit(batcher, ids, 20))
        assert row.ids == generated(answer, ids, 20)
        if row.ids:
            assert (row.said - plain(batcher.net, ids, row.ids)).abs().max() < 1e-4
        read += len(ids) - row.cached
        turns.append(Turn("assistant", row.text or "有"))
    if getattr(batcher.net, "whole_prompts", False):
        assert row.cached == 0 == batcher.prefixes.tokens
    else:
        assert row.cached > 0.7 * len(ids) and read < 1.6 * len(ids)


@pytest.fixture
def sliding(gemma):
    """An answerer whose model has layers that look at the last 32 tokens only."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 32}
    config = Gemma3TextConfig(
        vocab_size=gemma.net.config.vocab_size, num_key_value_heads=1, head_dim=16, **sizes, **kinds
    )
    sliding = copy.copy(gemma)
    sliding.net = Gemma3ForCausalLM(config).eval()
    sliding.prefixes = PrefixCache(sliding.net)
    return sliding


def test_ten_turns_through_a_sliding_window(sliding, batcher_of):
    """They find the last tokens in what was kept."""
    test_ten_turns_are_those_of_a_model_that_reads_all_of_them(sliding, batcher_of)


def test_what_many_begin_with_is_read_once(gemma, batcher_of):
    """Eight clients at once, with one long system text: seven wait for the first, and no longer than for it."""
    batcher, dice = batcher_of(gemma), random.Random(1)
    system = text_of(dice, 300)
    prompts = [batcher.encoder.whole_ids([Turn("user", f"{system}{n}问{n}")]) for n in range(8)]
    rows = [row_of(ticket) for ticket in [submit(batcher, ids, 20) for ids in prompts]]
    assert [row.ids for row in rows] == [generated(gemma, ids, 20) for ids in prompts]
    assert sorted(row.cached >= 288 for row in rows) == [False] + [True] * 7
    assert batcher.prefixes.tokens < 300 + 8 * 48


def test_interleaved_clients_who_leave_while_little_is_kept(gemma, batcher_of):
    """Conversations in turn, more than can be kept: right answers, within the limit, and still some use of it."""
    batcher, dice = batcher_of(gemma, slots=4, total_tokens=900), random.Random(2)
    system, chats, cached, most = text_of(dice, 60), [[] for _ in range(6)], 0, 0
    for _ in range(4):
        asked = []
        for chat in chats:
            chat.append(Turn("user", (system if not chat else "") + text_of(dice, 30)))
            asked.append(batcher.encoder.whole_ids(chat))
        leaving = [submit(batcher, ids + ids[-20:], 200) for ids in asked[:2]]
        tickets = [submit(batcher, ids, 10) for ids in asked]
        for ticket in leaving:
            ticket.cancel()
        for chat, ticket, ids in zip(chats, tickets, asked, strict=True):
            row = row_of(ticket)
            assert row.ids == generated(gemma, ids, 10)
            cached += row.cached
            most = max(most, batcher.prefixes.tokens)
            chat.append(Turn("assistant", row.text or "有"))
    assert sum(map(len, asked)) > 900 >= most > 0 and cached > 0
    while batcher.active_count:
        time.sleep(0.01)
    assert batcher.prefixes.limit == 900


def test_rows_come_before_what_is_kept(gemma, batcher_of):
    """An answer that fills the cache leaves no room for anything kept, until it has ended."""
    batcher, ids = batcher_of(gemma, total_tokens=400), [5, 6, 7] * 30
    row_of(submit(batcher, ids, 4))
    assert batcher.prefixes.tokens >= 80
    ticket = submit(batcher, ids, 310)
    while not ticket.rows[0].ids:
        time.sleep(0.001)
    assert batcher.prefixes.tokens == 0
    ticket.cancel()
    while batcher.active_count:
        time.sleep(0.001)
    assert row_of(submit(batcher, ids, 4)).ids == generated(gemma, ids, 4)


@pytest.mark.parametrize("method", ["fill", "offer"])
def test_where_memory_is_short_nothing_is_kept_and_all_are_answered(gemma, batcher_of, monkeypatch, method):
    batcher, ids = batcher_of(gemma), [5, 6, 7] * 30
    row_of(submit(batcher, ids, 4))

    def full(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(batcher.prefixes, method, full)
    assert row_of(submit(batcher, [*ids, 5] * 2, 4)).ids == generated(gemma, [*ids, 5] * 2, 4)
    assert batcher.alive and row_of(submit(batcher, [*ids, 5], 4)).cached > 0


@pytest.fixture
def two_adapters(gemma):
    """The random Gemma with two adapters that change what it says."""
    changed = copy.copy(gemma)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    changed.net = get_peft_model(copy.deepcopy(gemma.net), config, adapter_name="one")
    changed.net.add_adapter("two", config)
    generator = torch.Generator().manual_seed(3)
    for name, weight in changed.net.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator)
    return changed.net.eval() and changed


def test_adapters_and_clients_share_nothing(two_adapters, batcher_of):
    """Equal ids under another adapter, or from another client, are read anew."""
    names = ("base", "one", "two")
    warm, cold = batcher_of(two_adapters, names), batcher_of(two_adapters, names)
    cold.prefixes.usable = False
    ids, found = [5, 6, 7, 8] * 12, {}
    for _ in range(2):
        for name in names:
            for client in ("", "other"):
                found.setdefault((name, client), []).append(row_of(submit(warm, ids, 12, name, client)))
    assert [[row.cached for row in rows] for rows in found.values()] == [[0, 32]] * 6
    expected = {name: row_of(submit(cold, ids, 12, name)).ids for name in names}
    assert all(row.ids == expected[name] for (name, _), rows in found.items() for row in rows)
    assert len({tuple(ids) for ids in expected.values()}) == 3


def test_a_poisoned_prefix_is_seen_by_its_own_scope_alone(two_adapters, batcher_of):
    batcher, ids = batcher_of(two_adapters, ("one", "two")), [5, 6, 7, 8] * 12
    clean = {name: row_of(submit(batcher, ids, 12, name)).ids for name in ("one", "two")}
    with torch.inference_mode():
        for scope, root in batcher.prefixes.roots.items():
            for block in root.children.values() if scope[0] == "one" else ():
                block.values.normal_(generator=torch.Generator().manual_seed(4))
    assert row_of(submit(batcher, ids, 12, "two")).ids == clean["two"]
    assert row_of(submit(batcher, ids, 12, "one")).ids != clean["one"]


def test_a_thousand_conversations_hold_no_more_than_a_hundred(gemma, batcher_of):
    batcher, dice, held = batcher_of(gemma, total_tokens=2000), random.Random(5), []
    for number in range(1000):
        row_of(submit(batcher, dice.choices(range(5, 40), k=60), 1, client=str(number % 50)))
        if number in (99, 999):
            held.append((batcher.prefixes.tokens, len(batcher.prefixes.roots)))
    assert held[1][0] <= held[0][0] * 1.05 and held[1][1] <= 50 and held[0][0] > 1000


def test_a_console_reads_of_a_chat_what_is_new(answer, monkeypatch):
    """Streamed answers are those of a batch; one that is stopped in its middle leaves nothing wrong behind."""
    dice, turns, lengths = random.Random(6), [], []
    net, forward = type(answer.net), type(answer.net).forward

    @functools.wraps(forward)  # generate looks at its arguments
    def counted(self, input_ids=None, **arguments):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **arguments)

    for number in range(6):
        turns.append(Turn("user", text_of(dice, 50)))
        (expected,) = answer([turns], sampling(20))
        monkeypatch.setattr(net, "forward", counted)
        stream = answer.stream(turns, sampling(20))
        text = next(stream, "") if number == 3 else "".join(stream)
        stream.close()
        monkeypatch.undo()
        assert expected.text.startswith(text) if number == 3 else text == expected.text
        turns.append(Turn("assistant", text or "有"))
    first = [length for length in lengths if length > 1]
    assert len(first) == 6 and (max(first[1:]) < 110) == answer.prefixes.usable


def counted(monkeypatch, net):
    """A list of (rows, ids) that the forward passes of nets of this class get from now on."""
    shapes, forward = [], type(net).forward

    @functools.wraps(forward)  # generate looks at its arguments
    def watched(self, input_ids=None, **arguments):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(type(net), "forward", watched)
    return shapes


def test_what_a_batch_begins_with_is_read_once(answer, monkeypatch):
    """Rows of any length, one as short as what they share but for an id; the answers are those of each alone."""
    monkeypatch.setattr(prefix_cache, "LEAST_SHARED", 100)
    dice = random.Random(8)
    shared = dice.choices(range(5, 40), k=90)
    prompts = [shared + dice.choices(range(40, 60), k=length) for length in (1, 12, 130, 40)]
    expected = [answer.generate([ids], sampling(12))[0] for ids in prompts]
    shapes = counted(monkeypatch, answer.net.get_decoder())
    found = answer.generate(prompts, sampling(12))
    assert [cut(answer, ids) for ids in found] == [cut(answer, ids) for ids in expected]
    if answer.prefixes.usable:
        assert shapes[:2] == [(1, 90), (4, 130)] and set(shapes[2:]) == {(4, 1)}
        shapes.clear()
        answer.generate(prompts[1:], sampling(12))
        assert shapes[:2] == [(1, 90 % BLOCK), (3, 130)], "whole blocks were kept"
    else:
        assert (4, 220) in shapes


def test_a_batch_is_begun_through_a_sliding_window(sliding, monkeypatch):
    test_what_a_batch_begins_with_is_read_once(sliding, monkeypatch)


def test_beams_and_rows_with_little_in_common_are_read_whole(gemma, monkeypatch):
    dice = random.Random(9)
    prompts = [dice.choices(range(5, 40), k=300) for _ in range(4)]
    shapes = counted(monkeypatch, gemma.net.get_decoder())
    gemma.generate(prompts, sampling(2))
    gemma.generate([prompts[0]] * 4, Sampling(max_new_tokens=2, num_beams=2))
    assert [shape for shape in shapes if shape[1] > 1] == [(4, 300), (8, 300)]
    shapes.clear()
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "shards_weights", lambda: True)
        gemma.generate([prompts[0]] * 4, sampling(2))
    assert shapes[0] == (4, 300)
    shapes.clear()
    gemma.generate([prompts[0]] * 4, sampling(2))
    assert shapes[:2] == [(1, 299), (4, 1)]


# --- blocks -----------------------------------------------------------------------------------------------------------


def cache_of(prefixes, ids):
    """A cache whose keys and values tell ids and places."""
    cache = DynamicCache()
    column = torch.tensor(ids).float() * 1000 + torch.arange(len(ids))
    for layer in range(2):
        kept = column.view(1, 1, -1, 1).expand(1, 2, -1, 3) + layer
        cache.update(kept, -kept, layer)
    return cache


@pytest.fixture
def prefixes(gemma):
    return PrefixCache(gemma.net, 10 * BLOCK)


def test_the_longest_common_prefix_in_whole_blocks(prefixes):
    ids = list(range(3 * BLOCK))
    prefixes.offer("a", ids, cache_of(prefixes, ids))
    assert prefixes.tokens == 3 * BLOCK
    assert prefixes.known("a", ids) == 2 * BLOCK  # one id at least has to be read
    assert prefixes.known("a", [*ids, 1]) == 3 * BLOCK and prefixes.known("b", [*ids, 1]) == 0
    assert prefixes.known("a", [*ids[: 2 * BLOCK + 5], 999, *ids]) == 2 * BLOCK
    assert prefixes.known("a", [999, *ids]) == 0 and prefixes.find("a", [999, *ids]) == []
    other = [*ids[:BLOCK], *range(500, 500 + BLOCK)]
    prefixes.offer("a", other, cache_of(prefixes, other))
    assert prefixes.tokens == 4 * BLOCK  # the first block is there once
    found, cache = prefixes.find("a", [*other, 1]), DynamicCache()
    cache.layers = [type(layer)() for layer in cache_of(prefixes, [1]).layers]
    prefixes.fill(cache, [found, [], [found[0], found[1][:3]]], 2 * BLOCK + 4)
    for mine, whole in zip(cache.layers, cache_of(prefixes, other).layers, strict=True):
        assert torch.equal(mine.keys[0, :, 4:], whole.keys[0]) and torch.equal(mine.values[0, :, 4:], whole.values[0])
        assert torch.equal(mine.keys[2, :, -BLOCK - 3 :], whole.keys[0, :, : BLOCK + 3])
        assert not mine.keys[0, :, :4].any() and not mine.keys[1].any() and mine.keys.shape == (3, 2, 2 * BLOCK + 4, 3)


def test_least_used_blocks_go_first_and_ends_before_beginnings(prefixes):
    chats = [[n * 1000 + number for number in range(4 * BLOCK)] for n in range(3)]
    for chat in chats[:2]:
        prefixes.offer("a", chat, cache_of(prefixes, chat))
    prefixes.find("a", chats[0])  # all but its last block
    prefixes.offer("a", chats[2], cache_of(prefixes, chats[2]))
    assert prefixes.tokens == 10 * BLOCK
    assert [prefixes.known("a", [*chat, 1]) // BLOCK for chat in chats] == [3, 3, 4]
    prefixes.most_tokens = 5 * BLOCK
    prefixes.shrink()
    assert [prefixes.known("a", [*chat, 1]) // BLOCK for chat in chats] == [1, 0, 4]
    prefixes.most_tokens = 0
    prefixes.shrink()
    assert prefixes.tokens == 0 and not prefixes.roots


def test_a_part_of_a_row_is_offered(prefixes):
    """Ids are those of the last columns of a row; what is in front of them are pads."""
    ids = list(range(2 * BLOCK + 3))
    prefixes.offer("a", ids[5:], cache_of(prefixes, ids))
    prefixes.offer("b", ids[5:], cache_of(prefixes, ids[5:]))
    (one,), (two,) = (prefixes.find(scope, ids[5 : 6 + BLOCK]) for scope in "ab")
    assert one.shape == two.shape and ((one - two).abs() == 5).all()


def test_what_cannot_be_cut_is_not_kept(gemma):
    """Some RoPE turns keys by the whole text's length."""
    net = copy.copy(gemma.net)
    net.config = copy.deepcopy(net.config)
    assert PrefixCache(net).usable
    net.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert not PrefixCache(net).usable and PrefixCache(net).limit == 0


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="torch without FBGEMM")
def test_weights_kept_in_16_bits_count_among_those_of_which_an_eighth_is_kept(monkeypatch):
    """A quickened model may keep half of what the same weights in 32 bits let it keep, not nearly nothing."""
    monkeypatch.setattr(prefix_cache, "LEAST", BLOCK)
    wide = Gemma3TextConfig(vocab_size=8, hidden_size=64, intermediate_size=4096, num_hidden_layers=2, head_dim=16)
    net, limits = Gemma3ForCausalLM(wide).bfloat16().float().eval(), []
    for _ in range(2):
        kept = PrefixCache(net)
        with torch.inference_mode():
            cache = net(torch.tensor([[*range(8)] * 2]))[CACHE]
        kept.offer("a", [*range(8)] * 2, cache)
        limits.append(kept.limit)
        quicken(net)
    assert limits[0] * 0.48 < limits[1] < limits[0] * 0.52
