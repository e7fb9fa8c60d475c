"""One trace for the token viewer: each supervised token beside the distribution that the target had before it.

Row r of a trace supervises position t and is the distribution of token t+1, so it is shown at token t+1.

Shapes: T tokens, R supervised rows, N flat head entries of all rows, V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

from distill_pipe.report.facts import ViewedRow, ViewedToken, ViewedTrace
from distill_pipe.store.codec import rounding_error, scalar_bits
from distill_pipe.store.statistics import row_entropy
from distill_pipe.store.trace import Trace

# Keeps the page small: six such traces with eight candidates each are about a megabyte.
MOST_TOKENS = 512
CANDIDATES = 8


def viewed_trace(trace: Trace, vocab_size: int, logprob_bits: int) -> ViewedTrace:
    """The first tokens of a trace with their rows."""
    entropy_R, (low_R, high_R) = row_entropy([trace]), entropy_bounds(trace, vocab_size, logprob_bits)
    ends_R = trace.topk_counts_R.cumsum()
    rows: dict[int, ViewedRow] = {}
    for r, t in enumerate(trace.positions_R.tolist()):
        if t + 1 >= MOST_TOKENS:
            break
        count = int(trace.topk_counts_R[r])
        first = int(ends_R[r]) - count
        probabilities_K = np.exp(trace.topk_logprobs_N[first:first + count].astype(np.float64))
        ids_K = trace.topk_ids_N[first:first + CANDIDATES].tolist()
        rows[t + 1] = ViewedRow(
            # Eight samples may put the estimate outside what is possible at all.
            entropy=_short(np.clip(entropy_R[r], low_R[r], high_R[r])), entropy_low=_short(low_R[r]),
            entropy_high=_short(high_R[r]), tail_mass=_short(trace.tail_mass_R[r]),
            next_logprob=_short(trace.next_logprob_R[r]), head_entries=count,
            head_left=_short(probabilities_K[CANDIDATES:].sum()),
            candidates=tuple(zip(ids_K, map(_short, probabilities_K), strict=False)))
    tokens = tuple(ViewedToken(token_id=token, row=rows.get(t))
                   for t, token in enumerate(trace.token_ids_T[:MOST_TOKENS].tolist()))
    return ViewedTrace(ordinal=trace.ordinal, prompt_id=trace.prompt_id, domain=trace.domain,
                       finish_reason=trace.finish_reason, num_tokens=trace.num_tokens, tokens=tokens)


def entropy_bounds(trace: Trace, vocab_size: int, logprob_bits: int
                   ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the largest entropy in nats, `[R]` each, of any distribution that a row may have been stored from.

    With head part h, tail mass m and smallest head entry p_K: no tail token is likelier than p_K or m, so the entropy
    is at least `h - m log min(p_K, m)`; and an even tail over the V - K other tokens has the most, `h - m log(m / (V -
    K))`. Of h, m and p_K each takes what is least or most within their rounding.
    """
    counts_R = trace.topk_counts_R.astype(np.int64)
    ends_R = counts_R.cumsum()
    topk_2N = _rounded_from(trace.topk_logprobs_N, logprob_bits)
    mass_2R = np.minimum(_rounded_from(trace.tail_mass_R, scalar_bits(logprob_bits)), 1)
    log_mass_2R = np.log(np.maximum(mass_2R, np.finfo(np.float64).tiny))
    head_low_R, head_high_R = (np.add.reduceat(term_N, ends_R - counts_R) for term_N in _entropy_terms(topk_2N))
    tail_low_R, tail_high_R = _entropy_terms(log_mass_2R)
    low_R = head_low_R + np.maximum(tail_low_R, -mass_2R[0] * topk_2N[1, ends_R - 1])
    high_R = head_high_R + tail_high_R + mass_2R[1] * np.log(np.maximum(vocab_size - counts_R, 1))
    return low_R, np.maximum(low_R, high_R)


def _rounded_from(stored_N: NDArray[np.float32], bits: int) -> NDArray[np.float64]:
    """The least and the most that rounding to so many significant bits may have made `stored` of, `[2, N]`."""
    error = rounding_error(bits)
    return np.sort(stored_N.astype(np.float64) * np.array([[1 - error], [1 + error]]), axis=0)


def _entropy_terms(logp_2N: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the most of `-p log p` between two log-probabilities: it rises up to log p = -1, and falls then."""
    ends_2N = -np.exp(logp_2N) * logp_2N
    top_N: NDArray[np.float64] = np.clip(-1.0, *logp_2N)
    return ends_2N.min(0), -np.exp(top_N) * top_N


def _short(value: float) -> float:
    """Four significant digits: what a bar or a tooltip can show."""
    return float(f"{float(value):.4g}")
