"""Incremental detokenization, against the decoding of all ids at once."""

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from jfp8kv.text.detokenizer import Detokenizer
from jfp8kv.text.tokenizer import as_tokenizer

CORPUS = [
    "the cat sat on the mat. The end. STOP here, héllo wörld!",
    "你好，世界。日本語のテキスト",
    "😀👩‍👩‍👧 emoji 🎉🎉",
] * 4
SPECIAL = "<|end|>"
TEXTS = st.text(alphabet="the ca.STOP\né你好世😀👩\u200d🎉ÿ", max_size=40)


@functools.cache
def byte_level() -> Tokenizer:
    """Return a byte-level BPE tokenizer. Its tokens may start and end inside characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """Return a SentencePiece-like tokenizer with byte fallback, which drops the first space."""
    pieces = ["<unk>", "<s>", "▁", *"abcdehinopstwSTOP.", "▁t", "▁th", "▁the"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


def in_chunks(ids: list[int], seed: int) -> list[list[int]]:
    """Split `ids` at random into chunks of 0 to 6."""
    rng = random.Random(seed)
    chunks: list[list[int]] = []
    at = 0
    while at < len(ids):
        size = rng.randint(0, 6)
        chunks.append(ids[at : at + size])
        at += size
    return chunks


def pieces_of(detokenizer: Detokenizer, chunks: list[list[int]]) -> list[str]:
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.finish()]


def naive_cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Search character by character for the stop string that is complete first.

    Of several, the longest counts. Returns the text before it, and the stop string or None.
    """
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            longest = max(matching, key=len)
            return text[: end - len(longest)], longest
    return text, None


