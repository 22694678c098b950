"""Report words and phrases that the project does not use, as `file:line: phrase (write instead)`.

The project is written in plain technical English with the field's standard terms
(docs/glossary.md). The list holds what reviewers kept finding: words of a private dialect for
things that have a name.

    python .ci/language.py              # everything tracked by git
    python .ci/language.py jfp8kv/cache # some of it
"""

import re
import subprocess
import sys
from pathlib import Path

BANNED = {
    # phrase (a regular expression, case-insensitive): what to write instead
    r"\blikeliest\b": "most likely, top",
    r"\balike\b": "the same, both, equal",
    r"\banew\b": "again; recompute; restart",
    r"\bnobody\b": "no caller, no request",
    r"\bwhoever\b": "the caller that ..., the request that ...",
    r"\bsomebody\b": "a caller, a user",
    r"\bhe who\b": "the caller that ...",
    r"\b(is|are) no (?!longer\b|more\b|less\b|such\b|need\b|way\b|doubt\b|[a-z]+er\b|worse\b|"
    r"different\b)"
    r"(valid |such )?[a-z]+[.,:;)]": "is not a ..., invalid ...",
    r"\bis no (json|utf-8|csv|yaml|number|name|path|file|folder|model|text|list|prompt|tensor)\b": (
        "invalid ..., is not a ..."
    ),
    r"\bof (its|his|her|one's|their) own\b": "a separate ..., its ...",
    r"\blets? go of\b": "release, free",
    r"\btak(e|en|es|ing) over (?!from\b)": "adopt, reuse",
    r"\bbegin(s|ning)? again\b": "restart, recompute",
    r"\bsaid aloud\b": "with a warning",
    r"\b(is|are|was|were) told\b": "is notified, receives",
    r"\btold of\b": "notified of",
    r"\bthe other way (a)?round\b": "conversely",
    r"\bhas (its|a) say\b": "decides, constrains",
    r"\bruns? beside\b": "runs in the same batch, concurrently",
    r"\bin planes\b": "byte-split",
    r"\bgrammars? allows?\b(?= what)": "the grammar's bitmask",
    r"\bkeeps? on\b": "continues to",
    r"\bof which\b(?! the| each| one| only| some| all| none| at| \d)": "split the sentence",
    r"\bthan which\b": "split the sentence",
    r"\bthat is so\b": "this is the case; drop it",
    r"\bno more than that\b": "drop it",
    r"\bas (it|they) (is|are|was|were)\b(?! not| now)": "unchanged",
    r"\bmatter of fact\b": "drop it",
    r"\bsits? in\b": "is stored in",
    r"\bwhat (is|was|are|were) made\b": "the output, the generated tokens",
    r"\bwhat (it|they|a user|requests?) (made|asked|got)\b": "output tokens, options",
    r"\bmade of it\b": "computed, produced",
    r"\bin (his|her) hands\b": "managed by the caller",
    r"\bgives? (its|their|it) (pages )?back\b": "release, free",
    r"\bgiven back\b": "released, freed",
    r"\bforetell(s|ing)?\b": "predict",
    r"\bspeaks? of\b": "describe, refer to",
    r"\bwishes\b": "options, requirements",
    r"\bso many\b(?! that)": "that many; name the number",
    r"\bin a sitting\b": "drop it",
    r"\bgets on\b": "makes progress",
    r"\bcomes? to nothing\b": "has no effect",
    r"\bfor want of\b": "for lack of",
    r"\bto (its|their) ends?\b": "to completion",
    r"\bas far as (that|it|they) (goes|go)\b": "where possible",
    r"\bby (its|his) (very )?nature\b": "drop it",
    r"\b(aught|naught|whence|thence|hence(forth)?|thereof|wherein|whereby|thereby)\b": "plain",
}
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".ipynb"}
NAMES = {"Makefile", "run"}
SKIPPED = (".ci/language.py", "LICENSE", "benchmarks/results/", "tests/references/cases/data")


def findings(path: Path) -> list[str]:
    """Return one line for each use of a banned phrase in `path`."""
    found = []
    patterns = [(re.compile(p, re.IGNORECASE), advice) for p, advice in BANNED.items()]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if path.suffix == ".ipynb" and '"image/' in line:
            continue
        for pattern, advice in patterns:
            if match := pattern.search(line):
                found.append(f"{path}:{number}: {match.group(0)!r} (write: {advice})")
    return found


def main(roots: list[str]) -> int:
    listed = subprocess.run(
        ["git", "ls-files", *roots], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    paths = [
        Path(name)
        for name in listed
        if (Path(name).suffix in SUFFIXES or Path(name).name in NAMES)
        and not name.startswith(SKIPPED)
        and Path(name).is_file()
    ]
    found = [line for path in paths for line in findings(path)]
    print("\n".join(found) if found else f"language: {len(paths)} files, nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
