"""Machine code as `nvdisasm -c` prints it (SASS): the instructions of a kernel and the loops among them.

    .L_x_1:
            /*1c60*/              @!P2 LDGSTS.E.BYPASS.128 [R29+0x800], desc[UR12][R12.64] ;
            /*1c70*/               @P0 BRA `(.L_x_1) ;

Loops are the natural loops of the flow graph: code that is moved out of line is counted where it runs. Instructions
that never run (`@!PT`) are left out.
"""

import re
from collections import Counter
from dataclasses import dataclass

LABEL = re.compile(r"^(\.L_\w+):")
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<op>[A-Z][A-Za-z0-9_.]*)\s*(?P<operands>[^;]*)"
)
JUMPS, ENDS = ("BRA", "JMP", "CALL"), ("EXIT", "RET", "BRX", "JMX")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name with all modifiers, whether it depends on a predicate, and the label it may go to."""

    op: str
    conditional: bool
    target: str | None

    @property
    def base(self) -> str:
        return self.op.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """The instructions between a loop's header and its last jump back, inner loops included, by their places in the kernel."""

    header: int
    places: frozenset[int]

    def contains(self, other: "Loop") -> bool:
        return other.places < self.places


@dataclass(frozen=True)
class Kernel:
    """A kernel's instructions in order, and the loops among them."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def counts(self, loop: Loop | None = None) -> Counter[str]:
        """How often each instruction occurs in the loop, or in the whole kernel; padding is left out."""
        places = range(len(self.instructions)) if loop is None else sorted(loop.places)
        ops = (self.instructions[place].op for place in places)
        return Counter(op for op in ops if op != "NOP")

    def hot(self, *, among: tuple[str, ...]) -> list[Counter[str]]:
        """What the loops do that have one of the instructions `among`, or the innermost of them where they are nested.

        Where no loop has any: the longest innermost loop, and the whole kernel if it has no loop.
        """
        having = [
            x
            for x in self.loops
            if any(self.instructions[place].base in among for place in x.places)
        ]
        candidates = having or list(self.loops)
        inner = [self.counts(x) for x in candidates if not any(x.contains(y) for y in candidates)]
        if not inner:
            return [self.counts()]
        return inner if having else [max(inner, key=Counter.total)]


def parse(text: str, kernel: str) -> Kernel:
    """The kernel of that name in a disassembly, which may hold several."""
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
    # `BRA P1, ...` and `BRA.U !UP0, ...` have their predicate among the operands; a call comes back.
    conditional = (
        bool(found["guard"])
        or found["op"].startswith("CALL")
        or (target is not None and not operands.startswith("`("))
    )
    return Instruction(found["op"], conditional, target[1] if target else None)


def _successors(place: int, instructions: list[Instruction], labels: dict[str, int]) -> list[int]:
    """Where a warp can be next. Diverged warps (BRA.DIV) take code of their own, which runs in no kernel of equal threads."""
    at = instructions[place]
    following = [place + 1] if place + 1 < len(instructions) else []
    if at.target in labels and not at.op.startswith("BRA.DIV"):
        return [labels[at.target], *(following if at.conditional else [])]
    return [] if at.base in ENDS and not at.conditional else following


def _loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """Every jump back to a place through which all ways to it lead, and what lies on the ways between."""
    if not instructions:
        return []
    after = {place: _successors(place, instructions, labels) for place in range(len(instructions))}
    before: dict[int, list[int]] = {}
    for place, targets in after.items():
        for target in targets:
            before.setdefault(target, []).append(place)
    reached = _reach([0], after, stop=-1)
    bodies: dict[int, set[int]] = {}
    for place in sorted(reached):
        for header in after[place]:
            if header <= place and place not in _reach([0], after, stop=header):
                bodies.setdefault(header, {header}).update(
                    _reach([place], before, stop=header) & reached
                )
    return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]


def _reach(starts: list[int], edges: dict[int, list[int]], *, stop: int) -> set[int]:
    """Every place that can be come to from `starts` without going through `stop`, which is left out."""
    seen: set[int] = set()
    waiting = [place for place in starts if place != stop]
    while waiting:
        place = waiting.pop()
        if place not in seen:
            seen.add(place)
            waiting += [x for x in edges.get(place, []) if x != stop]
    return seen
