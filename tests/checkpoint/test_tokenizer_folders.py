"""Tokenizers of awkward folders equal those of transformers, which tests/references has stored."""

import builtins
import json
import sys
from pathlib import Path

import pytest

from jfp8kv.checkpoint import hf_tokenizer
from jfp8kv.checkpoint.hf_tokenizer import read_tokenizer
from jfp8kv.core.errors import CheckpointError, ConfigError
from tests.references.tokenizer_folders import CHATS, FOLDERS, TEXTS, folder, write

EXPECTED = json.loads(
    Path(__file__).parent.parent.joinpath("references", "tokenizers.json").read_text()
)


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_decoding_and_chats_equal_those_of_transformers(tmp_path, name):
    tokenizer = read_tokenizer(write(name, tmp_path))
    expected = EXPECTED[name]
    assert tokenizer.special_tokens == expected["special"]
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
