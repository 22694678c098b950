"""What an engine has compiled, as a table: which steps, for how many requests and tokens, how long it took, what it takes."""

import dataclasses
import math
from typing import Any

from rich import box
from rich.console import Group
from rich.text import Text

from jfp8kv.core.report import Report, empty_table

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """One compiled program.

    `requests` x `tokens` is its bucket: padded requests, and tokens of each that are run at once. `variant` of a decode is
    "plain" or "full" (engine/sampler_state.py). `temporary_bytes` is what it needs besides its arguments, `code_bytes` its machine
    code as far as the platform tells. `shared`: another engine had compiled it; `seconds` are what that took there.
    """

    step: str
    requests: int
    tokens: int
    variant: str
    seconds: float
    temporary_bytes: int
    code_bytes: int
    shared: bool


@dataclasses.dataclass(frozen=True, repr=False)
class CompileReport(Report):
    """The programs of an engine, in the order in which it came to need them. Prints as a table; `to_dict` has everything."""

    steps: tuple[CompiledStep, ...]

    @property
    def seconds(self) -> float:
        """Spent compiling, or reading from the compilation cache, by this engine."""
        return math.fsum(step.seconds for step in self.steps if not step.shared)

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, of types that JSON has."""
        return dataclasses.asdict(self) | {"seconds": self.seconds}

    def __repr__(self) -> str:
        return f"CompileReport({len(self.steps)} programs, {self.seconds:.1f} s)"

    def _layout(self, lines: box.Box | None) -> Group:
        columns = (
            "step",
            "requests x tokens",
            "variant",
            "seconds",
            "temporaries MiB",
            "code KiB",
            "",
        )
        table = empty_table(lines, *columns, text=["variant", ""])
        for each in self.steps:
            table.add_row(
                each.step,
                f"{each.requests} x {each.tokens}",
                each.variant,
                f"{each.seconds:.2f}",
                f"{each.temporary_bytes / _MIB:.2f}",
                f"{each.code_bytes / 1024:.0f}",
                "from another engine" if each.shared else "",
            )
        built = sum(not each.shared for each in self.steps)
        return Group(
            Text(f"{len(self.steps)} programs, {built} compiled here in {self.seconds:.1f} s"),
            table,
        )
