"""The tokenizer and chat template inside a GGUF file.

GGUF keeps a vocabulary, merges or scores, token types, and for byte-level BPE the *name* of a pre-tokenizer, not its
rule. The rules are listed here, as the models' own `tokenizer.json` files have them. A name that is not listed gives
no tokenizer, with a warning: splitting text by the wrong rule would change every answer quietly. Where llama.cpp and the
model's `tokenizer.json` differ, ids are the latter's: it normalizes Unicode for Qwen, for one.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jfp8kv.text.tokenizer import Tokenizer

# Token types of the GGUF specification.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def tokenizer_from_gguf(
    fields: Mapping[str, Any], *, eos_ids: Iterable[int], where: Path
) -> Tokenizer | None:
    """A `Tokenizer` from GGUF metadata; None, with a warning, when the file has none that is read here."""
    build = _MODELS.get(fields.get("tokenizer.ggml.model", ""))
    fields = _with_spaces_marked(fields)
    backend = build(fields) if build and "tokenizer.ggml.tokens" in fields else None
    if backend is None:
        name = " / ".join(str(fields.get(f"tokenizer.ggml.{key}")) for key in ("model", "pre"))
        warnings.warn(
            f"{where}: its tokenizer ({name}) is not read here, so prompts must be token ids. Models: "
            f"{', '.join(_MODELS)}; pre-tokenizers: {', '.join(_PRE_TOKENIZERS)}.",
            stacklevel=4,
        )
        return None
    special = _special_tokens(fields)
    _mark_special(backend, fields)
    bos = special.get("bos_token") if _adds_bos(fields) else None
    eos = special.get("eos_token") if fields.get("tokenizer.ggml.add_eos_token") else None
    if bos or eos:
        _surround(backend, bos, eos)
    return Tokenizer(
        backend,
        chat_template=fields.get("tokenizer.chat_template"),
        special_tokens=special,
        eos_ids=eos_ids,
    )


def _with_spaces_marked(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields, runs of spaces that are tokens (Gemma has them) spelled "▁" as in the model's own file, not " "."""
    tokens, kinds = fields.get("tokenizer.ggml.tokens"), fields.get("tokenizer.ggml.token_type")
    if fields.get("tokenizer.ggml.model") != "llama" or not tokens or not kinds:
        return fields
    marked = [
        "▁" * len(token) if kind == _USER_DEFINED and not token.strip(" ") else token
        for token, kind in zip(tokens, kinds, strict=False)
    ]
    return {**fields, "tokenizer.ggml.tokens": [*marked, *tokens[len(kinds) :]]}


def _adds_bos(fields: Mapping[str, Any]) -> bool:
    """The file's word, or llama.cpp's default: sentencepiece vocabularies and Llama 3's add BOS, the rest do not."""
    default = (
        fields["tokenizer.ggml.model"] == "llama"
        or fields.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    )
    return bool(fields.get("tokenizer.ggml.add_bos_token", default))


def _surround(backend: Any, bos: str | None, eos: str | None) -> None:
    """Make a `tokenizers.Tokenizer` put these tokens around every text."""
    from tokenizers.processors import TemplateProcessing

    tokens = [token for token in (bos, eos) if token]
    single = " ".join(part for part in (bos, "$A", eos) if part)
    backend.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, backend.token_to_id(token)) for token in tokens]
    )


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    tokens = fields["tokenizer.ggml.tokens"]
    found = {}
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = fields.get(f"tokenizer.ggml.{theirs}_token_id")
        if number is not None and number < len(tokens):
            found[f"{ours}_token"] = tokens[number]
    return found


def _mark_special(backend: Any, fields: Mapping[str, Any]) -> None:
    """Control tokens are found in text and left out of it again; user-defined ones are found and kept."""
    from tokenizers import AddedToken

    typed = list(
        zip(
            fields["tokenizer.ggml.tokens"],
            fields.get("tokenizer.ggml.token_type", ()),
            strict=False,
        )
    )
    control = [
        AddedToken(t, normalized=False, special=True)
        for t, kind in typed
        if kind in (_CONTROL, _UNKNOWN)
    ]
    kept = [
        AddedToken(t, normalized=False, special=False) for t, kind in typed if kind == _USER_DEFINED
    ]
    backend.add_special_tokens(control)
    backend.add_tokens(kept)


def _byte_level_bpe(fields: Mapping[str, Any]) -> Any | None:
    """Byte-level BPE (GPT-2's kind). Llama 3 takes a whole word that is a token before it looks at merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    name = fields.get("tokenizer.ggml.pre")
    if name not in _PRE_TOKENIZERS or "tokenizer.ggml.merges" not in fields:
        return None
    vocab = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=name in _LLAMA3_NAMES))
    if name in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[name]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2() -> Any:
    from tokenizers import pre_tokenizers as pre

    return pre.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> Any:
    """GPT-2's rule after every digit has been split off by itself."""
    from tokenizers import pre_tokenizers as pre

    return pre.Sequence([pre.Digits(individual_digits=True), _gpt2()])


def _by_regex(pattern: str) -> Callable[[], Any]:
    def build() -> Any:
        from tokenizers import Regex
        from tokenizers import pre_tokenizers as pre

        split = pre.Split(Regex(pattern), behavior="isolated", invert=False)
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_COMPOSED = ("qwen2",)  # "e" and a combining accent become one letter first
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    **dict.fromkeys(_LLAMA3_NAMES, _by_regex(_LLAMA3)),
    "qwen2": _by_regex(_QWEN2),
}


def _sentencepiece(fields: Mapping[str, Any]) -> Any | None:
    """The sentencepiece BPE of Llama 1 and 2 and of Gemma: no merges are stored, the best-scored piece is joined first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    tokens, scores = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.scores")
    if scores is None:
        return None
    vocab = {token: number for number, token in enumerate(tokens)}
    kinds = fields.get("tokenizer.ggml.token_type", ())
    kept = dict.fromkeys(
        token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED
    )
    unknown = _special_tokens(fields).get("unk_token")
    model = models.BPE(
        vocab, _merges(vocab, scores, kept), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    backend = Backend(model)
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(
    vocab: Mapping[str, int], scores: Sequence[float], kept: Collection[str]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the third first, then in order of ids, as in Llama 2's own file.

    User-defined pieces (`kept`) go before all, the longest left part first, so that a run of spaces is one token for as long
    as there is one. Their scores in the file mean nothing.
    """
    first = sorted(
        (pair for piece in kept for pair in _splits(piece, vocab)),
        key=lambda pair: (-len(pair[0]), -len(pair[1])),
    )
    ranked = sorted(
        (piece for piece in vocab if piece not in kept), key=lambda piece: -scores[vocab[piece]]
    )
    return first + [pair for piece in ranked for pair in _splits(piece, vocab)]


def _splits(piece: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    cuts = range(1, len(piece))
    found = [
        (left, right)
        for cut in cuts
        if (left := piece[:cut]) in vocab and (right := piece[cut:]) in vocab
    ]
    return (
        sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        if len(found) > 1
        else found
    )


_MODELS: dict[str, Callable[[Mapping[str, Any]], Any | None]] = {
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece,
}
