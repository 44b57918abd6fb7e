"""Talking to a model: a real process under a pseudo-terminal, the chat with a fake, and the stream of a real model."""

import io
import json
import os
import pty
import random
import select
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
import torch

from common.config import PredictFlags
from common.conversation.turns import Call, Turn
from common.errors import UserError
from common.inference import console
from common.inference.answer_parts import Thought
from common.inference.answerer import Answer, Answerer, Sampling
from common.model import loading
from gemma_sft import prompt
from gemma_sft.ft_gemma import predict
from gemma_sft.ft_gemma.config import Config

ROOT = Path(__file__).resolve().parents[1]
GREEDY = Sampling(max_new_tokens=40)
# takes the terminal on stdin as its own, so that Ctrl-C typed there is a signal, which a suite started by `nohup … &`
# ignores and its processes with it; and becomes the recipe
ON_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
CTRL_C, CTRL_D, BACKSPACE = b"\x03", b"\x04", b"\x7f"


class Terminal:
    """predict.py --base on a pseudo-terminal: type into it, wait for what it shows."""

    def __init__(self, folder, environment, *flags):
        self.master, slave = pty.openpty()
        modes = termios.tcgetattr(slave)
        modes[0] |= getattr(termios, "IUTF8", 0x4000)
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        recipe = [sys.executable, str(ROOT / "gemma_sft/ft_gemma/predict.py"), "--base", *map(str, flags)]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", ON_TERMINAL, *recipe],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        os.set_blocking(self.master, False)
        self.raw, self.read_to = b"", 0

    def type(self, text):
        os.write(self.master, text if isinstance(text, bytes) else text.encode())

    @property
    def shown(self):
        return self.raw.decode(errors="replace").replace("\r\n", "\n")

    def expect(self, text, seconds=300):
        """What is shown from the last expected text up to `text`, which has to come."""
        end = time.monotonic() + seconds
        while (found := self.shown.find(text, self.read_to)) < 0:
            assert time.monotonic() < end, f"no {text!r} after {self.shown[self.read_to :]!r}"
            if not self._more() and self.process.poll() is not None and not self._more():
                raise AssertionError(f"ended without {text!r}: {self.shown[self.read_to :]!r}")
        between, self.read_to = self.shown[self.read_to : found], found + len(text)
        return between

    def _more(self):
        if not select.select([self.master], [], [], 0.05)[0]:
            return False
        try:
            part = os.read(self.master, 1 << 16)
        except OSError:  # Linux says EIO once the process has closed the terminal
            return False
        self.raw += part
        return bool(part)

    def leave(self, seconds=120):
        """The exit code, after all that was still to be shown."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self._more()
        while self._more():
            pass
        return self.process.wait(1)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture(scope="module")
def terminals(small_gemma, environment, tmp_path_factory):
    """Two chats, one with short answers and one with endless ones, started side by side: they import for seconds."""
    folder = tmp_path_factory.mktemp("terminal")
    flags = ["--path_model_pretrain", small_gemma, "--model_save_dir", folder / "none"]
    short = Terminal(folder, environment, *flags, "--max_new_tokens", 20, "--seed", 1)
    endless = Terminal(folder, environment, *flags, "--max_new_tokens", 100_000, "--do_sample", "false")
    yield short, endless
    short.close()
    endless.close()


def test_a_chat_on_a_terminal(terminals):
    """A question, CLEAR, a blank line, Ctrl-C at the prompt, a second question, EXIT."""
    chat, _ = terminals
    chat.expect("请输入:")
    chat.type("你好，请问你是谁？\n")
    chat.expect("请稍等...\n")
    answer, _, seconds = chat.expect(" 秒 seconds\n").rpartition("\n")
    assert answer.strip() and "请输入" not in answer
    assert 0 <= float(seconds) < 300
    chat.expect("请输入:")
    chat.type("clear\n")
    assert "请稍等" not in chat.expect("history cleared\n")
    chat.expect("请输入:")
    chat.type(" \n")
    assert "请稍等" not in chat.expect("请输入:")
    time.sleep(0.5)  # Python overlooks a signal between the prompt and the read behind it; nobody types so fast
    chat.type(CTRL_C)
    chat.expect("请输入:")
    chat.type("一只猫" + BACKSPACE.decode() + "狗\n")
    chat.expect("秒 seconds\n")
    chat.expect("请输入:")
    chat.type("EXIT\n")
    assert chat.leave() == 0
    assert "Traceback" not in chat.shown and "Error" not in chat.shown and "Warning" not in chat.shown


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminals):
    """An answer of 100,000 tokens that stops within seconds was stopped by Ctrl-C; the chat goes on."""
    _, chat = terminals
    for _ in range(2):
        chat.expect("请输入:")
        chat.type("一\n")
        chat.expect("请稍等...\n")
        time.sleep(0.5)
        assert "seconds" not in chat.shown[chat.read_to :]
        chat.type(CTRL_C)
        assert "stopped]" in chat.expect("秒 seconds", seconds=20)
    chat.expect("请输入:")
    chat.type(CTRL_D)
    assert chat.leave() == 0
    assert "Traceback" not in chat.shown and "Error" not in chat.shown


# --- the chat with a fake -------------------------------------------------------------------------------------------


class Fake:
    """Streams `parts` and remembers the conversations it was asked with."""

    def __init__(self, *parts):
        self.parts, self.asked, self.closed = parts, [], 0

    def stream(self, turns, sampling, base=False):
        self.asked.append((list(turns), sampling, base))
        try:
            for part in self.parts:
                if isinstance(part, type):
                    raise part
                yield part
        finally:
            self.closed += 1

    def cut_to(self, turns, new_tokens):
        return 0

    def __call__(self, conversations, sampling, base=False):
        self.asked += [(list(turns), sampling, base) for turns in conversations]
        return [Answer("基" if base else "调", "stop", 1) for _ in conversations]


def typed(*lines):
    """An `ask` that types `lines` (exceptions are raised) and then Ctrl-D."""
    left = iter(lines)

    def ask(prompt):
        line = next(left, EOFError)
        if isinstance(line, type):
            raise line
        return line

    return ask


def turns_asked(fake):
    return [[(turn.role, turn.text) for turn in turns] for turns, _, _ in fake.asked]


def test_history_is_passed_on_until_clear():
    fake = Fake("答", "一")
    console.chat(fake, GREEDY, PredictFlags(), typed("甲", "乙", " Clear ", "丙"))
    assert turns_asked(fake) == [
        [("user", "甲")],
        [("user", "甲"), ("assistant", "答一"), ("user", "乙")],
        [("user", "丙")],
    ]
    assert {sampling for _, sampling, _ in fake.asked} == {GREEDY}


def test_system_text_comes_first_and_once():
    fake = Fake("答")
    console.chat(fake, GREEDY, PredictFlags(system="你是猫", base=True), typed("甲", "乙", "CLEAR", "丙"))
    assert [turns[0] for turns in turns_asked(fake)] == [("system", "你是猫")] * 3
    assert [len(turns) for turns in turns_asked(fake)] == [2, 4, 2]
    assert [base for _, _, base in fake.asked] == [True] * 3


@pytest.mark.parametrize("blank", ["", " ", "\t", "　", "\n"])
def test_blank_input_is_ignored(blank, capsys):
    fake = Fake("答")
    console.chat(fake, GREEDY, PredictFlags(), typed(blank))
    assert fake.asked == [] and "请稍等" not in capsys.readouterr().out


@pytest.mark.parametrize("word", ["EXIT", "exit", " Exit "])
def test_exit_leaves(word):
    fake = Fake("答")
    console.chat(fake, GREEDY, PredictFlags(), typed(word, "甲"))
    assert fake.asked == []


def test_words_that_only_contain_a_command_are_questions():
    fake = Fake("答")
    console.chat(fake, GREEDY, PredictFlags(), typed("CLEAR是什么意思", "exit?"))
    assert len(fake.asked) == 2


def test_pieces_are_shown_as_they_come(capsys):
    shown = []

    class Slow(Fake):
        def stream(self, turns, sampling, base=False):
            for part in ("一", "二\n", "三"):
                yield part
                shown.append(capsys.readouterr().out)

    console.chat(Slow(), GREEDY, PredictFlags(), typed("甲"))
    assert shown[0].endswith("请稍等...\n一") and shown[1:] == ["二\n", "三"]
    assert "秒 seconds" in capsys.readouterr().out


def test_an_interrupted_answer_stays_in_the_history(capsys):
    fake = Fake("半句", KeyboardInterrupt)
    console.chat(fake, GREEDY, PredictFlags(), typed("甲", KeyboardInterrupt, "乙"))
    assert turns_asked(fake)[1] == [("user", "甲"), ("assistant", "半句"), ("user", "乙")]
    assert fake.closed == 2
    assert "stopped" in capsys.readouterr().out


def test_half_a_character_typed_does_not_end_the_chat(monkeypatch, capsys):
    """A terminal without IUTF8 leaves two bytes of a Chinese character after a backspace."""
    fake = Fake("答")
    line = "你".encode()[:2] + b"abc\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line + "好\nEXIT\n".encode()), encoding="utf-8"))
    monkeypatch.setattr(predict, "load_answer", lambda cfg, base=False, base_url="", once=False: fake)
    predict.main(["--base"])
    asked = [turns[-1][1] for turns in turns_asked(fake)]
    assert asked[-1] == "好"
    for question in asked:
        question.encode()  # no lone surrogate goes to the tokenizer


def test_thought_and_calls_are_shown_apart(capsys):
    call = Call("f", '{"a": 1}')
    fake = Fake(Thought("想"), Thought("一想"), "答", "案", call)
    console.chat(fake, GREEDY, PredictFlags(), typed("甲", "乙"))
    shown = capsys.readouterr().out
    assert '请稍等...\n[思考 thinking]\n想一想\n[回答 answer]\n答案\n调用 call: f {"a": 1}\n' in shown
    assert fake.asked[1][0][1] == Turn("assistant", "答案", thought="想一想", calls=(call,)), "the mode decides on it"


def test_thought_alone_is_told_with_a_remedy(capsys):
    console.chat(Fake(Thought("想")), GREEDY, PredictFlags(), typed("甲"))
    assert (
        "想\n[只有思考，没有回答 thought alone, no answer: give a larger --max_new_tokens]\n" in capsys.readouterr().out
    )


def test_a_query_prints_thought_beside_the_answer(capsys):
    """stdout is the answer alone."""

    class Thinking(Fake):
        def __call__(self, conversations, sampling, base=False):
            return [Answer("" if base else "答", "stop", 1, 0, "想", () if base else (Call("f", "{}"),))]

    console.ask_once(Thinking(), GREEDY, PredictFlags(query="甲"))
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("答\n调用 call: f {}\n", "[思考 thinking]\n想\n")
    console.ask_once(Thinking(), GREEDY, PredictFlags(query="甲", base=True))
    shown = capsys.readouterr()
    assert shown.out == "\n" and shown.err.count("\n") == 3 and "a larger --max_new_tokens" in shown.err


# --- one question ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, shown, bases",
    [
        (["--query", "甲"], "调\n", [False]),
        (["--query", "甲", "--base"], "基\n", [True]),
        (["--query", "甲", "--compare"], None, [True, False]),
        (["--query", "甲", "--system", "你是猫"], "调\n", [False]),
    ],
)
def test_query(monkeypatch, capfd, flags, shown, bases):
    fake = Fake()
    monkeypatch.setattr(predict, "load_answer", lambda cfg, base=False, base_url="", once=False: fake)
    predict.main(flags)
    found = capfd.readouterr().out
    if shown is None:
        base, tuned = found.splitlines()
        assert base.startswith("基座 base:") and base.endswith("基")
        assert tuned.startswith("微调 tuned:") and tuned.endswith("调")
    else:
        assert found == shown
    assert [base for _, _, base in fake.asked] == bases
    system = [("system", "你是猫")] if "--system" in flags else []
    assert turns_asked(fake) == [[*system, ("user", "甲")]] * len(bases)


def test_query_prints_only_the_answer(small_gemma, tmp_path, capfd):
    """Bars and notes of loading go to stderr."""
    flags = ["--base", "--path_model_pretrain", str(small_gemma), "--model_save_dir", str(tmp_path)]
    predict.main([*flags, "--query", "你好", "--do_sample", "false", "--max_new_tokens", "12"])
    shown = capfd.readouterr().out
    cfg = Config(path_model_pretrain=str(small_gemma), model_save_dir=str(tmp_path))
    expected = predict.load_answer(cfg, base=True)([[Turn("user", "你好")]], Sampling(max_new_tokens=12))[0]
    assert shown == expected.text + "\n"


def test_base_and_compare_are_not_compared(monkeypatch, small_gemma, tmp_path, capsys):
    """With --base no adapter is loaded: the base's answer must not be shown as the tuned model's."""
    flags = ["--base", "--compare", "--query", "甲", "--path_model_pretrain", str(small_gemma)]
    try:
        predict.main([*flags, "--model_save_dir", str(tmp_path), "--max_new_tokens", "2"])
    except (UserError, SystemExit):
        pass
    assert "tuned" not in capsys.readouterr().out


def test_no_trained_run_is_one_line_with_a_remedy(recipe, tmp_path):
    done = recipe("predict.py", "--query", "你好", "--model_save_dir", tmp_path / "none")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / "none") in line and "train.py" in line and "--base" in line


# --- the prompt -----------------------------------------------------------------------------------------------------


@pytest.fixture
def only_tokenizer(tokenizer, tmp_path):
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


def prompt_shown(capsys, *flags):
    predict.main([str(flag) for flag in flags])
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line), line


@pytest.mark.parametrize(
    "flags, text",
    [
        ([], "<bos><start_of_turn>user\n你好<end_of_turn>\n<start_of_turn>model\n"),
        (["--system", "答"], "<bos><start_of_turn>user\n答\n\n你好<end_of_turn>\n<start_of_turn>model\n"),
        (["--prompt_style", "plain"], "<bos>你好"),
    ],
)
def test_print_prompt_needs_only_a_tokenizer(only_tokenizer, tokenizer, tmp_path, capsys, flags, text):
    common = ["--path_model_pretrain", only_tokenizer, "--model_save_dir", tmp_path / "none"]
    found, line = prompt_shown(capsys, *common, "--print_prompt", "你好", *flags)
    assert list(found) == ["text", "input_ids"] and found["text"] == text
    assert "你好" in line
    assert tokenizer.decode(found["input_ids"]) == text
    assert found["input_ids"].count(tokenizer.bos_token_id) == 1


def test_print_prompt_shows_what_the_trained_run_is_asked_with(only_tokenizer, tmp_path, capsys):
    """Style and lengths are the run's own, as they are in the chat."""
    config = {"prompt_style": "plain", "max_length_q": 6}
    manifest = {"state": "finished", "base": {"path": str(only_tokenizer), "sha256": ""}, "config": config}
    (tmp_path / "run_manifest.json").write_text(json.dumps(manifest))
    found, _ = prompt_shown(capsys, "--model_save_dir", tmp_path, "--print_prompt", "abcdefghijk")
    assert found["text"].startswith("<bos>a") and "<start_of_turn>" not in found["text"]
    assert len(found["input_ids"]) == 6


