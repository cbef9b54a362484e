"""The sections are measured at toy sizes, where looking for garbage would take longer than all the rest."""

from collections.abc import Iterator

import pytest

from helix.gpu.clock import known_objects_aside


@pytest.fixture(autouse=True)
def little_garbage() -> Iterator[None]:
    with known_objects_aside():
        yield
