"""Read and write the tokenizer of a Hugging Face folder.

transformers reads it, because checkpoints follow its rules on special tokens, their roles and chat
templates. Its code is imported when a tokenizer is read. It imports torch where torch is installed,
except for a plain `tokenizer.json`, which its general class reads without `AutoTokenizer`.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jfp8kv.checkpoint.hf_folder import read_json
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.text.chat import quiet_transformers
from jfp8kv.text.tokenizer import Tokenizer, named_templates

TOKENIZER, SETTINGS, TEKKEN = "tokenizer.json", "tokenizer_config.json", "tekken.json"
# Files of which one is enough for a tokenizer.
_FORMATS = (TOKENIZER, TEKKEN, "vocab.json", "vocab.txt")
_FORMAT_SUFFIXES = (".model", ".tiktoken")
# Tokenizer classes that read `tokenizer.json` unchanged, for model types without special rules.
# `AutoTokenizer` then uses the general class.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_PLAIN_MODEL_TYPES = ("llama",)


def read_tokenizer(folder: Path, *, vocab: int | None = None) -> Tokenizer | None:
    """Return the folder's tokenizer, or None if it has none.

    Args:
      folder: a Hugging Face folder.
      vocab: the model's vocabulary size. An EOS token outside it is dropped, with a warning.

    Raises:
      CheckpointError: a tokenizer that is damaged, needs a library that is not installed, or needs
        code of the checkpoint, which is never run.
    """
    name = _format(folder)
    if name is None:
        return None
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    added = _added_tokens(settings)
    try:
        loader = _loader(folder, settings)
    except (ImportError, RuntimeError) as error:  # a broken installation, of torch for example
        raise CheckpointError(
            f"{folder / name}: transformers, which reads it, cannot be imported: {error}"
        ) from error
    theirs = _load(folder, name, loader)
    backend = getattr(theirs, "backend_tokenizer", theirs)
    if backend is not theirs:
        backend.no_truncation()
        backend.no_padding()
        _check_added_tokens(backend, added)
    eos = theirs.eos_token_id
    if eos is not None and vocab is not None and not 0 <= eos < vocab:
        warnings.warn(
            f"{folder / SETTINGS}: eos_token {theirs.eos_token!r} has the id {eos}, outside the "
            f"model's vocabulary of {vocab} tokens, and is ignored.",
            stacklevel=4,
        )
        eos = None
    return Tokenizer(
        backend,
        chat_template=named_templates(theirs.chat_template),
        special_tokens=theirs.special_tokens_map,
        eos_ids=() if eos is None else (eos,),
    )


def _format(folder: Path) -> str | None:
    """Return the file that has the tokenizer."""
    for name in _FORMATS:
        if (folder / name).is_file():
            return name
    found = (path.name for path in folder.iterdir() if path.name.endswith(_FORMAT_SUFFIXES))
    return min(found, default=None)


def _loader(folder: Path, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function of transformers that reads the folder's tokenizer."""
    config = folder / "config.json"
    model_type = read_json(config).get("model_type") if config.is_file() else None
    plain = (
        (folder / TOKENIZER).is_file()
        and settings.get("tokenizer_class") in _PLAIN_CLASSES
        and "auto_map" not in settings
        and model_type in _PLAIN_MODEL_TYPES
    )
    loader: Callable[..., Any]
    with quiet_transformers():
        if plain:
            from transformers.tokenization_utils_tokenizers import TokenizersBackend

            loader = TokenizersBackend.from_pretrained
        else:
            from transformers import AutoTokenizer

            loader = AutoTokenizer.from_pretrained
    return loader


def _load(folder: Path, name: str, loader: Callable[..., Any]) -> Any:
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = loader(folder, trust_remote_code=False, local_files_only=True)
            if not hasattr(loaded, "backend_tokenizer") and (folder / TEKKEN).is_file():
                loaded = _from_tekken(folder / TEKKEN)
    except Exception as error:  # noqa: BLE001 (transformers documents no exceptions)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"{folder / name}: not a readable tokenizer: {reason}.{_advice(name, reason)}"
        ) from error
    return loaded


