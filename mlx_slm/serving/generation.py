"""mlx-lm's generation loop, made to outlive what goes wrong in one request."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from queue import Queue

from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache

from mlx_slm.errors import SlmError
from mlx_slm.export.prompt import Prompts
from mlx_slm.report import Report
from mlx_slm.serving.provider import SETTINGS, Provider


class Unanswered(BaseException):
    """A request that cannot be answered, and why; mlx-lm's handler would call any Exception 404."""


class Stopped(Exception):
    """The server ends."""


@dataclass
class Request(server.CompletionRequest):
    """A request to mlx-lm; `notes` say what was changed about it, `stop` are strings that end the answer."""

    stop: list[str] = field(default_factory=list)
    says_tokens: bool = False
    """Whether the client said how many tokens it wants."""
    notes: list[str] = field(default_factory=list)
    piece: Callable[[int], bytes] = lambda _: b""
    """UTF-8 of a token, perhaps a part of a character."""


class PromptCache(LRUPromptCache):
    """Always leaves the last token of a prompt to be read: without one there is nothing to go on from."""

    def fetch_nearest_cache(self, model, tokens: list[int]):
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, [*rest, tokens[-1]]


def new_cache() -> PromptCache:
    return PromptCache(SETTINGS["prompt_cache_size"], SETTINGS["prompt_cache_bytes"])


class Waiting(Queue):
    """Requests for the loop; `answers` are the queues of those that were not answered to their end."""

    def __init__(self):
        super().__init__()
        self.answers: weakref.WeakSet[Queue] = weakref.WeakSet()
        self._adding = threading.Lock()

    def put(self, item, block=True, timeout=None):
        with self._adding:
            self.answers.add(item[0])
        super().put(item, block, timeout)

    def in_work(self) -> list[Queue]:
        with self.mutex:
            still = {id(item[0]) for item in self.queue}
        with self._adding:
            return [answer for answer in self.answers if id(answer) not in still]


class Generation(server.ResponseGenerator):
    """The thread that computes. What it fails at is said to the requests in work, and it starts again."""

    model_provider: Provider
    requests: Waiting

    def __init__(self, provider: Provider, report: Report):
        self.report = report
        self._contexts: weakref.WeakValueDictionary[int, server.GenerationContext] = weakref.WeakValueDictionary()
        self._adding = threading.Lock()
        super().__init__(provider, new_cache())
        self.requests = Waiting()

    def _run_generate(self) -> None:
        while not self._stop:
            try:
                self._generate()
            except Exception as error:  # one request must not end service for all
                for answer in self.requests.in_work():
                    answer.put(RuntimeError(f"the generation failed: {type(error).__name__}: {error}"))
                self.model_provider.reset()
                self.prompt_cache = new_cache()
                with contextlib.suppress(OSError):  # nobody reads
                    self.report.warn(f"the generation failed and starts again ({type(error).__name__}: {error})")

    def _tokenize(self, tokenizer, request, args):
        prompts = self.model_provider.prompts[args.model.model]
        chat, how = "".join(message["content"] for message in request.messages), ["normal", None]
        if request.request_type == "chat" and not prompts.plain_chat:
            prompts.require_short(chat)
            try:
                ids, _, _, *how = super()._tokenize(tokenizer, request, args)
            except Exception as error:
                raise SlmError(f"the chat template of {prompts.name} does not take it ({error})") from error
            prompts.require_known(ids)
        else:
            ids = prompts.encode(request.prompt or chat)
        ids, args.max_tokens, request.notes = prompts.fit(ids, args.max_tokens, request.says_tokens)
        self._limit(args, prompts)
        request.piece = prompts.piece
        return ids, [ids], ["assistant"], *how

    @staticmethod
    def _limit(args, prompts: Prompts) -> None:
        """Keep what is asked for within the model's tokens, and what it writes within the tokenizer's."""
        bias = args.logits.logit_bias or {}
        if outside := [token for token in bias if token >= prompts.num_tokens]:
            raise SlmError(f"logit_bias: there is no token {outside[0]}")
        unnamed = range(prompts.num_tokens, prompts.vocab_size)
        args.logits.logit_bias = (bias | dict.fromkeys(unnamed, float("-inf"))) or None
        if args.sampling.top_k >= prompts.num_tokens:
            args.sampling.top_k = 0
        args.top_logprobs = min(args.top_logprobs, prompts.num_tokens)

    def generate(self, request: server.CompletionRequest, generation_args, progress_callback=None):
        assert isinstance(request, Request)
        try:
            context, responses = super().generate(request, generation_args, progress_callback)
        except Exception as error:
            raise Unanswered(error) from error
        with self._adding:
            self._contexts[id(context)] = context
        return context, until(request.stop, context, responses)

    def close(self, seconds: float) -> bool:
        """Stop what is in work and end the thread; returns whether it ended within `seconds`."""
        self._stop = True
        with self._adding:
            contexts = list(self._contexts.values())
        for context in contexts:
            context.stop()
        for answer in self.requests.in_work():
            answer.put(Stopped("the server was stopped"))
        self._generation_thread.join(seconds)
        return not self._generation_thread.is_alive()


def until(stop: list[str], context, responses: Iterator) -> Iterator:
    """Responses up to the first of the stop strings, which is left out; what might begin one waits for the next token.

    mlx-lm looks for stop words token by token and misses those that begin or end inside of a token.
    """
    held = ""
    for response in responses:
        ended = response.finish_reason
        held += response.text
        cuts = [place for word in stop if (place := held.find(word)) >= 0]
        if cuts:
            context.stop()
            yield replace(response, text=held[: min(cuts)], finish_reason=None)
            return
        if ended == "stop" and held:
            yield replace(response, text=held, finish_reason=None)
            return
        keep = 0 if ended else _begun(held, stop)
        yield replace(response, text=held[: len(held) - keep])
        held = held[len(held) - keep :]


def _begun(text: str, stop: list[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    return max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
