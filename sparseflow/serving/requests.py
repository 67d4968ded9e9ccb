"""What clients ask for, as OpenAI's API has it, and the jobs it comes down to.

A field that is not known here is refused: one that were ignored would change the text without a word.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictInt, model_validator

from sparseflow.serving.messages import Job

PROMPTS_MAX = 256
CHOICES_MAX = 128
LOGPROBS_MAX = 20

_TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1)]
_StopText = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class _TextRequest(BaseModel):
    """What both ways to ask have in common."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None
    n: int = Field(1, ge=1, le=CHOICES_MAX)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: _StopText | Annotated[list[_StopText], Field(max_length=16)] | None = None
    seed: StrictInt | None = None
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    """Of the caller's own; nothing depends on it."""

    # What transformers and vLLM have beside OpenAI's fields.
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False

    @property
    def tells_usage(self) -> bool:
        """Whether a stream's last event counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _common(self) -> dict[str, Any]:
        """Fields of a job."""
        names = (
            *("n", "seed", "temperature", "top_p", "frequency_penalty", "presence_penalty"),
            *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"),
        )
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        return {name: getattr(self, name) for name in names} | {"stop": stop, "logit_bias": self.logit_bias or {}}


class CompletionRequest(_TextRequest):
    """`POST /v1/completions`."""

    prompt: str | _TokenIds | Annotated[list[str] | list[_TokenIds], Field(min_length=1, max_length=PROMPTS_MAX)]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=LOGPROBS_MAX)
    add_special_tokens: bool = True
    best_of: int | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError(f"best_of={self.best_of}: choices are not ranked here; leave it out, or give n={self.n}")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 makes no text; give 1 or more, or echo=true")
        return self

    def jobs(self, ids: Iterator[int]) -> list[Job]:
        """A job for each prompt."""
        prompts: list[Any] = [self.prompt]
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            prompts = list(self.prompt)
        own = {name: getattr(self, name) for name in ("max_tokens", "echo", "logprobs", "add_special_tokens")}
        return [Job(next(ids), prompt=prompt, **own, **self._common()) for prompt in prompts]


class _TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")

    role: str = Field(min_length=1)
    content: str | list[_TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class _TextFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class ChatRequest(_TextRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=LOGPROBS_MAX)
    response_format: _TextFormat | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are one thing; give one of them")
        return self

    def jobs(self, ids: Iterator[int]) -> list[Job]:
        """The one job."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        messages = [message.plain() for message in self.messages]
        return [Job(next(ids), messages=messages, max_tokens=max_tokens, logprobs=logprobs, **self._common())]
