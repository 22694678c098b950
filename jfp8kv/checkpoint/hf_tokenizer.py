"""Read and write the tokenizer of a Hugging Face folder.

The files are `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`. `tokenizer.json`
has everything but the roles of the special tokens, tokens added later, and the chat template. Its
post-processor decides whether BOS is added, as in transformers 5 (`add_bos_token` of the config is
for folders without a tokenizer.json). transformers itself is not used, because it imports torch
where torch is installed.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jfp8kv.checkpoint.hf_folder import read_json
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.text.tokenizer import Tokenizer, pick_template

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_OTHER_FORMATS = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model")
_ROLES = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer(folder: Path, *, eos_ids: Iterable[int] = ()) -> Tokenizer | None:
    """Return the folder's tokenizer, or None if it has no tokenizer.json.

    Warns about a tokenizer in an unsupported format.

    Raises:
      CheckpointError: a tokenizer file is damaged.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        if other := next((name for name in _OTHER_FORMATS if (folder / name).is_file()), None):
            warnings.warn(
                f"{folder}: its tokenizer is in {other}, and the folder has no tokenizer.json, so "
                "prompts must be token ids. "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers "
                "writes one.",
                stacklevel=4,
            )
        return None
    backend = read_backend(path)
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    special = _special_tokens(settings)
    backend.no_truncation()
    backend.no_padding()
    _add_missing_tokens(backend, settings, special)
    eos = backend.token_to_id(special.get("eos_token", ""))
    return Tokenizer(
        backend,
        chat_template=_chat_template(folder, settings),
        special_tokens=special,
        eos_ids=tuple(eos_ids) or (() if eos is None else (eos,)),
    )


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


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by role, such as `{"bos_token": "<s>"}`.

    A token is a string, or an object with `content`.
    """
    tokens = {}
    for role in _ROLES:
        value = settings.get(f"{role}_token")
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            tokens[f"{role}_token"] = value
    return tokens


def _add_missing_tokens(
    backend: Any, settings: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Add the tokens of tokenizer_config.json that tokenizer.json lacks."""
    from tokenizers import AddedToken

    for number, entry in _added_tokens(settings):
        content = entry["content"]
        if backend.token_to_id(content) is not None:
            continue
        flags = {flag: entry[flag] for flag in _TOKEN_FLAGS if flag in entry}
        backend.add_tokens([AddedToken(content, **flags)])
        if (assigned := backend.token_to_id(content)) != number:
            raise CheckpointError(
                f"{SETTINGS} gives {content!r} the id {number}; with {TOKENIZER} it would be "
                f"{assigned}."
            )
    missing = [token for token in special.values() if backend.token_to_id(token) is None]
    backend.add_special_tokens(missing)


def _added_tokens(settings: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Return `added_tokens_decoder` in the order of the ids.

    Raises:
      CheckpointError: the entry is malformed.
    """
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, Mapping):
        raise CheckpointError(f"{SETTINGS}: added_tokens_decoder must be a JSON object.")
    entries = []
    for number, entry in listed.items():
        if not number.isdecimal() or not isinstance(entry, Mapping):
            raise CheckpointError(
                f"{SETTINGS}: added_tokens_decoder is malformed at {number!r}: {entry!r}."
            )
        if not isinstance(entry.get("content"), str):
            raise CheckpointError(
                f"{SETTINGS}: added_tokens_decoder is malformed at {number!r}: no content."
            )
        entries.append((int(number), dict(entry)))
    return sorted(entries, key=lambda item: item[0])


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return pick_template(settings.get("chat_template"))


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
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    (folder / TOKENIZER).write_text(tokenizer.backend.to_str(), encoding="utf-8")
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / SETTINGS).write_text(f"{text}\n", encoding="utf-8")