def test_print_prompt_that_cannot_fit_is_a_user_error(only_tokenizer, tmp_path):
    flags = ["--path_model_pretrain", only_tokenizer, "--model_save_dir", tmp_path, "--max_length_q", 3]
    with pytest.raises(UserError):
        predict.main([str(flag) for flag in [*flags, "--print_prompt", "你好"]])


# --- how long a prompt may be ----------------------------------------------------------------------------------------


@pytest.fixture
def limited(small_gemma):
    """limited(**knobs): an Answerer of a model with a context of 1,024 ids, `prompts` its prompts' lengths."""

    def load(**knobs):
        cfg = Config(path_model_pretrain=str(small_gemma), model_save_dir="/nowhere", given=frozenset(knobs), **knobs)
        answer = predict.load_answer(cfg, base=True)
        answer.prompts = []

        def generate(prompts, sampling, base=False, streamer=None):
            answer.prompts += map(len, prompts)
            return [[] for _ in prompts]

        answer.generate = generate
        return answer

    return load


@pytest.mark.parametrize(
    "knobs, tokens, length, limit",
    [
        ({}, 100, 800, 0),  # longer than the 512 of training
        ({}, 100, 3000, 924),
        ({}, 800, 600, 512),  # what is left of the context is less than what was trained with
        ({}, 5000, 600, 512),
        ({"max_length_q": 64}, 100, 800, 64),  # the user's own
        ({"max_length_q": 2000}, 100, 1500, 0),
    ],
)
def test_the_context_is_the_limit_of_a_prompt(limited, knobs, tokens, length, limit):
    answer, turns, sampling = limited(**knobs), [Turn("user", "人" * length)], Sampling(max_new_tokens=tokens)
    assert answer.cut_to(turns, tokens) == limit
    assert answer([turns], sampling)[0].cut_to == limit
    list(answer.stream(turns, sampling))
    whole = length - 1 + len(answer.fitted_ids([Turn("user", "人")]))
    assert answer.prompts == [limit or whole] * 2


