"""What torchrun, accelerate or deepspeed tells each process it starts, and how the processes share one console."""

import logging
import os
import time
import warnings

GRACE = 10  # seconds another process waits with its error: the first one's is mostly the same, and ends all of them
SHORT = 2  # seconds it waits where the first one is known to have the same error


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them; the first, 0, speaks and writes."""
    return int(os.environ.get("RANK", "0"))


def let_first_speak(seconds: float = GRACE) -> None:
    """Wait in all processes except the first: once that has said what is wrong, the launcher ends the others."""
    if rank():
        time.sleep(seconds)


def hush() -> None:
    """Print nothing except errors from now on. Has to come before libraries are imported."""
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is written in C++ too
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
