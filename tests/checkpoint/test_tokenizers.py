"""Tokenizers of folders and GGUF files give the ids and chats of transformers."""

import json
import warnings

import numpy as np
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from jfp8kv.checkpoint import load
from jfp8kv.checkpoint.gguf import read_header
from jfp8kv.checkpoint.gguf_tokenizer import tokenizer_from_gguf
from jfp8kv.checkpoint.hf_tokenizer import read_backend, read_tokenizer
from jfp8kv.core.errors import CheckpointError, ConfigError
from jfp8kv.text.tokenizer import as_tokenizer

TEXTS = [
    "hello world 123",
    "",
    "<|im_start|>user\nhi<|im_end|>\n",
    "naïve 日本 🎉\n\n  x",
    "it's 12 34567 o'clock",
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hello\nworld "}]


@pytest.fixture
def folder(tiny, tmp_path):
    return tiny.tokenizer(tmp_path)


def gguf_fields(tiny, **changes):
    tokens, merges = tiny.vocab()
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": merges,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    chat = {"tokenizer.chat_template": tiny.chatml}
    return chat | {
        f"tokenizer.ggml.{key}": value
        for key, value in (fields | changes).items()
        if value is not None
    }


@pytest.mark.parametrize("text", TEXTS)
def test_folder_and_gguf_tokenizers_of_one_vocabulary_agree(tiny, folder, text):
    hf = read_tokenizer(folder)
    gguf = tokenizer_from_gguf(gguf_fields(tiny), eos_ids=(2,), where=folder)
    assert hf.encode(text) == gguf.encode(text)
    assert hf.chat(CHAT) == gguf.chat(CHAT)
    for tokenizer in (hf, gguf):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
        assert tokenizer.eos_ids == (2,) and tokenizer.has_chat_template and tokenizer.vocab == 266


def test_special_tokens_are_single_ids_and_skipped_in_decoding(folder):
    tokenizer = read_tokenizer(folder)
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert tokenizer.decode(np.array(ids)) == "hello"


def test_a_digit_splitting_pre_tokenizer_never_joins_digits(tiny, folder):
    plain = tokenizer_from_gguf(gguf_fields(tiny), eos_ids=(), where=folder)
    digits = tokenizer_from_gguf(gguf_fields(tiny, pre="smollm"), eos_ids=(), where=folder)
    assert len(plain.encode("123")) == 1
    assert [digits.decode([i]) for i in digits.encode("123 4")] == ["1", "2", "3", " ", "4"]


def test_llama3_ignores_merges_for_a_word_that_is_a_token(tiny, folder):
    fields = gguf_fields(tiny, pre="llama-bpe", merges=["h e"])
    tokenizer = tokenizer_from_gguf(fields, eos_ids=(), where=folder)
    assert tokenizer.encode("hello") == [
        1,
        fields["tokenizer.ggml.tokens"].index("hello"),
    ]  # with BOS by default


@pytest.mark.parametrize(
    "change", [{"pre": "superbpe"}, {"pre": None}, {"model": "bert"}, {"tokens": None}]
)
def test_an_unknown_gguf_tokenizer_is_none_with_a_warning(tiny, folder, change):
    with pytest.warns(UserWarning, match="prompts must be token ids.*smollm"):
        assert tokenizer_from_gguf(gguf_fields(tiny, **change), eos_ids=(), where=folder) is None


def test_load_of_a_gguf_file_has_its_tokenizer(tiny, tmp_path):
    config = tiny.config(vocab_size=266)
    fields = gguf_fields(tiny)

    def more(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(fields["tokenizer.ggml.tokens"])
        writer.add_token_merges(fields["tokenizer.ggml.merges"])
        writer.add_token_types(fields["tokenizer.ggml.token_type"])
        writer.add_chat_template(tiny.chatml)

    params = load(tiny.gguf(tmp_path / "a.gguf", config, tiny.tensors(config), more=more))
    assert params.config.eos_ids == params.tokenizer.eos_ids == (2, 0)
    assert params.tokenizer.render(CHAT).endswith("<|im_end|>\n<|im_start|>assistant\n")


def sentencepiece_fields(**changes):
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"helo",
        "el",
        "he",
        "lo",
        "hel",
        "▁hello",
    ]
    tokens += ["hello"]
    scores = [0.0] * 264 + [-1.0, -2.0, -3.0, -4.0, -5.0, -4.5]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()}


def best_pair_first(pieces: list[str], tokens: list[str], scores: list[float]) -> list[str]:
    """Merge the neighbours that join to the best-scored piece, leftmost first, until none do."""
    while True:
        pairs = [
            (a + b, i)
            for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
            if a + b in tokens
        ]
        if not pairs:
            return pieces
        joined, i = max(pairs, key=lambda pair: (scores[tokens.index(pair[0])], -pair[1]))
        pieces = [*pieces[:i], joined, *pieces[i + 2 :]]


