"""A beam search that takes turns with the batcher: transformers' generate in a thread, held after each step."""

import threading

import torch


class Beams(threading.Thread):
    """Generates the answer to `row` (one of the batcher's); `step` lets it go on for one step."""

    def __init__(self, net, row, config):
        super().__init__(daemon=True)
        self.net, self.row, self.config = net, row, config
        self.mine, self.theirs = threading.Semaphore(0), threading.Semaphore(0)
        self.ids, self.error, self.over = None, None, False
        self.start()

    def step(self):
        """Let it do one step; True when it is over, with `ids` or `error`."""
        self.mine.release()
        self.theirs.acquire()
        return self.over

    def run(self):
        """The thread; not to be called."""
        self.mine.acquire()
        try:
            ids = torch.tensor([self.row.ask.ids], device=self.net.device)
            with torch.inference_mode():
                output = self.net.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self.config,
                    stopping_criteria=[self._pause],
                )
            self.ids = output[0, ids.shape[1] :].tolist()
        except Exception as error:  # carried over to the batcher, which reports it
            self.error = error
        finally:
            self.over = True
            self.theirs.release()

    def _pause(self, input_ids, scores, **kwargs):
        """A stopping criterion: hands the model back, waits for the next turn, and ends where nobody listens."""
        self.theirs.release()
        self.mine.acquire()
        return torch.full((len(input_ids),), self.row.ticket.cancelled, device=input_ids.device)
