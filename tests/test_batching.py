"""The slot batcher: what a request gets does not depend on who else is there."""

import importlib
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from common.conversation.turns import Turn
from common.engine import sampling as engine_sampling
from common.engine.batcher import Batcher, QueueFullError
from common.engine.kv_batch import KVBatch
from common.engine.request import Ask, ClientGoneError, ModelFailedError, Part, RequestTimeoutError, Ticket
from common.inference.answerer import Sampling
from common.inference.text import Wording, decode

FAMILIES = {
    "gemma": "gemma_sft.ft_gemma",
    "qwen": "qwen2_sft.ft_qwen2",
    "chatglm": "chatglm_sft.ft_chatglm",
    "glm4": "chatglm_sft.ft_glm4",
}
QUESTIONS = [f"{'他是不有的' * (n * 7 % 11)}问{n}+{n}=" for n in range(16)]


def answerer(family, folder):
    recipe = importlib.import_module(FAMILIES[family] + ".predict")
    config = importlib.import_module(FAMILIES[family] + ".config").Config
    return recipe.load_answer(config(path_model_pretrain=str(folder), model_save_dir="/nowhere"), base=True)


@pytest.fixture(scope="module", params=FAMILIES)
def answer(request):
    return answerer(request.param, request.getfixturevalue(f"small_{request.param}"))


@pytest.fixture(scope="module")
def batcher(answer):
    batcher = Batcher(answer, {"base": None}, slots=16)
    yield batcher
    batcher.close()


@pytest.fixture(scope="module")
def gemma(small_gemma):
    return answerer("gemma", small_gemma)


@pytest.fixture
def batcher_of(gemma):
    """batcher_of(**knobs): a Batcher on the random Gemma, closed after the test."""
    made = []

    def make(**knobs):
        made.append(Batcher(gemma, {"base": None}, **knobs))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


def ask(batcher, text, tokens=12, **changes):
    sampling = Sampling(max_new_tokens=tokens, **changes.pop("sampling", {}))
    return Ask(batcher.encoder.whole_ids([Turn("user", text)]), sampling, **changes)


def ids_and_stop(ticket):
    """[(ids, stop)] of the ticket's answers, once they have ended."""
    stops = {part.index: part.stop for parts in ticket.parts() for part in parts if part.stop}
    return [(row.ids, stops[row.index]) for row in ticket.rows]


def text_of(ticket):
    return "".join(part.text for parts in ticket.parts() for part in parts)


def generated(answer, question, **sampling):
    """(ids, stop) of transformers' generate for one question alone."""
    (row,) = answer.generate([answer.fitted_ids([Turn("user", question)])], Sampling(**sampling))
    ends = [number for number, id_ in enumerate(row) if id_ in answer.stop_ids]
    return (row[: ends[0]], "stop") if ends else (row, "length")


def test_together_as_one_by_one(answer, batcher):
    """Greedy ids of 16 requests that come at different times are those of generate, one by one."""
    lengths = [4 + n * 5 % 23 for n in range(16)]
    expected = [generated(answer, q, max_new_tokens=n) for q, n in zip(QUESTIONS, lengths, strict=True)]
    tickets = []
    for number, (question, length) in enumerate(zip(QUESTIONS, lengths, strict=True)):
        tickets.append(batcher.submit("base", [ask(batcher, question, length)]))
        if number % 5 == 4:
            time.sleep(0.02)  # some join while others are under way
    assert [ids_and_stop(ticket)[0] for ticket in tickets] == expected
    assert len({tuple(ids) for ids, _ in expected}) > 8  # and the model does not say the same to all


def test_penalties_as_in_generate(answer, batcher):
    expected = generated(answer, "有问答吗", max_new_tokens=24, repetition_penalty=1.7)
    others = [batcher.submit("base", [ask(batcher, question, 30)]) for question in QUESTIONS[:5]]
    asked = ask(batcher, "有问答吗", 24, sampling={"repetition_penalty": 1.7})
    assert ids_and_stop(batcher.submit("base", [asked]))[0] == expected
    for ticket in others:
        ids_and_stop(ticket)


