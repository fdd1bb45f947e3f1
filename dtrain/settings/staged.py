"""Staged settings: a size that changes at given epochs of a run, written `64` or `64,640@200`.

The first value holds from the start of the run; each `value@epoch` after it holds from the beginning of that epoch,
where epochs are counted from 0. So `64,640@200` is 64 for 200 epochs and 640 from then on.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass

from dtrain.settings.values import Unfit

_FIRST, _CHANGE = re.compile(r"\d{1,9}", re.ASCII), re.compile(r"(\d{1,9})\s*@\s*(\d{1,9})", re.ASCII)
_GIVE = "give a whole number such as 64, or one that changes at epochs such as 64,640@200"


@dataclass(frozen=True)
class Staged:
    """A whole number greater than 0 for every epoch of a run.

    changes: (epoch, value) pairs in ascending order of their epochs, the first of them at epoch 0. Neighbours differ in
    value, so two settings that mean the same are equal and have the same text. Make one with `parse`.
    """

    changes: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, given: object) -> Staged:
        """From a whole number, the text of a flag or of a TOML file, or another Staged.

        Raises Unfit, which says what to give; naming the setting is left to the caller.
        """
        if isinstance(given, Staged):
            return given
        if isinstance(given, float) and given.is_integer():
            given = int(given)
        if not isinstance(given, int | str) or isinstance(given, bool):
            raise Unfit(_GIVE)
        changes: list[tuple[int, int]] = []
        for part in str(given).split(","):
            epoch, number = _parsed(part.strip(), first=not changes)
            if number < 1:
                raise Unfit("give whole numbers greater than 0")
            if changes and epoch <= changes[-1][0]:
                raise Unfit(f"epoch {epoch} does not come after epoch {changes[-1][0]}; give ascending epochs")
            changes.append((epoch, number))
        kept = [change for at, change in enumerate(changes) if at == 0 or change[1] != changes[at - 1][1]]
        return cls(tuple(kept))

    def at(self, epoch: int) -> int:
        """The value in `epoch`, which is 0 or greater."""
        return self.changes[bisect.bisect_right(self.changes, epoch, key=lambda change: change[0]) - 1][1]

    @property
    def values(self) -> tuple[int, ...]:
        """The values in the order in which they come."""
        return tuple(value for _, value in self.changes)

    @property
    def largest(self) -> int:
        """The largest of the values."""
        return max(self.values)

    @property
    def last(self) -> int:
        """The value from the last change on."""
        return self.changes[-1][1]

    @property
    def plain(self) -> int | str:
        """What JSON and TOML hold: a number if it never changes, else the text."""
        return self.last if len(self.changes) == 1 else str(self)

    def __str__(self) -> str:
        """The shortest text that means this; `parse` reads it back."""
        (_, first), *later = self.changes
        return ",".join([str(first), *(f"{value}@{epoch}" for epoch, value in later)])


def _parsed(part: str, *, first: bool) -> tuple[int, int]:
    """The (epoch, value) that one part of the text means."""
    if first and _FIRST.fullmatch(part):
        return 0, int(part)
    match = _CHANGE.fullmatch(part)
    if match is None:
        if not first and _FIRST.fullmatch(part):
            raise Unfit(f"{part} does not say from which epoch; give value@epoch, such as {part}@200")
        raise Unfit(_GIVE)
    if first:
        raise Unfit(f"the first value counts from the start; give it without an epoch, such as {match[1]}")
    return int(match[2]), int(match[1])
