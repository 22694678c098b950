"""Chat messages to text: templates, parts, malformed messages, errors of templates."""

import dataclasses

import pydantic
import pytest

from jfp8kv.core.errors import ConfigError
from jfp8kv.text.chat import ChatOptions, normalize_messages, split_fields
from jfp8kv.text.prompts import ChatPrompt, with_chat_options
from jfp8kv.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "hi"}]
STRINGS = "{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}"
ADDED = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
TRIMMED = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
AS_JSON = "{% for m in messages %}[{{ m.role }}]{{ m.content | tojson }}{% endfor %}"
ONLY_STRINGS = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}"
)
BY_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part['text'] }};{% endfor %}{% endif %}{% endfor %}"
)


def render(template, messages=CHAT, special_tokens=None, **options):
    tokenizer = Tokenizer(None, chat_template=template, special_tokens=special_tokens)
    return tokenizer.render(messages, **options)


def parts(*texts, role="user"):
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRINGS, "[user]a\nb"),
        (ADDED, "[user]a\nb"),
        (TRIMMED, "[user]a\nb"),
        (AS_JSON, '[user]"a\\nb"'),
        (ONLY_STRINGS, "[user]a\nb"),
        (BY_PARTS, "[user]a;b;"),
    ],
)
def test_parts_of_text_are_joined_as_the_template_wants(template, expected):
    assert render(template, [parts("a", "b")]) == expected


def test_parts_that_look_like_a_dict_are_text():
    text = "{'type': 'text', 'text': 'x'}"
    assert render(BY_PARTS, [parts(text)]) == f"[user]{text};"
    assert render(STRINGS, [parts(text)]) == f"[user]{text}"


def test_parts_and_strings_may_be_mixed_in_a_conversation():
    messages = [parts("a"), {"role": "assistant", "content": "b"}, parts("c", "d")]
    assert render(STRINGS, messages) == "[user]a[assistant]b[user]c\nd"
    assert render(BY_PARTS, messages) == "[user]a;[assistant]b[user]c;d;"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "part of type 'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "image"}], "part of type 'image'"),
        ([{"type": "input_audio", "input_audio": {}}], "part of type 'input_audio'"),
        ([{"type": "video", "video": "x"}], "part of type 'video'"),
        ([{"type": "file", "file": {}}], "part of type 'file'"),
        ([{"type": "text", "text": 3}], "must be {'type': 'text'"),
        ([{"text": "a"}], "must be {'type': 'text'"),
        (["a"], "must be {'type': 'text'"),
        (3, "content of type int"),
        ({"text": "a"}, "content of type dict"),
        (b"a", "content of type bytes"),
        (True, "content of type bool"),
    ],
)
def test_content_that_is_not_text_is_refused_by_name(content, named):
    with pytest.raises(ConfigError, match=rf"messages\[1\] from 'user' has .*{named}"):
        render(STRINGS, [*CHAT, {"role": "user", "content": content}])


@pytest.mark.parametrize("key", ["image", "images", "audio", "video"])
def test_media_beside_the_content_is_refused_by_name(key):
    with pytest.raises(ConfigError, match=f"messages.0. from 'user' has '{key}'"):
        render(STRINGS, [{"role": "user", "content": "a", key: ["x"]}])
    assert render(STRINGS, [{"role": "user", "content": "a", key: None}]) == "[user]a"


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        (["hello"], r"messages\[0\]='hello'"),
        ([{"content": "x"}], r"messages\[0\].*'role'"),
        ([{"role": None, "content": "x"}], r"messages\[0\].*'role'"),
        ([CHAT[0], {"role": "user"}], r"messages\[1\] from 'user' has no 'content'"),
    ],
)
def test_malformed_messages_are_refused_by_position(messages, named):
    with pytest.raises(ConfigError, match=named):
        normalize_messages(messages)


def test_message_objects_are_messages():
    class Message(pydantic.BaseModel):
        role: str
        content: str | None = None
        tool_calls: list | None = None

    @dataclasses.dataclass
    class Plain:
        role: str
        content: str

    template = STRINGS + "{% if messages[0].tool_calls is defined %}CALLS{% endif %}"
    for message in (Message(role="user", content="a"), Plain("user", "a")):
        assert render(template, [message]) == "[user]a"


