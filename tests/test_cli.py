"""The command line over the tiny reference model, mostly in this process.

A mistake must give exit status 2 and one line on stderr that names it.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

import jfp8kv
from jfp8kv.engine import postprocess
from jfp8kv.engine.options import EngineOptions, LoadOptions
from jfp8kv.quality.options import (
    BenchOptions,
    CalibrationOptions,
    CompareOptions,
    PlanOptions,
)
from jfp8kv.sampling.params import SamplingParams
from tests.checkpoint.conftest import write_sidecar

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "references" / "llama_bf16"
PROMPT = ("--prompt", "hi")
ASK = ("--prompt", "the end", "--temperature", "0", "--max-tokens", "12")


@pytest.fixture
def says(monkeypatch):
    """Set stdin to these lines."""

    def says(*lines: str) -> None:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{x}\n" for x in lines).encode()))
        )

    return says


@pytest.fixture(scope="module")
def llm():
    return jfp8kv.LLM(str(MODEL))


@pytest.fixture(scope="module")
def expected(llm):
    """The output of the library for ASK."""
    return llm.generate("the end", temperature=0, max_tokens=12)[0]


def program(*argv: object, **options) -> subprocess.CompletedProcess[str]:
    """Run the program in a process."""
    command = [sys.executable, "-m", "jfp8kv", *map(str, argv)]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "timeout": 120,
    } | options
    return subprocess.run(command, cwd=ROOT, check=False, **options)


# -- generate --------------------------------------------------------------------------------------


def test_one_prompt_streams_to_stdout_and_statistics_to_stderr(run, expected):
    status, out, err = run("generate", MODEL, *ASK)
    assert (status, out) == (0, expected.text + "\n")
    assert re.fullmatch(
        r"jfp8kv: 12 tokens in .* tokens/s.*; "
        r"KV cache \(bfloat16\): 256 bytes per token, room .*\n",
        err,
    )


def test_kv_dtype_sets_the_format_of_the_cache(run):
    _, _, err = run("generate", MODEL, *ASK, "--kv-dtype", "fp8", "--kv-scales", "unit")
    assert "KV cache (fp8_e4m3): 128 bytes per token" in err


def test_quiet_prints_nothing_on_stderr(run):
    assert run("generate", MODEL, *ASK, "--quiet")[2] == ""


def test_outputs_of_several_prompts_are_numbered(run, llm, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf\r\n the caf\xc3\xa9\r\n\n")
    _, out, _ = run("generate", MODEL, *ASK, "--file", file)
    prompts = ["the end", " the café"]
    texts = [made.text for made in llm.generate(prompts, temperature=0, max_tokens=12)]
    assert out == "".join(
        f"[{i}] {p}\n{t}\n\n" for i, (p, t) in enumerate(zip(prompts, texts, strict=True))
    )


def test_prompts_are_read_from_stdin(run, says, expected):
    says("the end")
    assert run("generate", MODEL, *ASK[2:], "--file", "-")[1] == expected.text + "\n"


def test_json_prints_one_object_per_output(run, llm):
    settings = {
        "n": 2,
        "seed": 7,
        "max_tokens": 5,
        "temperature": 0.9,
        "min_p": 0.02,
        "top_k": 50,
        "top_p": 0.9,
    }
    options = [
        arg for name, value in settings.items() for arg in ("--" + name.replace("_", "-"), value)
    ]
    status, out, _ = run("generate", MODEL, "--json", "--prompt", "the end", *options)
    (output,) = llm.generate("the end", **settings)
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "prompt_index": 0,
            "prompt": "the end",
            "prompt_tokens": len(output.prompt_token_ids),
            "index": made.index,
            "text": made.text,
            "token_ids": made.token_ids,
            "finish_reason": "length",
            "stop_reason": None,
        }
        for made in output.outputs
    ]
    assert output.outputs[0].token_ids != output.outputs[1].token_ids


def test_chat_applies_the_chat_template(run, llm):
    messages = [{"role": "user", "content": "the end"}]
    assert (
        run("generate", MODEL, *ASK, "--chat")[1]
        == llm.chat(messages, temperature=0, max_tokens=12)[0].text + "\n"
    )


def test_stop_ends_the_output_before_the_match(run, expected):
    stop = expected.text[3:5]
    assert run("generate", MODEL, *ASK, "--stop", stop)[1] == expected.text.split(stop)[0] + "\n"


@pytest.mark.parametrize(
    ("command", "options", "omitted"),
    [
        ("generate", EngineOptions, {"seed"}),
        ("generate", SamplingParams, {"logprobs", "prompt_logprobs", "logit_bias"}),
        ("chat", EngineOptions, {"seed"}),
        ("chat", SamplingParams, {"logprobs", "prompt_logprobs", "logit_bias", "n", "best_of"}),
        ("export", LoadOptions, set()),
        ("calibrate", CalibrationOptions, set()),
        ("compare", CompareOptions, set()),
        ("plan", PlanOptions, set()),
        ("bench", BenchOptions, set()),
    ],
)
def test_the_help_has_every_option_of_the_library_with_its_help(run, command, options, omitted):
    help_text = " ".join(run(command, "--help")[1].split()).replace("- ", "-")
    for spec in options.specs():
        if spec.name not in omitted:
            assert f"--{spec.name.replace('_', '-')} " in help_text
            shown = spec.help.replace("- ", "-").replace("`", "")
            assert shown in help_text  # argparse breaks at hyphens


def test_defaults_are_those_of_the_library(run, monkeypatch):
    seen = {}

    def record(model, **fields):
        seen.update(fields)
        raise jfp8kv.ConfigError("enough")

    monkeypatch.setattr("jfp8kv.llm.LLM", record)
    run("generate", MODEL, *PROMPT)
    assert seen == {}
    run("generate", MODEL, *PROMPT, "--page-size", 16, "--no-strict", "--no-prefix-caching")
    assert seen == {"page_size": 16, "strict": False, "prefix_caching": False}


# -- chat ------------------------------------------------------------------------------------------


def test_a_conversation_keeps_its_messages_until_reset(run, says, llm):
    def answer(*messages: str) -> str:
        roles = ("user", "assistant") * len(messages)
        turns = [
            {"role": role, "content": text} for role, text in zip(roles, messages, strict=False)
        ]
        return llm.chat(
            [{"role": "system", "content": "be kind"}, *turns], temperature=0, max_tokens=8
        )[0].text

    says("hello", "", "a dog", "/reset", "a dog", "/what", "/exit", "never said")
    status, out, err = run(
        "chat", MODEL, "--temperature", 0, "--max-tokens", 8, "--system", "be kind", "--quiet"
    )
    first = answer("hello")
    second, fresh = answer("hello", first, "a dog"), answer("a dog")
    assert second != fresh
    assert (status, out) == (0, f"{first}\n{second}\n{fresh}\n")
    assert err.splitlines() == [
        "jfp8kv: conversation cleared",
        "jfp8kv: unknown command /what: the commands are /reset and /exit",
    ]


def test_variables_of_the_chat_template_are_given_as_json(run, says, llm):
    ask = ("chat", MODEL, "--temperature", 0, "--max-tokens", 8, "--quiet")
    says("hello")
    replaced = llm.chat(
        [{"role": "user", "content": "hello"}],
        temperature=0,
        max_tokens=8,
        chat_template_kwargs={"eos_token": " dog"},
    )[0].text
    assert run(*ask, "--chat-template-kwargs", '{"eos_token": " dog"}') == (0, f"{replaced}\n", "")
    for text, named in (("{", "not valid JSON"), ("[1]", "chat_template_kwargs=[1]: must be")):
        status, _, err = run(*ask, "--chat-template-kwargs", text)
        assert status == 2 and named in err and err.count("\n") == 1


def test_a_full_context_drops_the_oldest_messages(run, says, llm):
    says("a", "the dog and the end of the café", "hello " * 400)
    status, out, err = run(
        "chat", MODEL, "--temperature", 0, "--max-tokens", 24, "--max-model-len", 64, "--quiet"
    )
    second = llm.chat(
        [{"role": "user", "content": "the dog and the end of the café"}],
        temperature=0,
        max_tokens=24,
    )
    assert status == 0
    assert out.endswith(second[0].text + "\n")
    notice, refused = err.splitlines()
    assert "the context of 64 tokens is full: dropped your oldest message" in notice
    assert "this message alone exceeds the context of 64 tokens" in refused


@pytest.fixture
def ctrl_c(monkeypatch):
    """Send Ctrl-C to the main thread, which waits, during the given step of the engine."""

    def ctrl_c(at: int) -> None:
        steps = iter(range(at + 1))

        def interrupted(*args: object) -> object:
            if next(steps, None) == at:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.5)  # the main thread handles it before the step ends
            return read(*args)

        read = postprocess.read_new_tokens
        monkeypatch.setattr(postprocess, "read_new_tokens", interrupted)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield ctrl_c
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("step", [0, 1], ids=["prefill", "decode"])
def test_ctrl_c_ends_the_reply_and_the_conversation_continues(run, says, ctrl_c, llm, step):
    ctrl_c(step)
    says("a dog", "/reset", "the end")
    status, out, err = run("chat", MODEL, "--temperature", 0, "--max-tokens", 8, "--quiet")
    assert (status, err.count("\n")) == (0, 1)
    cut, whole = (
        llm.chat([{"role": "user", "content": text}], temperature=0, max_tokens=8)[0].text
        for text in ("a dog", "the end")
    )
    assert out.endswith(f"\n{whole}\n")
    before = out.removesuffix(f"\n{whole}\n")
    assert cut.startswith(before) and before != cut


@pytest.mark.parametrize("several", [(), ("--prompt", "a dog")], ids=["streaming", "a batch"])
def test_ctrl_c_ends_generate_without_a_traceback(run, ctrl_c, several):
    ctrl_c(0)
    status, out, err = run("generate", MODEL, *ASK, *several)
    assert (status, out.strip(), err) == (130, "", "")


def test_ctrl_c_at_the_prompt_exits(run, says, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    says()
    assert run("chat", MODEL, "--quiet") == (0, "", "")


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_prints_plain_tables_to_a_pipe(run):
    asked = jfp8kv.inspect(
        MODEL, kv_dtype="fp8", kv_scales="token_head", max_model_len=100, page_size=16
    )
    options = (
        "--kv-dtype",
        "fp8",
        "--kv-scales",
        "token_head",
        "--max-model-len",
        100,
        "--page-size",
        16,
    )
    assert run("inspect", MODEL, *options) == (0, f"{asked}\n", "")


def test_inspect_prints_json(run):
    status, out, err = run("inspect", MODEL, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(jfp8kv.inspect(MODEL).to_dict()))


def test_inspect_prints_lines_and_colours_within_the_width_of_a_terminal():
    ours, theirs = os.openpty()
    done = program(
        "inspect", MODEL, stdout=theirs, env=os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    )
    os.close(theirs)
    with open(ours, "rb", buffering=0) as terminal:
        shown = terminal.read(100_000).decode()
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b[1m" in shown and "───" in shown
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in shown.splitlines()) <= 100


# -- mistakes --------------------------------------------------------------------------------------

ASK_HI = ("generate", MODEL, *PROMPT)
MISTAKES = {
    "no command": ((), "COMMAND"),
    "an unknown command": (("generat",), "Did you mean 'generate'?"),
    "no model": (("generate", *PROMPT), "MODEL"),
    "no prompt": (("generate", MODEL), "give --prompt TEXT"),
    "an empty prompt": ((*ASK_HI, "--prompt", ""), "prompt 1 is empty"),
    "a prompt of undecodable bytes": (("generate", MODEL, "--prompt", "a\udcff"), "UTF-8"),
    "a prompt without its option": (("generate", MODEL, "the end"), "'the end'"),
    "a prompt longer than the context": (
        ("generate", MODEL, "--prompt", "a b " * 300),
        "max_model_len=256",
    ),
    "one such prompt among good ones": ((*ASK_HI, "--prompt", "a b " * 300), "prompt 1 has"),
    "a prompt longer than the pool": (
        ("generate", MODEL, "--prompt", "a b " * 40, "--kv-cache-memory", "20KB"),
        "kv_cache_memory",
    ),
    "a pool without a page": ((*ASK_HI, "--kv-cache-memory", "1KB"), "kv_cache_memory=1000"),
    "an invalid size": ((*ASK_HI, "--kv-cache-memory", "lots"), "kv_cache_memory='lots'"),
    "an unknown option": ((*ASK_HI, "--kv-dtpye", "fp8"), "Did you mean '--kv-dtype'?"),
    "an abbreviated option": ((*ASK_HI, "--max-tok=4"), "Did you mean '--max-tokens'?"),
    "another command's option": (("chat", MODEL, "--json"), "unknown option --json"),
    "an unknown kv_dtype": ((*ASK_HI, "--kv-dtype", "fp8_e4m4"), "Did you mean 'fp8_e4m3'?"),
    "unknown scales": (
        (*ASK_HI, "--kv-dtype", "fp8", "--kv-scales", "tokenhead"),
        "Did you mean 'token_head'?",
    ),
    "a missing file of scales": (
        (*ASK_HI, "--kv-dtype", "fp8", "--kv-scales", "/no/scales"),
        "'/no/scales'",
    ),
    "an unknown dtype": ((*ASK_HI, "--dtype", "int8"), "dtype='int8'"),
    "a context beyond the model's": ((*ASK_HI, "--max-model-len", 512), "max_model_len=512"),
    "temperature below 0": ((*ASK_HI, "--temperature", -1), "temperature=-1.0"),
    "temperature nan": ((*ASK_HI, "--temperature", "nan"), "temperature=nan"),
    "top_p above 1": ((*ASK_HI, "--top-p", 1.5), "top_p=1.5"),
    "top_p 0": ((*ASK_HI, "--top-p", 0), "top_p=0.0"),
    "min_p below 0": ((*ASK_HI, "--min-p", -0.1), "min_p=-0.1"),
    "max_tokens 0": ((*ASK_HI, "--max-tokens", 0), "max_tokens=0"),
    "max_tokens that is not a number": (
        (*ASK_HI, "--max-tokens", "ten"),
        "--max-tokens: 'ten' is not a whole number",
    ),
    "n 0": ((*ASK_HI, "--n", 0), "n=0"),
    "a negative seed": ((*ASK_HI, "--seed", -1), "seed=-1"),
    "an empty stop": ((*ASK_HI, "--stop", ""), "stop="),
    "a missing model": (("generate", "/no/model", *PROMPT), "/no/model"),
    "a hub id that is not cached": (("generate", "owner/missing", *PROMPT), "owner/missing"),
    "a model name that is too long for a file": (("generate", "m" * 300, *PROMPT), "m" * 300),
    "a model that is a Python file": (
        ("generate", __file__, *PROMPT),
        "neither a folder nor a .gguf file",
    ),
    "inspect without a model": (("inspect",), "MODEL"),
    "inspect a missing model": (("inspect", "/no/model"), "/no/model"),
    "inspect beyond the model's context": (
        ("inspect", MODEL, "--max-model-len", 512),
        "max_model_len=512",
    ),
    "inspect with page_size 0": (("inspect", MODEL, "--page-size", 0), "page_size=0"),
    "inspect with a misspelt option": (
        ("inspect", MODEL, "--page-sise", 8),
        "Did you mean '--page-size'?",
    ),
    "a misspelt command": (("inspct", MODEL), "Did you mean 'inspect'?"),
    "chat with a missing model": (("chat", "/no/model"), "/no/model"),
    "chat with an invalid temperature": (("chat", MODEL, "--temperature", -1), "temperature=-1.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_it(run, mistake):
    argv, named = MISTAKES[mistake]
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"jfp8kv: error: .+\n", err)
    assert named in err


@pytest.mark.parametrize(
    "content", [None, b"caf\xe9\n", b"", b"\n \n"], ids=["missing", "latin-1", "empty", "blank"]
)
def test_a_file_without_prompts_raises(run, tmp_path, content):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    status, out, err = run("generate", MODEL, "--file", file)
    assert (status, out) == (2, "")
    assert re.fullmatch(
        r"jfp8kv: error: (--file .*prompts.txt: cannot be read|no prompt: ).*\n", err
    )


def damage(folder: Path, file: str, content: bytes | None) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)


DAMAGED = {
    "no config": ("config.json", None, "config.json"),
    "a broken config": ("config.json", b"{", "config.json"),
    "no weights": ("model.safetensors", None, "no weights"),
    "truncated weights": (
        "model.safetensors",
        (MODEL / "model.safetensors").read_bytes()[:-100],
        "model.safetensors",
    ),
    "an entry of another type": (
        "config.json",
        b'{"architectures": "LlamaForCausalLM", "hidden_size": "64"}',
        "hidden_size='64'",
    ),
    "an unsupported architecture": (
        "config.json",
        b'{"architectures": ["MambaForCausalLM"]}',
        "MambaForCausalLM",
    ),
}


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_checkpoint_is_one_line_that_names_the_file(run, tmp_path, damaged):
    file, content, named = DAMAGED[damaged]
    folder = shutil.copytree(MODEL, tmp_path / "model")
    damage(folder, file, content)
    status, out, err = run("generate", folder, *PROMPT)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"jfp8kv: error: .+\n", err)
    assert named in err


def test_an_invalid_scale_is_in_the_report_and_no_strict_replaces_it(run, says, tmp_path):
    folder = write_sidecar(shutil.copytree(MODEL, tmp_path / "model"), [[0.5, 0.0]])
    status, out, err = run("inspect", folder)
    assert (status, err) == (0, "")
    assert re.search(
        r"\n +1 +1 +1 +kv_cache_scales.json: layer 1 +- +.* is 0: .*: scale 1 is used instead\n",
        out,
    )
    (tmp_path / "data.txt").write_text("the end")
    commands = {
        "generate": ASK,
        "chat": (),
        "calibrate": (tmp_path / "data.txt", "--out", tmp_path / "scales.safetensors"),
    }
    for command, options in commands.items():
        says()
        argv = (command, folder, *options, "--quiet")
        status, _, err = run(*argv)
        assert (
            (status, err.count("\n")) == (2, 1) and "layer 1 is 0" in err and "--no-strict" in err
        )
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            status, _, err = run(*argv, "--no-strict")
        assert (status, err.count("\n")) == (0, 1) and re.match(
            "jfp8kv: warning: .*layer 1 is 0.*: scale 1 is used instead", err
        )


def test_a_pickle_and_a_truncated_gguf_file_raise(run, tmp_path):
    for name in ("pytorch_model.bin", "model.gguf"):
        (tmp_path / name).write_bytes(b"GGUF\x03\x00\x00\x00")
        status, out, err = run("generate", tmp_path / name, *PROMPT)
        assert (status, out) == (2, "")
        assert re.fullmatch(rf"jfp8kv: error: .*{name}.*\n", err)


def test_a_model_without_a_chat_template_cannot_chat(run, tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    status, _, err = run("chat", folder)
    assert (status, err.count("\n")) == (2, 1)
    assert "has no chat template" in err


def test_a_warning_is_one_line(run, monkeypatch):
    def warn(*_: object, **__: object) -> None:
        warnings.warn("scales found\nand not applied", stacklevel=1)
        raise jfp8kv.ConfigError("enough")

    monkeypatch.setattr("jfp8kv.llm.LLM", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert run("generate", MODEL, *ASK)[2].splitlines() == [
            "jfp8kv: warning: scales found and not applied",
            "jfp8kv: error: enough",
        ]


# -- the program itself ----------------------------------------------------------------------------


def test_help_and_version_answer_without_jax():
    code = (
        "import sys; from jfp8kv.cli import main; status = main({!r}); "
        "sys.exit(3 if 'jax' in sys.modules else status)"
    )
    for argv in (
        ["--help"],
        ["generate", "--help"],
        ["chat", "--help"],
        ["inspect", "--help"],
        ["calibrate", "--help"],
        ["compare", "--help"],
        ["plan", "--help"],
        ["export", "--help"],
        ["bench", "--help"],
        ["batch", "--help"],
        ["--version"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(
            f"jfp8kv {jfp8kv.__version__}\n" if argv == ["--version"] else "usage: jfp8kv"
        )


def test_the_program_exits_with_the_status_of_main_and_prints_only_its_own_lines():
    done = program("generate", MODEL, *ASK, "--kv-dtype", "fp8")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith("jfp8kv: 12 tokens")
    refused = program(*ASK_HI, "--top-k", "many")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_closed_pipe_gives_no_traceback():
    read, write = os.pipe()
    os.close(read)
    try:
        done = program("generate", MODEL, *ASK, "--quiet", stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
