"""Each lesson and solution alone in a fresh kernel, from the first cell to the last: `make matrix` runs this file.

`make test` does not collect it: there nbdev_test runs each notebook once, in processes that it uses again.
"""
import pytest
from house import NBS, lessons, read, source
from run_lesson import run

FRESH = lessons() + sorted((NBS/"solutions").glob("*.ipynb"))


def shows(cell) -> bool:
    "Has it an output, other than a warning or the word that a stand-in is used, of which a run on real data has none?"
    return any(o.output_type != "stream" or o.name == "stdout" and any("using a stand-in" not in line for line in o.text.splitlines())
               for o in cell.get("outputs", []))


@pytest.mark.parametrize("path", FRESH, ids=lambda p: p.stem)
def test_runs_in_a_fresh_kernel(path):
    nb, error = run(path, timeout=180)
    assert error is None, str(error)
    assert all(c.execution_count for c in nb.cells if c.cell_type == "code" and c.source.strip())
    lost = [source(kept) for c, kept in zip(nb.cells, read(path)["cells"], strict=True) if shows(c) and not kept["outputs"]]
    assert not lost, f"these cells show something, but the notebook was committed without it: {lost}"
