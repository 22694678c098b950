"""Sampling: parameters of a request, and pure functions from logits to tokens.

`params` has the options, checked on the host. `settings` has the same values as device scalars, one
row per request. `rng` derives random keys, `penalties` edits logits, `filters` computes the cut of
top-k, top-p and min-p, and `sample` combines them. Device functions are written for one request and
batched with `vmap`.
"""
