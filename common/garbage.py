"""When Python looks for garbage in cycles: not while a script imports its libraries, whose objects all stay.

They are a million objects that refer to each other, and each look at all of them takes a tenth of a second or more.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

USUAL = gc.get_threshold()
RARE = 10_000_000  # new objects until Python looks: more than are made by imports


def look_rarely() -> None:
    """Do not look for garbage before `look_as_usual`."""
    gc.set_threshold(RARE)


def look_as_usual() -> None:
    """After `look_rarely`: look again, but never again at what is there by now. Otherwise nothing."""
    if gc.get_threshold()[0] == RARE:
        gc.freeze()
        gc.set_threshold(*USUAL)


@contextmanager
def not_looked_for() -> Iterator[None]:
    """Within it Python does not look: around what makes many objects, and no cycle among them."""
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looks:
            gc.enable()
