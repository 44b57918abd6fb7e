"""The processes that torchrun started together: which one this is, and waiting for the others."""

import datetime
from typing import NamedTuple

from common.config import world_size


class Processes(NamedTuple):
    """This process's number among `count`; the first one, 0, prints and writes."""

    rank: int = 0
    count: int = 1

    def wait(self):
        """Return when every process has come here."""
        if self.count > 1:
            import torch

            torch.distributed.barrier()


def start():
    """The Processes torchrun started, each with a device of its own; one alone where there is no torchrun."""
    if world_size() == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    patience = datetime.timedelta(days=1)  # a process waits until the slowest one has done its share
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=patience)
    return Processes(state.process_index, state.num_processes)
