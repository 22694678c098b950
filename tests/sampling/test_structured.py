"""Structured output of a tiny model with random weights, which would never produce it unguided."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest

import jfp8kv
from jfp8kv import ConfigError, SamplingParams
from tests.checkpoint.test_tokenizers import gemma_fields, sentencepiece_fields
from tests.models.test_decoder import REFERENCES

pytestmark = pytest.mark.quick_compile

FOLDER = REFERENCES[0].parent / "llama_bf16"
SIZES = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "page_size": 8,
    "max_num_batched_tokens": 24,
    "kv_cache_memory": 40 * 1024,
}
EOS = 2
RANDOM = {"max_tokens": 200, "temperature": 3.0}

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "é"]}, "maxItems": 2},
        "height": {"type": ["number", "null"], "multipleOf": 0.5, "minimum": 0, "maximum": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["ja", "jaja", 'say "no"\\', "línea\n😀"]
EXPRESSION = """
start: sum
sum: term (("+" | "-") term){0,2}
term: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


def is_person(text: str) -> bool:
    found = json.loads(text)
    assert {"name", "age", "tags"} <= set(found) <= set(PERSON["properties"])
    assert len(found["name"]) <= 6 and type(found["age"]) is int and 0 <= found["age"] <= 130
    assert len(found["tags"]) <= 2 and set(found["tags"]) <= {"a", "b\n", "é"}
    height = found.get("height")
    return height is None or (0 <= height <= 3 and height * 2 == int(height * 2))


def is_expression(text: str) -> bool:
    return re.fullmatch(r"[-+()1-9][-+()0-9]*", text) is not None and isinstance(eval(text), int)


CONSTRAINED = [
    ({"json_schema": PERSON}, is_person),
    (
        {"regex": r"([0-9]{4}-[0-9]|n/a|[α-ω]{2,5})"},
        lambda text: re.fullmatch(r"([0-9]{4}-[0-9]|n/a|[α-ω]{2,5})", text),
    ),
    ({"choice": CHOICES}, lambda text: text in CHOICES),
    ({"grammar": EXPRESSION}, is_expression),
]


@pytest.fixture(scope="module")
def params() -> jfp8kv.Params:
    return jfp8kv.load(FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def llm(params) -> jfp8kv.LLM:
    return jfp8kv.LLM(params, kv_dtype="fp8_e4m3", **SIZES)


@pytest.mark.parametrize(
    ("constraint", "matches"),
    CONSTRAINED,
    ids=[f"{i}_{next(iter(constraint))}" for i, (constraint, _) in enumerate(CONSTRAINED)],
)
def test_outputs_satisfy_the_constraint(llm, constraint, matches) -> None:
    (out,) = llm.generate("hello", n=8, seed=1, **RANDOM, **constraint)
    assert {each.finish_reason for each in out.outputs} == {"stop"}
    texts = [each.text for each in out.outputs]
    assert all(matches(text) for text in texts) and len(set(texts)) >= 3


def test_a_schema_can_be_a_dict_json_or_a_model_class(llm) -> None:
    class Model:
        @classmethod
        def model_json_schema(cls):
            return PERSON

    greedy = {"max_tokens": 100, "temperature": 0.0}
    texts = {
        llm.generate("hello", json_schema=form, **greedy)[0].text
        for form in (PERSON, json.dumps(PERSON), Model)
    }
    assert len(texts) == 1 and is_person(*texts)
    assert hash(SamplingParams(json_schema=PERSON)) == hash(
        SamplingParams(json_schema=json.dumps(PERSON))
    )


def test_constrained_and_free_requests_in_one_batch_give_the_outputs_they_give_alone(llm) -> None:
    """With shared prefixes, then with so little memory beside a session that some are preempted."""
    constraints = [{}, *(constraint for constraint, _ in CONSTRAINED), {}]
    sampling = [
        SamplingParams(seed=i, max_tokens=40, **constraint)
        for i, constraint in enumerate(constraints)
    ]
    prompts = ["hello you, hello"] * 3 + ["you and hello"] * (len(sampling) - 3)

    def results(outs) -> list[tuple]:
        return [(out.token_ids, out.outputs[0].finish_reason) for out in outs]

    pairs = zip(prompts, sampling, strict=True)
    alone = results(llm.generate([prompt], params)[0] for prompt, params in pairs)
    before = dataclasses.replace(llm.stats)
    assert results(llm.generate(prompts, sampling)) == alone
    assert llm.stats.prefix_hit_tokens > before.prefix_hit_tokens
    assert llm.stats.preemptions == before.preemptions
    with llm.session([5] * 200):
        assert results(llm.generate(prompts, sampling)) == alone
    assert llm.stats.preemptions > before.preemptions
    allocator = llm.engine.scheduler.kv_manager.allocator
    assert allocator.free_pages == allocator.num_pages


def test_a_stream_and_a_session_generate_the_same_constrained_text(llm) -> None:
    sampling = SamplingParams(max_tokens=80, temperature=1.5, seed=3, json_schema=PERSON)
    pieces = list(llm.stream("hello", sampling))
    assert "".join(pieces) == llm.generate("hello", sampling)[0].text and len(pieces) > 1
    with llm.session("hello") as session:
        assert session.generate(sampling).text == "".join(pieces) and session.text.endswith("}")


# -- the end of the output -------------------------------------------------------------------------


def test_an_output_ends_where_the_grammar_terminates_or_the_model_ends_it(llm) -> None:
    out = llm.generate("hello", regex="abc", **RANDOM)[0].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason) == ("abc", "stop", None)
    assert EOS not in out.token_ids
    ends = llm.generate("hello", n=16, seed=0, choice=["ja", "jaja"], **RANDOM)[0].outputs
    assert {(out.text, out.stop_reason) for out in ends} >= {("ja", EOS), ("jaja", None)}
    out = llm.generate("hello", regex="a*", logit_bias={EOS: 1e6}, **RANDOM)[0].outputs[0]
    assert (out.text, out.token_ids, out.finish_reason, out.stop_reason) == ("", [EOS], "stop", EOS)


