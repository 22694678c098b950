"""The cases that are compiled for GPUs, and their document."""

from benchmarks._gpu.cases import cases
from benchmarks._gpu.compiled import Report
from benchmarks.gpu_compile import BEGIN, DOCUMENT, END, document


def test_every_case_has_a_unique_name():
    names = [(case.name, case.target.name) for case in cases()]
    assert len(set(names)) == len(names)


def test_the_document_lists_every_case():
    """Figures may be from another compiler. After adding a case, run `make gpu-compile`."""
    generated = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:3])
        for line in generated.splitlines()
        if line.startswith("| ")
    ][2:]
    assert rows == [(case.name, case.target.name.upper()) for case in cases()]


def test_only_the_generated_part_is_replaced(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_compile.versions", lambda: "something 1.0")
    case = cases()[0]
    report = Report(case, 96, 0, 38916, 4, ("HMMA",), None, ())
    text = document([report], f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text and case.name in text and "something 1.0" in text
    assert document([report], text) == text


def test_blocks_are_limited_by_registers_shared_memory_or_threads():
    case = cases()[0]
    assert case.target.name == "h100"
    # 104 registers per lane are allocated: 65536 // (104 * 128).
    by_registers = Report(case, 97, 0, 1024, 4, (), None, ())
    by_shared = Report(case, 32, 0, 38916, 4, (), None, ())  # 233472 // (38916 + 1024)
    by_threads = Report(case, 32, 0, 1024, 8, (), None, ())  # 2048 // 256
    assert (by_registers.blocks, by_shared.blocks, by_threads.blocks) == (4, 5, 8)
