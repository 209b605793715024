"""How likely is a text under a checkpoint, and what does another way of computing change?

    python -m experiments.evaluate --checkpoint=Qwen3-30B-A3B --text=book.txt --phase=decode
    python -m experiments.evaluate --preset=tiny --random --text=README.md --compare=dtype=float32

Prints each text's log-likelihood and perplexity. --compare=checkpoint=Qwen3-30B-A3B-FP8, say, adds
those of a second way of computing, the mean KL(first || second), how often the likeliest tokens
agree, and the largest difference of a token's log-probability. Writes a JSONL of these, and an .npz
of every token's.

Texts are read in windows of --context tokens, --stride apart: moe_jax/scoring/texts.py has a
picture. A BOS token comes first where the tokenizer has one; else nothing predicts the first token.
--phase=decode scores with decode steps, by the kernels that generate. Logits have the dtype of the
model, and the log-softmax is float32. Two checkpoints are both in memory. A random model takes
bytes.
"""

import dataclasses
import functools
import pathlib
import time

from absl import logging

from experiments import generate as generate_script
from experiments.bench import environment, evaluation_records, records, script
from experiments.bench.candidates import LAYOUT_NAMES
from experiments.bench.script import flag
from moe_jax.attention import ATTENTION_BACKENDS
from moe_jax.checkpoints import open_checkpoint
from moe_jax.config import Qwen3MoeConfig
from moe_jax.decode_step import LAYERS_BACKENDS
from moe_jax.experts import EXPERTS_BACKENDS
from moe_jax.generation.arguments import position_limit
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import from_arrays, to_arrays
from moe_jax.presets import PRESETS
from moe_jax.scoring import SCORING_PHASES, Scorer, TextScores, score
from moe_jax.tokenization import ByteTokenizer, Tokenizer, load_tokenizer

