"""What several test files share."""

import itertools
from collections.abc import Callable

import pytest

from stockyard import Provider, Translation


@pytest.fixture(scope="session")
def attempt() -> Callable[..., Translation]:
    """Makes the Translation of one attempt; ids count up from 0 in each."""

    def make(model: str, stream: bool = False, strict: bool = False) -> Translation:
        ids = itertools.count()
        provider = Provider(id="p", name="P", base_url="https://api.replicate.com/v1")
        return Translation(
            model=model,
            provider=provider,
            stream=stream,
            now_s=1_790_000_000,
            new_id=lambda prefix: f"{prefix}{next(ids)}",
            strict=strict,
        )

    return make
