"""Texts and conversations as tokens: the same ones in training, measuring and serving."""

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from tiltflow.errors import ConfigError, RewardError
from tiltflow.scorers.language_head import RewardHead

Message: TypeAlias = Mapping[str, Any]  # {"role": "user", "content": "..."}
Text: TypeAlias = str | Sequence[Message]  # as it is, or a conversation for the model's chat template
_SHORT: Final = reprlib.Repr()  # a value may be deeper than repr() can go
_SHORT.maxstring = _SHORT.maxother = 200


def check_length(asked: int | None, positions: int | None, *, option: str) -> None:
    """Check how many tokens a text may have.

    Args:
        asked: What the user wants, if anything.
        positions: That the network has; None where nothing limits it.
        option: What the user set, for the message of an error.

    Raises:
        ConfigError: More are asked for than the network has positions.
    """
    if asked is not None and positions is not None and asked > positions:
        raise ConfigError(f"{option}={asked}: the network reads at most {positions} tokens; set that, or less")


class TextEncoder:
    """Makes tokens of texts as a folder's tokenizer does, and of conversations by its chat template."""

    def __init__(self, tokenizer: Any, *, unread: int | None):
        """Take a tokenizer.

        Args:
            tokenizer: Of the model.
            unread: A token that the model does not see at the end of a text, because it looks like padding.
        """
        self._tokenizer = tokenizer
        self._unread = unread
        self._before, self._after = _special_tokens(tokenizer)

    def encode(self, text: Text, head: RewardHead) -> list[int]:
        """Return the tokens of a text; `LanguageRewardModel.encode` tells how.

        Raises:
            RewardError: As there.
        """
        rendered = text if isinstance(text, str) else self.render(text, head.chat_template_kwargs)
        try:
            rendered.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RewardError(
                f"the text {_short(text)} is no Unicode text: {error}; half a character is lost"
            ) from error
        special = isinstance(text, str) and not head.as_conversation
        ids = list(self._tokenizer(rendered, add_special_tokens=special)["input_ids"])
        if special:
            ids = self._each_once(ids)
        while ids and ids[-1] == self._unread:
            ids.pop()
        if not ids:
            raise RewardError(f"the text {_short(text)} has no tokens; there is nothing to score")
        return ids

    def shortened(self, ids: list[int], length: int) -> list[int]:
        """Return the beginning of a text; what the tokenizer ends texts with stays at its end."""
        if len(ids) <= length:
            return ids
        end = self._after if ids[-len(self._after) :] == self._after and len(self._after) < length else []
        return ids[: length - len(end)] + end

    def render(self, conversation: Sequence[Message], template_kwargs: Mapping[str, Any]) -> str:
        """Return a conversation as text.

        Raises:
            RewardError: There is no chat template, or it refuses the conversation.
        """
        if self._tokenizer.chat_template is None:
            raise RewardError(
                "the model's tokenizer has no chat template for conversations; give texts, or add one to its folder "
                "(chat_template.jinja)"
            )
        messages = [dict(message) for message in conversation]
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs)
        except Exception as error:  # a template is a program of the model's makers and may fail in any way
            raise RewardError(f"the chat template refuses {_short(messages)}: {error}") from error

    def reads_clock(self, conversations: Iterable[Sequence[Message]], template_kwargs: Mapping[str, Any]) -> bool:
        """Return whether the chat template writes today's date into the first conversation that it takes."""
        if "strftime_now" not in str(self._tokenizer.chat_template):
            return False
        for conversation in conversations:
            try:
                rendered = self.render(conversation, template_kwargs)
            except RewardError:
                continue  # it is told, or counted, where its tokens are asked for
            try:
                # A template cannot call what is no function: it fails if it asks for the time.
                return self.render(conversation, {**template_kwargs, "strftime_now": ""}) != rendered
            except RewardError:
                return True
        return False

    def _each_once(self, ids: list[int]) -> list[int]:
        """Leave out what the tokenizer put before and after a text that begins or ends so already."""
        first, last = len(self._before), len(self._after)
        if first and ids[first : 2 * first] == self._before:
            ids = ids[first:]
        if last and ids[-2 * last : -last] == self._after:
            ids = ids[:-last]
        return ids


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return what a tokenizer puts before a text, and after it."""
    whole = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    starts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    return (whole[: starts[0]], whole[starts[0] + len(bare) :]) if bare and starts else ([], [])


def _short(value: Any) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