@pytest.mark.parametrize("text", ["hello", "hello hello", "helo ohel", "lolo  el"])
def test_sentencepiece_merges_the_best_scored_pair_first(tmp_path, text):
    fields = sentencepiece_fields()
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    tokenizer = tokenizer_from_gguf(fields, eos_ids=(2,), where=tmp_path)
    expected = best_pair_first(list("▁" + text.replace(" ", "▁")), tokens, scores)
    ids = tokenizer.encode(text)
    assert ids == [1, *map(tokens.index, expected)]
    assert tokenizer.decode(ids) == text


def test_sentencepiece_falls_back_to_bytes(tmp_path):
    tokenizer = tokenizer_from_gguf(
        sentencepiece_fields(add_bos_token=False), eos_ids=(2,), where=tmp_path
    )
    assert tokenizer.encode("é") == [259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("hé\n日 lo")) == "hé\n日 lo"


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "text", [*TEXTS, "cafe\u0301 caf\u00e9", "I'M 12345\n\n  x\t", "\u212b \u0301 a\u0308\u0301"]
)
def test_qwen_gguf_ids_equal_those_of_transformers(tiny, tmp_path, transformers, text):
    fields = gguf_fields(tiny, pre="qwen2", add_bos_token=False)
    tokens, merges = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    theirs = transformers.Qwen2Tokenizer(
        {t: i for i, t in enumerate(tokens)}, [tuple(m.split()) for m in merges]
    )
    theirs.add_special_tokens({"additional_special_tokens": tokens[:3]})
    ours = tokenizer_from_gguf(fields, eos_ids=(2,), where=tmp_path)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(
        theirs.encode(text), skip_special_tokens=True
    )


def gemma_fields():
    """Return a small vocabulary like Gemma's: runs of spaces and newlines and a tag are tokens."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    user_defined = ["\n", "\n\n", "  ", "   ", "    ", "<b>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["▁h", "he", "▁he", "ll", "▁hell", "hell", "hello", "▁hello", "▁", *"helowrd<>b/"]
    fields = {
        "model": "llama",
        "tokens": special + user_defined + bytes_ + pieces,
        "scores": [-1000.0] * 12 + [0.0] * 256 + [-float(i) for i in range(len(pieces))],
        "token_type": [3] * 6 + [4] * 6 + [6] * 256 + [1] * len(pieces),
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "add_bos_token": True,
        "add_space_prefix": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


SPACED = [
    " hello  hello",
    "hello       hello",
    "   \n\n\n  hell",
    "<b>hello</b>",
    "▁▁ hello ▁ he",
    "é\t日 w",
    "  ▁   h",
]


@pytest.mark.parametrize("text", [*SPACED, "<start_of_turn>hello\n  he<end_of_turn>\n", ""])
def test_gemma_gguf_ids_equal_those_of_transformers(tmp_path, transformers, text):
    from transformers.tokenization_utils_base import generate_merges

    fields = gemma_fields()
    named = [
        token.replace(" ", "▁") for token in fields["tokenizer.ggml.tokens"]
    ]  # as spelled in tokenizer.json
    vocab = {token: number for number, token in enumerate(named)}
    scores = dict(zip(named, [0.0] * 12 + fields["tokenizer.ggml.scores"][12:], strict=True))
    theirs = transformers.GemmaTokenizer(
        vocab, generate_merges(vocab, scores), mask_token=None, add_bos_token=True
    )
    theirs.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in named[6:12]])
    theirs.add_special_tokens({"additional_special_tokens": named[4:6]})
    ours = tokenizer_from_gguf(fields, eos_ids=(1,), where=tmp_path)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(
        theirs.encode(text), skip_special_tokens=True
    )
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == "<bos>" + text.replace(
        "▁", " "
    )


GGUF_TEXTS = [
    "hello world 123",
    "it's 12 34567 o'clock  two  spaces",
    "na\u00efve \u65e5\u672c \U0001f389\n\n x",
    "<|im_start|>user\nhi<|im_end|>\n",
    "def f(x):\n\treturn x+1  # c",
    "<start_of_turn>hello\n  he<end_of_turn>",
    "a<file_sep>b <empty_output> <|im_end|> x",
]


def theirs_from_gguf(fields, arch):
    """Return the tokenizer that transformers' own GGUF reader builds from the same metadata."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    given = {
        name: fields[f"tokenizer.{key}"]
        for key, name in mapping.GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in fields
    }
    return mapping.convert_gguf_tokenizer(arch, given)[0]


def assert_gguf_equal(fields, arch, where, texts=GGUF_TEXTS):
    ours = tokenizer_from_gguf(fields, eos_ids=(), where=where)
    theirs = theirs_from_gguf(fields, arch)
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids, False)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_gguf_ids_equal_those_of_the_gguf_reader_of_transformers(tiny, tmp_path, pre):
    """Decomposed characters are left out: its reader does not compose them for Qwen."""
    arch = "qwen2" if pre == "qwen2" else "llama"
    assert_gguf_equal(gguf_fields(tiny, pre=pre), arch, tmp_path)


