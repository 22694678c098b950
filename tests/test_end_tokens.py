"""Where a sequence ends: end-of-sequence tokens of files, special tokens as stop strings."""

import json
import shutil
import struct
import warnings

import pytest

import jfp8kv
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

FOLDER = REFERENCES[0].parent / "llama_bf16"  # "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"
SIZES = {"max_model_len": 64, "max_num_seqs": 2, "kv_cache_memory": "1MiB"}
GREEDY = {"temperature": 0.0, "max_tokens": 6}
VOCAB = 300


@pytest.fixture
def changed(tmp_path):
    """Return a function that copies the folder with changed JSON files; None removes a key."""

    def changed(**files):
        folder = tmp_path / "model"
        shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
        for name, entries in files.items():
            path = folder / f"{name}.json"
            content = json.loads(path.read_text()) | entries
            kept = {key: value for key, value in content.items() if value is not None}
            path.write_text(json.dumps(kept))
        return folder

    return changed


@pytest.fixture(scope="module")
def llm():
    return jfp8kv.LLM(jfp8kv.load(FOLDER, dtype="float32"), **SIZES)


NONE = {"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": None}}
NO_TOKENIZER_EOS = {"tokenizer_config": {"eos_token": None}}


@pytest.mark.parametrize(
    ("files", "expected", "sources"),
    [
        ({}, (2, 4), {2: ("config.json", "generation_config.json", "tokenizer")}),
        (NONE, (2,), {2: ("tokenizer",)}),
        (NONE | {"tokenizer_config": {"eos_token": "<unk>"}}, (0,), {0: ("tokenizer",)}),
        (NONE | NO_TOKENIZER_EOS, (), {}),
        (
            {"config": {"eos_token_id": [7, 8]}, "tokenizer_config": {"eos_token": "<|user|>"}},
            (7, 8, 2, 4, 3),
            {8: ("config.json",), 4: ("generation_config.json",), 3: ("tokenizer",)},
        ),
        (
            {"config": {"eos_token_id": -1}, "generation_config": {"eos_token_id": [-1, 9]}},
            (9, 2),
            {9: ("generation_config.json",)},
        ),
    ],
)
def test_end_tokens_are_the_union_of_all_files(changed, files, expected, sources):
    folder = changed(**files)
    assert jfp8kv.load(folder).eos_ids == expected
    report = jfp8kv.inspect(folder)
    found = {end.id: end.sources for end in report.end_tokens}
    assert tuple(found) == expected and sources.items() <= found.items()
    for end in report.end_tokens:
        assert f"{end.id} {end.text!r} ({', '.join(end.sources)})" in " ".join(str(report).split())


def test_an_end_token_of_the_tokenizer_alone_ends_an_output(changed):
    folder = changed(**NONE | {"tokenizer_config": {"eos_token": "<unk>"}})
    llm = jfp8kv.LLM(jfp8kv.load(folder, dtype="float32"), **SIZES)
    out = llm.generate([[1, 5]], logit_bias={0: 1e4}, **GREEDY)[0].outputs[0]
    assert (out.token_ids, out.finish_reason, out.stop_reason) == ([0], "stop", 0)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config": {"eos_token_id": VOCAB}}, "config.json: eos_token_id=300"),
        ({"config": {"eos_token_id": [2, 999]}}, "config.json: eos_token_id=999"),
        ({"config": {"bos_token_id": 301}}, "config.json: bos_token_id=301"),
        (
            {"generation_config": {"eos_token_id": [2, 4, 300]}},
            "generation_config.json: eos_token_id=300",
        ),
        ({"tokenizer_config": {"eos_token": "<|new|>"}}, "tokenizer_config.json: eos_token"),
    ],
)
def test_ids_outside_the_vocabulary_are_dropped_with_file_and_key(changed, files, named):
    with pytest.warns(UserWarning, match=named):
        params = jfp8kv.load(changed(**files))
    assert all(token < VOCAB for token in params.eos_ids)
    assert params.config.bos_id in (None, 1)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_a_negative_id_means_none(changed, key):
    folder = changed(config={key: -1}, generation_config={"eos_token_id": None}, **NO_TOKENIZER_EOS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = jfp8kv.load(folder, dtype="float32")
    assert (params.config.bos_id if key == "bos_token_id" else params.eos_ids) in (None, ())
    if key == "eos_token_id":
        out = jfp8kv.LLM(params, **SIZES).generate(
            [[1, 5]], logit_bias={VOCAB - 1: 1e4}, min_tokens=3, max_tokens=3, temperature=0.0
        )
        assert out[0].token_ids == [VOCAB - 1] * 3


def test_a_token_beyond_the_vocabulary_is_refused_by_name(changed):
    folder = changed(tokenizer_config={"additional_special_tokens": ["<|tool|>"]})
    params = jfp8kv.load(folder, dtype="float32")
    assert params.tokenizer.encode("a<|tool|>")[-1] == VOCAB
    with pytest.raises(jfp8kv.ConfigError, match=r"token id 300 \('<\|tool\|>' of the tokenizer"):
        jfp8kv.LLM(params, **SIZES).generate("a<|tool|>")


# -- stop strings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("token", "text"), [(2, "</s>"), (3, "<|user|>"), (1, "<s>")])
def test_a_stop_string_that_is_a_special_token_stops_at_its_id(llm, token, text, skip):
    options = {"ignore_eos": True, "logit_bias": {token: 1e4}, "skip_special_tokens": skip}
    out = llm.generate([[1, 5]], stop=["never", text], **options, **GREEDY)[0].outputs[0]
    assert (out.token_ids, out.finish_reason, out.stop_reason) == ([token], "stop", text)
    assert out.text == ""
    included = llm.generate(
        [[1, 5]], stop=text, include_stop_str_in_output=True, **options, **GREEDY
    )[0]
    assert (included.text, included.token_ids) == (text, [token])


def test_other_stop_strings_add_no_token(llm):
    out = llm.generate([[1, 5]], stop=["</s", "s>", "a</s>"], ignore_eos=True, **GREEDY)[0]
    assert out.outputs[0].finish_reason == "length"


def test_special_tokens_are_part_of_the_text_on_request(llm):
    options = {"ignore_eos": True, "logit_bias": {3: 1e4}, **GREEDY}
    assert llm.generate([[1, 5]], **options)[0].text == ""
    out = llm.generate([[1, 5]], skip_special_tokens=False, **options)[0]
    assert out.text == "<|user|>" * 6
    assert "".join(llm.stream([1, 5], skip_special_tokens=False, **options)) == out.text


# -- GGUF ------------------------------------------------------------------------------------------


def test_a_chat_ends_at_the_template_end_token_whatever_the_eos_field_is(smollm2_path, tmp_path):
    """The EOS field of the file is changed to token 5, an ordinary one."""
    content = bytearray(smollm2_path.read_bytes())
    key = b"tokenizer.ggml.eos_token_id"
    struct.pack_into("<I", content, content.index(key) + len(key) + 4, 5)
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    params = jfp8kv.load(path)
    assert params.eos_ids[0] == 5 and params.tokenizer.encode("<|im_end|>") == [2]
    llm = jfp8kv.LLM(params, kv_cache_memory="16MiB", max_model_len=256, max_num_seqs=1)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    out = llm.chat(messages, temperature=0.0, max_tokens=64)[0].outputs[0]
    assert (out.finish_reason, out.stop_reason) == ("stop", 2)
    assert "Paris" in out.text and "<|im" not in out.text
