import pytest


@pytest.fixture(autouse=True)
def clean() -> None:
    """Replace the check of the tests beside this folder: the servers here are shared by the tests of a file."""
