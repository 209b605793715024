"""Scores texts under a model, by prefill or by decode steps; two ways of computing side by side.

    [scores] = score([Scorer(model=model)], [tokens], context=1024, stride=512)
    scores.log_likelihood(), scores.perplexity()

`texts.py` has the windows that a text is read in and the loop over them, `scorer.py` the compiled
functions: the model on some columns, and what is kept of the logits.
"""

from moe_jax.scoring.scorer import SCORING_PHASES, Scorer
from moe_jax.scoring.texts import TextScores, perplexity, score

__all__ = ["SCORING_PHASES", "Scorer", "TextScores", "perplexity", "score"]