def test_max_tokens_ends_an_output_that_is_not_complete(llm) -> None:
    out = llm.generate("hello", json_schema=PERSON, max_tokens=5)[0].outputs[0]
    assert out.finish_reason == "length" and len(out.token_ids) == 5 and out.text.startswith("{")
    out = llm.generate("hello", regex="abc", max_tokens=3)[0].outputs[0]
    assert out.finish_reason == "stop"


def test_min_tokens_ignore_eos_and_stop_tokens_apply_to_structured_output(llm) -> None:
    ids = {"a": llm.tokenizer.encode("a")[-1], "b": llm.tokenizer.encode("b")[-1]}
    likely = {EOS: 50.0, ids["b"]: 100.0}
    out = llm.generate("hello", regex="a*", min_tokens=4, max_tokens=9, logit_bias=likely)[
        0
    ].outputs[0]
    assert (out.text, out.stop_reason) == ("aaaa", EOS)
    out = llm.generate("hello", regex="ab", min_tokens=5, max_tokens=9, logit_bias=likely)[
        0
    ].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason) == ("ab", "stop", None)
    out = llm.generate(
        "hello", regex="a*", ignore_eos=True, min_tokens=1, max_tokens=9, logit_bias=likely
    )[0].outputs[0]
    assert (out.text, out.finish_reason) == ("a" * 9, "length")
    out = llm.generate(
        "hello", regex="a+", stop_token_ids=ids["b"], max_tokens=9, logit_bias=likely
    )[0].outputs[0]
    assert (out.text, out.stop_reason) == ("a", ids["b"])
    out = llm.generate("hello", regex="ab*", stop="bb", max_tokens=9, logit_bias=likely)[0].outputs[
        0
    ]
    assert (out.text, out.stop_reason) == ("a", "bb")


def test_a_request_with_no_token_left_ends_with_the_reason_and_others_continue(llm) -> None:
    ids = llm.tokenizer.encode("abc", add_special_tokens=False)
    masked = {ids[1]: float("-inf")}
    sampling = [
        SamplingParams(regex="abc", logit_bias=masked),
        SamplingParams(regex="ab?", logit_bias=masked | {EOS: float("-inf")}),
        SamplingParams(regex="abc"),
    ]
    stuck, complete, fine = (out.outputs[0] for out in llm.generate(["hello"] * 3, sampling))
    assert (stuck.text, stuck.token_ids, stuck.finish_reason) == ("a", ids[:1], "dead_end")
    assert "leave no token" in stuck.stop_reason
    assert (complete.text, complete.finish_reason) == ("a", "stop") and fine.text == "abc"
    free = llm.generate("hello", logit_bias=dict.fromkeys(range(300), float("-inf")))[0].outputs[0]
    assert (free.token_ids, free.finish_reason) == ([], "dead_end")


