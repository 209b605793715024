"""A row's text, piece by piece as its tokens come."""

from collections.abc import Callable, Sequence

from moe_jax.generation.stopping import StopStrings

# A character of UTF-8 has at most four bytes: three of them may be waiting for the last, and
# tokenizers show them as one or as three of these.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_INCOMPLETE = 3
_IN_HAND = 16


class IncrementalDecoder:
    """Turns one row's tokens into text that, joined, is what decoding them all at once gives.

    Characters that several tokens make up are held back until they are complete. Only the last few
    tokens are decoded each time: those behind `_start` give the context that some tokenizers need
    for their spaces, those from `_next` on are new.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._tokens: list[int] = []
        self._start = self._next = 0
        self._shown = 0  # characters of the new tokens' text that have been returned

    def push(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self._tokens.append(token)
        text = self._new_text()
        incomplete = len(text) - len(text.rstrip(_REPLACEMENT))
        ready = len(text) - min(incomplete, _LONGEST_INCOMPLETE)
        piece = text[self._shown : ready]
        if incomplete:
            self._shown = max(self._shown, ready)
            self._forget(text)
        elif text:
            self._start, self._next, self._shown = self._next, len(self._tokens), 0
        return piece

    def flush(self) -> str:
        """What is still held back; characters that never became complete are replaced."""
        piece = self._new_text()[self._shown :]
        if piece:  # else the tokens in hand stay, as the next ones may need them for their spaces
            self._start = self._next = len(self._tokens)
            self._shown = 0
        return piece

    def _new_text(self) -> str:
        return self._after(self._start, self._next, len(self._tokens))

    def _after(self, start: int, next_: int, end: int) -> str:
        """The text of tokens next_ to end, which those from start on come before."""
        before = self._decode(self._tokens[start:next_])
        return self._decode(self._tokens[start:end])[len(before) :]

    def _forget(self, text: str) -> None:
        """Keeps few tokens in hand where nothing becomes complete: bytes that are no UTF-8."""
        cut = len(self._tokens) - _IN_HAND
        if cut - self._next < _IN_HAND:
            return
        settled = self._after(self._start, self._next, cut)
        rest = self._after(self._next, cut, len(self._tokens))
        if settled + rest == text and len(settled) <= self._shown:  # no character lies across
            self._start, self._next = self._next, cut
            self._shown -= len(settled)


class RowText:
    """One row's decoder and stop strings together; without a tokenizer the text is empty.

    Special tokens are not shown, but stop strings match their text, where the tokenizer has
    special_text(id) -> str | None. A special token ends a character that is incomplete before it.
    """

    def __init__(self, tokenizer, stop_strings: Sequence[str]):
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer.decode)
        self._stops = StopStrings(stop_strings)
        self._special_text = getattr(tokenizer, "special_text", None) if stop_strings else None

    def push(self, token: int) -> tuple[str, bool]:
        """The text that may now be shown, and whether a stop string is complete."""
        if self._decoder is None:
            return "", False
        text = self._decoder.push(token)
        special = self._special_text(token) if self._special_text else None
        if special is None:
            return self._stops.push(text)
        before, stopped = self._stops.push(text + self._decoder.flush())
        if stopped:
            return before, True
        shown, stopped = self._stops.push(special, hidden=True)
        return before + shown, stopped

    def flush(self) -> str:
        """The rest, for the end of a row that no stop string has ended."""
        if self._decoder is None:
            return ""
        shown, stopped = self._stops.push(self._decoder.flush())
        return shown if stopped else shown + self._stops.flush()
