"""Write `tokenizers.json`: what transformers computes for the folders of `tokenizer_folders.py`.

    python tests/references/make_tokenizers.py

By folder: `special` (roles), `eos`, `ids` and `decoded` (without and with special tokens) of each
text, `chat_ids` of the first conversation, and `chats`: the text of each conversation, or null
where there is no chat template.
Generated with transformers 5.24.0 and tokenizers 0.23.3, without torch and mistral-common.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from tests.references.tokenizer_folders import CHATS, FOLDERS, TEXTS, write  # noqa: E402


def reference(folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(text) for text in TEXTS]
    return {
        "special": tokenizer.special_tokens_map,
        "eos": tokenizer.eos_token_id,
        "ids": ids,
        "bare_ids": [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS],
        "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "decoded_special": [tokenizer.decode(row) for row in ids],
        "chat_ids": chat_ids(tokenizer),
        "chats": {name: chat(tokenizer, *given) for name, given in CHATS.items()},
    }


def chat(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> Any:
    options = {"add_generation_prompt": not options.get("continue_final_message"), **options}
    options |= options.pop("chat_template_kwargs", {})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except ValueError:
        return None
    return text


def chat_ids(tokenizer: Any) -> list[int] | None:
    messages, _ = next(iter(CHATS.values()))
    if tokenizer.chat_template is None:
        return None
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def main() -> None:
    found = {}
    for name in FOLDERS:
        with tempfile.TemporaryDirectory() as path:
            found[name] = reference(write(name, Path(path)))
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in found.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    Path(__file__).with_name("tokenizers.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
