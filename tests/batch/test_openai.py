"""OpenAI's batch format: what goes in is understood as the API does, what comes out is of its types."""

import json
from types import SimpleNamespace

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ConfigDict

import jfp8kv
from jfp8kv.batch.config import Config
from jfp8kv.batch.inputs import Row
from jfp8kv.batch.openai import CHAT, NO_LIMIT, TEXT, OpenAI
from jfp8kv.batch.plain import row_seed
from jfp8kv.batch.templates import RowError
from tests.batch.conftest import read_rows, write_rows
from tests.batch.stub import Stub

HELLO = [{"role": "user", "content": "Hello"}]


class Response(BaseModel):
    """Of the output object of OpenAI's API reference, which the `openai` package has no type for."""

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


def asks(name, url=CHAT, **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "m"} | body}


@pytest.fixture
def answers(job):
    """Run requests over the stub; lines of the output, each of its type."""

    def answers(*rows, **options):
        job.write("")
        write_rows(job.folder / "rows.jsonl", rows)
        outcome = job.run(restart=True, **options)
        assert outcome.totals["rows"] == len(rows)
        return [Line.model_validate(line) for line in read_rows(job.output)]

    return answers


def test_answers_are_of_the_types_of_the_openai_package(answers):
    chat, text, logs, text_logs = answers(
        asks("a", messages=HELLO, n=2, max_tokens=16),
        asks("b", url=TEXT, prompt="Hello", stop=["x"]),
        asks("c", messages=HELLO, logprobs=True, top_logprobs=1),
        asks("d", url=TEXT, prompt=[1, 2, 3], logprobs=1),
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
        "the engine gives the token itself, too"
    )
    (choice,) = Completion.model_validate(text_logs.response.body, strict=True).choices
    assert "".join(choice.logprobs.tokens) == choice.text and choice.logprobs.text_offset == list(
        range(16)
    )


def test_a_token_that_is_a_part_of_a_character_has_no_bytes_and_nothing_made_has_no_offsets():
    config = Config.model_validate({"model": "m", "input": "i", "output": "o"})
    form = OpenAI(config, {1: "a", 2: "\ufffd"}.get, created=0)

    def body(url, **made):
        choice = SimpleNamespace(index=0, finish_reason="stop", **made)
        result = SimpleNamespace(outputs=[choice], prompt_token_ids=[5])
        return form.record(Row(0, 1, dict), asks("a", url), result).output["response"]["body"][
            "choices"
        ][0]["logprobs"]

    made = body(CHAT, text="a?", token_ids=[1, 2], logprobs=[{1: -0.5}, {2: -1.5}])
    assert [(each["bytes"], each["top_logprobs"]) for each in made["content"]] == [
        ([97], []),
        (None, []),
    ]
    assert body(TEXT, text="", token_ids=[], logprobs=[])["text_offset"] == []


def test_ids_are_unique_and_the_same_in_every_run(answers):
    rows = [asks(f"r{i}", messages=HELLO) for i in range(20)]
    first, again = (
        [(line.id, line.response.request_id, line.response.body["id"]) for line in answers(*rows)]
        for _ in range(2)
    )
    assert first == again and len(set(first)) == 20


