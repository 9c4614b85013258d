"Each lesson and solution alone in a fresh kernel, from the first cell to the last."
import pytest
from house import NBS, lessons
from run_lesson import find, last_output, run

FRESH = lessons() + sorted((NBS/"solutions").glob("*.ipynb"))


@pytest.mark.parametrize("path", FRESH, ids=lambda p: p.stem)
def test_runs_in_a_fresh_kernel(path):
    nb, error = run(path, timeout=120)
    assert error is None, str(error)
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code" and c.source.strip())


def test_find_names_the_lessons():
    with pytest.raises(SystemExit, match="00_setup"): find("99_nothing")
    assert find("00_setup.ipynb").stem == "00_setup"


def test_last_output_is_the_last_code_cells():
    from nbformat.v4 import new_code_cell, new_notebook, new_output
    cells = [new_code_cell("1", outputs=[new_output("stream", text="old")]),
             new_code_cell("2", outputs=[new_output("stream", text="a\n"), new_output("execute_result", data={"text/plain": "b"})]),
             new_code_cell("pass")]
    assert last_output(new_notebook(cells=cells)) == "a\nb"
