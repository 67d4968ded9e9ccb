"""What the front and a worker say to each other over their socket pair, as msgpack.

    front      Job      ->   worker     answered by Begun, Pieces, Finished, and then Done; or by Failed, at any
                                        moment; Alive comes where a step had nothing to tell
               Cancel   ->              the job ends early, with Done
    worker     Ready    ->   front      once, when the model is open

Both are of one version and one start: a field that is missing is a bug, not a peer's fault.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack

MESSAGE_NBYTES_MAX = 1 << 28


@dataclass(frozen=True, slots=True)
class Job:
    """One choice: a prompt to continue. Either `prompt` (text or token ids) or `messages` (a chat) is given."""

    id: int
    index: int = 0
    """Which of a prompt's choices it is: their tokens are drawn apart, by `seed + index`."""
    prompt: str | list[int] | None = None
    messages: list[dict[str, str]] | None = None
    add_special_tokens: bool = True
    max_tokens: int | None = None
    """None: as many as the model has positions for."""
    min_tokens: int = 0
    echo: bool = False
    logprobs: int | None = None
    """So many likeliest tokens are told beside each token; None: no probabilities at all."""
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this job any more."""

    id: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has opened the model."""

    pid: int
    model: str
    fidelity: str
    n_positions: int
    longest_token: int
    """Bytes of the longest text that one token stands for."""
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class Begun:
    """The prompt's tokens are known, and so many of them were in the cache of keys and values already."""

    id: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Alive:
    """A step was made, of which there is nothing to show: a part of a prompt, or text that is held back."""

    id: int


@dataclass(frozen=True, slots=True)
class TokenName:
    """How a token is shown: its text, and its bytes, which may be a part of a character."""

    text: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of the text with the logarithm of its probability under the model (before temperature and penalties)."""

    name: TokenName
    logprob: float | None
    """None for the first token of a prompt, which nothing comes before."""
    top: list[tuple[TokenName, float]]
    """The likeliest tokens, most likely first."""
    offset: int
    """Where its text begins in the text of this choice, in characters."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More text, with its tokens where the job asks for probabilities. is_prompt: it is the prompt's echo."""

    id: int
    text: str
    tokens: list[ScoredToken]
    is_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """The text is complete. reason: `stop` (the model or a stop string ended it) or `length`."""

    id: int
    reason: str
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Done:
    """The job's last message."""

    id: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The job's last message: an error, with its HTTP status, a name for programs and a text for people."""

    id: int
    status: int
    code: str
    text: str


class Cancelled(Exception):
    """Ends a job that a `Cancel` came for."""


Message = Job | Cancel | Ready | Begun | Alive | Piece | Finished | Done | Failed
_KINDS = {kind.__name__: kind for kind in (Job, Cancel, Ready, Begun, Alive, Piece, Finished, Done, Failed)}


def pack(message: Message) -> bytes:
    """One message as bytes."""
    packed: bytes = msgpack.packb([type(message).__name__, asdict(message)])
    return packed


def unpacker() -> Any:
    """Takes bytes by `feed` and gives, iterated over, what `unpack` takes."""
    return msgpack.Unpacker(strict_map_key=False, max_buffer_size=MESSAGE_NBYTES_MAX)


def unpack(packed: Any) -> Message:
    """The message that `pack` made."""
    kind, fields = packed
    if kind == "Piece":
        fields["tokens"] = [_scored_token(token) for token in fields["tokens"]]
    message: Message = _KINDS[kind](**fields)
    return message


def _scored_token(fields: dict[str, Any]) -> ScoredToken:
    top = [(TokenName(**name), logprob) for name, logprob in fields["top"]]
    return ScoredToken(TokenName(**fields["name"]), fields["logprob"], top, fields["offset"])
