"""Tokenizer folders as checkpoints have them, awkward ones too, and the chats rendered with them.

`write` builds each folder from a small byte-level BPE. `make_tokenizers.py` stores the results of
transformers, and `tests/checkpoint/test_tokenizer_folders.py` compares the library with them.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

BOS, EOS, PAD, TOOL = "<s>", "</s>", "<pad>", "<|tool|>"
SPECIAL = [PAD, BOS, EOS, TOOL]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3"]
TEMPLATE = (
    "{{ bos_token }}"
    "{% if tools is not none %}[TOOLS]{{ tools | tojson }}{% endif %}"
    "{% if documents is not none %}{% for d in documents %}[{{ d.title }}]{% endfor %}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}[FAST]{% endif %}"
    "{% for m in messages %}"
    "<{{ m['role'] }}>"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}|{{ part.text }}{% endfor %}{% endif %}"
    "{% endfor %}"
)
ROLES = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, **ROLES}

TEXTS = [
    "hello world 123",
    "",
    " hello  hello",
    f"{BOS}hello{EOS}",
    f"x{TOOL}y {PAD}",
    "x <|extra|> y<|more|>z",
    "naïve 日本 🎉\n\n  x",
]

USER = {"role": "user", "content": "hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
WEATHER = {
    "type": "function",
    "function": {"name": "f", "description": "x", "parameters": {"type": "object"}},
}
CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([{"role": "system", "content": "Be brief."}, USER], {}),
    "no generation prompt": ([USER], {"add_generation_prompt": False}),
    "content null": ([USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
    "keys with null": (
        [USER, {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None}],
        {},
    ),
    "no content": ([USER, {"role": "assistant", "tool_calls": [CALL]}], {}),
    "tools": ([USER], {"tools": [WEATHER]}),
    "no tools": ([USER], {"tools": []}),
    "documents": ([USER], {"documents": [{"title": "T", "text": "x"}]}),
    "thinking off": ([USER], {"chat_template_kwargs": {"enable_thinking": False}}),
    "special token replaced": ([USER], {"chat_template_kwargs": {"bos_token": "<B>"}}),
    "continued": (
        [USER, {"role": "assistant", "content": "Sure, "}],
        {"continue_final_message": True},
    ),
    "another template": ([USER], {"chat_template": "{{ messages[0].content }}{{ eos_token }}"}),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}],
        {"chat_template": PARTS_TEMPLATE},
    ),
}


def vocab() -> dict[str, int]:
    """Return the vocabulary: special tokens, bytes, merged pieces."""
    pieces = [merge.replace(" ", "") for merge in MERGES]
    listed = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces]
    return {token: number for number, token in enumerate(listed)}


def backend(special: list[str | AddedToken] | None = None, **parts: Any) -> tokenizers.Tokenizer:
    """Return the byte-level BPE with these special tokens; None for all of `SPECIAL`."""
    built = tokenizers.Tokenizer(models.BPE(vocab(), [tuple(m.split()) for m in MERGES]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(SPECIAL if special is None else special)
    for name, part in parts.items():
        setattr(built, name, part)
    return built


def metaspace() -> tokenizers.Tokenizer:
    """Return a BPE of the sentencepiece kind: spaces are ▁, unknown characters are bytes."""
    pieces = ["<unk>", BOS, EOS, *(f"<0x{i:02X}>" for i in range(256)), "▁", *"helowrd123"]
    pieces += ["he", "▁he"]
    table = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(
        table, [("h", "e"), ("▁", "he")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    built.add_special_tokens(["<unk>", BOS, EOS])
    built.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1)]
    )
    return built


def _json(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def folder(
    tokenizer: Callable[[], tokenizers.Tokenizer] | None = backend,
    settings: dict[str, Any] | None = PLAIN,
    model_type: str | None = "llama",
    **files: Any,
) -> Callable[[Path], None]:
    """Return a function that writes a folder with these files. `special_tokens_map={...}` writes
    the JSON file of that name, a string is written unchanged."""

    def write(path: Path) -> None:
        if model_type is not None:
            _json(path, "config.json", {"model_type": model_type})
        if tokenizer is not None:
            tokenizer().save(str(path / "tokenizer.json"))
        if settings is not None:
            _json(path, "tokenizer_config.json", settings)
        for name, content in files.items():
            if isinstance(content, str):
                (path / name.replace("__", ".")).write_text(content, encoding="utf-8")
            else:
                _json(path, f"{name}.json", content)

    return write


def tekken(control: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a `tekken.json` with these control tokens."""
    ranks = [*(bytes([i]) for i in range(256)), b"he", b"ll", b"hell", b"hello", b" w"]
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
    return {
        "config": {
            "pattern": pattern,
            "num_vocab_tokens": len(ranks),
            "default_vocab_size": len(ranks) + len(control),
            "default_num_special_tokens": len(control),
            "version": "v7",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(rank).decode(), "token_str": None}
            for i, rank in enumerate(ranks)
        ],
        "special_tokens": control,
    }


