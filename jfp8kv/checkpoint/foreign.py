"""Recognize folders that are not checkpoints, so that errors say what they are and what to do."""

from pathlib import Path

from jfp8kv.core.errors import CheckpointError
from jfp8kv.core.file_contents import describe_placeholder
from jfp8kv.models.saved_names import MERGE_ADVICE

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer.model",
    "tekken.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# Files of a folder that has no config.json or no weights, and what to do with them.
_FOLDER_CONTENTS = {
    "*.gguf": "It contains {name}: load that file instead.",
    "model_index.json": "It contains {name}: it is a diffusers pipeline, not a language model.",
    "params.json": (
        "It contains {name}: it is in Meta's or Mistral's own format. Use the Hugging Face version "
        "of the model, or convert it with the conversion scripts of transformers."
    ),
    "zero_to_fp32.py": (
        "It is a DeepSpeed checkpoint: run `python zero_to_fp32.py . new_folder "
        "--safe_serialization` in it."
    ),
    "*.distcp": (
        "It is a distributed checkpoint of PyTorch: gather it into a model and write that with "
        "save_pretrained of transformers."
    ),
    "tf_model.h5": "It contains {name}: Keras weights are not supported; convert to safetensors.",
    "flax_model.msgpack": (
        "It contains {name}: convert it to safetensors, or wrap the tree in memory with "
        "Params.from_pytree."
    ),
    "*.onnx": "It contains {name}: ONNX models are not supported; use the original weights.",
    "*/config.json": "{parent} has a config.json: load that folder.",
    "snapshots/*/config.json": "It is a cache folder of the hub: load {parent}.",
}


def check_tokenizer_files(folder: Path) -> None:
    """Raise `CheckpointError` for a tokenizer file that is a pointer or a web page."""
    for name in _TOKENIZER_FILES:
        path = folder / name
        found = describe_placeholder(path) if path.is_file() else None
        if found is not None:
            raise CheckpointError(f"{path}: not a tokenizer file, but {found}.")


def adapter_error(folder: Path, base: object) -> CheckpointError:
    """Return the error for a folder with a PEFT adapter and no model."""
    of_base = f" for {base}" if isinstance(base, str) and base else ""
    return CheckpointError(
        f"{folder}: only an adapter{of_base} (PEFT), without the weights of a model. {MERGE_ADVICE}"
    )


def folder_hint(folder: Path) -> str:
    """Return what a folder without a config or weights contains and what to do, with a space.

    Returns "" if nothing is recognized.
    """
    for pattern, hint in _FOLDER_CONTENTS.items():
        found = sorted(folder.glob(pattern))
        if found:
            return " " + hint.format(name=found[0].name, parent=found[0].parent)
    return ""