def test_requests_that_cannot_be_served_are_answered_and_the_others_run(answers):
    bad = [
        ({"custom_id": "x", "method": "GET", "url": CHAT, "body": {}}, "asks GET"),
        (
            asks("x", url="/v1/embeddings", input="x"),
            "must be POST /v1/chat/completions or POST /v1/completions",
        ),
        (asks("x", messages="Hello"), "must be a list of messages"),
        (
            asks("x", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "a part of type 'image_url'",
        ),
        (
            asks("x", messages=[{"role": "user", "content": [{"type": "text"}]}]),
            "only text can be read, under 'text'",
        ),
        (asks("x", messages=HELLO, top_logprobs=2), "body.top_logprobs goes with logprobs: true"),
        (asks("x", url=TEXT, prompt=["a", "b"]), "give each prompt a line of its own"),
        (asks("x", messages=HELLO, tools=[{"type": "function"}]), "body.tools is not served here"),
        (
            asks("x", messages=HELLO, temprature=0.5),
            "body.temprature is not served here. Did you mean 'temperature'",
        ),
        (asks("x", messages=HELLO, stream=True), "body.stream is not served"),
    ]
    lines = answers(*(row for row, _ in bad), asks("good", messages=HELLO))
    for line, (_, message) in zip(lines, bad, strict=False):
        assert (
            line.response.status_code == 400
            and line.error is None
            and message in line.response.body["error"]["message"]
        )
        assert line.response.body["error"].keys() == {"message", "type", "param", "code"}
    assert lines[-1].response.status_code == 200


def test_a_line_that_is_no_request_has_an_error_and_no_response(job):
    job.write("")
    odd = asks("a", messages=HELLO) | {"custom_id": 3}
    lines = ["nope", json.dumps(asks("a", messages=HELLO)), '{"custom_id": "b"}', json.dumps(odd)]
    (job.folder / "rows.jsonl").write_text("\n".join(lines))
    assert job.run("input.format=openai").status == 1
    lines = [Line.model_validate(line) for line in job.results()]
    assert lines[0].response is None and lines[0].error.message.startswith("line 1: is no JSON")
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


def test_what_the_engine_refuses_is_400_and_where_it_fails_is_500(answers):
    lines = answers(
        asks("a", url=TEXT, prompt=""),
        asks("b", url=TEXT, prompt="poison"),
        stub=Stub(broken="poison"),
    )
    assert [line.response.status_code for line in lines] == [400, 500]
    assert "the prompt is empty" in lines[0].response.body["error"]["message"]


@pytest.fixture
def asked():
    """What a request becomes."""

    def asked(fields, **sampling):
        usual = {"top_p": 0.9, "temperature": 0.3} | sampling
        config = Config.model_validate(
            {"model": "m", "input": "i", "output": "o", "sampling": usual}
        )
        return OpenAI(config, str, created=0).request(Row(5, 6, dict), fields)

    return asked


def test_a_body_is_understood_as_the_api_does(asked):
    found = asked(
        asks(
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
    found = asked(
        asks(
            "a",
            messages=HELLO,
            seed=3,
            logit_bias={"50": -100},
            logprobs=True,
            frequency_penalty=0.1,
        )
    )
    assert (
        found.sampling["max_tokens"] == NO_LIMIT
        and found.sampling["seed"] == 3
        and found.sampling["logprobs"] == 0
    )
    assert found.sampling["logit_bias"] == {50: -100} and found.sampling["temperature"] == 0.3
    assert (
        asked(asks("a", messages=HELLO, logprobs=False, top_logprobs=None), logprobs=2).sampling[
            "logprobs"
        ]
        is None
    )
    assert asked(asks("a", messages=HELLO), logprobs=2).sampling["logprobs"] == 2
    assert asked(asks("a", url=TEXT, prompt="x", n=2, best_of=4)).sampling["best_of"] == 4
    found = asked(asks("a", url=TEXT, prompt=["one"], logprobs=3))
    assert (
        found.prompt == "one"
        and found.sampling["max_tokens"] == 16
        and found.sampling["logprobs"] == 3
    )
    assert asked(asks("a", messages=HELLO, seed=-1)).sampling["seed"] == 2**64 - 1
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
        }
    ]
    assert asked(asks("a", messages=parts)).prompt == HELLO


def test_what_asks_for_nothing_is_taken(asked):
    asked(
        asks(
            "a",
            messages=HELLO,
            tools=[],
            stream=False,
            store=True,
            response_format={"type": "text"},
            tool_choice="none",
        )
    )


def test_a_response_format_holds_the_text_to_a_schema(asked):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    assert (
        asked(asks("a", messages=HELLO, response_format=wanted)).sampling["json_schema"] == schema
    )
    for form, schema in (
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "text"}, None),
    ):  # instead of the config's
        held = asked(asks("a", messages=HELLO, response_format=form), regex="a*").sampling
        assert held["json_schema"] == schema and held["regex"] is None
    with pytest.raises(
        RowError, match="body.response_format is .*must be of type text, json_object"
    ):
        asked(asks("a", messages=HELLO, response_format={"type": "xml"}))


def test_openai_requests_get_openais_format_and_bring_their_own_prompts(job):
    write_rows(job.folder / "rows.jsonl", [asks("a", messages=HELLO)])
    with pytest.raises(jfp8kv.ConfigError, match="prompt: OpenAI batch requests bring their own"):
        job.run()
    job.write("", out="out.parquet")
    with pytest.raises(jfp8kv.ConfigError, match="get OpenAI's output format"):
        job.run()
    job.write("task: score")
    with pytest.raises(
        jfp8kv.ConfigError, match="task: OpenAI batch requests are for task generate"
    ):
        job.run()
