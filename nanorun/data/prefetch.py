"""Work done one call ahead, on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class OneAhead(Generic[Key, Value]):
    """Calls a function of a key, having begun with the next key while the caller works on this one's value.

    Holds at most one value that nobody has taken. A key that was not announced is worked out when it is asked for,
    and what was announced instead is forgotten, an error of it too; an error of a key that is asked for is raised
    by `take`, as itself. The thread begins with the first key that is announced. `close` ends it, and so do the end
    of the process and of this object: it never outlives the work on one key.
    """

    def __init__(self, make: Callable[[Key], Value]) -> None:
        self._make = make
        self._thread: ThreadPoolExecutor | None = None
        self._coming: tuple[Key, Future[Value]] | None = None

    def take(self, key: Key, then: Key | None = None) -> Value:
        """Return the value of `key`, and begin with that of `then`, the key that will be asked for next."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] == key:
            value = coming[1].result()
        else:
            if coming is not None:
                coming[1].cancel()
            value = self._make(key)
        if then is not None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="nanorun-ahead")
            self._coming = then, self._thread.submit(self._make, then)
        return value

    def close(self) -> None:
        """Forget what was announced and end the thread; `take` works on without being announced to."""
        self._coming = None
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
