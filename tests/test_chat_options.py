"""Chat options have one meaning in every call: chat, generate, session, streams, batch rows."""

import dataclasses
import json

import pytest

import jfp8kv
from jfp8kv.batch import load_config, run_batch
from jfp8kv.text.prompts import ChatPrompt
from jfp8kv.text.tokenizer import Tokenizer
from tests.batch.conftest import read_rows, write_rows
from tests.models.test_decoder import REFERENCES
from tests.references.tokenizer_folders import CALL, CHATS, TEMPLATE, USER, WEATHER

pytestmark = pytest.mark.quick_compile

FOLDER = REFERENCES[0].parent / "llama_bf16"
GREEDY = {"temperature": 0.0, "max_tokens": 2}
DATA = (FOLDER / "tokenizer_config.json").read_text()


@pytest.fixture(scope="module")
def llm():
    params = jfp8kv.load(FOLDER, dtype="float32")
    tokenizer = Tokenizer(
        params.tokenizer.backend,
        chat_template=TEMPLATE,
        special_tokens=params.tokenizer.special_tokens,
        eos_ids=params.tokenizer.eos_ids,
    )
    params = dataclasses.replace(params, tokenizer=tokenizer)
    return jfp8kv.LLM(params, max_model_len=256, max_num_seqs=2, kv_cache_memory="4MiB")


@pytest.mark.parametrize("name", CHATS)
def test_every_call_builds_the_same_prompt(llm, name):
    messages, options = CHATS[name]
    text = llm.tokenizer.render(messages, **options)
    ids = llm.tokenizer.chat(messages, **options)
    for prompt, keywords in (
        (messages, options),
        ([messages], options),
        (ChatPrompt(messages, jfp8kv.ChatOptions(**options)), {}),
    ):
        output = llm.generate(prompt, **keywords, **GREEDY)[0]
        assert (output.prompt, output.prompt_token_ids) == (text, ids)
    assert llm.chat(messages, **options, **GREEDY)[0].prompt_token_ids == ids
    assert jfp8kv.generate(llm.params, messages, **options, **GREEDY)[0].prompt == text
    with llm.session(messages, **options) as session:
        assert session.token_ids == ids
    streamed = "".join(llm.stream(messages, **options, **GREEDY))
    assert streamed == output.text
    request = (messages, {**GREEDY, **options})
    ((_, found),) = llm.generate_iter([request])
    assert found.prompt_token_ids == ids


def test_chat_options_are_checked_before_anything_runs(llm):
    for call in (llm.generate, llm.chat, llm.check):
        with pytest.raises(jfp8kv.ConfigError, match="tools='f': must be a list"):
            call([USER], tools="f")
    with pytest.raises(jfp8kv.ConfigError, match="prompt 0 is not a list of chat messages: tools"):
        llm.generate("hello", tools=[WEATHER])
    with pytest.raises(jfp8kv.ConfigError, match="tolls: no such keyword. Did you mean 'tools'"):
        llm.chat([USER], tolls=[])
    with pytest.raises(jfp8kv.ConfigError, match="chat_template_kwarg"):
        llm.session([USER], chat_template_kwarg={})


# -- batch rows ------------------------------------------------------------------------------------


@pytest.fixture
def prompts_of(tmp_path, monkeypatch):
    """Return a function that runs a batch of rows and returns the prompt of each."""

    def prompts_of(rows, **config):
        model = tmp_path / "model"
        if not model.exists():
            model.mkdir()
            for file in FOLDER.iterdir():
                (model / file.name).write_bytes(file.read_bytes())
            settings = json.loads(DATA) | {"chat_template": TEMPLATE}
            (model / "tokenizer_config.json").write_text(json.dumps(settings))
        write_rows(tmp_path / "rows.jsonl", rows)
        content = {
            "model": str(model),
            "input": str(tmp_path / "rows.jsonl"),
            "output": str(tmp_path / "out.jsonl"),
            "engine": {"max_model_len": 256, "max_num_seqs": 2},
            "sampling": GREEDY,
        }
        (tmp_path / "run.yaml").write_text(json.dumps(content | config))
        seen = []
        encode = Tokenizer.render
        monkeypatch.setattr(
            Tokenizer, "render", lambda *args, **kw: seen.append(encode(*args, **kw)) or seen[-1]
        )
        run_batch(load_config(tmp_path / "run.yaml"), restart=True)
        return seen, read_rows(tmp_path / "out.jsonl")

    return prompts_of


def test_rows_and_the_config_give_chat_options(prompts_of):
    rows = [
        {"messages": [USER]},
        {"messages": [USER], "tools": [WEATHER], "documents": None},
        {"messages": [USER], "chat_template_kwargs": {"enable_thinking": True}},
    ]
    chat = {"chat_template_kwargs": {"enable_thinking": False}}
    prompts, _ = prompts_of(rows, chat=chat)
    assert set(prompts) == {
        "<s>[FAST]<user>hi</s><assistant>",
        f"<s>[TOOLS]{json.dumps([WEATHER])}[FAST]<user>hi</s><assistant>",
        "<s><user>hi</s><assistant>",
    }


def test_openai_requests_render_tool_calls_with_parsed_arguments(prompts_of):
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    body = {"model": "m", "messages": history, "tools": [WEATHER], "max_tokens": 2}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (prompt,), (out,) = prompts_of([row])
    call = CALL | {"function": {"name": "f", "arguments": {"a": 1}}}
    assert prompt == (
        f"<s>[TOOLS]{json.dumps([WEATHER])}<user>hi</s>"
        f"<assistant>{json.dumps([call])}</s><assistant>"
    )
    assert out["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [USER], "tools": "f"}, "tools='f'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type 'image'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of type int"),
    ],
)
def test_a_row_with_an_invalid_chat_is_an_error_of_the_row(prompts_of, row, named):
    _, out = prompts_of([{"messages": [USER]}, row])
    assert out[0]["error"] is None and named in out[1]["error"]["message"]
