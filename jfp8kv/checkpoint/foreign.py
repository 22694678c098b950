"""Recognize files that are not what their name says, and weights that were saved from a wrapper.

Downloads leave pointers, web pages and partial files under the name of a checkpoint file; training
code saves adapters, pickles and wrapped modules. Each is refused with what it is and what to do.
"""

from collections.abc import Iterable
from pathlib import Path

from jfp8kv.core.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLE_ADVICE = (
    "pickle files can run code when they are read, so they are not supported. Convert them where "
    "you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) of "
    "transformers writes safetensors."
)
ADAPTER_CONFIG = "adapter_config.json"
_MERGE_ADVICE = (
    "Merge it into its base model with PEFT: AutoPeftModelForCausalLM.from_pretrained(adapter)"
    ".merge_and_unload().save_pretrained(new_folder)."
)
_HEAD_BYTES = 2048
_DOWNLOAD = "download the file again, for example with `hf download`"
_LFS = (
    f"a Git LFS pointer, not the file itself: run `git lfs pull` in the repository, or {_DOWNLOAD}"
)
_ANNEX = "a git-annex pointer, not the file itself: run `git annex get` in the repository"
_WEB_PAGE = (
    "a web page (HTML), such as an error or login page of a server: use the download link of the "
    f"file ('resolve', not 'blob', on the hub), or {_DOWNLOAD}"
)
_XML = f"an XML document, such as the error message of a server: {_DOWNLOAD}"
_OLD_GGML = "a GGML file from before GGUF: convert the original model to GGUF with llama.cpp"
_COMPRESSED = "a compressed file: unpack it first"
# By the first bytes of the file.
_PLACEHOLDERS: dict[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": _LFS,
    b"version https://hawser.github.com/spec/": _LFS,  # the name of Git LFS before its release
    b"/annex/objects/": _ANNEX,
}
_FORMATS: dict[bytes, str] = {
    b"GGUF": "a GGUF file: rename it to .gguf and load that file",
    b"ggml": _OLD_GGML,
    b"lmgg": _OLD_GGML,
    b"fmgg": _OLD_GGML,
    b"tjgg": _OLD_GGML,
    b"\x89HDF": "an HDF5 file, as Keras writes it: convert the model to safetensors",
    b"\x93NUMPY": "a NumPy array: convert the model to safetensors",
    b"\x1f\x8b": _COMPRESSED,
    b"BZh": _COMPRESSED,
    b"\xfd7zXZ": _COMPRESSED,
    b"\x28\xb5\x2f\xfd": _COMPRESSED,
    b"7z\xbc\xaf": _COMPRESSED,
}
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
# By a component of a tensor name: what saved it, and how to save the model inside.
_WRAPPERS = {
    "_orig_mod": ("torch.compile", "save model._orig_mod"),
    "module": ("DataParallel, DistributedDataParallel or DeepSpeed", "save model.module"),
    "_fsdp_wrapped_module": ("FSDP", "save a full state dict"),
    "_flat_param": ("FSDP", "save a full state dict"),
    "_checkpoint_wrapped_module": ("activation checkpointing", "save the module inside"),
}
_ADAPTER_PARTS = frozenset(
    (
        "base_layer",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "modules_to_save",
        "ia3_l",
        "hada_w1_a",
        "lokr_w1",
        "prompt_embeddings",
    )
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


def describe_file(path: Path) -> str | None:
    """Return what a file is and what to do, by its first bytes; None if it is not recognized.

    For files that their reader refuses: "a Git LFS pointer, not the file itself: run ...".
    """
    head = _head(path)
    return _placeholder(head) or _format(head)


def describe_placeholder(path: Path) -> str | None:
    """Return as `describe_file` what stands in for the real file: a pointer or a web page."""
    return _placeholder(_head(path))


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


def not_a(kind: str, path: Path, reason: str) -> CheckpointError:
    """Return the error for a file of another format.

    Args:
      kind: the format that was expected, with its article.
      path: the file.
      reason: what its reader found, for a file that is not recognized.
    """
    found = describe_file(path)
    return CheckpointError(
        f"{path}: not {kind} ({reason})." if found is None else f"{path}: not {kind}, but {found}."
    )


def _placeholder(head: bytes) -> str | None:
    """Return the description of a pointer or a web page by its first bytes."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, description in _PLACEHOLDERS.items():
        if text.startswith(start):
            return description
    lower = text.lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<title")):
        return _WEB_PAGE
    if lower.startswith(b"<?xml") or lower.startswith(b"<error"):
        return _WEB_PAGE if b"<html" in lower else _XML
    if lower.startswith(b"<!--") and b"<html" in lower:
        return _WEB_PAGE
    return None


def _format(head: bytes) -> str | None:
    """Return the description of a file in a known format by its first bytes."""
    for start, description in _FORMATS.items():
        if head.startswith(start):
            return description
    if head.startswith(b"PK\x03\x04"):
        if b"data.pkl" in head:
            return f"a PyTorch pickle: {PICKLE_ADVICE.removesuffix('.')}"
        return "a ZIP archive: unpack it first"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2:
        return f"a PyTorch or Python pickle: {PICKLE_ADVICE.removesuffix('.')}"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if not head:
        return f"an empty file: {_DOWNLOAD}"
    if not head.strip(b"\0"):
        return f"a file of zero bytes, as an interrupted download leaves it: {_DOWNLOAD}"
    if head.lstrip()[:1] == b"{":
        return f"JSON text, such as the error message of a server: {_DOWNLOAD}"
    return None


def check_tokenizer_files(folder: Path) -> None:
    """Raise `CheckpointError` for a tokenizer file that is a pointer or a web page."""
    for name in _TOKENIZER_FILES:
        path = folder / name
        found = describe_placeholder(path) if path.is_file() else None
        if found is not None:
            raise CheckpointError(f"{path}: not a tokenizer file, but {found}.")


def check_saved_names(names: Iterable[str], *, where: Path) -> None:
    """Raise `CheckpointError` for tensors of an adapter or of a wrapped module, by their names."""
    for name in names:
        parts = name.split(".")
        if not _ADAPTER_PARTS.isdisjoint(parts) or name.startswith("base_model.model."):
            raise CheckpointError(f"{where}: {name} is a tensor of an adapter. {_MERGE_ADVICE}")
        for part in parts:
            if part in _WRAPPERS:
                wrapper, advice = _WRAPPERS[part]
                raise CheckpointError(
                    f"{where}: {name} has '{part}.' in its name, because it was saved from a "
                    f"module wrapped by {wrapper}: {advice} instead, or rename the tensors without "
                    "it."
                )


def adapter_error(folder: Path, base: object) -> CheckpointError:
    """Return the error for a folder with a PEFT adapter and no model."""
    of_base = f" for {base}" if isinstance(base, str) and base else ""
    return CheckpointError(
        f"{folder}: only an adapter{of_base} (PEFT), without the weights of a model. "
        f"{_MERGE_ADVICE}"
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
