"""Trains a small Qwen3-MoE on text, to a checkpoint that continues the text.

    python -m experiments.train                                          # on Python's own library
    python -m experiments.train --aux_loss_coef=0 --out=out/unbalanced --beside=out/train
    python -m experiments.train --from=Qwen3-30B-A3B --text=notes --learning_rate=1e-5
    python -m experiments.train --mesh=data=2,expert=2                   # on four devices
    python -m experiments.generate --checkpoint=out/train/checkpoint --prompt="def "
    python -m experiments.evaluate --checkpoint=out/train/checkpoint --context=128 \
        --text=out/train/held_out.txt

By default the text is a sample of the .py files of Python's standard library on this machine, and
its tokens are those of a byte-level BPE made of it. Rows are packed: a document attends to itself
only. A step trains on --accumulate times --batch rows of --context tokens, and its losses are those
of all of them together. --from trains a checkpoint of either format on, with its own tokenizer.

Whatever ends a run, the same command goes on from the last state in --out, and comes to the same
numbers, bit for bit on one device. Other options are refused by name; only --steps and how a step
is computed may change. --noresume begins anew.

--mesh splits a micro-batch's rows over data and expert, parameters and the optimiser's state over
data, experts over expert, and heads and widths over tensor. The losses stay those of all rows. With
--coordinator=host:port, --processes and --process_id the devices may be several processes', each of
which reads its own rows; the first one writes the files.

--out gets metrics.jsonl, train.png (loss, imbalance and load of the experts over time), states,
held_out.txt, sample.txt and checkpoint, a Hugging Face folder. --beside draws the run of another
folder into the picture. What computes is bfloat16, what is trained and saved float32.
"""

import contextlib
import dataclasses
import functools
import pathlib

from absl import logging

from experiments.bench import (
    corpus,
    environment,
    processes,
    records,
    script,
    train_records,
    training_flags,
    training_run,
    training_start,
)
from experiments.bench.script import flag
from moe_jax.checkpoints import save_hugging_face
from moe_jax.generation import read_generation_defaults
from moe_jax.json_files import local_path
from moe_jax.parameters import active_parameter_count, from_arrays, parameter_count, to_arrays
from moe_jax.scoring import Scorer
from moe_jax.training import (
    OptimizerOptions,
    PackedDocuments,
)
from moe_jax.training.optimizer import SCHEDULES
from moe_jax.training.same_run import Json
from moe_jax.training.states import TrainingStates

_OF_A_NEW_MODEL = "Of a new model; {} by default."


