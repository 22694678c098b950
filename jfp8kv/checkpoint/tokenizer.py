"""The tokenizer of a Hugging Face folder, read from `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, and
written.

`tokenizer.json` has everything but the roles of the special tokens, tokens added since, and the chat template.
Whether BOS is added is its post-processor's word, as in transformers since version 5 (`add_bos_token` in the config
is for folders without a tokenizer.json). transformers itself is not used, because it imports torch where torch is
installed.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jfp8kv.checkpoint.folder import read_json
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.text.tokenizer import Tokenizer, pick_template

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_OTHER_FORMS = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model")


def read_tokenizer(folder: Path, *, eos_ids: Iterable[int] = ()) -> Tokenizer | None:
    """The folder's tokenizer; None when it has none, with a warning when it has one in a form that is not read.

    Raises:
      CheckpointError: a tokenizer file is damaged.
    """
    import tokenizers

    path = folder / TOKENIZER
    if not path.is_file():
        if other := next((name for name in _OTHER_FORMS if (folder / name).is_file()), None):
            warnings.warn(
                f"{folder}: its tokenizer is in {other} and there is no tokenizer.json, so prompts must be token ids. "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers writes one.",
                stacklevel=4,
            )
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for what it cannot parse
        raise CheckpointError(f"{path}: not a readable tokenizer: {error}.") from error
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


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """`{"bos_token": "<s>", ...}`; a token may be spelled as a string or as an object with `content`."""
    found = {}
    for key in (
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
    ):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(value, str):
            found[key] = value
    return found


def _add_missing_tokens(
    backend: Any, settings: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    from tokenizers import AddedToken

    listed = settings.get("added_tokens_decoder") or {}
    try:
        entries = sorted(
            ((int(number), dict(entry)) for number, entry in listed.items()),
            key=lambda item: item[0],
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"tokenizer_config.json: added_tokens_decoder is malformed ({error})."
        ) from error
    for number, entry in entries:
        if backend.token_to_id(entry["content"]) is None:
            flags = {
                k: entry[k]
                for k in ("single_word", "lstrip", "rstrip", "normalized", "special")
                if k in entry
            }
            backend.add_tokens([AddedToken(entry["content"], **flags)])
            if (got := backend.token_to_id(entry["content"])) != number:
                raise CheckpointError(
                    f"tokenizer_config.json puts {entry['content']!r} at id {number}; beside tokenizer.json it would be {got}."
                )
    backend.add_special_tokens(
        [token for token in special.values() if backend.token_to_id(token) is None]
    )


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return pick_template(settings.get("chat_template"))


def require_written_form(tokenizer: Any) -> None:
    """Raise `ConfigError` for a tokenizer, or what serves as one, that cannot be written to a file. None can."""
    if tokenizer is None or (
        isinstance(tokenizer, Tokenizer) and hasattr(tokenizer.backend, "to_str")
    ):
        return
    kind = type(tokenizer.backend if isinstance(tokenizer, Tokenizer) else tokenizer).__name__
    raise ConfigError(
        f"tokenizer of type {kind}: has no written form, so the folder would come back without it. One of the tokenizers "
        "library (or a fast one of transformers) has; or give dataclasses.replace(params, tokenizer=None)."
    )


def written_special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """What templates may name, as JSON has it."""
    return json.loads(json.dumps(tokenizer.special_tokens, default=str))


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_len: int) -> None:
    """Write what `read_tokenizer` reads, and transformers' `AutoTokenizer`: everything is in `tokenizer.json`, so the class
    named beside it is the one that adds nothing of its own."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
        **written_special_tokens(tokenizer),
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    (folder / TOKENIZER).write_text(tokenizer.backend.to_str(), encoding="utf-8")
    (folder / SETTINGS).write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
