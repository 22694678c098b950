"""Text on its way in and out of the engine: tokenizers, prompts, detokenization."""
