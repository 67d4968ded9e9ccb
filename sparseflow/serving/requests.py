"""What clients ask for, as OpenAI's API has it, and the jobs it comes down to.

A field that is not known here is refused: one that were ignored would change the text without a word. Those that cannot
change it are taken and mean nothing. Lists stop being looked at where the first thing in them is wrong.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, model_validator

from sparseflow.serving.messages import Job

PROMPTS_MAX = 256
CHOICES_MAX = 128
LOGPROBS_MAX = 20
MESSAGES_MAX = 4096
BIASES_MAX = 4096
STOPS_MAX = 16


def _valid_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"no valid Unicode at character {error.start} (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_valid_text)]
Int = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[Count], Field(min_length=1, fail_fast=True)]
StopText = Annotated[Text, Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
_OF_SEVERAL = {"min_length": 1, "max_length": PROMPTS_MAX, "fail_fast": True}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Taken, and without meaning here."""


class _TextRequest(_Strict):
    """What both ways to ask have in common."""

    model: Text | None = None
    n: int = Field(1, ge=1, le=CHOICES_MAX)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=STOPS_MAX, fail_fast=True)] | None = None
    seed: Int | None = None
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[Annotated[int, Field(ge=0, lt=2**31)], Bias] | None = None

    # What transformers and vLLM have beside OpenAI's fields.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    min_tokens: Count = 0
    ignore_eos: bool = False

    # The caller's own, or of OpenAI's service: no text depends on them.
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    prompt_cache_key: Text | None = None
    safety_identifier: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        """null is what is not given; a table of biases that is too large is told before each of them is looked at."""
        if not isinstance(fields, dict):
            return fields
        biases = fields.get("logit_bias")
        if isinstance(biases, dict) and len(biases) > BIASES_MAX:
            raise ValueError(f"logit_bias has {len(biases)} tokens; give at most {BIASES_MAX}")
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def tells_usage(self) -> bool:
        """Whether a stream's last event counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _common(self) -> dict[str, Any]:
        """Fields of a job."""
        names = (
            *("seed", "temperature", "top_p", "frequency_penalty", "presence_penalty"),
            *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"),
        )
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        own = {"stop": stop, "logit_bias": self.logit_bias or {}, "top_k": max(0, self.top_k)}
        return {name: getattr(self, name) for name in names} | own


class CompletionRequest(_TextRequest):
    """`POST /v1/completions`."""

    prompt: (
        Text | TokenIds | Annotated[list[Text], Field(**_OF_SEVERAL)] | Annotated[list[TokenIds], Field(**_OF_SEVERAL)]
    )
    max_tokens: Count = 16
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
        """A job for each choice of each prompt: choice c of prompt p is the job `p * n + c`."""
        prompts: list[Any] = [self.prompt]
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            prompts = list(self.prompt)
        own = {name: getattr(self, name) for name in ("max_tokens", "echo", "logprobs", "add_special_tokens")}
        common = own | self._common()
        return [Job(next(ids), index=n, prompt=prompt, **common) for prompt in prompts for n in range(self.n)]


class _TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One turn."""

    role: Text = Field(min_length=1)
    content: Text | Annotated[list[_TextPart], Field(fail_fast=True)] | None = None
    name: Text | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text} | ({"name": self.name} if self.name else {})


class _TextFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_TextRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MESSAGES_MAX, fail_fast=True)]
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=LOGPROBS_MAX)
    response_format: _TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] = []
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are one thing; give one of them")
        return self

    def jobs(self, ids: Iterator[int]) -> list[Job]:
        """A job for each choice."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        messages = [message.plain() for message in self.messages]
        own = {"messages": messages, "max_tokens": max_tokens, "logprobs": logprobs} | self._common()
        return [Job(next(ids), index=n, **own) for n in range(self.n)]
