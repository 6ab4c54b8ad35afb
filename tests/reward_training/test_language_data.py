"""Pairs and ratings as tokens: what is too long, what batches look like, and that nothing is lost."""

import numpy as np
import pytest

from tests.scorers.tiny_language import save_causal
from tiltflow.data.preferences import Preference
from tiltflow.data.ratings import Rating
from tiltflow.data.records import LeftOut
from tiltflow.errors import DataError
from tiltflow.reward_training.batches import Batches
from tiltflow.reward_training.language_data import PairExamples, RatingExamples, Tokenizing
from tiltflow.scorers import LanguageRewardModel

SHORT = Preference("w1 w2", "w3", "f, line 1", margin=2.0, label=0.5)
LONG = Preference("w1 " * 9, "w2", "f, line 2")
SAME_START = Preference("w1 " * 9, "w1 " * 8, "f, line 3")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageRewardModel:
    return LanguageRewardModel.from_pretrained(save_causal(tmp_path_factory.mktemp("model")))


def tokenizing(model, *, over_length="filter", on_bad="skip", max_length=6) -> tuple[Tokenizing, LeftOut]:
    left_out = LeftOut(on_bad)
    return Tokenizing(model, max_length=max_length, over_length=over_length, left_out=left_out), left_out


def test_too_long_pairs_are_left_out_and_counted(model):
    how, left_out = tokenizing(model)
    examples = PairExamples([SHORT, LONG, SAME_START], how, pad=0)
    assert len(examples) == 1 and examples.lengths == [6]  # two texts
    assert how.notes == {"longer than 6 tokens, left out": 2} and not left_out.counts


def test_too_long_texts_keep_their_beginning_unless_it_is_all_they_differ_by(model):
    how, left_out = tokenizing(model, over_length="truncate")
    examples = PairExamples([SHORT, LONG, SAME_START], how, pad=0)
    assert examples.lengths == [6, 12]
    assert how.notes == {"longer than 6 tokens, truncated": 2}
    assert left_out.counts == {"identical chosen and rejected": 1}
    batch = examples.batch([1], [1.0])
    assert batch["chosen"].tolist() == [model.encode("w1 " * 9)[:6]]


def test_a_text_that_is_cut_still_ends(tmp_path):
    model = LanguageRewardModel.from_pretrained(save_causal(tmp_path / "model"), append_eos=True)
    how, _ = tokenizing(model, over_length="truncate", max_length=4)
    examples = PairExamples([Preference("w1 w2 w3 w4", "w1", "f, line 1")], how, pad=0)
    batch = examples.batch([0], [1.0])
    assert batch["chosen"].tolist() == [[*model.encode("w1 w2")[:3], 1]]
    assert batch["rejected"].tolist() == [model.encode("w1")]


def test_pairs_count_both_texts_against_the_tokens_of_a_micro_batch(model):
    how, _ = tokenizing(model, max_length=99)
    examples = PairExamples([Preference("w1 " * 24, "w2", f"f, line {n}") for n in range(8)], how, pad=0)
    for parts in Batches(examples.lengths, batch_size=8, max_tokens=100).epoch():
        assert [len(part.places) for part in parts.micro_batches] == [2] * 4
        rows = [examples.batch(part.places, part.weights) for part in parts.micro_batches]
        assert all(2 * row["chosen"].numel() <= 100 for row in rows)


def test_half_a_character_is_a_bad_record(model):
    broken = Preference("w1 \ud83d", "w2", "f, line 1")
    how, left_out = tokenizing(model)
    assert len(PairExamples([broken, SHORT], how, pad=0)) == 1
    assert left_out.counts == {"cannot be encoded": 1}
    how, _ = tokenizing(model, on_bad="error")
    with pytest.raises(DataError, match=r"f, line 1: cannot be encoded: the text .* is no Unicode text"):
        PairExamples([broken], how, pad=0)


def test_too_long_pair_can_be_an_error_with_its_line(model):
    how, _ = tokenizing(model, over_length="error")
    with pytest.raises(DataError, match="f, line 2: 10 tokens are more than max_length=6; raise it, or"):
        PairExamples([SHORT, LONG], how, pad=0)
    how, _ = tokenizing(model, over_length="truncate", on_bad="error")
    with pytest.raises(DataError, match="f, line 3: identical chosen and rejected: after both were truncated"):
        PairExamples([SAME_START], how, pad=0)


def test_batch_of_pairs(model):
    how, _ = tokenizing(model, max_length=99)
    examples = PairExamples([SHORT, LONG, SAME_START], how, pad=7)
    batch = examples.batch([2, 0, 1], [1.0, 1.0, 0.0])
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "chosen": (3, 10),
        "rejected": (3, 9),
        **dict.fromkeys(("chosen_length", "rejected_length", "label", "margin", "weight"), (3,)),
    }
    assert batch["chosen_length"].tolist() == [10, 3, 1]  # the row that only fills the batch is not worth computing on
    assert batch["rejected_length"].tolist() == [9, 2, 1]
    assert batch["chosen"][1].tolist() == [*model.encode("w1 w2"), *[7] * 7]
    assert batch["label"].tolist() == [1.0, 0.5, 1.0]
    assert batch["margin"].tolist() == [0.0, 2.0, 0.0]
    assert batch["weight"].tolist() == [1.0, 1.0, 0.0]


def test_batch_of_ratings(model):
    how, left_out = tokenizing(model)
    ratings = [Rating("w1 w2", (1.0, -100.0), "f, line 1"), Rating("w1 " * 9, (1.0, 2.0), "f, line 2")]
    examples = RatingExamples([*ratings, Rating("w3", (0.0, 4.0), "f, line 3")], how, pad=7)
    assert examples.lengths == [3, 2] and how.notes == {"longer than 6 tokens, left out": 1}
    batch = examples.batch([1, 0], [1.0, 1.0])
    assert batch["inputs"].tolist() == [[*model.encode("w3"), 7], model.encode("w1 w2")]
    assert batch["lengths"].tolist() == [2, 3]
    assert batch["labels"].tolist() == [[0.0, 4.0], [1.0, -100.0]]
    assert not left_out.counts


@pytest.mark.parametrize(("over_length", "max_length"), [("filter", 6), ("truncate", 3)])
def test_nothing_is_lost(model, over_length, max_length):
    generator = np.random.default_rng(0)

    def text() -> str:
        return " ".join(f"w{n}" for n in generator.integers(0, 3, generator.integers(1, 12)))

    preferences = [Preference(text(), text(), f"f, line {n}") for n in range(200)]
    how, left_out = tokenizing(model, over_length=over_length, max_length=max_length)
    examples = PairExamples(preferences, how, pad=0)
    dropped = sum(left_out.counts.values()) + how.notes[f"longer than {max_length} tokens, left out"]
    assert len(examples) + dropped == 200
    assert 0 < dropped < 200
