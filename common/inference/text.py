"""Ids as text: at once, or while they arrive: whole characters, cleaned, ended by a stop string that is left out."""

import itertools
import re

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte piece of a SentencePiece vocabulary


def decode(tokenizer, ids):
    """Text of generated ids; bytes that make no whole character are left out."""
    if not tokenizer.is_fast:
        return tokenizer.decode(ids, skip_special_tokens=True).replace("\ufffd", "")
    text = ""
    for are_bytes, run_ids in itertools.groupby(ids, key=lambda id_: _byte(tokenizer, id_) is not None):
        if are_bytes:  # the tokenizer would turn a whole run into U+FFFD for one byte that is missing
            text += bytes(_byte(tokenizer, id_) for id_ in run_ids).decode("utf-8", "ignore")
        else:
            text += tokenizer.decode(list(run_ids), skip_special_tokens=True)
    return text.replace("\ufffd", "")


def _byte(tokenizer, id_):
    match = BYTE.fullmatch(tokenizer.convert_ids_to_tokens(id_) or "")
    return int(match[1], 16) if match else None


class Wording:
    """Turns ids into text as they come; each id is decoded a few times, however long the answer.

    clean(text, ended): how the family shows an answer; None leaves it as generated.
    stops: strings that end the text; of one that may be about to appear nothing is given out.
    `ids` are the caller's to append to. `length`: characters so far, also of what is kept back.
    """

    def __init__(self, tokenizer, clean=None, stops=()):
        self.tokenizer, self.clean, self.stops = tokenizer, clean, stops
        self.ids, self.settled, self.context, self.end = [], "", 0, 0
        self.shown, self.stopped, self.length = "", False, 0

    def more(self, ended=False):
        """The text that is new and will not change; with `ended` all that is left. `stopped` after a stop string."""
        if self.stopped:
            return ""
        whole = self._whole()
        if self.clean:
            whole = self.clean(whole, ended)
        self.length = len(whole)
        found = [at for stop in self.stops if (at := whole.find(stop, len(self.shown))) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(whole) - (0 if ended else self._held(whole))
        new = whole[len(self.shown) : end]
        self.shown += new
        return new

    def _whole(self):
        """All text so far. Only ids after `context` are decoded; those up to `end` have made whole characters."""
        before = decode(self.tokenizer, self.ids[self.context : self.end])
        whole = self.settled + decode(self.tokenizer, self.ids[self.context :])[len(before) :]
        if self.ids and not self._in_a_character():
            self.settled, self.context, self.end = whole, self.end, len(self.ids)
        return whole

    def _in_a_character(self):
        last = self.ids[-4:]
        if BYTE.fullmatch(self.tokenizer.convert_ids_to_tokens(last[-1]) or ""):
            return True
        return self.tokenizer.decode(last).endswith("\ufffd")

    def _held(self, whole):
        """Characters at the end that may be the start of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        ends = (whole[-length:] for length in range(min(longest, len(whole)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self.stops)), 0)
