"""A small model's config, the loop over training steps, and what is looked at when it is done."""

import math
import time
from collections.abc import Callable, Sequence

import jax

from experiments.bench.corpus import unigram_perplexity
from experiments.bench.environment import Environment
from experiments.bench.train_records import HeldOutRow, StepRow
from moe_jax.config import Qwen3MoeConfig
from moe_jax.generation import GenerationDefaults, generate
from moe_jax.model import Qwen3Moe
from moe_jax.scoring import Scorer, score
from moe_jax.tokenization import Tokenizer
from moe_jax.training import PackedDocuments, TrainOptions, TrainState, train_step

HEAD_DIM = 32  # of a small model's attention
AUX_LOSS_COEF = 0.01

_compiled_step = jax.jit(train_step, static_argnames="options", donate_argnames="state")


def small_config(
    *,
    vocab_size: int,
    layers: int,
    hidden: int,
    experts: int,
    experts_per_token: int,
    moe_intermediate: int,
    context: int,
    eos_token_id: int,
) -> Qwen3MoeConfig:
    """A config of these sizes: heads of HEAD_DIM, two for a key, and a tied embedding."""
    heads = hidden // HEAD_DIM
    return Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=context,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=moe_intermediate,
        norm_topk_prob=True,
        router_aux_loss_coef=AUX_LOSS_COEF,
        tie_word_embeddings=True,
        extra={"eos_token_id": eos_token_id},
    )


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], vocab_size: int) -> list[list[int]]:
    """Each document's tokens, and the end token behind them where the tokenizer has one.

    Raises:
      ValueError: there is a token that the model has not.
    """
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    made = [[*tokenizer.encode(text, add_special_tokens=False), *end] for text in texts]
    largest = max(max(ids, default=0) for ids in made)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}; expected 0 to {vocab_size - 1}, as vocab_size "
            f"is {vocab_size}"
        )
    return made


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
) -> TrainState:
    """Steps from the state's own number up to `steps`.

    Args:
      state: to begin with; it is donated.
      packed: the documents; step n trains on its batch n.
      options: how a step is computed.
      A, B: micro-batches, and rows of each.
      steps: how many are done at the end.
      log_every: the first step, each of these, and the last have a row.
      run: for the rows.
      on_step: called after each step with the number of steps done, and the row or None.

    Raises:
      FloatingPointError: the loss or the gradients of a row are not finite.
    """
    begun, tokens, compiles = time.perf_counter(), 0, True
    for number in range(int(state.step), steps):
        batch = packed.batch(number, A=A, B=B)
        state, metrics = _compiled_step(state, batch, options=options)
        done = number + 1
        tokens += batch.input_ids.size
        if not (compiles or done % log_every == 0 or done == steps):
            on_step(done, None)
            continue
        metrics.loss.block_until_ready()
        seconds = time.perf_counter() - begun
        row = StepRow.of(run, done, metrics, None if compiles else tokens / seconds)
        if not math.isfinite(row.loss) or not math.isfinite(row.gradient_norm):
            raise FloatingPointError(
                f"step {done} has a loss of {row.loss} and a gradient norm of {row.gradient_norm}; "
                "expected finite numbers: a lower learning rate may give them"
            )
        on_step(done, row)
        begun, tokens, compiles = time.perf_counter(), 0, False
    return state


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
      ids: the held-out text's.
      train: the documents' tokens, for the unigrams.
      context: the most that a prediction sees; a window's second half is scored.
      step, run: for the row.

    Raises:
      ValueError: there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(
            f"the held-out text has {len(ids)} tokens; expected at least 2, so more --text"
        )
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
