"""What long work on a model tells of itself while it goes on, to whoever wants to show it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# watch(label, total), entered around the work, gives the function that counts: advance(n) after every n parameters.
Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def watch_silently(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Count nothing, and show nothing."""
    yield lambda n: None
