"""Tokenizers, chat templates, prompts and detokenization."""