def _from_tekken(path: Path) -> Any:
    """Return the tokenizer of Mistral's format with the chat template of mistral-common.

    `AutoTokenizer` returns one of mistral-common where that is installed, which has no template and
    no backend of the tokenizers library. Both add BOS to a text.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    converted = convert_tekken_tokenizer(str(path))
    bos = converted.bos_token
    converted.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, converted.bos_token_id)]
    )
    return converted


def _advice(name: str, reason: str) -> str:
    if "custom code" in reason:
        return (
            " Code of a checkpoint is never run. Where you trust it, save the tokenizer as a "
            "tokenizer.json with save_pretrained of transformers."
        )
    if name.endswith(_FORMAT_SUFFIXES):
        needed = {"sentencepiece": "SentencePiece", "tiktoken": "tiktoken"}
        missing = {module: name for module, name in needed.items() if find_spec(module) is None}
        if missing:
            installs = " or ".join(f"pip install 'jfp8kv[{module}]'" for module in missing)
            return f" A file in the format of {' or '.join(missing.values())} needs {installs}."
    if name == TEKKEN and find_spec("mistral_common") is None:
        return " mistral-common may read it: pip install 'jfp8kv[mistral]'."
    return ""


def _check_added_tokens(backend: Any, added: Mapping[int, str]) -> None:
    """Raise `CheckpointError` if a token of `added_tokens_decoder` has another id."""
    for number, content in added.items():
        if (assigned := backend.token_to_id(content)) != number:
            raise CheckpointError(
                f"{SETTINGS} gives {content!r} the id {number}; with {TOKENIZER} it would be "
                f"{assigned}."
            )


def _added_tokens(settings: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens of `added_tokens_decoder` by id.

    Raises:
      CheckpointError: the entry is malformed.
    """
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, Mapping):
        raise CheckpointError(f"{SETTINGS}: added_tokens_decoder must be a JSON object.")
    added = {}
    for number, entry in listed.items():
        if not number.isdecimal() or not isinstance(entry, Mapping):
            raise CheckpointError(
                f"{SETTINGS}: added_tokens_decoder is malformed at {number!r}: {entry!r}."
            )
        if not isinstance(entry.get("content"), str):
            raise CheckpointError(
                f"{SETTINGS}: added_tokens_decoder is malformed at {number!r}: no content."
            )
        added[int(number)] = entry["content"]
    return added


def read_backend(path: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a tokenizer.json.

    Raises:
      CheckpointError: the file is missing or damaged.
    """
    import tokenizers

    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable tokenizer: {error}.") from error
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises bare Exception for invalid content
            raise
        raise CheckpointError(f"{path}: not a readable tokenizer: {error}.") from error


def require_serializable(tokenizer: Any) -> None:
    """Raise `ConfigError` for a tokenizer that cannot be written to a file. None is accepted."""
    if tokenizer is None:
        return
    backend = tokenizer.backend if isinstance(tokenizer, Tokenizer) else tokenizer
    if isinstance(tokenizer, Tokenizer) and hasattr(backend, "to_str"):
        return
    raise ConfigError(
        f"tokenizer of type {type(backend).__name__}: cannot be written to a file, so the folder "
        "would have none. Use a tokenizer of the tokenizers library (or a fast one of "
        "transformers), or write without it: dataclasses.replace(params, tokenizer=None)."
    )


def special_tokens_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the special tokens as JSON values; tokens of other types become strings."""
    tokens: dict[str, Any] = json.loads(json.dumps(tokenizer.special_tokens, default=str))
    return tokens


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_len: int) -> None:
    """Write the files that `read_tokenizer` and transformers' `AutoTokenizer` read.

    `tokenizer.json` is complete, so the class named in the settings is the one that adds nothing.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        **special_tokens_json(tokenizer),
    }
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        settings["chat_template"] = [
            {"name": name, "template": text} for name, text in template.items()
        ]
    elif template is not None:
        settings["chat_template"] = template
    (folder / TOKENIZER).write_text(tokenizer.backend.to_str(), encoding="utf-8")
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / SETTINGS).write_text(f"{text}\n", encoding="utf-8")