# What may differ in --compare: which weights, and how they are computed.
WEIGHTS = ("checkpoint", "seed", "dtype", "dequantize")
COMPUTED = ("phase", "experts_backend", "attention_backend", "layers_backend", "layout")
_PALLAS = ("pallas", "pallas_interpret")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    checkpoint: pathlib.Path | None = flag(None, "A checkpoint directory of either format.")
    preset: str | None = flag(None, "With --random: whose sizes.", of=PRESETS)
    random: bool = flag(False, "Random weights, and bytes as tokens.")
    seed: int = flag(0, "Of random weights.", least=0)
    dtype: str | None = flag(
        None, "By default as stored, bfloat16 for a random model.", of=generate_script.DTYPES
    )
    dequantize: bool = flag(False, "Whether an FP8 checkpoint becomes bfloat16, or --dtype.")
    text: tuple[pathlib.Path, ...] = flag(
        (),
        "A file of UTF-8; may be given several times.",
        repeated=True,
        needs="a file of UTF-8, as in --text=FILE",
    )
    context: int = flag(1024, "The most tokens that a prediction sees.", least=1)
    stride: int | None = flag(
        None, "Tokens that a window scores; half of --context by default.", least=1
    )
    batch: int = flag(8, "Windows that are rows of one batch.", least=1)
    chunk: int = flag(64, "Columns of a batch that run at once.", least=2)
    phase: str = flag("prefill", "Whether to score by prefill or decode steps.", of=SCORING_PHASES)
    experts_backend: str = flag("auto", "What computes experts.", of=("auto", *EXPERTS_BACKENDS))
    attention_backend: str = flag(
        "auto", "What computes attention.", of=("auto", *ATTENTION_BACKENDS)
    )
    layers_backend: str = flag(
        "auto", "What computes all layers of a step.", of=("auto", *LAYERS_BACKENDS)
    )
    layout: str | None = flag(None, "Of the Pallas experts' backends.", of=LAYOUT_NAMES)
    compare: tuple[str, ...] = flag(
        (),
        "NAME=VALUE: what the second way of computing has in place of that flag, which is one of "
        f"{', '.join((*WEIGHTS, *COMPUTED))}. May be given several times.",
        repeated=True,
    )
    out: pathlib.Path = flag(
        pathlib.Path("out/evaluate"), "The folder for JSONL and .npz.", needs="a folder"
    )
    commit: str = flag("", "The commit to record; the checkout's by default.")

    def __post_init__(self):
        self.weights()
        if self.stride is not None and self.stride > self.context:
            raise ValueError(
                f"--stride is {self.stride}; expected 1 to {self.context}, as --context is"
            )
        if self.layout is not None and self.experts_backend not in _PALLAS:
            raise ValueError(
                f"--layout is {self.layout!r} with --experts_backend {self.experts_backend!r}; "
                f"expected one of {', '.join(_PALLAS)}, which have layouts"
            )
        self.ways()
        self.read_texts()
        script.writable_folder("out", self.out)

    def weights(self) -> generate_script.Settings:
        """What experiments.generate loads by.

        Raises:
          ValueError: there is no checkpoint and no random model, or both.
        """
        named = {name: getattr(self, name) for name in WEIGHTS}
        # Random tokens in place of a prompt, which loading does not look at.
        return generate_script.Settings(
            preset=self.preset, random=self.random, prompt_tokens=1, **named
        )

    def ways(self) -> list["Settings"]:
        """The first way of computing, and the second one if there is to be any.

        Raises:
          ValueError: --compare names no flag that may differ, or a value that it cannot have.
        """
        if not self.compare:
            return [self]
        texts = {}
        for asked in self.compare:
            name, equals, text = asked.partition("=")
            if not equals or name not in (*WEIGHTS, *COMPUTED):
                raise ValueError(
                    f"--compare has {asked!r}; expected NAME=VALUE with a name of "
                    f"{', '.join((*WEIGHTS, *COMPUTED))}"
                )
            texts[name] = text
        try:
            second = script.with_texts(dataclasses.replace(self, compare=()), texts)
        except ValueError as error:
            raise ValueError(f"--compare has {' '.join(self.compare)}: {error}") from None
        return [dataclasses.replace(self, compare=()), second]

    def read_texts(self) -> list[str]:
        """The files' texts.

        Raises:
          ValueError: one cannot be read, is no UTF-8, or is empty.
        """
        texts = []
        for path in self.text:
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"--text has {str(path)!r}; expected a file of UTF-8: {error}"
                ) from None
            if not text:
                raise ValueError(f"--text has {str(path)!r}, which is empty; expected some text")
            texts.append(text)
        return texts

    @property
    def window_stride(self) -> int:
        """As given, or half of the context."""
        return self.stride or -(-self.context // 2)

    @property
    def name(self) -> str:
        """Of the model, in the files' names."""
        return self.preset if self.checkpoint is None else self.checkpoint.resolve().name

    def described(self) -> dict[str, str]:
        """The way of computing, for the record."""
        names = [*WEIGHTS, *COMPUTED, "preset"]
        if not self.random:
            names.remove("seed")
        values = {name: getattr(self, name) for name in names}
        absent = (None, False)  # by identity, because a seed may be 0
        return {
            name: str(value)
            for name, value in values.items()
            if not any(value is other for other in absent)
        }


def main(settings: Settings) -> None:
    """Scores the texts, prints a table and writes both files.

    Raises:
      ValueError, OSError, NotImplementedError, FloatingPointError: as evaluate.
    """
    logging.set_verbosity(logging.WARNING)  # absl's default shows a page of Orbax's notes
    ways = settings.ways()
    named = {name for way in ways for name in (way.experts_backend, way.layers_backend)}
    if "pallas_interpret" in named:
        script.make_interpreter_safe()
    console = script.make_console()
    run = environment.describe(
        seed=settings.seed, repeats=1, commit=settings.commit, read_ceiling_tbps=None
    )
    path = settings.out / f"{run.device}_{settings.name}.jsonl"
    records.begin_record(path, settings.name, evaluation_records.KINDS)
    with script.progress(console) as bar:
        begun = time.perf_counter()
        scorers, found = evaluate(settings, bar)
        seconds = time.perf_counter() - begun
    rows = evaluation_records.make_rows(
        run,
        texts=[str(path) for path in settings.text],
        found=found,
        ways=[way.described() for way in ways],
        backends=[scorer.backends for scorer in scorers],
        context=settings.context,
        stride=settings.window_stride,
    )
    records.write_record(path, records.Record(preset=settings.name, rows=rows))
    tokens = path.with_suffix(".npz")
    evaluation_records.save_tokens(tokens, rows, found)
    evaluation_records.print_rows(console, rows)
    console.print(
        f"{seconds:.1f} s, loading and compiling included. Wrote {path} and {tokens}",
        highlight=False,
        soft_wrap=True,
    )


def evaluate(settings: Settings, bar: script.Progress) -> tuple[list[Scorer], list[TextScores]]:
    """Loads what is asked for and scores every text.

    Raises:
      ValueError, OSError, NotImplementedError: a checkpoint cannot be loaded, a text has too few
        tokens, a backend cannot do it; the message says what is wrong.
      FloatingPointError: a prediction is NaN.
    """
    ways = settings.ways()
    # The small files first, because a mistake in them should not take minutes to come out.
    configs = [config_of(way) for way in ways]
    texts = [token_ids(way, config) for way, config in zip(ways, configs, strict=True)]
    if texts[-1] != texts[0]:
        raise ValueError(
            f"--compare has {' '.join(settings.compare)}, whose tokenizer makes other tokens of "
            "--text; expected the same tokens of both"
        )
    for config in configs:
        limit = position_limit(config)
        if limit is not None and settings.context > limit:
            raise ValueError(
                f"--context is {settings.context}; expected at most {limit}, the model's "
                "max_position_embeddings"
            )
    models: dict[generate_script.Settings, Qwen3Moe] = {}
    for way in ways:
        if way.weights() not in models:
            bar.say(f"loading {way.name}, {way.dtype or 'in its own dtype'}")
            models[way.weights()] = load_model(way, ways[0].dtype)
    scorers = [
        Scorer(model=models[way.weights()], **{name: getattr(way, name) for name in COMPUTED})
        for way in ways
    ]

    def on_batch(number: int, total: int) -> None:
        if number == 0:
            bar.start("scoring", total)
        bar.advance(f"batch {number + 1} of {total}")

    found = score(
        scorers,
        texts[0],
        context=settings.context,
        stride=settings.window_stride,
        batch=settings.batch,
        chunk=settings.chunk,
        on_batch=on_batch,
    )
    return scorers, found


def load_model(settings: Settings, drawn_as: str | None) -> Qwen3Moe:
    """The model; random weights are drawn in one dtype and converted.

    In another dtype other numbers would be drawn, and they would be two models.
    """
    if not settings.random or settings.dtype == drawn_as:
        return generate_script.load_to_generate(settings.weights()).model
    drawn = dataclasses.replace(settings, dtype=drawn_as).weights()
    model = generate_script.load_to_generate(drawn).model
    dtype = settings.dtype or "bfloat16"
    arrays = {name: array.astype(dtype) for name, array in to_arrays(model).items()}
    return from_arrays(model.config, arrays)


def config_of(settings: Settings) -> Qwen3MoeConfig:
    """The model's config, without its weights."""
    if settings.checkpoint is None:
        return PRESETS[settings.preset]
    return open_checkpoint(settings.checkpoint).config


def token_ids(settings: Settings, config: Qwen3MoeConfig) -> list[list[int]]:
    """Each text's tokens, a BOS token before them where there is one.

    Raises:
      FileNotFoundError: the checkpoint has no tokenizer.
      ValueError: a text has fewer than two tokens, or one that the model does not have.
    """
    tokenizer: Tokenizer | ByteTokenizer = ByteTokenizer(config.vocab_size)
    first = []
    if settings.checkpoint is not None:
        tokenizer = load_tokenizer(settings.checkpoint)
        bos = tokenizer.special_ids.get("bos_token")
        first = [] if bos is None else [bos]
    made = []
    for path, text in zip(settings.text, settings.read_texts(), strict=True):
        ids = [*first, *tokenizer.encode(text, add_special_tokens=False)]
        if len(ids) < 2:
            raise ValueError(
                f"--text has {str(path)!r}, which is {len(ids)} token; expected at least 2, one to "
                "predict"
            )
        if max(ids) >= config.vocab_size:
            raise ValueError(
                f"--checkpoint has a tokenizer that gives token {max(ids)}; expected 0 to "
                f"{config.vocab_size - 1}, as vocab_size is {config.vocab_size}"
            )
        made.append(ids)
    return made


run = functools.partial(
    script.run,
    Settings,
    main,
    one_line=(ValueError, OSError, NotImplementedError, FloatingPointError),
)

if __name__ == "__main__":
    run()
