"""Words that a judge chooses among: how they are spelt, by which tokens, and how probable each is."""

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tiltflow.errors import JudgeError, UnparsableError
from tiltflow.rewards.judge import TOKEN_ID, ChatEndpoint, NotOfferedError
from tiltflow.rewards.loops import PerProcess

FIRST_WAIT: Final = 30.0  # seconds until a server that failed to tell its tokens is asked again; doubles each time
MOST_SPLIT: Final = 0.05  # of the words' probability: what first pieces of them may have
ROUNDING: Final = 0.05  # by which probabilities may exceed one together
NO_LETTER: Final = "\ue000"  # of a private area of Unicode: no tokenizer has learnt it

_log = logging.getLogger(__name__)


def spellings(word: str) -> tuple[str, ...]:
    """Return how a word may be spelt as an answer, in every case and with and without the space before it.

    Example: `("Yes", " Yes", "yes", " yes", "YES", " YES")`.
    """
    return tuple(space + each for each in (word.capitalize(), word.lower(), word.upper()) for space in ("", " "))


@dataclass
class _Known:
    """What one process knows of a judge's tokens."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    tokens: Mapping[str, tuple[int, ...]] | None = None
    over: bool = False  # the server cannot tell, and is not asked any more
    told: bool = False  # that has been logged
    again: float = 0.0  # of the monotonic clock: not asked before
    wait: float = FIRST_WAIT


class LabelTokens:
    """The tokens that spell a judge's possible answers, as its own server tells them; threads may share it."""

    def __init__(self, endpoint: ChatEndpoint, labels: Mapping[str, Sequence[str]]):
        """Prepare; nothing is asked yet.

        Args:
            endpoint: The judge.
            labels: Label -> its spellings.
        """
        self._endpoint = endpoint
        self._labels = {label: tuple(spelt) for label, spelt in labels.items()}
        self._known = PerProcess(_Known)

    def __reduce__(self) -> tuple[type["LabelTokens"], tuple[ChatEndpoint, Mapping[str, Sequence[str]]]]:
        return LabelTokens, (self._endpoint, self._labels)

    def find(self) -> Mapping[str, tuple[int, ...]] | None:
        """Return label -> its tokens, or None if they cannot be had, which is logged once.

        The server is asked once, by the first thread that wants to know. If it has no such route that is final; if it
        failed, it is asked again after 30 s, a minute, two, and so on.
        """
        known = self._known.get()
        with known.lock:
            if known.tokens is not None or known.over or time.monotonic() < known.again:
                return known.tokens
            try:
                known.tokens = self._ask()
            except NotOfferedError as error:
                known.over = True
                self._tell(known, error)
            except JudgeError as error:
                known.again = time.monotonic() + known.wait
                known.wait *= 2
                self._tell(known, error)
            return known.tokens

    def give_up(self, why: JudgeError) -> None:
        """Return no tokens any more: the server does not tell their probabilities."""
        known = self._known.get()
        with known.lock:
            known.tokens, known.over = None, True
            self._tell(known, why)

    def _ask(self) -> dict[str, tuple[int, ...]]:
        """Return label -> its spellings that are one token.

        A token that would spell two labels spells neither, nor does the one that stands for what a tokenizer does not
        know.
        """
        unknown = set(self._endpoint.tokens(NO_LETTER))
        found: dict[str, set[int]] = {}
        for label, spelt in self._labels.items():
            encoded = [self._endpoint.tokens(each) for each in spelt]
            found[label] = {tokens[0] for tokens in encoded if len(tokens) == 1}
        single = {
            label: tuple(sorted(own.difference(unknown, *(found[other] for other in found if other != label))))
            for label, own in found.items()
        }
        split = [label for label, own in single.items() if not own]
        if split:
            raise NotOfferedError(f"the tokenizer of the judge has no single token for {split[0]!r}")
        return single

    def _tell(self, known: _Known, why: JudgeError) -> None:
        if known.told:
            return
        known.told = True
        _log.info(
            "the probabilities of %s are read from the likeliest tokens, as these cannot be asked for directly: %s",
            ", ".join(self._labels),
            why,
        )


