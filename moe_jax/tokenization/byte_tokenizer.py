"""A tokenizer without files: for models that have no text of their own, random ones above all."""

import numbers
import operator
from collections.abc import Sequence


def utf8(text: str) -> bytes:
    """The bytes of a text.

    Raises:
      TypeError: text is no string.
      ValueError: it has half of a surrogate pair, as a shell's arguments in other encodings do.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is {text!r}; expected a string")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text[{error.start}] is {text[error.start]!r}; expected UTF-8") from None


class ByteTokenizer:
    """Each byte of UTF-8 is a token, 0 to 255; no other id has a text."""

    vocab_size = 256
    eos_id = None

    def __init__(self, vocab_size: int):
        """Takes the model's vocab_size.

        Raises:
          ValueError: it is no whole number from 256 up.
        """
        whole = isinstance(vocab_size, numbers.Integral) and not isinstance(vocab_size, bool)
        if not whole or vocab_size < self.vocab_size:
            raise ValueError(f"vocab_size is {vocab_size!r}; expected at least 256, one id a byte")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The bytes of the text; there are no special tokens to add.

        Raises:
          TypeError, ValueError: as utf8 does.
        """
        del add_special_tokens
        return list(utf8(text))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8, and ids of no byte, are replaced by U+FFFD.

        Raises:
          TypeError: ids is no sequence of whole numbers.
        """
        del skip_special_tokens
        try:
            # 0xFF is no part of any character, so it is replaced wherever it stands.
            text = bytes(id_ if 0 <= id_ < 256 else 0xFF for id_ in map(operator.index, ids))
        except TypeError:
            raise TypeError(f"ids is {ids!r}; expected a sequence of token ids") from None
        return text.decode(errors="replace")