RAISING = {
    "raise_exception": "{{ raise_exception('roles must alternate') }}",
    "undefined attribute": "{{ missing.attribute }}",
    "type": "{{ 'a' + 1 }}",
    "division": "{{ 1 / 0 }}",
    "index": "{{ messages[5].content.x }}",
    "encoding": "{{ 'a'.encode('x') }}",
    "method": "{{ 'a'.index('b') }}",
    "assertion": "{{ strftime_now(3) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "sandbox": "{{ messages.__class__.__mro__ }}",
    "sandboxed change": "{{ messages.append(1) }}",
    "syntax": "{% for %}",
    "unknown filter": "{{ 1 | nothing }}",
}


@pytest.mark.parametrize("template", RAISING.values(), ids=RAISING)
def test_whatever_a_template_raises_is_a_config_error(template):
    with pytest.raises(ConfigError, match="chat template (refuses|is not valid)"):
        render(template)


def test_templates_have_the_filters_and_tags_of_hugging_face():
    source = (
        "{% for m in messages %}\n{% if loop.index0 == 1 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}\n{% endfor %}"
        "{% generation %}a<b{% endgeneration %}{{ strftime_now('%Y') | length }}"
    )
    assert render(source, [*CHAT, *CHAT]) == '{"role": "user", "content": "hi"}\na<b4'


def test_tools_may_be_functions():
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: one.
            b: another.
        """
        return a + b

    template = "{{ tools[0].function.name }} {{ tools[0].function.parameters.required | tojson }}"
    assert render(template, tools=[add]) == 'add ["a", "b"]'


def test_named_templates_are_selected_as_in_transformers():
    templates = {"default": "D", "tool_use": "T", "rag": "R"}
    assert render(templates) == "D"
    assert render(templates, tools=[]) == "T"
    assert render(templates, chat_template="rag") == "R"
    assert render(templates, chat_template="{{ messages | length }}") == "1"
    with pytest.raises(ConfigError, match="no default: give chat_template, one of rag, x"):
        render({"rag": "R", "x": "X"})
    with pytest.raises(ConfigError, match="no chat template"):
        render(None)
    assert render(None, chat_template=STRINGS) == "[user]hi"


def test_a_field_of_the_final_message_can_be_continued():
    template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}"
        "({{ m.reasoning_content }}){% endif %}{{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    final = {"role": "assistant", "content": "a", "reasoning_content": "b"}
    assert render(template, [*CHAT, final], continue_final_message=True) == (
        "[user]hi.[assistant](b)a"
    )
    assert (
        render(template, [*CHAT, final], continue_final_message="reasoning_content")
        == "[user]hi.[assistant](b"
    )
    with pytest.raises(ConfigError, match="refuses"):
        render(template, [*CHAT, final], continue_final_message="thoughts")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tools": "f"}, "tools='f'"),
        ({"tools": [3]}, "tools=.3.: must be a list of JSON schemas"),
        ({"documents": {"title": "x"}}, "documents="),
        ({"chat_template": 3}, "chat_template=3"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "must be a dict"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools' is an option itself"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt='yes'"),
        ({"continue_final_message": 3}, "continue_final_message=3"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "give one of them"),
    ],
)
def test_invalid_chat_options_are_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        ChatOptions(**options)


def test_chat_options_apply_to_messages_only():
    options, others = split_fields({"tools": [], "temperature": 0.0})
    assert (options, others) == (ChatOptions(tools=[]), {"temperature": 0.0})
    (prompt,) = with_chat_options([CHAT], options)
    assert isinstance(prompt, ChatPrompt) and prompt.messages == CHAT
    assert with_chat_options(["a", CHAT], None) == ["a", CHAT]
    with pytest.raises(ConfigError, match="prompt 1 is not a list of chat messages: tools"):
        with_chat_options([CHAT, "a"], options)
