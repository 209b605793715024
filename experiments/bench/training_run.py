"""The loop over training steps, and what is looked at at a save and when it is done."""

import functools
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import jax

from experiments.bench.corpus import unigram_perplexity
from experiments.bench.environment import Environment
from experiments.bench.processes import is_first
from experiments.bench.records import Record, write_record
from experiments.bench.train_records import HeldOutRow, Row, SavedRow, StepRow, rows_until
from moe_jax.generation import GenerationDefaults, generate
from moe_jax.model import Qwen3Moe
from moe_jax.scoring import Scorer, score
from moe_jax.tokenization import Tokenizer
from moe_jax.training import (
    Batch,
    PackedDocuments,
    TrainOptions,
    TrainState,
    init_state,
    train_step,
)
from moe_jax.training.objective import count_targets, micro_sums, targets_of
from moe_jax.training.states import TrainingStates
from moe_jax.training.train_step import Params

_HELD_OUT_ROWS = 256  # of which a state's held-out loss is the mean

_compiled_step = jax.jit(train_step, static_argnames="options", donate_argnames="state")


def first_state(
    states: TrainingStates,
    params: Params,
    options: TrainOptions,
    say: Callable[[str], None],
) -> TrainState:
    """The last whole state or, where there is none, that of `params`; says what it found.

    Raises:
      CheckpointError: as TrainingStates.restore.
    """
    parallelism, optimizer = options.parallelism, options.optimizer
    target = jax.eval_shape(lambda: init_state(params, optimizer))
    if parallelism is not None:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            target,
            parallelism.shardings_of(target),
        )
    restored = states.restore(target)
    if restored is None:
        return init_state(params, optimizer, parallelism=parallelism)
    done, steps = int(restored.state.step), optimizer.total_steps
    nothing = ": nothing is left to train; --noresume begins anew" if done == steps else ""
    say(f"going on from step {done} of {steps} in {states.folder}{nothing}")
    for note in restored.notes:
        say(note)
    return restored.state


def run_and_save(
    state: TrainState,
    packed: PackedDocuments,
    held_out: PackedDocuments,
    states: TrainingStates,
    metrics: pathlib.Path,
    *,
    options: TrainOptions,
    A: int,
    B: int,
    steps: int,
    log_every: int,
    save_every: int,
    run: Environment,
    report: Callable[[int, str], None],
) -> tuple[TrainState, Record]:
    """run_steps that saves its states with their held-out loss, and its rows.

    Args:
      state, packed, options, A, B, steps, log_every, save_every, run: as in run_steps.
      held_out: as pack_held_out makes it.
      states: where states go.
      metrics: the file of the rows, written anew with each. Of a run that goes on it has the rows
        that lead to `state`.
      report: called as report(steps done, the row's text or an empty one).

    Returns:
      The last state, when it is saved, and all rows.

    Raises:
      FloatingPointError: as run_steps, or the held-out loss is not finite.
      CheckpointError, OSError: a state, or the file, cannot be written.
      ValueError: the file is damaged.
    """
    rows = rows_until(metrics, int(state.step))
    record = Record(preset=metrics.resolve().parent.name, rows=rows)

    def add(row: Row) -> None:
        record.rows.append(row)
        if is_first():
            write_record(metrics, record)

    def on_step(done: int, row: StepRow | None) -> None:
        if row is not None:
            add(row)
        states.check()
        report(done, "" if row is None else row.described)

    def save(state: TrainState) -> None:
        loss = held_out_loss(state.params, held_out, options=options, B=B)
        # The row comes first, so that a state is never without the rows that lead to it.
        add(SavedRow(run=run, step=int(state.step), held_out_loss=loss))
        states.save(state, held_out_loss=loss)

    state = run_steps(
        state,
        packed,
        options=options,
        A=A,
        B=B,
        steps=steps,
        log_every=log_every,
        run=run,
        on_step=on_step,
        save_every=save_every,
        save=save,
    )
    states.wait()
    return state, record


def run_steps(
    state: TrainState,
    packed: PackedDocuments,
    *,
    options: TrainOptions,
    A: int,
    B: int,
    steps: int,
    log_every: int,
    run: Environment,
    on_step: Callable[[int, StepRow | None], None],
    save_every: int,
    save: Callable[[TrainState], None],
) -> TrainState:
    """Steps from the state's own number up to `steps`.

    Args:
      state: to begin with; it is donated.
      packed: the documents; step n trains on its batch n.
      options: how a step is computed.
      A, B: micro-batches, and rows of each.
      steps: how many are done at the end.
      log_every: step 1, each of these, and the last have a row, wherever this process begins.
      run: for the rows.
      on_step: called after each step with the number of steps done, and the row or None.
      save_every: after each of these steps, and after the last, `save` is called.
      save: called with the state, which is donated to the next step; its time does not count.

    Raises:
      FloatingPointError: the loss or the gradients of a row are not finite.
    """
    begun, tokens, compiles = time.perf_counter(), 0, True
    for number in range(int(state.step), steps):
        batch = packed.batch_on_mesh(number, A=A, B=B, parallelism=options.parallelism)
        state, metrics = _compiled_step(state, batch, options=options)
        done = number + 1
        tokens += batch.input_ids.size
        row = None
        if done == 1 or done % log_every == 0 or done == steps:
            metrics.loss.block_until_ready()
            seconds = time.perf_counter() - begun
            row = StepRow.of(run, done, metrics, None if compiles else tokens / seconds)
            if not math.isfinite(row.loss) or not math.isfinite(row.gradient_norm):
                raise FloatingPointError(
                    f"step {done} has a loss of {row.loss} and a gradient norm of "
                    f"{row.gradient_norm}; expected finite numbers: a lower learning rate may give "
                    "them"
                )
        on_step(done, row)
        if row is not None:
            begun, tokens, compiles = time.perf_counter(), 0, False
        if done % save_every == 0 or done == steps:
            state.step.block_until_ready()
            paused = time.perf_counter()
            save(state)
            begun += time.perf_counter() - paused
    return state


