"""A tokenizer without files: for models that have no text of their own, random ones above all."""

from collections.abc import Sequence


class ByteTokenizer:
    """Each byte of UTF-8 is a token, 0 to 255; no other id has a text."""

    vocab_size = 256
    eos_id = None

    def __init__(self, vocab_size: int):
        """Takes the model's vocab_size.

        Raises:
          ValueError: it is below 256.
        """
        if vocab_size < self.vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}; expected at least 256, one id a byte")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The bytes of the text; there are no special tokens to add."""
        del add_special_tokens
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8, and ids of no byte, are replaced by U+FFFD."""
        del skip_special_tokens
        # 0xFF is no part of any character, so it is replaced wherever it stands.
        return bytes(id_ if 0 <= id_ < 256 else 0xFF for id_ in ids).decode(errors="replace")