def test_a_model_that_does_not_say_its_context_is_asked_as_it_was_trained(small_gemma, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    assert [loading.context_of(path) for path in (small_gemma, tmp_path, tmp_path.parent)] == [1024, 0, 0]


def test_a_long_chat_forgets_its_oldest_turns_and_says_so(limited, capsys):
    answer = limited()
    capsys.readouterr()
    console.chat(answer, Sampling(max_new_tokens=24), PredictFlags(), typed("人" * 900, "的" * 400, "短"))
    shown = capsys.readouterr()
    assert shown.err.count("cut to 1000 tokens") == shown.err.count("\n") == 2
    assert "cut" not in shown.out
    assert len(answer.prompts) == 3 and answer.prompts[1] < 450 < 900 < answer.prompts[0]


def test_a_long_query_is_cut_and_stdout_is_the_answer_alone(small_gemma, tmp_path, capsys):
    flags = ["--base", "--path_model_pretrain", str(small_gemma), "--model_save_dir", str(tmp_path)]
    predict.main([*flags, "--query", "人" * 3000, "--max_new_tokens", "4"])
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1 and "cut to" not in shown.out
    assert shown.err.count("the prompt was cut to 1020 tokens") == 1


def test_print_prompt_has_the_limit_of_the_answer(small_gemma, tmp_path, capsys):
    flags = ["--path_model_pretrain", small_gemma, "--model_save_dir", tmp_path, "--max_new_tokens", 24]
    for length, expected in ((900, "whole"), (2000, 1000)):
        predict.main([str(flag) for flag in [*flags, "--print_prompt", "人" * length]])
        shown = capsys.readouterr()
        found = json.loads(shown.out)
        assert found["text"].count("人") == 900 if expected == "whole" else len(found["input_ids"]) == expected
        assert ("cut to 1000 tokens" in shown.err) is (expected != "whole")


# --- the stream -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(small_gemma):
    return predict.load_answer(Config(path_model_pretrain=str(small_gemma), model_save_dir="/nowhere"), base=True)


class Scripted:
    """A net whose `generate` says given ids, one at a time."""

    device = torch.device("cpu")

    def __init__(self, ids):
        self.ids, self.said = ids, 0

    def generate(self, input_ids, streamer=None, stopping_criteria=None, **kwargs):
        if streamer:
            streamer.put(input_ids)
        for id_ in self.ids:
            if any(bool(rule(input_ids, None).all()) for rule in stopping_criteria or []):
                break
            input_ids = torch.cat([input_ids, torch.tensor([[id_]])], dim=1)
            self.said += 1
            if streamer:
                streamer.put(torch.tensor([id_]))
        if streamer:
            streamer.end()
        return input_ids


def ids_of(tokenizer, *parts):
    """Ids of pieces (str) and of single bytes (bytes)."""
    names = []
    for part in parts:
        names += [f"<0x{byte:02X}>" for byte in part] if isinstance(part, bytes) else [part]
    return tokenizer.convert_tokens_to_ids(names)


NI, HAO, SMILE = "你".encode(), "好".encode(), "😀".encode()
CUT = [  # pieces generated, text
    ([NI, HAO], "你好"),
    ([NI[:1]], ""),
    ([SMILE[:3]], ""),
    ([NI, HAO[:2]], "你"),
    ([NI, SMILE[:3]], "你"),
    ([NI, HAO, NI[:1]], "你好"),
    ([SMILE, SMILE, SMILE[:2]], "😀😀"),
    (["人", NI[:2]], "人"),
    (["人", NI, HAO[:1]], "人你"),
    ([b"A", NI[:2]], "A"),
    (["人", "▁", NI[:2]], "人"),
    (["▁", "人", "\n", "▁"], "人"),
    (["人", "\n", "\n", "的"], "人\n\n的"),
    ([NI, "<end_of_turn>", HAO], "你"),
    ([NI, HAO[:1], "<end_of_turn>"], "你"),
    (["<end_of_turn>"], ""),
    ([], ""),
]


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("parts, text", CUT, ids=[repr(parts) for parts, _ in CUT])
def test_a_character_cut_in_its_middle_is_never_shown(tokenizer, parts, text, streamed):
    ids = ids_of(tokenizer, *parts)
    end = ids_of(tokenizer, "<end_of_turn>")[0]
    if streamed and end in ids:
        ids = ids[: ids.index(end) + 1]  # generate stops there
    answer = Answerer(Scripted(ids), tokenizer, prompt, "chat", 64)
    turns = [Turn("user", "问")]
    found = list(answer.stream(turns, GREEDY)) if streamed else [answer([turns], GREEDY)[0].text]
    assert "".join(found) == text
    assert all(found) or not streamed


def test_characters_of_several_bytes_come_whole_and_at_once(tokenizer):
    answer = Answerer(Scripted(ids_of(tokenizer, "人", NI, SMILE, "的")), tokenizer, prompt, "chat", 64)
    assert "".join(answer.stream([Turn("user", "问")], GREEDY)) == "人你😀的"


@pytest.mark.parametrize("question", ["你好", "1+1=", "一二三", "a", "🙂", "问答" * 100])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_the_stream_is_the_greedy_answer(real, question, tokens):
    turns, sampling = [Turn("user", question)], Sampling(max_new_tokens=tokens)
    parts = list(real.stream(turns, sampling))
    assert "".join(parts) == real([turns], sampling)[0].text


def test_the_stream_of_any_ids_is_the_whole_answer(tokenizer):
    """Whatever a model says, bytes that are no character included."""
    words = ["人", "的", "a", "▁", "\n", NI, HAO, SMILE, NI[:1], NI[:2], HAO[1:], b"A"]
    draw = random.Random(0)
    different = []
    for _ in range(200):
        parts = draw.choices(words, k=draw.randrange(1, 9))
        answer = Answerer(Scripted(ids_of(tokenizer, *parts)), tokenizer, prompt, "chat", 64)
        turns = [Turn("user", "问")]
        streamed, whole = "".join(answer.stream(turns, GREEDY)), answer([turns], GREEDY)[0].text
        if streamed != whole:
            different.append((parts, streamed, whole))
    assert different == []


def test_beams_are_streamed_in_one_piece(real):
    turns, sampling = [Turn("user", "你好")], Sampling(max_new_tokens=6, num_beams=2)
    assert list(real.stream(turns, sampling)) == [real([turns], sampling)[0].text]


def test_closing_the_stream_stops_the_generation(real):
    before = set(threading.enumerate())
    sampling = Sampling(max_new_tokens=100_000, do_sample=True)
    started = time.monotonic()
    for question in ("一", "二", "三"):
        stream = real.stream([Turn("user", question)], sampling)
        next(stream, None)
        stream.close()
        assert set(threading.enumerate()) == before
    assert time.monotonic() - started < 20
    assert real([[Turn("user", "一")]], Sampling(max_new_tokens=2))  # and the model is free again


def test_closing_ends_the_generation_early(tokenizer):
    net = Scripted(ids_of(tokenizer, *["的"] * 100_000))
    stream = Answerer(net, tokenizer, prompt, "chat", 64).stream([Turn("user", "问")], GREEDY)
    assert next(stream).startswith("的")
    stream.close()
    assert net.said < 100_000


def test_a_failure_in_the_middle_reaches_the_reader(tokenizer):
    class Broken(Scripted):
        def generate(self, input_ids, streamer=None, **kwargs):
            super().generate(input_ids, streamer)
            raise RuntimeError("out of memory")

    before = set(threading.enumerate())
    stream = Answerer(Broken(ids_of(tokenizer, "的")), tokenizer, prompt, "chat", 64)
    found = []
    with pytest.raises(RuntimeError, match="out of memory"):
        found.extend(stream.stream([Turn("user", "问")], GREEDY))
    assert set(threading.enumerate()) == before


def test_a_stream_never_started_generates_nothing(tokenizer):
    net = Scripted(ids_of(tokenizer, "的"))
    Answerer(net, tokenizer, prompt, "chat", 64).stream([Turn("user", "问")], GREEDY).close()
    assert net.said == 0


def test_a_prompt_that_cannot_fit_is_a_user_error(tokenizer):
    answer = Answerer(Scripted([]), tokenizer, prompt, "chat", 3)
    with pytest.raises(UserError):
        answer([[Turn("user", "问")]], GREEDY)
    with pytest.raises(UserError):
        next(answer.stream([Turn("user", "问")], GREEDY))