def token_masses(logprobs: Mapping[str, float], tokens: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return the probability of each label among all first tokens.

    Args:
        logprobs: Token, written by its id -> log-probability.
        tokens: Label -> ids of its tokens, all of which were asked for.

    Raises:
        NotOfferedError: The probability of a token was not told.
    """
    absent = [token for each in tokens.values() for token in each if f"{TOKEN_ID}{token}" not in logprobs]
    if absent:
        raise NotOfferedError(
            f"the judge did not tell the log-probability of token {absent[0]} but those of {list(logprobs)[:3]}; use a "
            "server that knows logprob_token_ids, or leave out yes_token_ids and no_token_ids"
        )
    return {label: sum(math.exp(logprobs[f"{TOKEN_ID}{token}"]) for token in ids) for label, ids in tokens.items()}


def word_masses(logprobs: Mapping[str, float], words: Sequence[str]) -> dict[str, float]:
    """Return the probability of each word among all first tokens; its spellings (" Good", "good") count together.

    A word that is not among the tokens given is less probable than all that are, and counts as zero (`check_absent`
    tells whether it may).

    Args:
        logprobs: Token -> log-probability.
        words: In lower case.
    """
    masses = dict.fromkeys(words, 0.0)
    for token, logprob in logprobs.items():
        word = token.strip(" \t\n▁Ġ").lower()  # the last two: how some servers spell a token's leading space
        if word in masses:
            masses[word] += math.exp(logprob)
    return masses


def check_absent(
    masses: Mapping[str, float],
    logprobs: Mapping[str, float],
    spelt: Mapping[str, Sequence[str]],
    *,
    max_uncertainty: float,
) -> None:
    """Check that words which are not among the likeliest tokens could not change the shares of those that are by much.

    A spelling that is not listed is at most as probable as the least probable token that is, and all that are not
    listed have together what the listed ones leave of 1. With b the least of both bounds for an absent word and m the
    probability of the words that are there, a share moves by at most b / (m + b).

    Args:
        masses: Word -> probability, zero for one that is not listed; not all of them are zero.
        logprobs: The likeliest tokens -> log-probability.
        spelt: Word -> its spellings.
        max_uncertainty: By how much a share may move.

    Raises:
        UnparsableError: It may move by more.
    """
    listed = [math.exp(logprob) for logprob in logprobs.values()]
    rest = max(0.0, 1.0 - sum(listed))
    for word, mass in masses.items():
        if mass > 0:
            continue
        bound = min(len(spelt[word]) * min(listed), rest)
        moves = bound / (sum(masses.values()) + bound)
        if moves > max_uncertainty:
            raise UnparsableError(
                f"the judge's {len(listed)} likeliest tokens do not have {word!r}, which may have probability up to "
                f"{bound:.2g}: that would move the shares of {', '.join(masses)} by {moves:.2g}, more than "
                f"max_uncertainty={max_uncertainty:g}; raise top_logprobs, use a server that tells label tokens, or "
                "put the question so that it is answered with one of these words"
            )


def shares(masses: Mapping[str, float], logprobs: Mapping[str, float], *, min_mass: float) -> list[float]:
    """Return the probability of each word among these words, from their probabilities among all.

    Args:
        masses: Word -> probability.
        logprobs: First tokens -> log-probability, for the message.
        min_mass: How probable the words must be together for the answer to be one of them.

    Raises:
        JudgeError: They are more probable than certain.
        UnparsableError: They are less probable than that: the judge is saying something else.
    """
    total = sum(masses.values())
    if total > 1 + ROUNDING:
        raise JudgeError(f"the judge's log-probabilities are none: {', '.join(masses)} have probability {total:.3g}")
    if total <= 0 or total < min_mass:
        likely = sorted(logprobs, key=lambda token: -logprobs[token])[:3]
        raise UnparsableError(
            f"the judge's first word is none of {', '.join(masses)}: together they have probability {total:.2g}, less "
            f"than {min_mass:g}; the likeliest are {likely}"
        )
    return [mass / total for mass in masses.values()]


def weigh_words(logprobs: Mapping[str, float], words: Sequence[str], *, min_mass: float) -> list[float]:
    """Return the probability of each word among these words, from the log-probabilities of first tokens.

    Raises:
        UnparsableError: As `shares`, or the judge's tokenizer splits a word that it may well be saying: how probable
            that word is cannot be read from its first piece.
    """
    masses = word_masses(logprobs, words)
    pieces = {word[:end]: word for word in words for end in range(2, len(word))}
    begun = word_masses(logprobs, list(pieces))
    said, unsaid = sum(masses.values()), sum(begun.values())
    if unsaid > MOST_SPLIT * said and said + unsaid >= min_mass:
        piece = max(begun, key=lambda piece: begun[piece])
        raise UnparsableError(
            f"the judge's first token is {piece!r} with probability {begun[piece]:.2g}, which only begins "
            f"{pieces[piece]!r}: its tokenizer splits that word; let the answer be continued (continue_answer), where "
            "the space before the word makes it another token, or use another model"
        )
    return shares(masses, logprobs, min_mass=min_mass)
