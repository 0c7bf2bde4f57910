"""kopf's storages, as ones that keep nothing.

kopf copies every object of every event for them, handlers of changes or not; that took half of the operator's time. Nothing
of kopf's is stored with objects here, since no handler of changes exists.
"""

from typing import Any

import kopf


class NoDiffBase(kopf.DiffBaseStorage):  # type: ignore[misc]
    """Sees no difference between any two objects."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        """Keeps nothing."""


class NoProgress(kopf.ProgressStorage):  # type: ignore[misc]
    """Knows of no handler's progress."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        """Keeps nothing."""

    def purge(self, **_: Any) -> None:
        """There is nothing to remove."""

    def touch(self, **_: Any) -> None:
        """Never writes: a touched object would be a write of kopf's."""

    def clear(self, *, essence: Any) -> Any:
        return essence