def test_gemma_and_sentencepiece_gguf_ids_equal_those_of_the_reader(tmp_path):
    """Texts of sentencepiece do not begin with a space, before which its reader adds none."""
    assert_gguf_equal(gemma_fields(), "gemma3", tmp_path)
    assert_gguf_equal(sentencepiece_fields(), "llama", tmp_path)


def test_the_ids_of_a_real_gguf_file_equal_those_of_the_reader(smollm2_path):
    fields, _ = read_header(smollm2_path)
    assert_gguf_equal(fields, "llama", smollm2_path)


def test_a_run_of_spaces_is_split_longest_token_first(tmp_path):
    fields = gemma_fields()
    ids = tokenizer_from_gguf(fields, eos_ids=(1,), where=tmp_path).encode(
        " " * 7 + "hello", add_special_tokens=False
    )
    assert [fields["tokenizer.ggml.tokens"][i] for i in ids] == ["    ", "   ", "hello"]


def test_the_post_processor_of_the_file_decides_whether_bos_is_added(folder):
    path = folder / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(path))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.encode("hello") == [1, 262]
    assert tokenizer.chat(CHAT).count(1) == 3  # a chat has only the special tokens of its template


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True, "add_eos_token": True}])
def test_ids_and_chats_equal_those_of_transformers(tiny, tmp_path, transformers, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoTokenizer.from_pretrained(tiny.tokenizer(tmp_path, **settings))
    for ours in (read_tokenizer(tmp_path), as_tokenizer(theirs)):
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text)
            assert ours.decode(ours.encode(text)) == theirs.decode(
                theirs.encode(text), skip_special_tokens=True
            )
        for prompt in (True, False):
            assert ours.chat(CHAT, add_generation_prompt=prompt) == theirs.apply_chat_template(
                CHAT, add_generation_prompt=prompt, return_dict=False
            )
        assert ours.eos_ids == (theirs.eos_token_id,)


def test_truncation_settings_of_the_file_are_ignored(folder):
    path = folder / "tokenizer.json"
    limited = tokenizers.Tokenizer.from_file(str(path))
    limited.enable_truncation(3)
    limited.enable_padding(length=8)
    limited.save(str(path))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("a much longer text")) == "a much longer text"
    assert len(tokenizer.encode("hello")) == 1


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
def test_a_bug_while_reading_a_tokenizer_is_not_reported_as_damage(
    tiny, tmp_path, monkeypatch, error
):
    class Backend:
        @staticmethod
        def from_str(content):
            raise error("a bug")

    folder = tiny.tokenizer(tmp_path)
    monkeypatch.setattr("tokenizers.Tokenizer", Backend)
    with pytest.raises(error, match="a bug"):
        read_backend(folder / "tokenizer.json")


def test_tokens_listed_only_in_the_config_are_added_at_their_ids(tiny, tmp_path):
    entry = {"content": "<tool>", "special": True, "normalized": False}
    tokenizer = read_tokenizer(tiny.tokenizer(tmp_path, added_tokens_decoder={"266": entry}))
    assert tokenizer.encode("<tool>") == [266]
    with pytest.raises(CheckpointError, match="'<tool>' the id 300"):
        read_tokenizer(tiny.tokenizer(tmp_path, added_tokens_decoder={"300": entry}))


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        read_tokenizer(folder)


def test_a_chat_template_may_be_a_file_or_one_of_several(tiny, tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = tiny.tokenizer(
        tmp_path, chat_template=None, pad_token={"content": "<|endoftext|>", "__type": "AddedToken"}
    )
    assert not read_tokenizer(folder).has_chat_template
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert read_tokenizer(folder).render(CHAT) == "D"
    (folder / "chat_template.jinja").write_text("{{ pad_token }}")
    assert read_tokenizer(folder).render(CHAT) == "<|endoftext|>"


def test_without_a_chat_template_messages_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="no chat template"):
        read_tokenizer(tiny.tokenizer(tmp_path, chat_template=None)).chat(CHAT)


def test_any_object_with_encode_and_decode_is_a_tokenizer():
    class Bytes:
        def encode(self, text, add_special_tokens=True):
            return list(text.encode())

        def decode(self, ids, skip_special_tokens=True):
            return bytes(ids).decode()

        eos_token_id = 0

        def get_vocab(self):
            return {chr(i): i for i in range(256)}

    tokenizer = as_tokenizer(Bytes())
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert (tokenizer.eos_ids, tokenizer.vocab) == ((0,), 256)
    assert as_tokenizer(tokenizer) is tokenizer and as_tokenizer(None) is None
    with pytest.raises(ConfigError, match="tokenizer of type int"):
        as_tokenizer(3)
