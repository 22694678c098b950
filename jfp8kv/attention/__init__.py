"""Attention over the paged cache: what a query may see, the implementations, and the dispatch between them."""
