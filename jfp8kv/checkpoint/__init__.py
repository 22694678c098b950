"""Reading checkpoints into `Params`: Hugging Face folders and hub ids, GGUF files, tokenizers, and what `save` wrote; and
writing them: `save` in a form of our own, `export` (in its module) as a Hugging Face folder."""

from jfp8kv.checkpoint.load import load
from jfp8kv.checkpoint.orbax import save
from jfp8kv.text.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load", "save"]
