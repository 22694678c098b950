"""OpenAI's batch format: requests have the meaning of the API, responses its types."""

import json
from types import SimpleNamespace

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict

import jfp8kv
from jfp8kv.batch import dry_run, load_config
from jfp8kv.batch.config import Config
from jfp8kv.batch.openai import CHAT_URL, COMPLETIONS_URL, UNLIMITED_TOKENS, OpenAIRequests
from jfp8kv.batch.requests import row_seed
from jfp8kv.text.chat import ChatOptions
from jfp8kv.text.rows import Row, RowError
from tests.batch.conftest import ROOT, read_rows, write_rows
from tests.batch.stub import StubEngine

MODEL = ROOT / "tests" / "references" / "llama_bf16"
HELLO = [{"role": "user", "content": "Hello"}]


class Response(BaseModel):
    """The response in OpenAI's API reference; the `openai` package has no type for it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    status_code: int
    request_id: str
    body: dict


class Error(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    code: str
    message: str


class Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    id: str
    custom_id: str | None
    response: Response | None
    error: Error | None


def request(name, url=CHAT_URL, **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "m"} | body}


@pytest.fixture
def respond(job):
    """Run requests on the stub engine; return the validated output lines."""

    def respond(*rows, **options):
        job.write("")
        write_rows(job.folder / "rows.jsonl", rows)
        result = job.run(restart=True, **options)
        assert result.totals.rows == len(rows)
        return [Line.model_validate(line) for line in read_rows(job.output)]

    return respond


def test_responses_have_the_types_of_the_openai_package(respond):
    chat, text, logs, text_logs = respond(
        request("a", messages=HELLO, n=2, max_tokens=16),
        request("b", url=COMPLETIONS_URL, prompt="Hello", stop=["x"]),
        request("c", messages=HELLO, logprobs=True, top_logprobs=1),
        request("d", url=COMPLETIONS_URL, prompt=[1, 2, 3], logprobs=1),
    )
    assert [line.custom_id for line in (chat, text, logs, text_logs)] == ["a", "b", "c", "d"]
    assert all(
        line.response.status_code == 200 and line.error is None
        for line in (chat, text, logs, text_logs)
    )
    found = ChatCompletion.model_validate(chat.response.body, strict=True)
    assert [choice.index for choice in found.choices] == [0, 1] and found.choices[
        0
    ].message.role == "assistant"
    assert (
        found.usage.completion_tokens == 32
        and found.usage.total_tokens == found.usage.prompt_tokens + 32
    )
    found = Completion.model_validate(text.response.body, strict=True)
    assert (
        found.object == "text_completion"
        and len(found.choices[0].text) == 16
        and found.choices[0].finish_reason == "stop"
    )
    (choice,) = ChatCompletion.model_validate(logs.response.body, strict=True).choices
    assert "".join(each.token for each in choice.logprobs.content) == choice.message.content
    assert choice.logprobs.content[0].bytes == [ord(choice.message.content[0])]
    assert len(choice.logprobs.content[0].top_logprobs) == 1, (
        "the engine also returns the sampled token"
    )
    (choice,) = Completion.model_validate(text_logs.response.body, strict=True).choices
    assert "".join(choice.logprobs.tokens) == choice.text and choice.logprobs.text_offset == list(
        range(16)
    )


def test_a_partial_character_has_no_bytes_and_an_empty_output_no_offsets():
    config = Config.model_validate({"model": "m", "input": "i", "output": "o"})
    form = OpenAIRequests(config, {1: "a", 2: "\ufffd"}.get, created=0)

    def logprobs(url, **fields):
        choice = SimpleNamespace(index=0, finish_reason="stop", **fields)
        result = SimpleNamespace(outputs=[choice], prompt_token_ids=[5])
        return form.result(Row(0, 1, dict), request("a", url), result).output["response"]["body"][
            "choices"
        ][0]["logprobs"]

    found = logprobs(CHAT_URL, text="a?", token_ids=[1, 2], logprobs=[{1: -0.5}, {2: -1.5}])
    assert [(each["bytes"], each["top_logprobs"]) for each in found["content"]] == [
        ([97], []),
        (None, []),
    ]
    assert logprobs(COMPLETIONS_URL, text="", token_ids=[], logprobs=[])["text_offset"] == []


def test_ids_are_unique_and_the_same_in_every_run(respond):
    rows = [request(f"r{i}", messages=HELLO) for i in range(20)]
    first, again = (
        [(line.id, line.response.request_id, line.response.body["id"]) for line in respond(*rows)]
        for _ in range(2)
    )
    assert first == again and len(set(first)) == 20


def test_unsupported_requests_get_an_error_response_and_the_others_run(respond):
    bad = [
        (
            {"custom_id": "x", "method": "GET", "url": CHAT_URL, "body": {}},
            "GET /v1/chat/completions: must be POST",
        ),
        (
            request("x", url="/v1/embeddings", input="x"),
            "must be POST /v1/chat/completions or POST /v1/completions",
        ),
        (request("x", messages="Hello"), "must be a list of messages"),
        (
            request("x", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "a part of type 'image_url'",
        ),
        (
            request("x", messages=[{"role": "user", "content": [{"type": "text"}]}]),
            "must be {'type': 'text', 'text': ...} with a string",
        ),
        (request("x", messages=HELLO, top_logprobs=2), "body.top_logprobs needs logprobs: true"),
        (request("x", url=COMPLETIONS_URL, prompt=["a", "b"]), "put each prompt on a line"),
        (request("x", messages=HELLO, tools=[{"type": "function"}]), "body.tools[0]: must be"),
        (request("x", messages=HELLO, tools={"f": 1}), "body.tools={'f': 1}: must be a list"),
        (request("x", messages=HELLO, tool_choice="required"), "body.tool_choice is not supported"),
        (
            request("x", messages=HELLO, temprature=0.5),
            "body.temprature is not supported. Did you mean 'temperature'",
        ),
        (request("x", messages=HELLO, stream=True), "body.stream is not supported"),
    ]
    rows = [row | {"custom_id": f"x{number}"} for number, (row, _) in enumerate(bad)]
    lines = respond(*rows, request("good", messages=HELLO))
    for line, (_, message) in zip(lines, bad, strict=False):
        assert (
            line.response.status_code == 400
            and line.error is None
            and message in line.response.body["error"]["message"]
        )
        assert line.response.body["error"].keys() == {"message", "type", "param", "code"}
    assert lines[-1].response.status_code == 200


def test_an_invalid_line_has_an_error_and_no_response(job):
    job.write("")
    odd = request("a", messages=HELLO) | {"custom_id": 3}
    lines = [
        "nope",
        json.dumps(request("a", messages=HELLO)),
        '{"custom_id": "b"}',
        json.dumps(odd),
    ]
    (job.folder / "rows.jsonl").write_text("\n".join(lines))
    assert job.run("input.format=openai").status == 1
    lines = [Line.model_validate(line) for line in job.results()]
    assert lines[0].response is None and lines[0].error.message.startswith("line 1: invalid JSON")
    assert lines[1].response.status_code == 200
    assert (
        lines[2].response.status_code == 400
        and "has no 'body'" in lines[2].response.body["error"]["message"]
    )
    assert (
        lines[3].response is None
        and lines[3].custom_id is None
        and "custom_id" in lines[3].error.message
    )


def test_a_refused_request_has_status_400_and_an_engine_error_500(respond):
    lines = respond(
        request("a", url=COMPLETIONS_URL, prompt=""),
        request("b", url=COMPLETIONS_URL, prompt="poison"),
        stub=StubEngine(broken="poison"),
    )
    assert [line.response.status_code for line in lines] == [400, 500]
    assert "the prompt is empty" in lines[0].response.body["error"]["message"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], "rows.jsonl:3: custom_id 'a' is already used in line 1"),
        (["a", "b", "b", "b"], "rows.jsonl:3: custom_id 'b' is already used in line 2"),
        (["é", "e", "é"], "rows.jsonl:3: custom_id 'é' is already used in line 1"),
        (["", "b"], "rows.jsonl:1: custom_id is empty"),
        (["a", ""], "rows.jsonl:2: custom_id is empty"),
        (["a", " \n"], "rows.jsonl:2: custom_id is empty"),
        (["a", None], "rows.jsonl:2: custom_id is empty"),
    ],
)
@pytest.mark.parametrize("start", ["run", "dry run", "shard"])
def test_a_file_with_an_empty_or_repeated_custom_id_is_refused(job, ids, message, start):
    job.write("")
    write_rows(job.folder / "rows.jsonl", [request(each, messages=HELLO) for each in ids])
    with pytest.raises(jfp8kv.ConfigError, match=message):
        if start == "dry run":
            dry_run(load_config(job.config, [f"model={MODEL}"]))
        else:
            job.run(*(["shard=[1,2]"] if start == "shard" else []))
    assert not job.output.exists() and not job.partial.exists() and not job.manifest.exists()


def test_a_repeated_custom_id_late_in_a_file_is_found_before_the_first_row_runs(job):
    class NeverStarted(StubEngine):
        def generate(self, requests):
            raise AssertionError("the engine was started")

    job.write("")
    ids = [f"r{number}" for number in range(5000)]
    rows = [request(each, messages=HELLO) for each in [*ids, "r17"]]
    write_rows(job.folder / "rows.jsonl", rows)
    with pytest.raises(jfp8kv.ConfigError, match="jsonl:5001: custom_id 'r17'.* in line 18"):
        job.run(stub=NeverStarted())


@pytest.fixture
def converted():
    """Convert a request, with sampling options in the config."""

    def converted(fields, **sampling):
        defaults = {"top_p": 0.9, "temperature": 0.3} | sampling
        config = Config.model_validate(
            {"model": "m", "input": "i", "output": "o", "sampling": defaults}
        )
        return OpenAIRequests(config, str, created=0).request(Row(5, 6, dict), fields)

    return converted


def test_a_body_has_the_meaning_of_the_api(converted):
    found = converted(
        request(
            "a",
            messages=HELLO,
            temperature=0.0,
            max_completion_tokens=5,
            max_tokens=9,
            user="me",
            top_k=3,
            stop=None,
        )
    )
    assert found.prompt == HELLO
    assert found.sampling == {
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 3,
        "seed": row_seed(0, 5),
    }
    found = converted(
        request(
            "a",
            messages=HELLO,
            seed=3,
            logit_bias={"50": -100},
            logprobs=True,
            frequency_penalty=0.1,
        )
    )
    assert (
        found.sampling["max_tokens"] == UNLIMITED_TOKENS
        and found.sampling["seed"] == 3
        and found.sampling["logprobs"] == 0
    )
    assert found.sampling["logit_bias"] == {50: -100} and found.sampling["temperature"] == 0.3
    assert (
        converted(
            request("a", messages=HELLO, logprobs=False, top_logprobs=None), logprobs=2
        ).sampling["logprobs"]
        is None
    )
    assert converted(request("a", messages=HELLO), logprobs=2).sampling["logprobs"] == 2
    assert (
        converted(request("a", url=COMPLETIONS_URL, prompt="x", n=2, best_of=4)).sampling["best_of"]
        == 4
    )
    found = converted(request("a", url=COMPLETIONS_URL, prompt=["one"], logprobs=3))
    assert (
        found.prompt == "one"
        and found.sampling["max_tokens"] == 16
        and found.sampling["logprobs"] == 3
    )
    assert converted(request("a", messages=HELLO, seed=-1)).sampling["seed"] == 2**64 - 1
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        }
    ]
    assert converted(request("a", messages=parts)).prompt == parts


def test_values_without_effect_are_accepted(converted):
    converted(
        request(
            "a",
            messages=HELLO,
            tools=[],
            stream=False,
            store=True,
            response_format={"type": "text"},
            tool_choice="none",
            functions=[],
            function_call="none",
        )
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": False, "top_logprobs": None}, None),
        ({"logprobs": False}, None),
        ({"logprobs": None, "top_logprobs": 0}, "default"),
        ({"top_logprobs": 0}, "default"),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_log_probabilities_of_a_chat_have_the_meaning_of_the_api(converted, body, expected):
    sampling = converted(request("a", messages=HELLO, **body)).sampling
    assert sampling.get("logprobs", "default") == expected


@pytest.mark.parametrize("body", [{"logprobs": None}, {"logprobs": False, "top_logprobs": 0}, {}])
def test_a_completion_without_log_probabilities_is_accepted(converted, body):
    sampling = converted(request("a", url=COMPLETIONS_URL, prompt="x", **body)).sampling
    assert sampling.get("logprobs") is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"logprobs": 2}, "body.logprobs is 2: must be true or false"),
    ],
)
def test_log_probabilities_that_contradict_are_refused(converted, body, message):
    with pytest.raises(RowError, match=message):
        converted(request("a", messages=HELLO, **body))


def test_a_response_format_constrains_the_output(converted):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert (
        converted(request("a", messages=HELLO, response_format=wanted)).sampling["json_schema"]
        == schema
    )
    for form, schema in (
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "text"}, None),
    ):  # replaces the constraint of the config
        sampling = converted(
            request("a", messages=HELLO, response_format=form), regex="a*"
        ).sampling
        assert sampling["json_schema"] == schema and sampling["regex"] is None
    with pytest.raises(
        RowError, match="body.response_format is .*must be of type text, json_object"
    ):
        converted(request("a", messages=HELLO, response_format={"type": "xml"}))


def test_openai_requests_determine_the_output_format_and_the_prompts(job):
    write_rows(job.folder / "rows.jsonl", [request("a", messages=HELLO)])
    with pytest.raises(
        jfp8kv.ConfigError, match="prompt: OpenAI batch requests have their prompts"
    ):
        job.run()
    job.write("", out="out.parquet")
    with pytest.raises(jfp8kv.ConfigError, match="get OpenAI's output format"):
        job.run()
    job.write("task: score")
    with pytest.raises(jfp8kv.ConfigError, match="task: OpenAI batch requests need task generate"):
        job.run()


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "é"]}'}}
WEATHER = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def calling(arguments):
    call = CALL | {"function": {"name": "f", "arguments": arguments}}
    return [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, RESULT]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": [1, "é"]}', {"a": [1, "é"]}), ("{}", {}), ("", {}), (None, {}), ({"a": 1}, {"a": 1})],
)
def test_arguments_of_tool_calls_are_parsed_before_the_template(converted, arguments, expected):
    found = converted(request("a", messages=calling(arguments), tools=[WEATHER]))
    call = found.prompt.messages[1]
    assert "content" not in call
    assert call["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}
    assert found.prompt.options == ChatOptions(tools=[WEATHER])


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        (calling("{"), r"body.messages\[1\].tool_calls\[0\].function.arguments is not valid JSON"),
        (calling("[1]"), r"arguments is \[1\]: must be a JSON object"),
        ([*HELLO, {"role": "assistant", "tool_calls": "f"}], "must be a list of tool calls"),
        ([*HELLO, {"role": "assistant", "tool_calls": [{}]}], "must have a function with a name"),
        ([{"role": "user", "content": 3}], r"body.messages\[0\] from 'user' has content of type"),
    ],
)
def test_malformed_tool_calls_are_refused_by_position(converted, messages, named):
    with pytest.raises(RowError, match=named):
        converted(request("a", messages=messages))


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ({}, None),
        ({"tools": []}, None),
        ({"tools": None, "tool_choice": "auto"}, None),
        ({"tools": [WEATHER], "tool_choice": "none"}, None),
        ({"tools": [WEATHER], "tool_choice": "auto"}, ChatOptions(tools=[WEATHER])),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            ChatOptions(chat_template_kwargs={"enable_thinking": False}),
        ),
        ({"chat_template": "x"}, ChatOptions(chat_template="x")),
        ({"documents": [{"text": "x"}]}, ChatOptions(documents=[{"text": "x"}])),
        (
            {"add_generation_prompt": False, "continue_final_message": True},
            ChatOptions(add_generation_prompt=False, continue_final_message=True),
        ),
    ],
)
def test_chat_options_of_a_body_reach_the_template(converted, body, options):
    found = converted(request("a", messages=HELLO, **body)).prompt
    assert found == HELLO if options is None else found.options == options