def test_beams_as_in_generate(answer, batcher):
    """Beams go through generate itself, in turn with the others."""
    expected = generated(answer, "有问答吗", max_new_tokens=8, num_beams=3)
    other = batcher.submit("base", [ask(batcher, QUESTIONS[3], 20)])
    ticket = batcher.submit("base", [ask(batcher, "有问答吗", 8, sampling={"num_beams": 3})])
    assert ids_and_stop(ticket)[0] == expected
    assert ids_and_stop(other)[0] == generated(answer, QUESTIONS[3], max_new_tokens=20)


def test_long_prompts_are_read_in_chunks(answer, batcher, monkeypatch):
    """… where the model allows it; the answer is the same."""
    monkeypatch.setattr("common.engine.batcher.CHUNK", 16)
    question = "的一是不了人我在有他" * 10
    expected = generated(answer, question, max_new_tokens=10)
    short = batcher.submit("base", [ask(batcher, "有", 30)])
    assert ids_and_stop(batcher.submit("base", [ask(batcher, question, 10)]))[0] == expected
    assert ids_and_stop(short)[0] == generated(answer, "有", max_new_tokens=30)


def test_sampling_depends_on_the_seed_alone(batcher):
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.95}
    asked = ask(batcher, "有问答吗", 16, sampling=drawn, seed=7)
    alone = ids_and_stop(batcher.submit("base", [asked]))[0]
    others = [batcher.submit("base", [ask(batcher, q, 20, sampling=drawn)]) for q in QUESTIONS[:6]]
    assert ids_and_stop(batcher.submit("base", [asked]))[0] == alone
    for ticket in others:
        ids_and_stop(ticket)
    different = ask(batcher, "有问答吗", 16, sampling=drawn, seed=8)
    assert ids_and_stop(batcher.submit("base", [different]))[0] != alone


DRAWN = [
    {"min_p": 0.1},
    {"min_p": 0.3, "temperature": 2.0},
    {"min_p": 0.05, "temperature": 0.7, "top_k": 9},
    {"min_p": 0.2, "temperature": 3.0, "top_k": 12, "top_p": 0.8},
    {"min_p": 1.0, "temperature": 1.5},
    {"min_p": 0.0, "temperature": 1.5, "top_p": 0.6},
    {"temperature": 2.0},
]


@pytest.mark.parametrize("few", [1, 4, 1024])
def test_chances_are_those_of_transformers(few, monkeypatch):
    """Temperature, top_k, top_p and min_p of several rows at once: ids come as often as transformers' warpers say.

    few: how many ids are sorted at first, too few for some rows.
    """
    monkeypatch.setattr(engine_sampling, "FEW", few)
    times, size = 4000, 40
    logits = torch.randn(len(DRAWN), size, generator=torch.Generator().manual_seed(0)) * 2
    numbers = [(number + 0.5) / times for number in range(times)]
    samplings = [Sampling(do_sample=True, **drawn) for drawn in DRAWN]
    together = engine_sampling.draw(logits.repeat(times, 1), samplings * times, [n for n in numbers for _ in DRAWN])
    for row, drawn in enumerate(samplings):
        warpers = LogitsProcessorList([logits_process.TemperatureLogitsWarper(drawn.temperature)])
        warpers += [logits_process.TopKLogitsWarper(drawn.top_k)] if drawn.top_k else []
        warpers += [logits_process.TopPLogitsWarper(drawn.top_p), logits_process.MinPLogitsWarper(drawn.min_p)]
        chances = warpers(None, logits[row : row + 1]).softmax(-1)[0]
        counted = torch.bincount(together.view(times, -1)[:, row], minlength=size)
        assert (counted > 0).tolist() == (chances * times >= 1).tolist()
        is_cut = drawn.top_k > 0 or drawn.top_p < 1 or drawn.min_p > 0
        assert counted.sum() == times and ((counted > 0).sum() < size) == is_cut
        assert (counted - chances * times).abs().max() <= 1.01
        alone = engine_sampling.draw(logits[row].expand(times, size), [drawn] * times, numbers)
        assert torch.equal(alone, together.view(times, -1)[:, row])


