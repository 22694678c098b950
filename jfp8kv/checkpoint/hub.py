"""A model's files from the Hugging Face hub, through huggingface_hub and its cache."""

from pathlib import Path

from jfp8kv.checkpoint.kv_file import KV_FILE
from jfp8kv.core.errors import CheckpointError

SMALL = ["*.json", "*.jinja", "tokenizer.model", KV_FILE]
FILES = ["*.safetensors", *SMALL]
NOT_THESE = ["*/*", "consolidated*.safetensors"]  # other formats and copies of the same weights


def fetch(repo: str, *, weights: bool = True) -> Path:
    """The local folder of a hub model: configs, tokenizer and, if asked for, weights, downloaded if the cache lacks them.

    Raises:
      CheckpointError: it cannot be had, saying what to try.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repo, allow_patterns=FILES if weights else SMALL, ignore_patterns=NOT_THESE
            )
        )
    except (
        Exception
    ) as error:  # it lets through those of its HTTP library, which differs between its versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{repo}: no such folder here, and the Hugging Face hub did not give a model of that name ({reason}). "
            "Check the spelling and the network; gated models need `hf auth login`; with HF_HUB_OFFLINE=1 only the "
            "cache is read."
        ) from error
