"""The tokenizer of a CLIP made from nothing."""

from tiltflow.scorers.clip_tokenizer import build_tokenizer


def test_the_same_captions_make_the_same_tokenizer() -> None:
    """A run that goes on, and every process of it, learns its words anew; they must mean the same ones."""
    captions = ["a photo of two red circles", "a photo of a green star", "a photo of three blue squares and a moon"]
    first, *others = (build_tokenizer(captions, max_length=16).get_vocab() for _ in range(20))
    assert all(other == first for other in others)