def test_min_p_is_of_one_row_alone(batcher_of):
    """A row with min_p 1 is greedy, whatever its temperature; the row beside it draws as it does alone."""
    batcher, hot = batcher_of(), {"do_sample": True, "temperature": 5.0}
    (greedy,) = ids_and_stop(batcher.submit("base", [ask(batcher, "有问答吗", 16)]))
    (alone,) = ids_and_stop(batcher.submit("base", [ask(batcher, "有问答吗", 16, sampling=hot, seed=3)]))
    asks = [ask(batcher, "有问答吗", 16, sampling=hot | {"min_p": p}, seed=3) for p in (1.0, 0.0)]
    assert ids_and_stop(batcher.submit("base", asks)) == [greedy, alone] and greedy != alone


def test_text_is_that_of_the_answerer(answer, batcher):
    """Live or not, the parts make up the text the console shows."""
    for question in QUESTIONS[:4]:
        expected = answer([[Turn("user", question)]], Sampling(max_new_tokens=40))[0].text
        for live in (False, True):
            assert text_of(batcher.submit("base", [ask(batcher, question, 40, live=live)])) == expected


def test_forward_passes_are_shared(batcher_of):
    batcher = batcher_of(slots=16)
    before = batcher.forwards
    tickets = [batcher.submit("base", [ask(batcher, "有", 40, stop=("\x00",))]) for _ in range(16)]
    total = sum(len(ids_and_stop(ticket)[0][0]) for ticket in tickets)
    assert total > 100 and batcher.forwards - before < total / 4


def test_a_slot_is_free_as_soon_as_a_client_leaves(batcher_of):
    batcher = batcher_of(slots=1, queue=1)
    long = batcher.submit("base", [ask(batcher, "有", 900)])
    queued = batcher.submit("base", [ask(batcher, "有", 900)])
    with pytest.raises(QueueFullError):
        batcher.submit("base", [ask(batcher, "有")])
    queued.cancel()
    with pytest.raises(ClientGoneError):
        list(long.parts(gone=lambda: True))
    assert text_of(batcher.submit("base", [ask(batcher, "问", 4)])) is not None
    assert len(long.rows[0].ids) < 900 and queued.rows[0].ids == [] and not batcher.waiting


def test_a_time_limit(batcher_of):
    batcher = batcher_of()
    with pytest.raises(RequestTimeoutError):
        list(batcher.submit("base", [ask(batcher, "有", 900)], seconds=0.05).parts())


def test_a_time_limit_holds_where_parts_come_without_a_pause(batcher_of):
    batcher, part = batcher_of(), Part(0, "有", [], None)
    ticket = Ticket("base", [ask(batcher, "有")], batcher, seconds=0.05)
    parts = ticket.parts()
    ticket.events.put(part)
    assert next(parts) == [part]
    ticket.events.put(part)
    time.sleep(0.06)
    with pytest.raises(RequestTimeoutError):
        next(parts)


def test_total_tokens_bound_the_batch(batcher_of):
    """Three of 40 columns do not fit in 100 tokens; one of more than 100 is answered alone."""
    batcher, widest = batcher_of(total_tokens=100), 0
    asks = [ask(batcher, "有", tokens) for tokens in (20, 20, 20, 200)]
    tickets = [batcher.submit("base", [one]) for one in asks]
    while any(row.ticket.ended is None and not row.over for ticket in tickets for row in ticket.rows):
        widest = max(widest, batcher.active_count)
        time.sleep(0.001)
    assert widest <= 2 and all(ids_and_stop(ticket) for ticket in tickets)


def test_several_answers_to_one_request(batcher_of):
    batcher, drawn = batcher_of(), {"do_sample": True, "temperature": 2.0}
    asks = [ask(batcher, "有问答吗", 12, sampling=drawn, seed=seed) for seed in (1, 2, 3)]
    found = ids_and_stop(batcher.submit("base", asks))
    assert len({tuple(ids) for ids, _ in found}) == 3
    assert found == [ids_and_stop(batcher.submit("base", [one]))[0] for one in asks]


