"The tools that find, run and copy notebooks. (The notebooks themselves are run by nbdev_test, and in fresh kernels by `make matrix`.)"
import json
import os
import re

import nbformat
import pytest
import run_lesson
from copy_lesson import clean, copy
from house import NBS, lessons
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from run_lesson import Teller, find, last_output, run


@pytest.fixture
def mine(tmp_path, monkeypatch):
    "A folder of one's own with a copy of lesson 00 and a notebook that nbs/ has not."
    monkeypatch.setattr(run_lesson, "MINE", tmp_path)
    for name in ("00_setup", "77_trial"): nbformat.write(new_notebook(), tmp_path/f"{name}.ipynb")
    return tmp_path


def test_find_knows_numbers_and_names(mine):
    for path in lessons():
        number, stem = path.stem.split("_")[0], path.stem
        for name in (number, number.lstrip("0") or "0", stem, f"{stem}.ipynb", f"nbs/{stem}.ipynb"):
            if name in "abcdefg": continue                          # 00a is not `a`
            assert find(name) == path, name


def test_find_knows_exercises_and_solutions(mine):
    for path in [*(NBS/"exercises").glob("*.ipynb"), *(NBS/"solutions").glob("*.ipynb")]: assert find(path.stem) == path


def test_find_looks_into_my(mine):
    assert find("77") == find("77_trial") == find("my/77") == mine/"77_trial.ipynb"
    assert find("my/00") == find("my/00_setup.ipynb") == mine/"00_setup.ipynb" and find("00").parent == NBS


@pytest.mark.parametrize("name", ["", "99", "99_nothing", "my/01", "matmul", "1z"])
def test_find_names_the_lessons(mine, name):
    with pytest.raises(SystemExit, match="00_setup"): find(name)


def test_run_tells_where_it_is(tmp_path, capsys):
    cells = [new_markdown_cell("# A lesson\n\nwords"), new_code_cell("1 + 1"), new_markdown_cell("## Middle\n### Deep"), new_code_cell("2 + 2"), new_code_cell("1/0"), new_code_cell("3")]
    nbformat.write(new_notebook(cells=cells), tmp_path/"a.ipynb")
    nb, error = run(tmp_path/"a.ipynb", tell=Teller(tmp_path/"a.ipynb"))
    assert "ZeroDivisionError" in str(error)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("  cell")] == ["  cell 1 of 4 · A lesson", "  cell 2 of 4 · Middle"]


def test_last_output_is_the_last_code_cells():
    cells = [new_code_cell("1", outputs=[new_output("stream", text="old")]),
             new_code_cell("2", outputs=[new_output("stream", text="a\n"), new_output("execute_result", data={"text/plain": "b"})]),
             new_code_cell("pass")]
    assert last_output(new_notebook(cells=cells)) == "a\nb"
    cells += [new_code_cell("3", outputs=[new_output("display_data", data={"text/plain": "<Figure size 1x1 with 1 Axes>", "image/png": ""})])]
    assert last_output(new_notebook(cells=cells)) == "(a figure)"


def test_a_copy_is_clean_and_never_overwrites(tmp_path):
    path = NBS/"00_setup.ipynb"
    first, second = copy(path, tmp_path/"my"), copy(path, tmp_path/"my")
    assert (first.name, second.name) == ("00_setup.ipynb", "00_setup_2.ipynb") and first.read_bytes() == second.read_bytes()
    ours, theirs = json.loads(first.read_text()), json.loads(path.read_text())
    assert [c["source"] for c in ours["cells"] if c["cell_type"] == "code"] == [c["source"] for c in theirs["cells"] if c["cell_type"] == "code"]
    assert not any(c["outputs"] or c["execution_count"] for c in ours["cells"] if c["cell_type"] == "code")
    nbformat.validate(nbformat.read(first, as_version=4))


@pytest.mark.parametrize("path", [NBS/"index.ipynb", NBS/"00_setup.ipynb", NBS/"exercises/00_setup_exercises.ipynb"], ids=lambda p: p.stem)
def test_links_of_a_copy_lead_somewhere(path):
    text = "\n".join("".join(c["source"]) for c in clean(path, NBS.parent/"my")["cells"] if c["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert any(link.startswith("../nbs/") for link in links)
    assert not [link for link in links if not link.startswith("https:") and not os.path.exists(os.path.normpath(NBS.parent/"my"/link))]


def test_the_installer_explains_and_names_no_index():
    import install
    for text in (install.NO_GPU, install.NO_PIP): assert "http" not in text and "make {goal}" in text
    assert all(f"  {i}. " in install.NO_GPU for i in (1, 2, 3, 4)) and "pytorch.org" in install.NO_GPU


def test_the_installer_mends_an_environment_without_pip(tmp_path, monkeypatch):
    import install
    calls, state = [], iter([False, True])
    monkeypatch.setattr(install, "has_pip", lambda: next(state))
    monkeypatch.setattr(install.subprocess, "run", lambda args, **kwargs: calls.append(args))
    install.make_venv()
    assert calls[0][1:4] == ["-m", "venv", "--clear"]
    state = iter([False, False])
    monkeypatch.setattr(install, "VENV", tmp_path/"v"); (tmp_path/"v").mkdir()
    with pytest.raises(SystemExit, match="python3-venv"): install.make_venv()
    assert not (tmp_path/"v").exists(), "nothing half-made stays"
