"""What torchrun, accelerate or deepspeed tells each process it starts, and how the processes share one console."""

import logging
import os
import time
import warnings

GRACE = 10  # seconds the others wait with an error: the first process's is the same, as a rule, and ends them
SHORT = 2  # the same where it is known to be


def world_size():
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank():
    """Number of this process among them; the first, 0, speaks and writes."""
    return int(os.environ.get("RANK", "0"))


def let_first_speak(seconds=GRACE):
    """Wait in all processes but the first: once that has said what is wrong, the launcher ends the others."""
    if rank():
        time.sleep(seconds)


def hush():
    """Print nothing from now on but errors. Has to come before libraries are imported."""
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is written in C++ too
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
