"""Stop strings: found in text that comes in pieces, and never shown in part.

Text that could be the beginning of a stop string is held back until it is clear that it is not.
Where pieces are cut makes no difference to what comes out. Hidden text, that of special tokens, is
searched like any other but never shown.
"""

from collections.abc import Collection, Sequence, Set


class StopStrings:
    """Watches one row's text."""

    def __init__(self, strings: Collection[str]):
        """Takes the strings to stop at; with none, all text passes.

        Raises:
          ValueError: one of them is empty.
          TypeError: `strings` is a string itself, or holds something else than strings.
        """
        several = isinstance(strings, (Sequence, Set)) and not isinstance(strings, str)
        if not several or not all(isinstance(item, str) for item in strings):
            raise TypeError(f"stop_strings is {strings!r}; expected a sequence of strings")
        if "" in strings:
            raise ValueError("stop_strings has an empty string; expected at least one character")
        self._strings = tuple(strings)
        self._held = ""
        self._hidden: list[bool] = []  # for each held character

    def push(self, text: str, *, hidden: bool = False) -> tuple[str, bool]:
        """Returns the text that is now safe to show, and whether a stop string is complete.

        Of several, the one that ends first counts, and of those that end together the longest. The
        text before it is returned; what follows it is dropped.

        Args:
          text: the next piece.
          hidden: whether the piece is only searched: it may complete a stop string, or be in one.
        """
        self._held += text
        self._hidden += [hidden] * len(text)
        ends = [
            (start + len(string), start)
            for string in self._strings
            if (start := self._held.find(string)) >= 0
        ]
        if ends:
            _, start = min(ends)
            shown = self._release(start)
            self._release(len(self._held))
            return shown, True
        return self._release(len(self._held) - self._start_of_a_stop_string()), False

    def flush(self) -> str:
        """What was held back; for the end of a row that stops for another reason."""
        return self._release(len(self._held))

    def _release(self, length: int) -> str:
        """Takes the first `length` held characters out; returns those that are not hidden."""
        released = zip(self._held[:length], self._hidden, strict=False)
        shown = "".join(character for character, hidden in released if not hidden)
        self._held, self._hidden = self._held[length:], self._hidden[length:]
        return shown

    def _start_of_a_stop_string(self) -> int:
        """Length of the longest end of the held text that is how a stop string begins."""
        longest = max((len(string) - 1 for string in self._strings), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(string.startswith(self._held[-length:]) for string in self._strings):
                return length
        return 0