class CountingDecoder:
    """A tokenizer that records the longest list of ids it decoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.longest = tokenizer, 0

    def decode(self, ids: list[int]) -> str:
        self.longest = max(self.longest, len(ids))
        return self.tokenizer.decode(ids)


@settings(max_examples=400)
@given(st.lists(st.integers(0, 340), max_size=40), st.integers(0, 9))
def test_pieces_of_any_byte_level_tokens_join_to_the_full_decoding(ids, seed):
    tokenizer = byte_level()
    full = tokenizer.decode(ids)
    for chunks in ([[token] for token in ids], in_chunks(ids, seed)):
        pieces = pieces_of(Detokenizer(tokenizer), chunks)
        assert "".join(pieces) == full
        assert "\ufffd" in full or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200)
@given(TEXTS, st.integers(0, 9))
def test_pieces_of_any_text_are_whole_characters_and_join_to_it(text, seed):
    for tokenizer in (byte_level(), byte_fallback()):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for chunks in ([[token] for token in ids], in_chunks(ids, seed)):
            pieces = pieces_of(Detokenizer(tokenizer), chunks)
            assert not any("\ufffd" in piece for piece in pieces)
            assert "".join(pieces) == tokenizer.decode(ids)


@settings(max_examples=200)
@given(
    TEXTS,
    st.lists(st.text("theSTOP 你好😀a", min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_stop_strings_that_span_tokens_end_the_text_where_a_full_search_does(text, stops, seed):
    for tokenizer in (byte_level(), byte_fallback()):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        detokenizer = Detokenizer(tokenizer, stops)
        shown = "".join(pieces_of(detokenizer, in_chunks(ids, seed)))
        assert (shown, detokenizer.stopped) == naive_cut(tokenizer.decode(ids), stops)


@settings(max_examples=50)
@given(
    TEXTS,
    st.lists(st.text("theSTOP 你好😀a", min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_a_kept_stop_string_is_the_end_of_the_text(text, stops, seed):
    tokenizer = byte_level()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, stops, keep_stop=True)
    shown = "".join(pieces_of(detokenizer, in_chunks(ids, seed)))
    before, found = naive_cut(tokenizer.decode(ids), stops)
    assert (shown, detokenizer.stopped) == (before + (found or ""), found)


def test_the_tokens_kept_end_with_the_one_that_completed_the_stop_string():
    tokenizer = byte_level()
    ids = tokenizer.encode("the cat STOPs here, the end").ids
    detokenizer = Detokenizer(tokenizer, ["STOP"])
    assert detokenizer.push(ids) == "the cat "
    kept = detokenizer.tokens_kept
    assert "STOP" in tokenizer.decode(ids[:kept])
    assert "STOP" not in tokenizer.decode(ids[: kept - 1])
    assert detokenizer.stopped == "STOP"
    assert detokenizer.push(ids) == detokenizer.finish() == ""
    assert detokenizer.tokens_kept == kept


def test_without_a_stop_string_every_token_pushed_is_kept():
    tokenizer = byte_level()
    ids = tokenizer.encode("the cat sat").ids
    detokenizer = Detokenizer(tokenizer)
    detokenizer.push(ids[:2])
    detokenizer.push([])
    detokenizer.push(ids[2:])
    assert detokenizer.tokens_kept == len(ids)
    assert detokenizer.stopped is None


def test_text_waits_while_it_may_be_the_start_of_a_stop_string():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, ["\n\nUser:"])

    def push(text: str) -> str:
        return detokenizer.push(tokenizer.encode(text).ids)

    assert push("Yes.") == "Yes."
    assert push("\n\nUs") == ""
    assert push("ually") == "\n\nUsually"
    assert push("\n") == ""
    assert detokenizer.finish() == "\n"


def test_an_emoji_of_four_tokens_is_emitted_with_the_last():
    for tokenizer in (byte_level(), byte_fallback()):
        names = [f"<0x{byte:02X}>" for byte in "🦩".encode()]
        raw = [tokenizer.token_to_id(name) for name in names]
        ids = raw if None not in raw else tokenizer.encode("🦩").ids
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push([token]) for token in ids]
        assert pieces == [""] * (len(ids) - 1) + ["🦩"]


def test_special_tokens_inside_a_character_do_not_break_it():
    tokenizer = byte_level()
    end = tokenizer.token_to_id(SPECIAL)
    ids = [token for i in tokenizer.encode("🦩").ids for token in [i] + [end] * 5]
    assert "".join(pieces_of(Detokenizer(tokenizer), [[token] for token in ids])) == "🦩"


def test_an_incomplete_character_at_the_end_is_one_replacement_character():
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(tokenizer.encode("🦩").ids[:-1]) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_the_first_word_keeps_its_space_with_the_prompt_as_context():
    tokenizer = byte_fallback()
    word = [tokenizer.token_to_id("▁the")]
    assert Detokenizer(tokenizer).push(word) == "the"
    assert Detokenizer(tokenizer, context=word).push(word) == " the"


@pytest.mark.parametrize("kind", ["text", "random", "invalid", "special"])
def test_work_per_token_does_not_grow_with_the_text(kind):
    tokenizer = byte_level()
    rng = random.Random(0)
    invalid = tokenizer.token_to_id("¡")  # byte 0xA1, which starts no character
    ids = {
        "text": tokenizer.encode("the cat 你好 😀" * 60).ids,
        "random": [rng.randrange(340) for _ in range(600)],
        "invalid": [invalid] * 600,
        "special": [tokenizer.token_to_id(SPECIAL)] * 600,
    }[kind]
    decoder = CountingDecoder(tokenizer)
    shown = "".join(pieces_of(Detokenizer(decoder), [[token] for token in ids]))
    assert shown == tokenizer.decode(ids)
    assert decoder.longest <= 12


@pytest.mark.parametrize("spaces", [True, False])
def test_spaces_between_special_tokens_are_those_of_the_decoder(spaces):
    backend = Tokenizer(models.WordLevel({"<a>": 0, "<b>": 1, "x": 2, "<unk>": 3}, "<unk>"))
    backend.add_special_tokens(["<a>", "<b>"])  # without a decoder, tokens are joined with spaces
    tokenizer = as_tokenizer(backend)
    ids = [0, 1, 2, 0, 0, 1, 2, 2]
    text = tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=spaces)
    assert text == ("<a> <b> x <a> <a> <b> x x" if spaces else "<a><b> x <a><a><b> x x")
    assert tokenizer.decode(ids, spaces_between_special_tokens=spaces) == "x x x"
