"""Tokenizers of awkward folders equal those of transformers, which tests/references has stored."""

import base64
import builtins
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from jfp8kv.checkpoint import hf_tokenizer
from jfp8kv.checkpoint.hf_tokenizer import read_tokenizer, write_tokenizer
from jfp8kv.core.errors import CheckpointError, ConfigError
from tests.references.tokenizer_folders import CHATS, FOLDERS, TEXTS, folder, tekken, write

EXPECTED = json.loads(
    Path(__file__).parent.parent.joinpath("references", "tokenizers.json").read_text()
)


def known_roles(special):
    """Return the roles without `unk_token`, whose default differs between versions."""
    return {role: token for role, token in special.items() if role != "unk_token"}


# Mistral's own library, where it is installed, reads this file instead of transformers.
NAMES = [name for name in FOLDERS if name != "tekken.json" or find_spec("mistral_common") is None]


@pytest.mark.parametrize("name", NAMES)
def test_ids_decoding_and_chats_equal_those_of_transformers(tmp_path, name):
    tokenizer = read_tokenizer(write(name, tmp_path))
    expected = EXPECTED[name]
    assert known_roles(tokenizer.special_tokens) == known_roles(expected["special"])
    assert tokenizer.eos_ids == (() if expected["eos"] is None else (expected["eos"],))
    for i, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        assert ids == expected["ids"][i]
        assert tokenizer.encode(text, add_special_tokens=False) == expected["bare_ids"][i]
        assert tokenizer.decode(ids) == expected["decoded"][i]
        assert tokenizer.decode(ids, skip_special_tokens=False) == expected["decoded_special"][i]
    for chat, (messages, options) in CHATS.items():
        if expected["chats"][chat] is None:
            with pytest.raises(ConfigError, match="no chat template"):
                tokenizer.render(messages, **options)
            continue
        assert tokenizer.render(messages, **options) == expected["chats"][chat]
    if expected["chat_ids"] is not None:
        messages, _ = next(iter(CHATS.values()))
        assert tokenizer.chat(messages) == expected["chat_ids"]


def test_the_references_cover_every_folder():
    assert set(EXPECTED) == set(FOLDERS)


PLAIN = ["plain", "special only in the vocabulary", "roles not special", "special_tokens_map"]
PLAIN += ["added_tokens", "extra_special_tokens by name", "added_tokens_decoder", "adds BOS"]


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_folder_is_read_without_auto_tokenizer(tmp_path, name, monkeypatch):
    """`AutoTokenizer` imports torch where it is installed."""
    monkeypatch.delitem(sys.modules, "transformers.models.auto.tokenization_auto", raising=False)
    read_tokenizer(write(name, tmp_path))
    assert "transformers.models.auto.tokenization_auto" not in sys.modules


def without(monkeypatch, *modules):
    """Make imports of these modules fail, as where they are not installed."""
    find = hf_tokenizer.find_spec
    absent = lambda name, *rest: None if name in modules else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(hf_tokenizer, "find_spec", absent)
    imported = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.partition(".")[0] in modules:
            raise ImportError(f"no module {name}")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model", "qwen.tiktoken"])
def test_a_format_whose_library_is_missing_names_the_extra(tmp_path, monkeypatch, name):
    without(monkeypatch, "sentencepiece", "tiktoken")
    folder(None, None)(tmp_path)
    (tmp_path / name).write_bytes(b"\x00not a model")
    with pytest.raises(CheckpointError, match=rf"{name}.*jfp8kv\[sentencepiece\].*tiktoken\]"):
        read_tokenizer(tmp_path)


REMOTE = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}


@pytest.mark.parametrize("has_json", [False, True])
def test_code_of_a_checkpoint_is_refused_and_not_run(tmp_path, has_json):
    tokenizer = FOLDERS["plain"] if has_json else folder(None, model_type="own")
    tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(REMOTE))
    (tmp_path / "code.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(CheckpointError, match="Code of a checkpoint is never run"):
        read_tokenizer(tmp_path)


def test_a_folder_without_any_tokenizer_file_has_none(tmp_path):
    folder(None)(tmp_path)
    assert read_tokenizer(tmp_path) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_written_tokenizer_gives_the_same_ids_and_chats(tmp_path, name):
    tokenizer = read_tokenizer(write(name, tmp_path / "in"))
    (tmp_path / "out").mkdir()
    write_tokenizer(tokenizer, tmp_path / "out", max_len=64)
    again = read_tokenizer(tmp_path / "out")
    assert again.eos_ids == tokenizer.eos_ids
    assert again.special_tokens == tokenizer.special_tokens
    assert again.special_ids == tokenizer.special_ids
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    for chat, (messages, options) in CHATS.items():
        if EXPECTED[name]["chats"][chat] is not None:
            assert again.render(messages, **options) == EXPECTED[name]["chats"][chat]


RANKS = [*(bytes([i]) for i in range(256)), b"he", b"ll", b"hell", b"hello"]


def test_a_tiktoken_file_is_read_where_tiktoken_is_installed(tmp_path):
    pytest.importorskip("tiktoken")
    folder(None, {"tokenizer_class": "PreTrainedTokenizerFast"})(tmp_path)
    lines = (f"{base64.b64encode(rank).decode()} {i}" for i, rank in enumerate(RANKS))
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("hello he") == [259, 32, 256]
    assert tokenizer.decode(tokenizer.encode("hé hello")) == "hé hello"


def test_a_sentencepiece_model_is_read_where_sentencepiece_is_installed(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder(None, None)(tmp_path)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat on the mat\nhello world\n" * 20)
    options = {"vocab_size": 290, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), **options
    )
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    tokenizer = read_tokenizer(tmp_path)
    for text in ("hello world", "the mat sat", "é the"):
        assert tokenizer.encode(text) == model.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_ids == (2,)


def test_a_tekken_file_has_the_template_of_mistral_common_where_it_is_installed(tmp_path):
    pytest.importorskip("mistral_common")
    tools = ("AVAILABLE_TOOLS", "TOOL_RESULTS", "SYSTEM_PROMPT", "INST")
    pairs = [token for name in tools for token in (f"[{name}]", f"[/{name}]")]
    single = ["TOOL_CALLS", "TOOL_CONTENT", "IMG", "IMG_BREAK", "IMG_END"]
    single += ["PREFIX", "MIDDLE", "SUFFIX"]
    names = ["<unk>", "<s>", "</s>", "<pad>", *pairs, *(f"[{name}]" for name in single)]
    control = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(names)]
    folder(None, None, "mistral", tekken=tekken(control))(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.encode("hello")[0] == 1 and tokenizer.eos_ids == (2,)
    assert tokenizer.render([{"role": "user", "content": "hi"}]) == "<s>[INST]hi[/INST]"
