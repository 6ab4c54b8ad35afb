from collections.abc import Iterator

import pytest

from tests.serving.helpers import nothing_left


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with nothing_left():
        yield