def test_a_grammar_that_becomes_too_complex_ends_its_request_with_the_reason(
    llm, monkeypatch
) -> None:
    import llguidance

    matcher, limits = llguidance.LLMatcher, llguidance.LLParserLimits(step_max_items=1)
    structured_output = llm.engine.structured_output

    def limited(*args, **kwargs):
        return matcher(*args, limits=limits, **kwargs)

    limited.grammar_from_json_schema = matcher.grammar_from_json_schema
    monkeypatch.setattr(llguidance, "LLMatcher", limited)
    structured_output._grammar.cache_clear()
    out = llm.generate("hello", json_schema={"type": "object"}, max_tokens=20)[0].outputs[0]
    structured_output._grammar.cache_clear()
    assert out.finish_reason == "dead_end" and "Too many items" in out.stop_reason


# -- invalid constraints ---------------------------------------------------------------------------

INVALID = [
    ({"json_schema": {"type": "nope"}}, "Invalid type: nope"),
    ({"json_schema": {"type": "string", "contains": 1}}, "contains"),
    ({"json_schema": {"$ref": "https://example.com/schema"}}, "not present in a registry"),
    ({"json_schema": "{bad"}, "json_schema='{bad': invalid JSON: Expecting property name"),
    ({"json_schema": "[1]"}, "must be a dict, the JSON text of one"),
    ({"json_schema": 3}, "must be a dict, the JSON text of one"),
    ({"json_schema": {"enum": [float("nan")]}}, "invalid JSON"),
    ({"json_schema": {"enum": [object()]}}, "invalid JSON"),
    ({"regex": "(["}, r"regex='\(\[': .*unclosed character class"),
    ({"regex": "(?=a)b"}, "look-ahead"),
    ({"regex": ""}, "regex=''.*at least one character"),
    ({"regex": re.compile("a")}, "regex=.*must be a string"),
    ({"regex": "a\ud800"}, "regex is not valid Unicode at character 1"),
    ({"choice": "yes"}, r"choice='yes': must be a list of strings.*try \['yes', 'no'\]"),
    ({"choice": []}, "must be a list of strings"),
    ({"choice": ["a", ""]}, "at least one character"),
    ({"choice": [1, 2]}, "must be a list of strings"),
    ({"grammar": "start: foo"}, 'unknown name: "foo"'),
    ({"grammar": "%%"}, "lexer error"),
    ({"grammar": b"start"}, "grammar=b'start': must be a string"),
    (
        {"regex": "a", "choice": ["a"]},
        "regex and choice: a request can have only one of json_schema, regex, choice, grammar",
    ),
]


@pytest.mark.parametrize(
    ("given", "message"), INVALID, ids=[str(given)[:40] for given, _ in INVALID]
)
def test_an_invalid_constraint_raises_with_the_reason(llm, given, message) -> None:
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
        llm.generate("hello", **given)


def test_one_invalid_constraint_among_many_prompts_raises_before_any_runs(llm) -> None:
    before = llm.stats.prompt_tokens
    sampling = [SamplingParams(regex="a"), SamplingParams(), SamplingParams(regex="([")]
    with pytest.raises(ConfigError, match="unclosed"):
        llm.generate(["hello"] * 3, sampling)
    assert llm.stats.prompt_tokens == before


def test_structured_output_needs_llguidance_and_a_tokenizer(params, llm, monkeypatch) -> None:
    bare = jfp8kv.LLM(jfp8kv.Params(params.tree, params.config), **SIZES)
    with pytest.raises(ConfigError, match="regex='a': needs a tokenizer"):
        bare.generate([[5, 6]], regex="a")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ConfigError,
        match=r"regex='not seen yet': needs llguidance.*pip install 'jfp8kv\[structured\]'",
    ):
        llm.generate("hello", regex="not seen yet")


