"""Text to token ids and back: a checkpoint's tokenizer and chat template, or plain bytes."""

from moe_jax.tokenization.byte_tokenizer import ByteTokenizer
from moe_jax.tokenization.chat_template import ChatTemplateError
from moe_jax.tokenization.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ByteTokenizer", "ChatTemplateError", "Tokenizer", "load_tokenizer"]
