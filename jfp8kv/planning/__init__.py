"""Choosing a cache layer by layer, from what each layer costs where it is measured."""