# -- token bitmasks --------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "ends"), [(300, [EOS, 4, 7]), (333, [EOS, 4, 7]), (352, [])])
def test_bits_are_set_for_matching_tokens_and_never_for_padding(params, vocab, ends) -> None:
    """The oracle matches the text of each token. `vocab` may be padded past the 300 tokens."""
    from jfp8kv.sampling.structured import StructuredOutput

    structured_output = StructuredOutput(params.tokenizer, vocab, eos_ids=tuple(ends[:2]))
    regex = SamplingParams(regex="h(e|llo)*w?", max_tokens=9, stop_token_ids=ends[2:])
    start = re.compile("(h((e|llo)*(w|l|ll)?)?)?")  # the prefixes of a match
    end_ids = {*ends[:2], *regex.stop_token_ids}
    for text in ("", "h", "he", "hel", "hello"):
        matcher = structured_output.new_matcher(regex.constraint, end_ids)
        matcher.accept_output(params.tokenizer.encode(text, add_special_tokens=False))
        masks = structured_output.token_bitmask([None, matcher], rows=3)
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :vocab]
        spelled = {token: params.tokenizer.decode([token]) for token in range(300)}
        want = set(ends if re.fullmatch(regex.regex, text) else ())
        want |= {
            token for token, piece in spelled.items() if piece and start.fullmatch(text + piece)
        }
        assert set(np.flatnonzero(bits[1]).tolist()) == want, text
        assert bits[0].all() and bits[2].all()


@pytest.mark.parametrize("fields", [sentencepiece_fields(), gemma_fields()], ids=["llama", "gemma"])
def test_tokenizers_of_gguf_files_can_spell_a_grammar(params, tmp_path, fields) -> None:
    """Any character can be spelled with byte tokens. A token includes the space before a word."""
    from jfp8kv.checkpoint.gguf_tokenizer import tokenizer_from_gguf

    tokenizer = tokenizer_from_gguf(fields, eos_ids=(2,), where=tmp_path)
    config = dataclasses.replace(params.config, eos_ids=(2,))
    assert tokenizer.vocab < config.vocab
    llm = jfp8kv.LLM(jfp8kv.Params(params.tree, config, tokenizer), kv_dtype="fp8_e4m3", **SIZES)
    sampling = SamplingParams(
        regex=r"hello( hello| é){1,3}\n日?", temperature=2.0, max_tokens=60, n=4
    )
    for out in llm.generate("hello", sampling)[0].outputs:
        assert re.fullmatch(sampling.regex, out.text) and out.finish_reason == "stop"


def test_after_warmup_structured_requests_compile_nothing(params) -> None:
    llm = jfp8kv.LLM(
        params,
        kv_dtype="fp8_e4m3",
        **SIZES | {"max_num_seqs": 1, "max_num_batched_tokens": 18},
    )
    llm.warmup(structured=True)
    before = llm.stats.compilations
    sampling = [
        SamplingParams(regex="[a-z]{5}"),
        SamplingParams(max_tokens=3),
        SamplingParams(choice=["a", "b"], logprobs=2),
    ]
    llm.generate(["hello", "you", "hello you"], sampling)
    assert llm.stats.compilations == before and llm.stats.grammar_s > 0


# Texts of special tokens are spelled with ordinary tokens: "</s>" is id 2, "<|user|>" id 3.
SPELLED = [
    ({"choice": ["</s>"]}, "</s>"),
    ({"choice": ["x</s>y"]}, "x</s>y"),
    ({"choice": ["<|user|>"]}, "<|user|>"),
    ({"regex": "</s>"}, "</s>"),
    ({"regex": r"<\|user\|>"}, "<|user|>"),
    ({"regex": "[<]s[>]"}, "<s>"),
    ({"regex": "(<s)>"}, "<s>"),
    ({"json_schema": {"enum": ["</s>"]}}, '"</s>"'),
    ({"json_schema": {"const": "a<|user|>"}}, '"a<|user|>"'),
    ({"grammar": 'start: "</s>"'}, "</s>"),
    ({"grammar": 'start: "a" end\nend: "</s>"'}, "a</s>"),
]


@pytest.mark.parametrize(("constraint", "text"), SPELLED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("skip", [True, False])
def test_the_text_of_a_special_token_is_spelled_with_ordinary_tokens(llm, constraint, text, skip):
    out = llm.generate("hi", skip_special_tokens=skip, **constraint, **RANDOM)[0].outputs[0]
    assert (out.text, out.finish_reason) == (text, "stop")
    assert not {0, 1, 2, 3, 4} & set(out.token_ids[:-1])


def test_a_grammar_can_name_special_tokens(llm):
    grammar = 'start: "a" <|user|> "b"'
    out = llm.generate("hi", grammar=grammar, skip_special_tokens=False, **RANDOM)[0].outputs[0]
    assert out.text == "a<|user|>b" and 3 in out.token_ids
    end = llm.generate("hi", grammar="start: </s>", **RANDOM)[0].outputs[0]
    assert (end.text, end.token_ids, end.finish_reason) == ("", [2], "stop")
