"""Parser of machine code (SASS) as printed by `nvdisasm -c`: instructions and loops of a kernel.

    .L_x_1:
            /*1c60*/              @!P2 LDGSTS.E.BYPASS.128 [R29+0x800], desc[UR12][R12.64] ;
            /*1c70*/               @P0 BRA `(.L_x_1) ;

Loops are the natural loops of the control flow graph, so out-of-line code counts where it runs.
Instructions that never run (`@!PT`) are ignored.
"""

import re
from collections import Counter
from dataclasses import dataclass

LABEL = re.compile(r"^(\.L_\w+):")
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?"
    r"(?P<op>[A-Z][A-Za-z0-9_.]*)\s*(?P<operands>[^;]*)"
)
JUMPS, ENDS = ("BRA", "JMP", "CALL"), ("EXIT", "RET", "BRX", "JMX")


@dataclass(frozen=True)
class Instruction:
    """An instruction: its opcode with all modifiers, whether it is predicated, its jump target."""

    op: str
    conditional: bool
    target: str | None

    @property
    def base(self) -> str:
        """Opcode without modifiers."""
        return self.op.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """A loop with its inner loops, as instruction indices in the kernel."""

    header: int
    indices: frozenset[int]

    def contains(self, other: "Loop") -> bool:
        """Return whether `other` is nested in this loop."""
        return other.indices < self.indices


@dataclass(frozen=True)
class Kernel:
    """The instructions of a kernel in order, and its loops."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def counts(self, loop: Loop | None = None) -> Counter[str]:
        """Return the number of each instruction in a loop, or in the kernel, without padding."""
        indices = range(len(self.instructions)) if loop is None else sorted(loop.indices)
        ops = (self.instructions[i].op for i in indices)
        return Counter(op for op in ops if op != "NOP")

    def hot_loops(self, *, containing: tuple[str, ...]) -> list[Counter[str]]:
        """Return the counts of the innermost loops that contain one of these opcodes.

        If no loop contains any: of the longest innermost loop, or of a kernel without loops.
        """
        matching = [
            loop
            for loop in self.loops
            if any(self.instructions[i].base in containing for i in loop.indices)
        ]
        candidates = matching or list(self.loops)
        inner = [self.counts(x) for x in candidates if not any(x.contains(y) for y in candidates)]
        if not inner:
            return [self.counts()]
        return inner if matching else [max(inner, key=Counter.total)]


def parse(text: str, kernel: str) -> Kernel:
    """Parse the kernel with this name from a disassembly, which may have several."""
    start = text.find(f"\n.text.{kernel}:")
    body = text[start + 1 :] if start >= 0 else text
    end = body.find("\n//-----")
    instructions, labels = [], {}
    for line in body[: end if end >= 0 else None].splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (found := INSTRUCTION.match(line)) and (found["guard"] or "").strip() != "@!PT":
            instructions.append(_instruction(found))
    return Kernel(tuple(instructions), tuple(_loops(instructions, labels)))


def _instruction(found: re.Match[str]) -> Instruction:
    operands = found["operands"].strip()
    target = re.search(r"`\((\.L_\w+)\)", operands) if found["op"].split(".")[0] in JUMPS else None
    # `BRA P1, ...` and `BRA.U !UP0, ...` have their predicate among the operands. A call returns.
    conditional = (
        bool(found["guard"])
        or found["op"].startswith("CALL")
        or (target is not None and not operands.startswith("`("))
    )
    return Instruction(found["op"], conditional, target[1] if target else None)


def _successors(index: int, instructions: list[Instruction], labels: dict[str, int]) -> list[int]:
    """Return the next instructions. Code for diverged warps (BRA.DIV) is ignored."""
    instruction = instructions[index]
    following = [index + 1] if index + 1 < len(instructions) else []
    if instruction.target in labels and not instruction.op.startswith("BRA.DIV"):
        return [labels[instruction.target], *(following if instruction.conditional else [])]
    return [] if instruction.base in ENDS and not instruction.conditional else following


def _loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """Return the natural loops: back edges to a dominator, with the instructions on their paths."""
    if not instructions:
        return []
    after = {index: _successors(index, instructions, labels) for index in range(len(instructions))}
    before: dict[int, list[int]] = {}
    for index, targets in after.items():
        for target in targets:
            before.setdefault(target, []).append(index)
    reached = _reach([0], after, stop=-1)
    bodies: dict[int, set[int]] = {}
    for index in sorted(reached):
        for header in after[index]:
            if header <= index and index not in _reach([0], after, stop=header):
                bodies.setdefault(header, {header}).update(
                    _reach([index], before, stop=header) & reached
                )
    return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]


def _reach(starts: list[int], edges: dict[int, list[int]], *, stop: int) -> set[int]:
    """Return the instructions reachable from `starts` without `stop`."""
    seen: set[int] = set()
    waiting = [index for index in starts if index != stop]
    while waiting:
        index = waiting.pop()
        if index not in seen:
            seen.add(index)
            waiting += [x for x in edges.get(index, []) if x != stop]
    return seen