def _without_special() -> tokenizers.Tokenizer:
    return backend([])


def _roles_not_special() -> tokenizers.Tokenizer:
    built = backend([])
    built.add_tokens([AddedToken(token, special=False, normalized=False) for token in SPECIAL])
    return built


def _adds_bos() -> tokenizers.Tokenizer:
    return backend(
        post_processor=processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    )


_VOCAB_FILES = {"vocab": vocab(), "merges__txt": "#version: 0.2\n" + "\n".join(MERGES) + "\n"}
_CONTROL = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(SPECIAL)]
_NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T"}]
_DECODER = {
    "2": {"content": EOS, "special": False, "normalized": False},
    str(len(vocab())): {"content": "<|extra|>", "special": True, "lstrip": True, "rstrip": True},
    str(len(vocab()) + 1): {"content": "<|more|>", "special": False, "normalized": False},
}

FOLDERS: dict[str, Callable[[Path], None]] = {
    "plain": folder(),
    "plain, TokenizersBackend": folder(settings=PLAIN | {"tokenizer_class": "TokenizersBackend"}),
    "special only in the vocabulary": folder(_without_special),
    "special only in the vocabulary, smollm3": folder(_without_special, model_type="smollm3"),
    "no special tokens at all": folder(_without_special, settings=None),
    "roles not special": folder(_roles_not_special),
    "roles not special, no class": folder(_roles_not_special, {"chat_template": TEMPLATE, **ROLES}),
    "special_tokens_map": folder(
        _without_special,
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE},
        special_tokens_map=ROLES | {"additional_special_tokens": [TOOL, "<|extra|>"]},
    ),
    "special_tokens_map of objects": folder(
        settings={"chat_template": TEMPLATE},
        special_tokens_map={"bos_token": {"content": BOS, "lstrip": False}, "eos_token": EOS},
    ),
    "added_tokens": folder(added_tokens={"<|extra|>": len(vocab()), "<|more|>": len(vocab()) + 1}),
    "additional_special_tokens": folder(
        settings=PLAIN | {"additional_special_tokens": ["<|extra|>", "<|more|>"]}
    ),
    "extra_special_tokens": folder(
        settings=PLAIN | {"extra_special_tokens": ["<|extra|>", "<|more|>"]}
    ),
    "extra_special_tokens by name": folder(
        settings=PLAIN | {"extra_special_tokens": {"image_token": "<|extra|>"}}
    ),
    "added_tokens_decoder": folder(settings=PLAIN | {"added_tokens_decoder": _DECODER}),
    "roles as objects": folder(
        settings=PLAIN | {"bos_token": {"content": BOS, "__type": "AddedToken"}, "eos_token": TOOL}
    ),
    "roles null": folder(settings=PLAIN | {"bos_token": None, "eos_token": None}),
    "add_bos_token": folder(settings=PLAIN | {"add_bos_token": True, "add_eos_token": True}),
    "add_bos_token false": folder(_adds_bos, PLAIN | {"add_bos_token": False}),
    "adds BOS": folder(_adds_bos),
    "no settings": folder(settings=None),
    "no config": folder(model_type=None),
    "unknown class": folder(settings=PLAIN | {"tokenizer_class": "OwnTokenizer"}),
    "LlamaTokenizer with bytes": folder(settings=PLAIN | {"tokenizer_class": "LlamaTokenizer"}),
    "LlamaTokenizer": folder(metaspace, PLAIN | {"tokenizer_class": "LlamaTokenizer"}),
    "metaspace": folder(metaspace),
    "GPT2Tokenizer": folder(settings=PLAIN | {"tokenizer_class": "GPT2Tokenizer"}),
    "Qwen2Tokenizer": folder(
        settings=PLAIN | {"tokenizer_class": "Qwen2Tokenizer"}, model_type="qwen2"
    ),
    "qwen2, plain class": folder(model_type="qwen2"),
    "clean_up_tokenization_spaces": folder(settings=PLAIN | {"clean_up_tokenization_spaces": True}),
    "named templates": folder(settings=PLAIN | {"chat_template": _NAMED}),
    "template file": folder(chat_template__jinja=TEMPLATE, settings=PLAIN | {"chat_template": "x"}),
    "vocab.json, qwen2": folder(None, PLAIN | {"tokenizer_class": None}, "qwen2", **_VOCAB_FILES),
    "vocab.json, gpt2": folder(None, PLAIN | {"tokenizer_class": None}, "gpt2", **_VOCAB_FILES),
    "tekken.json": folder(None, None, "mistral", tekken=tekken(_CONTROL)),
}


def write(name: str, path: Path) -> Path:
    """Write a folder of `FOLDERS`, and return its path."""
    path.mkdir(parents=True, exist_ok=True)
    FOLDERS[name](path)
    return path
