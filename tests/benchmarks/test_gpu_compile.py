"""The list of what is compiled for GPUs, and the document that lists it."""

from benchmarks._gpu.cases import cases
from benchmarks._gpu.compiled import Report
from benchmarks.gpu_compile import BEGIN, DOCUMENT, END, document


def test_every_case_has_a_name_of_its_own():
    names = [(case.name, case.target.name) for case in cases()]
    assert len(set(names)) == len(names)


def test_the_document_lists_every_case():
    """Its figures may be of another compiler; a kernel or option that it does not have needs `make gpu-compile`."""
    made = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:3])
        for line in made.splitlines()
        if line.startswith("| ")
    ][2:]
    assert rows == [(case.name, case.target.name.upper()) for case in cases()]


def test_the_generated_part_alone_is_written_again(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_compile.versions", lambda: "something 1.0")
    case = cases()[0]
    report = Report(case, 96, 0, 38916, 4, ("HMMA",), None, ())
    text = document([report], f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "old" not in text and case.name in text and "something 1.0" in text
    assert document([report], text) == text


def test_as_many_blocks_fit_as_the_scarcest_of_registers_shared_memory_and_threads_allows():
    case = cases()[0]
    assert case.target.name == "h100"
    by_registers = Report(
        case, 97, 0, 1024, 4, (), None, ()
    )  # 104 registers a lane are allocated: 65536 // (104 * 128)
    by_shared = Report(case, 32, 0, 38916, 4, (), None, ())  # 233472 // (38916 + 1024)
    by_threads = Report(case, 32, 0, 1024, 8, (), None, ())  # 2048 // 256
    assert (by_registers.blocks, by_shared.blocks, by_threads.blocks) == (4, 5, 8)
