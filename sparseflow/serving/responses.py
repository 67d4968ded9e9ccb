"""What clients get: OpenAI's objects, whole or as the events of a stream."""

import secrets
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import sparseflow
from sparseflow.serving.messages import Begun, Finished, Message, Piece, ScoredToken, TokenName


@dataclass
class Choice:
    """One text as far as it has come."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None


class Response(ABC):
    """Gathers the messages of a request's jobs, one a choice; a subclass knows the form of one way to ask."""

    prefix = ""
    object = ""
    chunk_object = ""

    def __init__(self, model: str, fidelity: str, n: int, n_prompts: int, tells_logprobs: bool) -> None:
        """
        Args:
            n: choices for each prompt. Choice c of prompt p has the index `p * n + c`, as its job has.
        """
        self._n = n
        self._tells_logprobs = tells_logprobs
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"sparseflow-{sparseflow.__version__}-{fidelity}",
        }
        self._choices = [Choice() for _ in range(n * n_prompts)]
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0

    def take(self, index: int, message: Message) -> dict[str, Any] | None:
        """Note a message of one choice's job; the event that a stream sends of it, if any."""
        match message:
            case Begun() if index % self._n == 0:
                self.prompt_tokens += message.prompt_tokens
                self.cached_tokens += message.cached_tokens
            case Piece():
                self._choices[index].text += message.text
                self._choices[index].tokens += message.tokens
                return self._chunk(self._piece(index, message))
            case Finished():
                self._choices[index].finish_reason = message.reason
                self.completion_tokens += message.completion_tokens
                return self._chunk(self._piece(index, None) | {"finish_reason": message.reason})
        return None

    def first_events(self) -> list[dict[str, Any]]:
        """Events that come before any text."""
        return []

    def usage_event(self) -> dict[str, Any]:
        """The last event of a stream that is to count tokens."""
        return self._head | {"object": self.chunk_object, "choices": [], "usage": self.usage()}

    def whole(self) -> dict[str, Any]:
        """The answer where it is not streamed."""
        choices = [
            {"index": index, "finish_reason": choice.finish_reason} | self._text(choice)
            for index, choice in enumerate(self._choices)
        ]
        return self._head | {"object": self.object, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens read and made."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._head | {"object": self.chunk_object, "choices": [choice]}

    @abstractmethod
    def _piece(self, index: int, piece: Piece | None) -> dict[str, Any]:
        """A choice of an event; None: the last event of a choice, without text."""

    @abstractmethod
    def _text(self, choice: Choice) -> dict[str, Any]:
        """The text of a choice, and its logprobs."""


class CompletionResponse(Response):
    """Of `/v1/completions`."""

    prefix = "cmpl"
    object = chunk_object = "text_completion"

    def _piece(self, index: int, piece: Piece | None) -> dict[str, Any]:
        text, tokens = ("", []) if piece is None else (piece.text, piece.tokens)
        return {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": None}

    def _text(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.text, "logprobs": self._logprobs(choice.tokens)}

    def _logprobs(self, tokens: list[ScoredToken]) -> dict[str, Any] | None:
        if not self._tells_logprobs:
            return None
        return {
            "tokens": [token.name.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top_of_completion(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _top_of_completion(token: ScoredToken) -> dict[str, float] | None:
    """The likeliest and the token itself, which need not be one of them."""
    if token.logprob is None:
        return None
    return {name.text: logprob for name, logprob in token.top} | {token.name.text: token.logprob}


class ChatResponse(Response):
    """Of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def first_events(self) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
            for index in range(len(self._choices))
        ]

    def _piece(self, index: int, piece: Piece | None) -> dict[str, Any]:
        delta = {} if piece is None else {"content": piece.text}
        logprobs = None if piece is None else self._logprobs(piece.tokens)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _text(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.tokens)}

    def _logprobs(self, tokens: list[ScoredToken]) -> dict[str, Any] | None:
        if not self._tells_logprobs:
            return None
        return {
            "content": [
                _named(token.name, token.logprob) | {"top_logprobs": [_named(*other) for other in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }


def _named(name: TokenName, logprob: float | None) -> dict[str, Any]:
    return {"token": name.text, "logprob": logprob, "bytes": list(name.raw)}
