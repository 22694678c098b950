"""Reference implementation of sampling in NumPy and float64, with sorting."""

import numpy as np


def adjusted(logits, params, generated=0, prompt=(), output=(), eos_ids=()):
    """Return the logits after bias, penalties and min_tokens, one token at a time."""
    x = np.asarray(logits, np.float64).copy()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in range(len(x)):
        in_output = list(output).count(token)
        if in_output or token in prompt:
            x[token] = (
                x[token] / params.repetition_penalty
                if x[token] > 0
                else x[token] * params.repetition_penalty
            )
        x[token] -= params.presence_penalty * (in_output > 0) + params.frequency_penalty * in_output
    if generated < params.min_tokens:
        x[[*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)]] = -np.inf
    return x


def distribution(logits, params):
    """Return the probabilities after temperature, top-k, top-p and min-p. Ties stay together."""
    x = np.asarray(logits, np.float64)
    if params.temperature == 0:
        return np.eye(len(x))[np.argmax(x)]
    p = normalized(np.exp((x - x.max()) / params.temperature))
    if 0 < params.top_k < len(p):
        p = normalized(np.where(x >= np.sort(x)[-params.top_k], p, 0))
    if params.top_p < 1:
        descending = np.sort(p)[::-1]
        last = np.argmax(np.cumsum(descending) >= params.top_p)
        p = normalized(np.where(p >= descending[last], p, 0))
    return normalized(np.where(p >= params.min_p * p.max(), p, 0))


def normalized(p):
    return p / p.sum()
