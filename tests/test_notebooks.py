"Each lesson and solution alone in a fresh kernel, from the first cell to the last."
import pytest
from house import NBS, lessons, read, source
from run_lesson import find, last_output, run

FRESH = lessons() + sorted((NBS/"solutions").glob("*.ipynb"))


def shows(cell) -> bool:
    "Has it an output, other than the word that a stand-in is used (which a run on real data does not say)?"
    return any(o.output_type != "stream" or any("using a stand-in" not in line for line in o.text.splitlines()) for o in cell.get("outputs", []))


@pytest.mark.parametrize("path", FRESH, ids=lambda p: p.stem)
def test_runs_in_a_fresh_kernel(path):
    nb, error = run(path, timeout=120)
    assert error is None, str(error)
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code" and c.source.strip())
    lost = [source(kept) for c, kept in zip(nb.cells, read(path)["cells"], strict=True) if shows(c) and not kept["outputs"]]
    assert not lost, f"these cells show something, but the notebook was committed without it: {lost}"


def test_find_names_the_lessons():
    with pytest.raises(SystemExit, match="00_setup"): find("99_nothing")
    assert find("00_setup.ipynb").stem == "00_setup"


def test_last_output_is_the_last_code_cells():
    from nbformat.v4 import new_code_cell, new_notebook, new_output
    cells = [new_code_cell("1", outputs=[new_output("stream", text="old")]),
             new_code_cell("2", outputs=[new_output("stream", text="a\n"), new_output("execute_result", data={"text/plain": "b"})]),
             new_code_cell("pass")]
    assert last_output(new_notebook(cells=cells)) == "a\nb"
