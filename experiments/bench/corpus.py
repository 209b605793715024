"""Text to train on: a sample of files, what of it is held out, and a byte-level BPE made of it."""

import dataclasses
import hashlib
import json
import pathlib
import sysconfig
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_jax.tokenization import Tokenizer, load_tokenizer

END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".py", ".txt", ".md")  # of the files that a folder gives
HELD_OUT_SHARE = 0.02
_TRAINED_ON = "trained_on.json"
# Of the standard library's folders: packages that are installed into it, and its tests.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents, each a text.

    Attributes:
      train: to train on, the tokenizer too.
      held_out: the others, some HELD_OUT_SHARE of all characters.
    """

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def standard_library() -> list[pathlib.Path]:
    """The .py files of this Python's standard library, without its tests, in a fixed order."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return [root / path for path in found if not _LEFT_OUT & set(path.parts)]


def files_of(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The files, and of each folder those with one of SUFFIXES, in a fixed order.

    Raises:
      ValueError: a path is neither, or a folder has no such file.
    """
    files = []
    for path in paths:
        if path.is_file():
            files.append(path)
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise ValueError(
                f"--text has {str(path)!r}; expected a file, or a folder with files that end in "
                f"{', '.join(SUFFIXES)}"
            )
        files += found
    return files


def read_corpus(paths: Sequence[pathlib.Path], *, max_bytes: int, seed: int) -> Corpus:
    """Reads files in an order that `seed` gives, until they have max_bytes.

    Of a folder's or the library's files, those that are no UTF-8 are passed over. One document by
    itself is cut in two.

    Args:
      paths: files and folders; empty takes the standard library.
      max_bytes: a file that would go beyond is passed over.
      seed: of the order.

    Raises:
      ValueError: there is no text.
    """
    files = files_of(paths) if paths else standard_library()
    texts, size = [], 0
    for index in np.random.default_rng(seed).permutation(len(files)):
        try:
            text = files[index].read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            if files[index] in paths:
                raise ValueError(
                    f"--text has {str(files[index])!r}; expected a file of UTF-8: {error}"
                ) from None
            continue
        nbytes = len(text.encode())
        if text.strip() and size + nbytes <= max_bytes:
            texts.append(text)
            size += nbytes
    if not texts:
        raise ValueError(
            f"--max_mb is {max_bytes / 1e6:g}, and none of {len(files)} files has that little "
            "text; expected more, or another --text"
        )
    if len(texts) == 1:
        at = max(1, round(len(texts[0]) * (1 - HELD_OUT_SHARE)))
        return Corpus(train=(texts[0][:at],), held_out=(texts[0][at:],))
    wanted, held_out = HELD_OUT_SHARE * sum(map(len, texts)), []
    while len(texts) > 1 and sum(map(len, held_out)) < wanted:
        held_out.append(texts.pop())
    return Corpus(train=tuple(texts), held_out=tuple(held_out))


def trained_tokenizer(folder: pathlib.Path, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of these texts, kept in the folder for the next run of the same.

    The folder gets tokenizer.json, tokenizer_config.json and generation_config.json, as a
    checkpoint has them; token 0 is END_OF_TEXT.

    Raises:
      ValueError: vocab_size is below 257, one for each byte and END_OF_TEXT.
    """
    if vocab_size < 257:
        raise ValueError(f"--vocab_size is {vocab_size}; expected at least 257, 256 bytes among it")
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    key = {"sha256": digest, "vocab_size": vocab_size, "tokenizers": tokenizers.__version__}
    made_of = folder / _TRAINED_ON
    if made_of.is_file() and json.loads(made_of.read_text()) == key:
        return load_tokenizer(folder)
    made_of.unlink(missing_ok=True)
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    sidecars = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
        },
        "generation_config.json": {
            "do_sample": True,
            "temperature": 0.7,
            "top_k": 0,
            "top_p": 0.9,
            "eos_token_id": 0,
        },
        _TRAINED_ON: key,  # last, because it says that the others are there
    }
    for name, data in sidecars.items():
        (folder / name).write_text(json.dumps(data, indent=2) + "\n")
    return load_tokenizer(folder)


def unigram_perplexity(train: Sequence[int], held_out: Sequence[int], vocab_size: int) -> float:
    """Of the held-out tokens but the first, by their frequencies in `train` with 1 added to each.

    The first is left out because a model has nothing to predict it from.
    """
    counts = np.bincount(np.asarray(train), minlength=vocab_size) + 1.0
    log_p = np.log(counts / counts.sum())
    return float(np.exp(-log_p[np.asarray(held_out)[1:]].mean()))
