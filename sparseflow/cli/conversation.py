"""A conversation with a model: its text so far, with keys and values, so that only new tokens are computed."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sparseflow.cli.running import Run, Show, continue_ids, ends_of_text
from sparseflow.errors import BadRequest, PromptTooLong
from sparseflow.models.kv_prefix import KVPrefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversation:
    """Turns of a person and of a model, by the tokenizer's chat template; without one, a text that both go on with."""

    def __init__(self, model: Any, tokenizer: "PreTrainedTokenizerBase", system: str | None = None) -> None:
        """
        Args:
            system: what the model is told before the first turn.

        Raises:
            BadRequest: `system` without a template.
        """
        self._model, self._tokenizer = model, tokenizer
        self.has_template = bool(tokenizer.chat_template)
        if system is not None and not self.has_template:
            raise BadRequest(
                "--system: the model's tokenizer has no chat template, so that there is no place for it; "
                "leave it out, and say it in the first line"
            )
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.n_positions: int = model.config.max_position_embeddings
        self._kept = KVPrefix(model.config)
        self.reset()

    def reset(self) -> None:
        """Begin a new one."""
        self._messages: list[dict[str, str]] = [*self._system]
        self._ids: list[int] = []
        self._text = ""
        """Of `_ids`, with a template."""
        self._kept.forget()

    @property
    def n_tokens(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._ids)

    def answer(
        self,
        line: str,
        *,
        max_new_tokens: int,
        show: Show,
        stops: Sequence[str] = (),
        is_interrupted: Callable[[], bool] = lambda: False,
        quiet: bool = True,
        **sampling: Any,
    ) -> Run:
        """What the model says to a line. It stays in the conversation, cut short or not.

        Args:
            show, stops, is_interrupted, quiet: as of `running.continue_ids`.
            sampling: passed to `model.generate`.

        Raises:
            PromptTooLong: no position is left for an answer; the conversation stays as it was.
            BadRequest: the chat template refuses.
        """
        ids, text = self._with_template(line) if self.has_template else (self._continued(line), "")
        room = self.n_positions - len(ids)
        if room < 1:
            raise PromptTooLong(
                f"with this line the conversation has {len(ids)} tokens, the model has {self.n_positions} positions; "
                "say less, or begin a new one with /reset"
            )
        n_known = self._kept.keep(ids)
        try:
            run = continue_ids(
                self._model,
                self._tokenizer,
                ids,
                show=show,
                stops=stops,
                is_interrupted=is_interrupted,
                quiet=quiet,
                past_key_values=self._kept.cache,
                max_new_tokens=min(max_new_tokens, room),
                **sampling,
            )
        except BaseException:
            self._kept.forget()  # layers may hold different numbers of tokens
            raise
        self._kept.note(ids + run.token_ids)
        self._note(line, ids, text, run)
        run.prompt_tokens = len(ids) - n_known
        return run

    def _continued(self, line: str) -> list[int]:
        """Without a template: the line stands in a line of its own behind what was said."""
        if self._ids:
            return self._ids + self._tokenizer("\n" + line, add_special_tokens=False).input_ids
        ids: list[int] = self._tokenizer(line).input_ids
        return ids

    def _with_template(self, line: str) -> tuple[list[int], str]:
        """The tokens so far and those of what comes, as the template writes it; and the text of all."""
        from jinja2 import TemplateError

        messages = [*self._messages, {"role": "user", "content": line}]
        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise BadRequest(f"the tokenizer's chat template refuses: {error}; /reset begins a new one") from error
        if self._ids and text.startswith(self._text):  # an answer's tokens stay as the model made them
            new = text[len(self._text) :]
            return self._ids + self._tokenizer(new, add_special_tokens=False).input_ids, text
        return self._tokenizer(text, add_special_tokens=False).input_ids, text

    def _note(self, line: str, ids: list[int], text: str, run: Run) -> None:
        said = run.token_ids
        if self.has_template:
            self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": run.text}]
            self._text = text + self._tokenizer.decode(said, skip_special_tokens=False)
        elif said and said[-1] in ends_of_text(self._model):
            said = said[:-1]  # the text goes on
        self._ids = ids + said
