"""A prompt style as other programs' templates, read off the family's own renderer and compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jinja2.exceptions import TemplateError

from common.data.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.data.family import Family

SYSTEM, ASKED, ANSWERED, AGAIN = "{system}", "{question 1}", "{answer 1}", "{question 2}"
MODELFILE = (
    'FROM .\nTEMPLATE """{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{header}{{{{ end }}}}'
    '{{{{ .Prompt }}}}{ask}{{{{ .Response }}}}{end}"""\n'
)
JINJA = (
    "{{{{ {bos} }}}}{{% for message in messages %}}"
    "{{% if message['role'] == 'system' %}}{{{{ {before} + message['content'] + {after} }}}}"
    "{{% elif message['role'] == 'assistant' %}}{{{{ message['content'] + {end} }}}}"
    "{{% else %}}{{% if loop.first %}}{{{{ {first} }}}}{{% elif messages[loop.index0 - 1]['role'] != 'system' %}}"
    "{{{{ {header} }}}}{{% endif %}}{{{{ message['content'] + {ask} }}}}{{% endif %}}{{% endfor %}}"
)


class Layout(NamedTuple):
    """The constant texts of a prompt style: what stands around system text, question and answer."""

    bos: str  # before everything; engines add it by themselves
    before: str  # before a system text
    after: str  # between system text and first question
    first: str  # before the first question where there is no system text
    header: str  # before any later question
    ask: str  # between question and answer
    end: str  # behind an answer
    default: str  # the system text in `first`: some templates give one to conversations without


def layout(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str) -> Layout | None:
    """The Layout of a style, or None where constant texts cannot express it (numbered rounds)."""

    def split(turns: Sequence[Turn], *marks: str) -> list[str]:
        """The rendered turns, split at the marks."""
        text = tokenizer.decode(_ids(tokenizer, prompt, style, turns), skip_special_tokens=False)
        found = []
        for mark in marks:
            part, _, text = text.partition(mark)
            found.append(part)
        return [*found, text]

    question = Turn("user", ASKED)
    first, ask, between, again = split(
        [question, Turn("assistant", ANSWERED), Turn("user", AGAIN)], ASKED, ANSWERED, AGAIN
    )
    before, after, system_ask = split([Turn("system", SYSTEM), question], SYSTEM, ASKED)
    if not ask == again == system_ask:
        return None
    bos = tokenizer.bos_token if tokenizer.bos_token and first.startswith(tokenizer.bos_token) else ""
    first, before = first[len(bos) :], before[len(bos) :]
    if between.endswith(first):
        return Layout(bos, before, after, first, first, ask, between[: len(between) - len(first)], "")
    stop = tokenizer.decode(prompt.stop_ids(tokenizer, style)[:1], skip_special_tokens=False)
    if first.startswith(before) and first.endswith(after) and between.startswith(stop):
        default = first[len(before) : len(first) - len(after)]
        return Layout(bos, before, after, first, between[len(stop) :], ask, stop, default)
    return None


def chat_template(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str) -> str | None:
    """A Jinja chat template that gives exactly the ids of this style: the tokenizer's own, one made here, or None."""
    made = layout(tokenizer, prompt, style)
    candidates = [tokenizer.chat_template] + ([jinja_of(made)] if made else [])
    return next((found for found in candidates if found and _renders_alike(tokenizer, prompt, style, found)), None)


def modelfile(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str) -> str | None:
    """An Ollama Modelfile for a folder in this style, or None where Ollama's template cannot express it."""
    made = layout(tokenizer, prompt, style)
    if made is None:
        return None
    text = MODELFILE.format(**made._asdict())
    if made.default:
        text += f'SYSTEM """{made.default}"""\n'
    stops = [tokenizer.decode([id_], skip_special_tokens=False) for id_ in prompt.stop_ids(tokenizer, style)]
    return text + "".join(f'PARAMETER stop "{stop}"\n' for stop in stops)


def jinja_of(made: Layout) -> str:
    """`made` as a Jinja template; a later question's header follows the end of the answer before it."""
    return JINJA.format(**{name: repr(text) for name, text in made._asdict().items()})


def _renders_alike(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str, template: str) -> bool:
    """Whether the template gives the ids of `prompt.render`, in three conversations."""
    rounds = [Turn("user", "你好"), Turn("assistant", "您好。"), Turn("user", "1+1="), Turn("assistant", "2")]
    conversations = [rounds[:1], rounds[:3], [*rounds, Turn("user", "谢谢")]]
    return all(
        _rendered(tokenizer, template, turns) == _ids(tokenizer, prompt, style, turns) for turns in conversations
    )


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str, turns: Sequence[Turn]) -> list[int] | None:
    """The ids a Jinja template gives, or None where it refuses the turns."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError:
        return None


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str, turns: Sequence[Turn]) -> list[int]:
    return [id_ for piece in prompt.render(tokenizer, turns, style) for id_ in piece.ids]
