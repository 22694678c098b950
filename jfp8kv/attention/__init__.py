"""Attention over the paged cache: interface, backends, and the dispatch between them."""
