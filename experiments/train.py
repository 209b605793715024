"""Trains a small Qwen3-MoE on text, to a checkpoint that continues the text.

    python -m experiments.train                                          # on Python's own library
    python -m experiments.train --aux_loss_coef=0 --out=out/unbalanced --beside=out/train
    python -m experiments.train --from=Qwen3-30B-A3B --text=notes --learning_rate=1e-5
    python -m experiments.generate --checkpoint=out/train/checkpoint --prompt="def "
    python -m experiments.evaluate --checkpoint=out/train/checkpoint --context=128 \
        --text=out/train/held_out.txt

By default the text is a sample of the .py files of Python's standard library on this machine, and
its tokens are those of a byte-level BPE made of it. Rows are packed: a document attends to itself
only. A step trains on --accumulate times --batch rows of --context tokens, and its losses are those
of all of them together. --from trains a checkpoint of either format on, with its own tokenizer.

--out gets metrics.jsonl, train.png (loss, imbalance and load of the experts over time),
held_out.txt, sample.txt and checkpoint, a Hugging Face folder. --beside draws the run of another
folder into the picture. What computes is bfloat16, what is trained and saved float32.
"""

import dataclasses
import functools
import pathlib

import jax.numpy as jnp
from absl import logging
from flax import nnx

from experiments import generate as generate_script
from experiments.bench import (
    corpus,
    environment,
    records,
    script,
    train_records,
    training_run,
)
from experiments.bench.script import flag
from moe_jax.attention import ATTENTION_BACKENDS
from moe_jax.checkpoints import save_hugging_face
from moe_jax.config import Qwen3MoeConfig
from moe_jax.experts import EXPERTS_BACKENDS
from moe_jax.generation import read_generation_defaults
from moe_jax.generation.arguments import position_limit
from moe_jax.json_files import local_path
from moe_jax.model import Qwen3Moe
from moe_jax.parameters import active_parameter_count, from_arrays, parameter_count, to_arrays
from moe_jax.scoring import Scorer
from moe_jax.tokenization import Tokenizer
from moe_jax.training import (
    OptimizerOptions,
    PackedDocuments,
    TrainOptions,
    init_state,
)
from moe_jax.training.objective import COMPUTE_DTYPES
from moe_jax.training.optimizer import SCHEDULES

# Of a new model, where no flag says otherwise.
_SIZES = {
    "vocab_size": 2048,
    "layers": 2,
    "hidden": 128,
    "experts": 8,
    "experts_per_token": 2,
    "moe_intermediate": 64,
}
_OF_A_NEW_MODEL = "Of a new model; {} by default."