def pack_held_out(ids: Sequence[int], context: int) -> PackedDocuments:
    """The held-out text as rows for `held_out_loss`.

    Raises:
      ValueError: there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(
            f"the held-out text has {len(ids)} tokens; expected at least 2, so more --text"
        )
    return PackedDocuments([ids], context)


def held_out_loss(
    params: Params, packed: PackedDocuments, *, options: TrainOptions, B: int
) -> float:
    """The mean cross entropy of the same rows at each save, in nats, computed as a step does.

    Args:
      params: a state's.
      packed: of it as many rows are taken as make whole batches, at most _HELD_OUT_ROWS.
      options: how a step is computed.
      B: rows that run at once.

    Raises:
      FloatingPointError: it is not finite.
    """
    B, mesh, nll, targets = min(B, packed.rows), options.parallelism, 0, 0
    if mesh is not None:
        devices = mesh.size("data") * mesh.size("expert")
        B = max(B - B % devices, devices)  # of fewer rows than devices, some come twice
    for number in range(max(min(packed.rows, _HELD_OUT_ROWS) // B, 1)):
        batch = packed.batch_on_mesh(number, A=1, B=B, parallelism=mesh)
        sums = _compiled_sums(params, batch, options=options)
        nll, targets = nll + float(sums[0]), targets + int(sums[1])
    loss = nll / max(targets, 1)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the held-out loss is {loss}; expected a finite number: a lower learning rate may "
            "give one"
        )
    return loss


@functools.partial(jax.jit, static_argnames="options")
def _compiled_sums(
    params: Params, batch: Batch, options: TrainOptions
) -> tuple[jax.Array, jax.Array]:
    """-log p summed over the targets of a batch [1, B, S], and how many there are."""
    targets = targets_of(batch)
    one, of_one = jax.tree.map(lambda array: array[0], (batch, targets))
    return micro_sums(params, one, of_one, options).nll, count_targets(targets)


def score_held_out(
    scorer: Scorer,
    ids: Sequence[int],
    train: Sequence[Sequence[int]],
    *,
    context: int,
    step: int,
    run: Environment,
) -> HeldOutRow:
    """The model's and the unigrams' perplexity of held-out tokens.

    The model's is what experiments.evaluate gives with the same --context.

    Args:
      scorer: the model.
      ids: the held-out text's, at least two.
      train: the documents' tokens, for the unigrams.
      context: the most that a prediction sees; a window's second half is scored.
      step, run: for the row.
    """
    stride = -(-context // 2)
    [scores] = score([scorer], [ids], context=context, stride=stride, chunk=min(64, context))
    every = [token for document in train for token in document]
    return HeldOutRow(
        run=run,
        step=step,
        tokens=len(ids),
        context=context,
        perplexity=scores.perplexity(),
        unigram_perplexity=unigram_perplexity(every, ids, scorer.model.config.vocab_size),
    )


def continued(
    model: Qwen3Moe,
    tokenizer: Tokenizer,
    defaults: GenerationDefaults,
    *,
    prompts: Sequence[str],
    most: int,
    context: int,
    seed: int,
    prefill_backend: str = "auto",
) -> str:
    """Each prompt with what the model writes behind it, drawn as `defaults` say.

    Args:
      model, tokenizer, defaults: of the checkpoint.
      prompts: the texts; none gives an empty text.
      most: new tokens of each; 0 gives an empty text.
      context: the most tokens of a prompt and its continuation.
      seed: of the draws.
      prefill_backend: as in moe_jax.generation.stream.

    Raises:
      ValueError: a prompt leaves no room.
    """
    if not prompts or not most:
        return ""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, ids))
    if longest >= context:
        raise ValueError(
            f"a prompt has {longest} tokens; expected fewer than the context's {context}"
        )
    made = generate(
        model,
        ids,
        sampling=defaults.sampling,
        stop_ids=defaults.stop_ids,
        seed=seed,
        max_new_tokens=min(most, context - longest),
        tokenizer=tokenizer,
        prefill_backend=prefill_backend,
    )
    parts = zip(prompts, made.texts, strict=True)
    return "".join(f"--- {prompt!r}\n{prompt}{text}\n" for prompt, text in parts)
