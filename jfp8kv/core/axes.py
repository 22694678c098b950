"""The axis words, the same from kernel to API.

=============  ====================================================================================
tokens         positions of one request handled in one call (a prefill chunk, or 1 when decoding)
requests       requests stepped together; the axis `vmap` adds
pages          entries of one request's page table, or physical pages of one layer
layer_pages    physical pages of all layers, folded: layer * pages + page
page_size      tokens per page
q_heads        query heads
kv_heads       key/value heads; q_heads = kv_heads * group
group          query heads that share one KV head
head_dim       features per head
hidden         width of the residual stream
vocab          token ids
layers         decoder layers
=============  ====================================================================================

A page table entry, slot or token id that means "nothing" is *past the end* (`num_pages`, `vocab`), never -1: JAX wraps
negative indices even with `mode="drop"`.
"""
