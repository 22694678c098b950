"""Numbers of layers as people write them."""

from collections.abc import Sequence


def runs(numbers: Sequence[int], most: int | None = None) -> str:
    """`0-4, 6-10` for 0 to 4 and 6 to 10, in ascending order; past `most` runs "..." stands for the rest."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in found]
    return ", ".join(shown if most is None or len(shown) <= most else [*shown[: most - 1], "..."])