def _size(name: str, help: str, least: int = 1):
    return flag(None, f"{help} {_OF_A_NEW_MODEL.format(_SIZES[name])}", least=least)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags."""

    text: tuple[pathlib.Path, ...] = flag(
        (),
        "A file of UTF-8, or a folder of them; may be given several times. By default Python's "
        "standard library.",
        repeated=True,
    )
    max_mb: float = flag(4.0, "MB (1e6 bytes) of text, a sample of what there is.", least=1e-6)
    source: pathlib.Path | None = flag(
        None, "A checkpoint of either format to begin from.", name="from"
    )
    vocab_size: int | None = _size("vocab_size", "Tokens of the BPE, at least 257.", least=257)
    layers: int | None = _size("layers", "Decoder layers.")
    hidden: int | None = _size("hidden", f"The model's width, in steps of {training_run.HEAD_DIM}.")
    experts: int | None = _size("experts", "Experts of a layer.")
    experts_per_token: int | None = _size("experts_per_token", "Those that a token is sent to.")
    moe_intermediate: int | None = _size("moe_intermediate", "An expert's inner width.")
    aux_loss_coef: float | None = flag(
        None,
        f"Of the balance loss; {training_run.AUX_LOSS_COEF} by default, or the checkpoint's own.",
        least=0,
    )
    z_loss_coef: float | None = flag(
        None, "Of the router z-loss; 0 by default, or the checkpoint's own.", least=0
    )
    balance: str = flag(
        "per_layer",
        "What the balance loss is taken over: all layers' tokens pooled, as Hugging Face has it, "
        "hide a layer behind the others.",
        of=("pooled", "per_layer"),
    )
    steps: int = flag(480, "Updates.", least=1)
    context: int = flag(128, "Tokens of a row.", least=2)
    batch: int = flag(8, "Rows that run at once.", least=1)
    accumulate: int = flag(1, "Micro-batches of --batch rows in a step.", least=1)
    learning_rate: float = flag(4e-3, "The largest; a checkpoint may need less.", least=0)
    warmup_steps: int = flag(40, "In which the learning rate rises.", least=0)
    schedule: str = flag("cosine", "How it falls to a tenth.", of=SCHEDULES)
    weight_decay: float = flag(0.1, "AdamW's; not of norms and biases.", least=0)
    clip_norm: float | None = flag(1.0, "The largest gradient norm; empty for none.", least=0)
    compute_dtype: str = flag("bfloat16", "What the step computes in.", of=COMPUTE_DTYPES)
    remat: bool = flag(False, "Whether the backward pass computes each layer anew.")
    logit_columns: int | None = flag(
        None, "Positions of a row whose logits are in memory at once; all by default.", least=1
    )
    experts_backend: str = flag("auto", "What computes experts.", of=("auto", *EXPERTS_BACKENDS))
    attention_backend: str = flag(
        "auto", "What computes attention.", of=("auto", *ATTENTION_BACKENDS)
    )
    seed: int = flag(0, "Of the sample, the weights, the order of rows and the draws.", least=0)
    log_every: int = flag(20, "Steps between two lines of metrics.", least=1)
    prompt: tuple[str, ...] = flag(
        ("def ", "class ", "import "), "What the model continues at the end.", repeated=True
    )
    sample_tokens: int = flag(48, "Of each continuation; 0 for none.", least=0)
    out: pathlib.Path = flag(pathlib.Path("out/train"), "The folder to write to.", needs="a folder")
    beside: pathlib.Path | None = flag(None, "The --out of another run, for the picture.")
    commit: str = flag("", "The commit to record; the checkout's by default.")

    def __post_init__(self):
        if self.source is not None:
            local_path(self.source, "--from")
            for name in _SIZES:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} is {getattr(self, name)} with --from; expected it without, "
                        "because the checkpoint has its own"
                    )
        elif self.sizes["hidden"] % training_run.HEAD_DIM:
            raise ValueError(
                f"--hidden is {self.hidden}; expected a multiple of {training_run.HEAD_DIM}, the "
                "size of an attention head"
            )
        elif self.sizes["experts_per_token"] > self.sizes["experts"]:
            raise ValueError(
                f"--experts_per_token is {self.sizes['experts_per_token']}; expected 1 to "
                f"{self.sizes['experts']}, as --experts is"
            )
        if "" in self.prompt:
            raise ValueError("--prompt is empty; expected at least one character")
        try:
            self.optimizer()
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        if self.text:
            corpus.files_of(self.text)
        if self.beside is not None and not (self.beside / _METRICS).is_file():
            raise ValueError(
                f"--beside is {str(self.beside)!r}; expected a folder with {_METRICS}, as --out is"
            )
        script.writable_folder("out", self.out)

    @property
    def sizes(self) -> dict[str, int]:
        """Of a new model."""
        return {
            name: default if getattr(self, name) is None else getattr(self, name)
            for name, default in _SIZES.items()
        }

    def optimizer(self) -> OptimizerOptions:
        """Raises a ValueError that names what cannot be."""
        return OptimizerOptions(
            learning_rate=self.learning_rate,
            # A run of a few steps has no place for more.
            warmup_steps=min(self.warmup_steps, self.steps - 1),
            total_steps=self.steps,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
        )

    def options(self, config: Qwen3MoeConfig) -> TrainOptions:
        """How a step is computed."""
        return TrainOptions(
            # Without what config.json has besides, which the step does not depend on.
            config=dataclasses.replace(config, extra={}),
            optimizer=self.optimizer(),
            compute_dtype=self.compute_dtype,
            balance=self.balance,
            remat=self.remat,
            logit_columns=self.logit_columns,
            experts_backend=self.experts_backend,
            attention_backend=self.attention_backend,
        )


_METRICS, _PICTURE, _CHECKPOINT = "metrics.jsonl", "train.png", "checkpoint"
_HELD_OUT, _SAMPLE, _TOKENIZER = "held_out.txt", "sample.txt", "tokenizer"


def main(settings: Settings) -> None:
    """Trains, scores the held-out text, and writes everything to --out.

    Raises:
      ValueError, OSError, NotImplementedError, FloatingPointError: it cannot be done; the message
        says what is wrong.
    """
    logging.set_verbosity(logging.WARNING)  # absl's default shows a page of Orbax's notes
    console = script.make_console()
    beside = None if settings.beside is None else train_records.read_record(
        settings.beside / _METRICS
    )  # fmt: skip
    with script.progress(console) as bar:
        bar.say("reading text, making its tokenizer")
        texts = corpus.read_corpus(
            settings.text, max_bytes=round(settings.max_mb * 1e6), seed=settings.seed
        )
        model, tokenizer, sidecars = load(settings, texts)
        config = model.config
        train = training_run.token_ids(tokenizer, texts.train, config.vocab_size)
        held_out = "".join(texts.held_out)
        (settings.out / _HELD_OUT).write_text(held_out, encoding="utf-8")
        bar.say(
            f"{parameter_count(config) / 1e6:.2f} M parameters, "
            f"{active_parameter_count(config) / 1e6:.2f} M of them for a token; "
            f"{sum(map(len, train)) / 1e6:.2f} M tokens of {len(train)} documents"
        )
        run = environment.describe(
            seed=settings.seed, repeats=1, commit=settings.commit, read_ceiling_tbps=None
        )
        record = records.Record(preset=settings.out.resolve().name, rows=[])

        def add(row: train_records.StepRow | train_records.HeldOutRow) -> None:
            record.rows.append(row)
            records.write_record(settings.out / _METRICS, record)

        def on_step(done: int, row: train_records.StepRow | None) -> None:
            if row is not None:
                add(row)
            bar.report(done, "" if row is None else row.described)

        bar.start("compiling the step", settings.steps)
        state = training_run.run_steps(
            init_state(to_arrays(model), settings.optimizer()),
            PackedDocuments(train, settings.context, seed=settings.seed),
            options=settings.options(config),
            A=settings.accumulate,
            B=settings.batch,
            steps=settings.steps,
            log_every=settings.log_every,
            run=run,
            on_step=on_step,
        )
        model = from_arrays(config, state.params)
        save_hugging_face(settings.out / _CHECKPOINT, model, overwrite=True, copy_from=sidecars)
        bar.say("scoring the held-out text")
        row = training_run.score_held_out(
            Scorer(model=model, experts_backend=settings.experts_backend),
            tokenizer.encode(held_out, add_special_tokens=False),
            train,
            context=settings.context,
            step=int(state.step),
            run=run,
        )
        add(row)
        bar.say("continuing prompts")
        sample = training_run.continued(
            model,
            tokenizer,
            read_generation_defaults(sidecars, config.extra),
            prompts=settings.prompt,
            most=settings.sample_tokens,
            context=settings.context,
            seed=settings.seed,
            prefill_backend=settings.experts_backend,
        )
        (settings.out / _SAMPLE).write_text(sample, encoding="utf-8")
    runs = {record.preset: record}
    if beside is not None:
        runs[settings.beside.resolve().name] = beside
    train_records.draw(settings.out / _PICTURE, runs)
    console.print(sample, highlight=False, markup=False, end="")
    console.print(
        f"Held-out text, {row.tokens} tokens: perplexity {row.perplexity:.2f}, of unigrams "
        f"{row.unigram_perplexity:.2f}. Wrote {settings.out}: {_METRICS}, {_PICTURE}, {_HELD_OUT}, "
        f"{_SAMPLE}, {_CHECKPOINT}",
        highlight=False,
        soft_wrap=True,
    )


def load(settings: Settings, texts: corpus.Corpus) -> tuple[Qwen3Moe, Tokenizer, pathlib.Path]:
    """The float32 model to begin with, its tokenizer, and the folder of the tokenizer's files."""
    if settings.source is not None:
        loaded = generate_script.load_to_generate(
            generate_script.Settings(
                checkpoint=settings.source, dtype="float32", dequantize=True, prompt=("-",)
            )
        )
        config = with_coefficients(settings, loaded.model.config)
        limit = position_limit(config)
        if limit is not None and settings.context > limit:
            raise ValueError(
                f"--context is {settings.context}; expected at most {limit}, the checkpoint's "
                "max_position_embeddings"
            )
        return from_arrays(config, to_arrays(loaded.model)), loaded.tokenizer, settings.source
    sizes, folder = settings.sizes, settings.out / _TOKENIZER
    tokenizer = corpus.trained_tokenizer(folder, texts.train, sizes["vocab_size"])
    config = training_run.small_config(
        **sizes, context=settings.context, eos_token_id=tokenizer.eos_id
    )
    config = with_coefficients(settings, config)
    return Qwen3Moe(config, rngs=nnx.Rngs(settings.seed), dtype=jnp.float32), tokenizer, folder


def with_coefficients(settings: Settings, config: Qwen3MoeConfig) -> Qwen3MoeConfig:
    """The config with the coefficients that flags give."""
    given = {
        "router_aux_loss_coef": settings.aux_loss_coef,
        "router_z_loss_coef": settings.z_loss_coef,
    }
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(config, **given)


run = functools.partial(
    script.run,
    Settings,
    main,
    one_line=(ValueError, OSError, NotImplementedError, FloatingPointError),
)

if __name__ == "__main__":
    run()
