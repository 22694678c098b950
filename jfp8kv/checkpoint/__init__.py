"""Checkpoints: load Hugging Face folders, hub ids, GGUF files and saved folders; save; export."""

from jfp8kv.checkpoint.load import load
from jfp8kv.checkpoint.orbax import save
from jfp8kv.text.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load", "save"]
