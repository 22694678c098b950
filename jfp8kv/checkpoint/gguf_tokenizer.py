"""Build the tokenizer of a GGUF file, with its chat template.

GGUF stores a vocabulary, merges or scores, token types, and for byte-level BPE the *name* of a
pre-tokenizer instead of its rule. The rules are listed here, as in the `tokenizer.json` files of
the models. A file with an unknown name has no tokenizer here, with a warning, because the wrong
rule would silently change every output. If llama.cpp and `tokenizer.json` of the model differ, ids
follow `tokenizer.json`, which for example normalizes Unicode for Qwen.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jfp8kv.text.tokenizer import Tokenizer

# Token types of the GGUF specification.
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def tokenizer_from_gguf(
    fields: Mapping[str, Any], *, eos_ids: Iterable[int], where: Path
) -> Tokenizer | None:
    """Return the `Tokenizer` of GGUF metadata; None, with a warning, if it is not supported."""
    build = _MODELS.get(fields.get("tokenizer.ggml.model", ""))
    fields = _with_marked_spaces(fields)
    backend = build(fields) if build and "tokenizer.ggml.tokens" in fields else None
    if backend is None:
        name = " / ".join(str(fields.get(f"tokenizer.ggml.{key}")) for key in ("model", "pre"))
        warnings.warn(
            f"{where}: its tokenizer ({name}) is not supported, so prompts must be token ids. "
            f"Supported models: {', '.join(_MODELS)}; pre-tokenizers: "
            f"{', '.join(_PRE_TOKENIZERS)}.",
            stacklevel=4,
        )
        return None
    special = _special_tokens(fields)
    _mark_special(backend, fields)
    bos = special.get("bos_token") if _adds_bos(fields) else None
    eos = special.get("eos_token") if fields.get("tokenizer.ggml.add_eos_token") else None
    if bos or eos:
        _add_bos_and_eos(backend, bos, eos)
    return Tokenizer(
        backend,
        chat_template=fields.get("tokenizer.chat_template"),
        special_tokens=special,
        eos_ids=eos_ids,
    )


def _with_marked_spaces(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write tokens that consist of spaces (as Gemma has) with "▁", as tokenizer.json does."""
    tokens = fields.get("tokenizer.ggml.tokens")
    kinds = fields.get("tokenizer.ggml.token_type")
    if fields.get("tokenizer.ggml.model") != "llama" or not tokens or not kinds:
        return fields
    marked = [
        "▁" * len(token) if kind == _USER_DEFINED and not token.strip(" ") else token
        for token, kind in zip(tokens, kinds, strict=False)
    ]
    return {**fields, "tokenizer.ggml.tokens": [*marked, *tokens[len(kinds) :]]}


def _adds_bos(fields: Mapping[str, Any]) -> bool:
    """Return whether BOS is added, according to the file or to llama.cpp's default.

    By default BOS is added for sentencepiece and Llama 3 vocabularies only.
    """
    default = (
        fields["tokenizer.ggml.model"] == "llama"
        or fields.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
    )
    return bool(fields.get("tokenizer.ggml.add_bos_token", default))


def _add_bos_and_eos(backend: Any, bos: str | None, eos: str | None) -> None:
    """Configure a `tokenizers.Tokenizer` to add these tokens before and after every text."""
    from tokenizers.processors import TemplateProcessing

    tokens = [token for token in (bos, eos) if token]
    single = " ".join(part for part in (bos, "$A", eos) if part)
    backend.post_processor = TemplateProcessing(
        single=single, special_tokens=[(token, backend.token_to_id(token)) for token in tokens]
    )


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    tokens = fields["tokenizer.ggml.tokens"]
    found = {}
    for key, role in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = fields.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and 0 <= number < len(tokens):
            found[f"{role}_token"] = tokens[number]
    return found


def _mark_special(backend: Any, fields: Mapping[str, Any]) -> None:
    """Register control and user-defined tokens. Decoding drops the control tokens."""
    from tokenizers import AddedToken

    kinds = fields.get("tokenizer.ggml.token_type", ())
    control = []
    user_defined = []
    for token, kind in zip(fields["tokenizer.ggml.tokens"], kinds, strict=False):
        if kind in (_CONTROL, _UNKNOWN):
            control.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            user_defined.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(control)
    backend.add_tokens(user_defined)


def _byte_level_bpe(fields: Mapping[str, Any]) -> Any | None:
    """Return byte-level BPE, as in GPT-2. In Llama 3, a word that is a token is not split."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    name = fields.get("tokenizer.ggml.pre")
    if name not in _PRE_TOKENIZERS or "tokenizer.ggml.merges" not in fields:
        return None
    vocab = {token: number for number, token in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab, merges, ignore_merges=name in _LLAMA3_NAMES))
    if name in _NFC_NAMES:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[name]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2() -> Any:
    from tokenizers import pre_tokenizers as pre

    return pre.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> Any:
    """Return GPT-2's rule after splitting every digit off."""
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
_NFC_NAMES = ("qwen2",)  # pre-tokenizers of models that normalize Unicode to NFC
_PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    **dict.fromkeys(_LLAMA3_NAMES, _by_regex(_LLAMA3)),
    "qwen2": _by_regex(_QWEN2),
}


def _sentencepiece(fields: Mapping[str, Any]) -> Any | None:
    """Return the sentencepiece BPE of Llama 1 and 2 and of Gemma.

    The file has no merges: of all pairs, the one whose joined piece has the best score is merged
    first.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    tokens = fields["tokenizer.ggml.tokens"]
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None:
        return None
    vocab = {token: number for number, token in enumerate(tokens)}
    kinds = fields.get("tokenizer.ggml.token_type", ())
    user_defined = dict.fromkeys(
        token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED
    )
    model = models.BPE(
        vocab,
        _merges(vocab, scores, user_defined),
        unk_token=_special_tokens(fields).get("unk_token"),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    space = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = space
        backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(
    vocab: Mapping[str, int], scores: Sequence[float], user_defined: Collection[str]
) -> list[tuple[str, str]]:
    """Return all pairs of pieces that join to a third piece, in the order of merging.

    Pairs are ordered by the score of the joined piece, then by ids, as in Llama 2's tokenizer.json.
    User-defined pieces, whose scores have no meaning, come first, the longest left part first, so
    that a run of spaces becomes one token if the vocabulary has it.
    """
    first = sorted(
        (pair for piece in user_defined for pair in _splits(piece, vocab)),
        key=lambda pair: (-len(pair[0]), -len(pair[1])),
    )
    ranked = sorted(
        (piece for piece in vocab if piece not in user_defined),
        key=lambda piece: -scores[vocab[piece]],
    )
    return first + [pair for piece in ranked for pair in _splits(piece, vocab)]


def _splits(piece: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the splits of a piece into two pieces of the vocabulary, in the order of ids."""
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    known = [(left, right) for left, right in pairs if left in vocab and right in vocab]
    if len(known) < 2:
        return known
    return sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


_MODELS: dict[str, Callable[[Mapping[str, Any]], Any | None]] = {
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece,
}