def test_frequency_penalty_ends_a_loop(batcher_of):
    """A random model says the same piece again and again, until it has become too dear."""
    batcher = batcher_of()
    plain = ids_and_stop(batcher.submit("base", [ask(batcher, "有", 60)]))[0][0]
    dear = ids_and_stop(batcher.submit("base", [ask(batcher, "有", 60, frequency_penalty=2.0)]))[0][0]
    once = ids_and_stop(batcher.submit("base", [ask(batcher, "有", 60, presence_penalty=100.0)]))[0][0]
    assert max(map(dear.count, dear)) < max(map(plain.count, plain)) and len(set(once)) == len(once)


@pytest.mark.parametrize("live", [False, True])
def test_stop_strings(batcher_of, live):
    """The text ends before the first stop string, of which no part was ever sent; logprobs are those of the text."""
    batcher = batcher_of()
    sampling = Sampling(max_new_tokens=60, do_sample=True, temperature=3.0)
    asked = Ask(batcher.encoder.whole_ids([Turn("user", "有")]), sampling, clean=False, live=live)
    seed, whole = next(
        (seed, text)
        for seed in range(50)
        if len(text := text_of(batcher.submit("base", [replace(asked, seed=seed)]))) > 12
    )
    stop = whole[8:11]
    stopping = replace(asked, seed=seed, stop=(stop, "没有"), logprobs=2)
    parts = [part for parts in batcher.submit("base", [stopping]).parts() for part in parts]
    expected = whole[: whole.index(stop)]
    assert "".join(part.text for part in parts) == expected and parts[-1].stop == "stop"
    assert all(expected.startswith("".join(part.text for part in parts[:n])) for n in range(len(parts)))
    entries = [entry for part in parts for entry in part.entries]
    assert decode(batcher.tokenizer, [entry.id for entry in entries]) == expected
    assert all(len(e.top) == 2 and e.top[0][1] >= e.top[1][1] and e.logprob <= e.top[0][1] <= 0 for e in entries)


def test_a_request_that_fails_harms_no_other(batcher_of):
    """An id beyond the vocabulary fails in the model; those read with it are answered."""
    batcher = batcher_of()
    bad = batcher.submit("base", [Ask([10**6], Sampling(max_new_tokens=3))])
    good = [batcher.submit("base", [ask(batcher, "有", 6)]) for _ in range(3)]
    with pytest.raises(ModelFailedError):
        list(bad.parts())
    assert len({tuple(ids_and_stop(ticket)[0][0]) for ticket in good}) == 1 and batcher.alive


@pytest.mark.parametrize("drawn", [False, True])
def test_logits_that_are_no_numbers_harm_no_other(batcher_of, monkeypatch, drawn):
    """As float16 overflows on some prompt: the whole service ended, or gave an answer of the first id."""
    batcher = batcher_of()
    forward, others = batcher.net.forward, [ask(batcher, "有", 6, sampling={"do_sample": drawn}, seed=1)] * 2

    def overflown(*args, input_ids, **kwargs):
        output = forward(*args, input_ids=input_ids, **kwargs)
        output.logits[(input_ids == 9).any(1)] = float("nan")
        return output

    expected = text_of(batcher.submit("base", others[:1], seconds=30))
    monkeypatch.setattr(batcher.net, "forward", overflown)
    bad = batcher.submit("base", [replace(others[0], ids=[9, 9, 9], logprobs=1)], seconds=30)
    good = [batcher.submit("base", [one], seconds=30) for one in others]
    with pytest.raises(ModelFailedError):
        list(bad.parts())
    assert [text_of(ticket) for ticket in good] == [expected] * 2 and batcher.alive


