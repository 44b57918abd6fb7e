"""Rows of published corpora that have a shape of their own."""

from __future__ import annotations

import re
from collections.abc import Callable

from common.conversation.turns import FormatError, Turn
from common.data.fields import ROLES, Fields, as_text, role_of

Shape = frozenset[str]  # keys of a row
Reader = Callable[[Fields], list[list[Turn]]]  # a row's conversations
MOSS_MARKS = re.compile(r"^\s*<\|[\w ]+\|>:\s*|\s*<eo\w>\s*$")
MOSS_NOTES = ("Inner Thoughts", "Tool Responses")
SPEAKER = re.compile(r"<(Human|Assistant) \d+>\s*[:：]\s*(?:[（(](?:字数要求|[Ww]ord count)[^）)]*[）)]\s*)?")
SAID = re.compile(r"^(Human|Assistant)[:：]", re.MULTILINE)
ASKED, ANSWERED = re.compile(r"^\s*问[:：]\s*"), re.compile(r"^\s*答[:：]\s*")


def spoken(question: str) -> list[Turn]:
    """A question as turns: one, or those of BELLE's chats, `Human:…Assistant:…Human:…Assistant:` a line each."""
    before, *parts = SAID.split(question.strip())
    speakers, texts = parts[::2], [text.strip() for text in parts[1::2]]
    in_turn = speakers and speakers == ["Human", "Assistant"] * (len(speakers) // 2)
    if before or not in_turn or texts.pop() or not all(texts):
        return [Turn("user", question)]
    return [Turn(ROLES[who.lower()], text) for who, text in zip(speakers, texts, strict=False)]


def _many_answers(row: Fields) -> list[list[Turn]]:
    """HC3's rows: a conversation for each answer to the question."""
    question = Turn("user", row.text("question"))
    answers = row.items("human_answers") + row.items("chatgpt_answers")
    if not answers:
        raise FormatError("empty", "human_answers 和 chatgpt_answers 都是空的 are both empty")
    return [[question, Turn("assistant", as_text(answer, "answers"))] for answer in answers]


def _exam(row: Fields) -> list[list[Turn]]:
    """COIG's exam questions: task, text and question; answer and explanation."""
    asked = [row.text(f"textbox_{key}", required=False) for key in ("q_instruction", "q_context", "question")]
    explained = row.text("textbox_answer_analysis", required=False)
    answer = "\n".join(part for part in (row.text("textbox_answer"), explained) if part.strip())
    return [[Turn("user", "\n".join(part for part in asked if part.strip())), Turn("assistant", answer)]]


def _moss(row: Fields) -> list[list[Turn]]:
    """MOSS's chats {turn_1: {Human, MOSS, Commands, …}}, each text between markers such as <|Human|>: and <eoh>."""
    meta = row.text("meta_instruction", required=False)
    turns = [Turn("system", meta)] if meta.strip() else []
    chat = row.get("chat")
    for value in chat.values() if isinstance(chat, dict) else ():
        if not isinstance(value, dict):
            raise FormatError("not-an-utterance", f"chat: 应有 Human 和 MOSS expected, found {str(value)[:60]!r}")
        round_ = Fields(value, "chat")
        command = MOSS_MARKS.sub("", round_.text("Commands", required=False)) or "None"
        if command != "None":
            raise FormatError("plugin-call", f"chat 调用了插件 calls a plugin, which would be lost: {command[:40]!r}")
        question, answer = (MOSS_MARKS.sub("", round_.text(name)) for name in ("Human", "MOSS"))
        turns += [Turn("user", question), Turn("assistant", answer)]
        round_.read |= {name for name in MOSS_NOTES if MOSS_MARKS.sub("", str(value.get(name))) == "None"}
        row.inner += round_.unread()
    return [turns]


def _best_thread(row: Fields) -> list[list[Turn]]:
    """OpenAssistant's trees {prompt: {text, role, replies: [{…, rank}, …]}}: always the reply of the best rank."""
    turns, messages = [], [row.get("prompt")]
    while messages:
        if not all(isinstance(message, dict) and "role" in message for message in messages):
            raise FormatError(
                "not-an-utterance", f"prompt: 应有 role, text 和 replies expected, found {str(messages)[:60]!r}"
            )
        best = min(messages, key=lambda message: (message.get("rank") is None, message.get("rank") or 0))
        role = role_of(best["role"])
        if role is None:
            raise FormatError(
                "unknown-role", f"prompt: 未知角色 unknown role {best['role']!r}; known: prompter, assistant"
            )
        message = Fields(best, "prompt")
        turns.append(Turn(role, message.text("text")))
        row.inner += ["prompt.replies"] if len(messages) > 1 else []
        messages = message.items("replies")
        row.inner += message.unread()
    return [turns]


def _dialogue(row: Fields) -> list[list[Turn]]:
    """RefGPT's dialogues, one text: <start_chat><Human 1>:…<Assistant 1>:…<end_chat>."""
    text = row.text("dialogue").strip().removeprefix("<start_chat>").removesuffix("<end_chat>")
    before, *parts = SPEAKER.split(text)
    if before.strip() or not parts:
        raise FormatError("not-a-dialogue", f"dialogue: 应以 <Human 1>: 开头 must begin with it, found {text[:40]!r}")
    said = zip(parts[::2], parts[1::2], strict=True)
    return [[Turn(ROLES[who.lower()], as_text(text.strip(), "dialogue")) for who, text in said]]


def _forum(answer: str) -> Reader:
    """A reader of forums' rows: a title and more of the question, which often says the title again; an answer."""

    def read(row: Fields) -> list[list[Turn]]:
        question = row.text("title").strip()
        for key in [key for key in ("desc", "ask", "content") if key != answer]:
            more = row.text(key, required=False).strip()
            question = more if question in more else question if more in question else f"{question}\n{more}"
        return [[Turn("user", question), Turn("assistant", row.text(answer))]]

    return read


def _in_turn(row: Fields) -> list[list[Turn]]:
    """Rows of UltraChat, question and answer in turn, and of HuatuoGPT, where each begins with 问： or 答：."""
    texts = [as_text(text, "data") for text in row.items("data")]
    marks = [(ASKED, ANSWERED)[number % 2] for number in range(len(texts))]
    if all(mark.match(text) for mark, text in zip(marks, texts, strict=True)):
        texts = [mark.sub("", text) for mark, text in zip(marks, texts, strict=True)]
    return [[Turn(("user", "assistant")[number % 2], text) for number, text in enumerate(texts)]]


CORPORA: dict[Shape, Reader] = {
    frozenset({"question", "human_answers", "chatgpt_answers"}): _many_answers,
    frozenset({"textbox_question", "textbox_answer"}): _exam,
    frozenset({"chat", "num_turns"}): _moss,
    frozenset({"message_tree_id", "prompt"}): _best_thread,
    frozenset({"dialogue", "reference"}): _dialogue,
}
# where the keys are of no other shape
RARE: dict[Shape, Reader] = {
    frozenset({"title", "answer"}): _forum("answer"),
    frozenset({"qid", "title", "content"}): _forum("content"),
    frozenset({"data"}): _in_turn,
}