def _size(name: str, help: str, least: int = 1):
    return flag(None, f"{help} {_OF_A_NEW_MODEL.format(training_start.SIZES[name])}", least=least)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(training_flags.StepFlags):
    """The flags; those of how and where a step is computed are training_flags.py's."""

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
    hidden: int | None = _size("hidden", f"The width, in steps of {training_start.HEAD_DIM}.")
    experts: int | None = _size("experts", "Experts of a layer.")
    experts_per_token: int | None = _size("experts_per_token", "Those that a token is sent to.")
    moe_intermediate: int | None = _size("moe_intermediate", "An expert's inner width.")
    aux_loss_coef: float | None = flag(
        None,
        f"Of the balance loss; {training_start.AUX_LOSS_COEF} by default, or the checkpoint's own.",
        least=0,
    )
    z_loss_coef: float | None = flag(
        None, "Of the router z-loss; 0 by default, or the checkpoint's own.", least=0
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
    seed: int = flag(0, "Of the sample, the weights, the order of rows and the draws.", least=0)
    log_every: int = flag(20, "Steps between two lines of metrics.", least=1)
    save_every: int = flag(100, "Steps between two saves of the whole state.", least=1)
    keep: int = flag(
        2, "States to keep: the last ones, and besides the one of the least held-out loss.", least=1
    )
    resume: bool = flag(
        True,
        "Go on from the last state in --out, if it holds one; --noresume removes them instead.",
    )
    prompt: tuple[str, ...] = flag(
        ("def ", "class ", "import "), "What the model continues at the end.", repeated=True
    )
    sample_tokens: int = flag(48, "Of each continuation; 0 for none.", least=0)
    out: pathlib.Path = flag(pathlib.Path("out/train"), "The folder to write to.", needs="a folder")
    beside: pathlib.Path | None = flag(None, "The --out of another run, for the picture.")
    commit: str = flag("", "The commit to record; the checkout's by default.")

    def __post_init__(self):
        super().__post_init__()
        self.check_rows(self.batch)
        if self.source is not None:
            local_path(self.source, "--from")
            for name in training_start.SIZES:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} is {getattr(self, name)} with --from; expected it without, "
                        "because the checkpoint has its own"
                    )
        elif self.sizes["hidden"] % training_start.HEAD_DIM:
            raise ValueError(
                f"--hidden is {self.hidden}; expected a multiple of {training_start.HEAD_DIM}, the "
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
            for name, default in training_start.SIZES.items()
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

    def start(self, texts: corpus.Corpus) -> training_start.Start:
        """Raises a ValueError that names what cannot be loaded, or does not fit."""
        coefficients = {
            "router_aux_loss_coef": self.aux_loss_coef,
            "router_z_loss_coef": self.z_loss_coef,
        }
        if self.source is not None:
            return training_start.from_checkpoint(
                self.source, context=self.context, coefficients=coefficients
            )
        return training_start.new_model(
            self.out / _TOKENIZER,
            texts.train,
            context=self.context,
            coefficients=coefficients,
            seed=self.seed,
            parallelism=self.parallelism,
            **self.sizes,
        )

    def data(self, train: list[list[int]], held_out: list[int]) -> dict[str, Json]:
        """What the run's numbers follow from besides the options; see TrainingStates."""
        return {
            "seed": self.seed,
            "from": None if self.source is None else str(self.source.resolve()),
            "context": self.context,
            "rows_of_a_step": self.accumulate * self.batch,
            "micro_batches": self.accumulate,
            "texts": training_start.checksum(train),
            "held_out": training_start.checksum([held_out]),
        }


_METRICS, _PICTURE, _CHECKPOINT = "metrics.jsonl", "train.png", "checkpoint"
_HELD_OUT, _SAMPLE, _TOKENIZER, _STATES = "held_out.txt", "sample.txt", "tokenizer", "states"


def main(settings: Settings) -> None:
    """Trains, scores the held-out text, and writes everything to --out.

    Raises:
      ValueError, OSError, NotImplementedError, FloatingPointError: it cannot be done; the message
        says what is wrong.
    """
    settings.join()
    # Orbax logs a page of notes, and the trace of an error that it raises besides.
    logging.set_verbosity(logging.FATAL)
    console = script.make_console()
    beside = None if settings.beside is None else train_records.read_record(
        settings.beside / _METRICS
    )  # fmt: skip
    with script.progress(console) as bar, contextlib.ExitStack() as opened:
        bar.say("reading text, making its tokenizer")
        texts = corpus.read_corpus(
            settings.text, max_bytes=round(settings.max_mb * 1e6), seed=settings.seed
        )
        with processes.first_before_others():
            model, tokenizer, sidecars = settings.start(texts)
        config = model.config
        options = settings.step_options(config, settings.optimizer())
        train = training_start.token_ids(tokenizer, texts.train, config.vocab_size)
        held_out = "".join(texts.held_out)
        held_out_ids = tokenizer.encode(held_out, add_special_tokens=False)
        held_out_rows = training_run.pack_held_out(held_out_ids, settings.context)
        if processes.is_first():
            (settings.out / _HELD_OUT).write_text(held_out, encoding="utf-8")
        bar.say(
            f"{parameter_count(config) / 1e6:.2f} M parameters, "
            f"{active_parameter_count(config) / 1e6:.2f} M of them for a token; "
            f"{sum(map(len, train)) / 1e6:.2f} M tokens of {len(train)} documents"
        )
        states = opened.enter_context(
            TrainingStates(
                settings.out / _STATES,
                options=options,
                data=settings.data(train, held_out_ids),
                config=config,
                keep=settings.keep,
                anew=not settings.resume,
            )
        )
        params = to_arrays(model)
        state = training_run.first_state(states, params, options, bar.say)
        del model, params  # or they would stay beside those in training
        run = environment.describe(
            seed=settings.seed, repeats=1, commit=settings.commit, read_ceiling_tbps=None
        )
        metrics = settings.out / _METRICS
        bar.start("compiling the step", settings.steps)
        state, record = training_run.run_and_save(
            state,
            PackedDocuments(train, settings.context, seed=settings.seed),
            held_out_rows,
            states,
            metrics,
            options=options,
            A=settings.accumulate,
            B=settings.batch,
            steps=settings.steps,
            log_every=settings.log_every,
            save_every=settings.save_every,
            run=run,
            report=bar.report,
        )
        done = int(state.step)
        params = state.params
        if options.parallelism is not None:
            params = processes.whole_here(params)
        del state
        if not processes.is_first():
            return
        model = from_arrays(config, params)
        save_hugging_face(settings.out / _CHECKPOINT, model, overwrite=True, copy_from=sidecars)
        bar.say("scoring the held-out text")
        row = training_run.score_held_out(
            Scorer(model=model, experts_backend=settings.experts_backend),
            held_out_ids,
            train,
            context=settings.context,
            step=done,
            run=run,
        )
        record.rows.append(row)
        records.write_record(metrics, record)
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


run = functools.partial(
    script.run,
    Settings,
    main,
    one_line=(ValueError, OSError, NotImplementedError, FloatingPointError),
)

if __name__ == "__main__":
    run()