def test_no_memory_to_join_two_batches_ends_no_service(batcher_of, monkeypatch):
    """A request waited for ever for a thread that had ended, and the service took no other."""
    batcher, join = batcher_of(), KVBatch.join

    def short(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(KVBatch, "join", short)
    first = batcher.submit("base", [Ask([9, 9, 9], Sampling(max_new_tokens=400), live=True)], seconds=30)
    parts = first.parts()
    next(parts)
    second = batcher.submit("base", [ask(batcher, "有", 6)], seconds=30)
    for answer in (parts, second.parts()):
        with pytest.raises(ModelFailedError):
            list(answer)
    monkeypatch.setattr(KVBatch, "join", join)
    assert ids_and_stop(batcher.submit("base", [ask(batcher, "有", 6)], seconds=30)) and batcher.alive


def test_no_memory_to_draw_ends_no_service(batcher_of, monkeypatch):
    """A request waited for ever for a thread that had ended."""
    batcher, draw = batcher_of(), engine_sampling.draw

    def short(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    asked = ask(batcher, "有", 6, sampling={"do_sample": True})
    monkeypatch.setattr(engine_sampling, "draw", short)
    with pytest.raises(ModelFailedError):
        text_of(batcher.submit("base", [asked], seconds=30))
    monkeypatch.setattr(engine_sampling, "draw", draw)
    assert ids_and_stop(batcher.submit("base", [asked], seconds=30)) and batcher.alive


def test_a_model_that_is_broken_is_not_alive(batcher_of, monkeypatch):
    batcher = batcher_of()

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(batcher.net, "forward", broken)
    with pytest.raises(ModelFailedError):
        list(batcher.submit("base", [ask(batcher, "有", 6)]).parts())
    batcher.thread.join(10)
    assert not batcher.alive
    with pytest.raises(ModelFailedError):
        batcher.submit("base", [ask(batcher, "有", 6)])


@pytest.mark.parametrize("family", FAMILIES)
def test_words_come_whole(family, request):
    """Whatever ids: the parts are the text, and nothing that was shown changes."""
    from transformers import AutoTokenizer

    if family == "chatglm":
        import chatglm_sft.models.chatglm  # noqa: F401
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(f"small_{family}"))
    dice, special = random.Random(0), set(tokenizer.all_special_ids)
    ordinary = [id_ for id_ in range(len(tokenizer)) if id_ not in special]
    texts = [tokenizer.encode("你好，世界😀 一二 三\n\na  b", add_special_tokens=False)]
    for ids in texts + [[dice.choice(ordinary) for _ in range(30)] for _ in range(60)]:
        words, shown = Wording(tokenizer), ""
        for id_ in ids:
            words.ids.append(id_)
            shown += words.more()
            assert shown == words.shown
        assert shown + words.more(ended=True) == decode(tokenizer, ids)


def test_a_step_is_recorded_before_anybody_asks(batcher_of):
    expecting, plain = batcher_of(), batcher_of()
    expecting.expect("base")
    for _ in range(200):
        if expecting.switch.replays:
            break
        time.sleep(0.05)
    assert list(expecting.switch.replays) == [None] and expecting.switch.replays[None] and not plain.switch.replays
    asked = [ids_and_stop(one.submit("base", [ask(one, QUESTIONS[3])])) for one in (expecting, plain)]
    assert asked[0] == asked[1]


def test_memory_is_handed_back_once_nobody_asks(batcher_of, monkeypatch):
    rests = []
    monkeypatch.setattr("common.engine.batcher.REST", 0.05)
    monkeypatch.setattr("common.engine.batcher.hand_back", lambda: rests.append(batcher.forwards))
    batcher = batcher_of()
    answers = []
    for _ in range(2):
        answers.append(ids_and_stop(batcher.submit("base", [ask(batcher, QUESTIONS[3])])))
        time.sleep(0.5)
    assert len(rests) == 2 and 0 < rests[0] < rests[1] == batcher.forwards
    assert answers[0] == answers[1]


def test_an_encoder_rests_and_goes_on(batcher_of):
    encoder = batcher_of().encoder
    turns, before = [Turn("user", QUESTIONS[3])], {*threading.enumerate()}
    ids, text = encoder.whole_ids(turns), encoder.text_ids(QUESTIONS[4])
    kept = [thread for thread in before if thread.name.startswith("encoder")]
    encoder.rest()
    assert any(not thread.is_alive() for thread in kept)
    assert (encoder.whole_ids(turns), encoder.text_ids(QUESTIONS[4])) == (ids, text)
