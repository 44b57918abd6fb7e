"""A prompt style as other programs' templates, read off the family's own renderer and compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jinja2.exceptions import TemplateError

from common.conversation.turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.conversation.family import Family

SYSTEM, GREETED, ASKED, ANSWERED, AGAIN = "{system}", "{greeting}", "{question 1}", "{answer 1}", "{question 2}"
MODELFILE = (
    'FROM {gguf}\nTEMPLATE """{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{header}{{{{ end }}}}'
    '{{{{ .Prompt }}}}{ask}{{{{ .Response }}}}{end}"""\n'
)
JINJA = (  # ask: what stands before the next question; greet: before a greeting, nothing before other answers
    "{{{{ {bos} }}}}{{% set ns = namespace(ask={first}, greet={greet}) %}}{{% for message in messages %}}"
    "{{% if message['role'] == 'system' %}}{{% set ns.ask = {before} + message['content'] + {after} %}}{welcome}"
    "{{% elif message['role'] == 'assistant' %}}{{{{ ns.greet + message['content'] + {end} }}}}{spoken}"
    "{{% else %}}{{{{ ns.ask + message['content'] + {ask} }}}}{{% set ns.ask = {header} %}}{{% endif %}}"
    "{{% if message['role'] != 'system' %}}{{% set ns.greet = '' %}}{{% endif %}}{{% endfor %}}"
)
WELCOME = "{{% set ns.greet = {before} + message['content'] + {between} %}}"  # the system text stands before a greeting
SPOKEN = "{{% set ns.ask = {header} %}}"


class Layout(NamedTuple):
    """The constant texts of a prompt style: what stands around system text, question and answer."""

    bos: str  # before everything; engines add it by themselves
    before: str  # before a system text
    after: str  # between system text and first question
    greet: str  # before a greeting where there is no system text
    between: str | None  # between system text and greeting; None: the system text waits for the first question
    first: str  # before the first question where there is neither
    header: str  # before any later question
    ask: str  # between question and answer
    end: str  # behind an answer
    default: str  # the system text in `first`: some templates give one to conversations without


def layout(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str) -> Layout | None:
    """The Layout of a style, or None where constant texts cannot express it (numbered rounds)."""

    def shown(*turns: Turn) -> str:
        return tokenizer.decode(_ids(tokenizer, prompt, style, turns), skip_special_tokens=False)

    def split(text: str, *marks: str) -> list[str]:
        found = []
        for mark in marks:
            part, _, text = text.partition(mark)
            found.append(part)
        return [*found, text]

    system, greeting, question = Turn("system", SYSTEM), Turn("assistant", GREETED), Turn("user", ASKED)
    rounds = shown(question, Turn("assistant", ANSWERED), Turn("user", AGAIN))
    first, ask, apart, again = split(rounds, ASKED, ANSWERED, AGAIN)
    before, after, system_ask = split(shown(system, question), SYSTEM, ASKED)
    if not ask == again == system_ask:
        return None
    greet = split(shown(greeting, question), GREETED)[0]
    welcome = shown(system, greeting, question)
    between = split(welcome, SYSTEM, GREETED)[1] if welcome.find(SYSTEM) < welcome.find(GREETED) else None
    bos = tokenizer.bos_token if tokenizer.bos_token and first.startswith(tokenizer.bos_token) else ""
    first, before, greet = first[len(bos) :], before[len(bos) :], greet[len(bos) :]
    if apart.endswith(first):
        end = apart[: len(apart) - len(first)]
        return Layout(bos, before, after, greet, between, first, first, ask, end, "")
    stop = tokenizer.decode(prompt.stop_ids(tokenizer, style)[:1], skip_special_tokens=False)
    if not apart.startswith(stop):
        return None
    has_default = first.startswith(before) and first.endswith(after)
    default = first[len(before) : len(first) - len(after)] if has_default else ""
    return Layout(bos, before, after, greet, between, first, apart[len(stop) :], ask, stop, default)


def chat_template(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str) -> str | None:
    """A Jinja chat template that gives exactly the ids of this style in every order of turns, or None.

    The tokenizer's own, the family's, or one made here, in that order.
    """
    made = layout(tokenizer, prompt, style)
    candidates = [tokenizer.chat_template, prompt.CHAT_TEMPLATE, made and jinja_of(made)]
    return next((found for found in candidates if found and _renders_alike(tokenizer, prompt, style, found)), None)


def modelfile(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str, gguf: str) -> str | None:
    """An Ollama Modelfile for a model in the file `gguf`, or None where Ollama's template cannot express the style."""
    made = layout(tokenizer, prompt, style)
    if made is None or made.header != made.first and not made.default:  # it says the same before every question
        return None
    text = MODELFILE.format(gguf=gguf, **made._asdict())
    if made.default:
        text += f'SYSTEM """{made.default}"""\n'
    stops = [tokenizer.decode([id_], skip_special_tokens=False) for id_ in prompt.stop_ids(tokenizer, style)]
    return text + "".join(f'PARAMETER stop "{stop}"\n' for stop in stops)


def jinja_of(made: Layout) -> str:
    """`made` as a Jinja template; a later question's header follows the end of the answer before it."""
    texts = {name: repr(text) for name, text in made._asdict().items()}
    waits = made.between is None
    return JINJA.format(
        welcome="" if waits else WELCOME.format(**texts), spoken="" if waits else SPOKEN.format(**texts), **texts
    )


def _renders_alike(tokenizer: PreTrainedTokenizerBase, prompt: Family, style: str, template: str) -> bool:
    """Whether the template gives the ids of `prompt.render` in every order of turns, one to three questions each."""
    rounds = [Turn("user", "你好"), Turn("assistant", "您好。"), Turn("user", "1+1="), Turn("assistant", "2")]
    system, greeting = [Turn("system", "少说话。")], [Turn("assistant", "在的。")]
    return all(
        _rendered(tokenizer, template, turns) == _ids(tokenizer, prompt, style, turns)
        for start in ([], system, greeting, system + greeting)
        for turns in ([*start, *rounds[:1]], [*start, *rounds[:3]], [*start, *rounds, Turn("user", "谢谢")])
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
