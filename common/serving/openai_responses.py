"""OpenAI's answers: Parts to choices and chunks, and its error object."""

import time


class Shape:
    """What a client gets: JSON objects of one request, whole or in chunks. Texts of several answers side by side."""

    def __init__(self, wanted, name, model, batcher):
        self.wanted, self.batcher, self.started = wanted, batcher, set()
        prefix, kind = ("chatcmpl-", "chat.completion") if wanted.chat else ("cmpl-", "text_completion")
        self.head = {"id": prefix + name, "object": kind, "created": int(time.time()), "model": model}
        self.offsets = [0] * len(wanted.asks)

    def usage(self, tokens):
        """Token counts; a prompt with n answers counts once."""
        asked = sum(len(ask.ids) for ask in self.wanted.asks[:: self.wanted.n])
        return {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens}

    def whole(self, parts, tokens):
        """The answer to a request that is not streamed; parts: all of them."""
        choices = []
        for index in range(len(self.wanted.asks)):
            mine = [part for part in parts if part.index == index]
            text, entries = "".join(part.text for part in mine), [entry for part in mine for entry in part.entries]
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self.wanted.chat
                else {"text": text}
            )
            choices.append(self._choice(index, said, entries, mine[-1].stop))
        return self.head | {"choices": choices, "usage": self.usage(tokens)}

    def chunk(self, part):
        """The chunk of one Part; the first one of a chat's answer names the role."""
        said = {"text": part.text}
        if self.wanted.chat:
            role = {} if part.index in self.started else {"role": "assistant"}
            said = {"delta": role | ({"content": part.text} if part.text or role else {})}
            self.started.add(part.index)
        choice = self._choice(part.index, said, part.entries, part.stop)
        kind = "chat.completion.chunk" if self.wanted.chat else "text_completion"
        return self.head | {"object": kind, "choices": [choice]}

    def last_chunk(self, tokens):
        """The chunk that holds the token counts."""
        kind = "chat.completion.chunk" if self.wanted.chat else "text_completion"
        return self.head | {"object": kind, "choices": [], "usage": self.usage(tokens)}

    def _choice(self, index, said, entries, stop):
        wanted = self.wanted.asks[index].logprobs is not None
        logprobs = (self._chat_logprobs if self.wanted.chat else self._logprobs)(index, entries) if wanted else None
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": stop}

    def _chat_logprobs(self, index, entries):
        def one(id_, logprob):
            token, raw = self.batcher.encoder.token(id_)
            return {"token": token, "logprob": max(logprob, -9999.0), "bytes": raw}

        content = [one(e.id, e.logprob) | {"top_logprobs": [one(*other) for other in e.top]} for e in entries]
        return {"content": content, "refusal": None}

    def _logprobs(self, index, entries):
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token, _ = self.batcher.encoder.token(entry.id)
            found["tokens"].append(token)
            found["token_logprobs"].append(max(entry.logprob, -9999.0))
            found["top_logprobs"].append({self.batcher.encoder.token(id_)[0]: max(p, -9999.0) for id_, p in entry.top})
            found["text_offset"].append(self.offsets[index])
            self.offsets[index] += len(token)
        return found


def error(message, status, param=None, code=None):
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
