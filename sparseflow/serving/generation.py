"""One job in a worker: the prompt's tokens, their probabilities where they are asked for, and its choices."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from torch import Tensor

from sparseflow.errors import BadRequest, PromptTooLong
from sparseflow.models.kv_prefix import KVPrefix
from sparseflow.serving.messages import Alive, Begun, Cancelled, Finished, Job, Message, Piece, ScoredToken
from sparseflow.serving.sampling import Sampler
from sparseflow.serving.text_stream import Shown, TextStream
from sparseflow.serving.token_names import TokenNames

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 512  # positions of a prompt that are computed at once; between two it can be cancelled
_SCORED_AT_ONCE = 64  # positions whose probabilities are made at once, in float32


class Generator:
    """Runs jobs on one model, one after the other.

    Keys and values of the last job stay, so that a prompt that begins as the last text did is not computed anew.
    """

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
        """
        Args:
            model: any causal language model of transformers.
            tokenizer: one with a `backend_tokenizer`.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer)
        eos = model.generation_config.eos_token_id
        self._eos_ids: list[int] = [eos] if isinstance(eos, int) else list(eos or [])
        self._kept = KVPrefix(model.config)

    @torch.inference_mode()
    def run(self, job: Job, tell: Callable[[Message], None], is_cancelled: Callable[[], bool]) -> None:
        """Tell of all that the job makes, but for its last message.

        Raises:
            Cancelled: `is_cancelled` said so between two steps. BadRequest, PromptTooLong: the job cannot be done.
            SparseFlowError: the weights could not be had.
        """

        def require_wanted() -> None:
            if is_cancelled():
                raise Cancelled

        ids = self._prompt_ids(job)
        max_tokens = self._require_room(job, len(ids))
        scores_prompt = job.echo and job.logprobs is not None
        if scores_prompt:
            self._kept.forget()
        n_cached = self._kept.keep(ids)
        tell(Begun(job.id, len(ids), n_cached))
        try:
            prompt_scores = self._read_prompt(job, ids, tell, require_wanted, scores_prompt)
            stream = self._echo(job, ids, prompt_scores, tell)
            self._continue(job, ids, max_tokens, stream, tell, require_wanted)
        except BaseException:
            self._kept.forget()  # a step may have been left half done
            raise

    # --- the prompt

    def _prompt_ids(self, job: Job) -> list[int]:
        ids: list[int] | None
        if job.messages is not None:
            ids = self._templated(job.messages)
        elif isinstance(job.prompt, str):
            encoded = self._tokenizer(job.prompt, add_special_tokens=job.add_special_tokens, verbose=False)
            ids = encoded.input_ids
        else:
            ids = job.prompt
        vocab_size = self._model.config.vocab_size
        if not ids:
            raise BadRequest("the prompt has no tokens; give at least one character or token id")
        if not all(0 <= token_id < vocab_size for token_id in ids):
            wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
            raise BadRequest(f"prompt: token id {wrong} is none of this model; give ids from 0 to {vocab_size - 1}")
        wrong_biases = [token_id for token_id in job.logit_bias if not 0 <= token_id < vocab_size]
        if wrong_biases:
            raise BadRequest(f"logit_bias: {wrong_biases[0]} is no token; give ids from 0 to {vocab_size - 1}")
        return list(ids)

    def _templated(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except (jinja2.TemplateError, TypeError, ValueError) as error:  # what templates raise of themselves, and others
            raise BadRequest(f"messages: the chat template refuses them ({error})") from error
        return list(ids)

    def _require_room(self, job: Job, n_prompt: int) -> int:
        """How many tokens may be made."""
        n_positions = self._model.config.max_position_embeddings
        left = n_positions - n_prompt
        if left < (0 if job.max_tokens == 0 else 1) or (job.max_tokens or 0) > left:
            asked = "" if job.max_tokens is None else f" and max_tokens={job.max_tokens}"
            raise PromptTooLong(
                f"a prompt of {n_prompt} tokens{asked}, the model has {n_positions} positions; "
                "shorten the prompt or lower max_tokens"
            )
        return left if job.max_tokens is None else job.max_tokens

    def _read_prompt(
        self,
        job: Job,
        ids: Sequence[int],
        tell: Callable[[Message], None],
        require_wanted: Callable[[], None],
        scores_prompt: bool,
    ) -> list[ScoredToken]:
        """Compute the prompt but for its last token; the scores of its tokens where they are asked for."""
        scored = [self._scored(ids[0], None, job)] if scores_prompt else []
        while (n_done := len(self._kept.ids)) < len(ids) - 1:
            require_wanted()
            chunk = ids[n_done : min(n_done + _CHUNK, len(ids) - 1)]
            logits = self._step(chunk, all_logits=scores_prompt)
            tell(Alive(job.id))
            for begin in range(0, len(chunk) if scores_prompt else 0, _SCORED_AT_ONCE):
                some = logits[begin : begin + _SCORED_AT_ONCE].float().log_softmax(-1)
                following = ids[n_done + begin + 1 :]
                scored += [self._scored(token_id, row, job) for token_id, row in zip(following, some, strict=False)]
        return scored

    def _echo(
        self, job: Job, ids: Sequence[int], scores: Sequence[ScoredToken], tell: Callable[[Message], None]
    ) -> TextStream:
        """Tell the prompt where it is asked for; the stream of what comes after it."""
        if not job.echo:
            return TextStream(self._tokenizer, ids, job.stop)
        prompt = TextStream(self._tokenizer, [], [])
        shown = [prompt.push(token_id, scores[n] if scores else None) for n, token_id in enumerate(ids)]
        shown.append(prompt.finish())
        text = "".join(part.text for part in shown)
        tell(Piece(job.id, text, [token for part in shown for token in part.tokens], is_prompt=True))
        return TextStream(self._tokenizer, ids, job.stop, offset=len(text))

    # --- what is made

    def _continue(
        self,
        job: Job,
        ids: Sequence[int],
        max_tokens: int,
        stream: TextStream,
        tell: Callable[[Message], None],
        require_wanted: Callable[[], None],
    ) -> None:
        sampler = Sampler(job, ids, self._eos_ids)
        last, n_made, reason = ids[-1], 0, "length"
        while n_made < max_tokens:
            require_wanted()
            logits = self._step([last])[0].float().cpu()
            last = sampler.choose(logits)
            n_made += 1
            token = None if job.logprobs is None else self._scored(last, logits.log_softmax(-1), job)
            self._tell_shown(job, stream.push(last, token), tell)
            if last in self._eos_ids or stream.is_stopped:
                reason = "stop"
                break
        self._tell_shown(job, stream.finish(), tell)
        tell(Finished(job.id, reason, n_made))

    def _tell_shown(self, job: Job, shown: Shown, tell: Callable[[Message], None]) -> None:
        is_something = shown.text or shown.tokens
        tell(Piece(job.id, shown.text, shown.tokens) if is_something else Alive(job.id))

    def _scored(self, token_id: int, logprobs: Tensor | None, job: Job) -> ScoredToken:
        """Args: logprobs: (vocab_size,) float32 of this position, None for the first of a prompt."""
        name = self._names.of(token_id)
        if logprobs is None:
            return ScoredToken(name, None, [], 0)
        values, found = logprobs.topk(min(job.logprobs or 0, len(logprobs)))
        top = [(self._names.of(other), value) for other, value in zip(found.tolist(), values.tolist(), strict=True)]
        return ScoredToken(name, float(logprobs[token_id]), top, 0)

    # --- the model and its cache

    def _step(self, ids: Sequence[int], all_logits: bool = False) -> Tensor:
        """Append these tokens; logits of all of them, or of the last, (n, vocab_size)."""
        given = torch.tensor([ids], device=self._model.device)
        n_logits = 0 if all_logits else 1  # 0: all
        output = self._model(given, past_key_values=self._kept.cache, use_cache=True, logits_to_keep=n_logits)
        self._kept.ids += ids
        logits: Tensor = output.logits[0]
        return logits
