"The tools that find, run and copy notebooks. (The notebooks themselves are run by nbdev_test, and in fresh kernels by `make matrix`.)"
import json
import os
import re
from types import SimpleNamespace

import nbformat
import pytest
import run_lesson
from copy_lesson import clean, copy
from house import NBS, lessons
from nbclient.exceptions import DeadKernelError
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


@pytest.mark.parametrize("name, words", [("", "which lesson"), ("99", "no lesson '99'"), ("99_nothing", "no lesson"), ("matmul", "no lesson"), ("1z", "no lesson"),
                                         ("my/01", "no my/01 yet: make copy L=01 puts a copy"), ("my/01_matmul.ipynb", "make copy L=01_matmul")])
def test_find_names_the_lessons(mine, name, words):
    with pytest.raises(SystemExit, match=f"(?s){re.escape(words)}.*00_setup"): find(name)


def test_run_tells_where_it_is(tmp_path, capsys):
    cells = [new_markdown_cell("# A lesson\n\nwords"), new_code_cell("1 + 1"), new_markdown_cell("## Middle\n### Deep"), new_code_cell("2 + 2"), new_code_cell("1/0"), new_code_cell("3")]
    nbformat.write(new_notebook(cells=cells), tmp_path/"a.ipynb")
    nb, error = run(tmp_path/"a.ipynb", tell=Teller(tmp_path/"a.ipynb"))
    assert "ZeroDivisionError" in str(error) and nb.cells[1].outputs[0].data["text/plain"] == "2"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("  cell")] == ["  cell 1 of 4 · A lesson", "  cell 2 of 4 · Middle"]


def test_a_lesson_is_run_and_told_about(mine, tmp_path, monkeypatch, capfd):
    "What make lesson prints: where it is, how it went, where the pages lie, and the last output; nothing else."
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Mine"), new_code_cell("print('seven')")]), mine/"77_trial.ipynb")
    monkeypatch.setattr(run_lesson, "ROOT", tmp_path)
    monkeypatch.setattr(run_lesson.sys, "argv", ["run_lesson.py", "77"])
    run_lesson.main()
    said = capfd.readouterr()
    assert re.fullmatch(r"""running 77_trial.ipynb in a fresh kernel .scale tiny; Ctrl-C stops it.
  cell 1 of 1 · Mine
every cell ran, \d+ s
_out/77_trial.ipynb and _out/77_trial.html written
The last output of the notebook reads:

seven
""", said.out) and "WARNING" not in said.err
    assert "seven" in (tmp_path/"_out/77_trial.html").read_text(encoding="utf-8") and not nbformat.read(mine/"77_trial.ipynb", 4).cells[1].outputs


def test_an_error_stops_a_lesson_and_is_shown(mine, tmp_path, monkeypatch, capsys):
    nbformat.write(new_notebook(cells=[new_code_cell("1/0")]), mine/"77_trial.ipynb")
    monkeypatch.setattr(run_lesson, "ROOT", tmp_path)
    monkeypatch.setattr(run_lesson.sys, "argv", ["run_lesson.py", "77"])
    with pytest.raises(SystemExit, match="ZeroDivisionError"): run_lesson.main()
    assert "stopped by an error" in capsys.readouterr().out and (tmp_path/"_out/77_trial.ipynb").exists()


@pytest.mark.parametrize("gone", [DeadKernelError("Kernel died"), AssertionError(), KeyboardInterrupt()], ids=repr)
def test_a_kernel_that_is_gone_takes_no_outputs_along(mine, tmp_path, monkeypatch, capsys, gone):
    "Ctrl-C, or a lesson that outgrows the memory: a sentence, not nbclient's traceback, and what was computed is kept."
    def execute(client): client.nb.cells[0].outputs = [new_output("stream", text="hours of work")]; raise gone
    nbformat.write(new_notebook(cells=[new_code_cell("1"), new_code_cell("2")]), mine/"77_trial.ipynb")
    monkeypatch.setattr(run_lesson, "ROOT", tmp_path), monkeypatch.setattr(run_lesson.NotebookClient, "execute", execute)
    monkeypatch.setattr(run_lesson.sys, "argv", ["run_lesson.py", "77"])
    with pytest.raises(SystemExit, match="kernel is gone: by Ctrl-C, or because it ran out of memory"): run_lesson.main()
    assert nbformat.read(tmp_path/"_out/77_trial.ipynb", 4).cells[0].outputs[0].text == "hours of work"


def test_only_record_keeps_outputs_and_writes_results(mine, tmp_path, monkeypatch):
    nbformat.write(new_notebook(cells=[new_code_cell("import os; os.environ.get('EXP_RECORD')")]), mine/"77_trial.ipynb")
    monkeypatch.setattr(run_lesson, "ROOT", tmp_path)
    monkeypatch.setenv("EXP_RECORD", ""), monkeypatch.setattr(run_lesson.sys, "argv", ["run_lesson.py", "--record", "77"])
    run_lesson.main()
    assert nbformat.read(mine/"77_trial.ipynb", 4).cells[0].outputs[0].data["text/plain"] == "'1'" and not (tmp_path/"_out/77_trial.ipynb").exists()


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


def test_copy_takes_the_exercises_along_and_says_how_to_run_them(mine, monkeypatch, capsys):
    import copy_lesson
    monkeypatch.setattr(copy_lesson, "ROOT", mine.parent)
    monkeypatch.setattr(copy_lesson.copy, "__defaults__", (mine,))
    for lesson, made in (("1", ["01_matmul", "01_matmul_exercises"]), ("01", ["01_matmul_2", "01_matmul_exercises_2"]), ("02a_autograd_exercises", ["02a_autograd_exercises"])):
        monkeypatch.setattr(copy_lesson.sys, "argv", ["copy_lesson.py", lesson])
        copy_lesson.main()
        assert re.findall(r"make lesson L=my/(\w+) runs it", capsys.readouterr().out) == made
        for name in made: assert find(f"my/{name}") == mine/f"{name}.ipynb"


def test_make_leads_to_my_and_names_its_lessons():
    makefile = (NBS.parent/"Makefile").read_text(encoding="utf-8")
    assert '--ServerApp.root_dir="$(CURDIR)"' in makefile and "@mkdir -p my" in makefile
    assert "OMP_WAIT_POLICY ?= PASSIVE" in makefile and "my" in (NBS.parent/".gitignore").read_text(encoding="utf-8").replace("/", "").split()
    helped = re.findall(r"^([a-z]+):.*##", makefile, flags=re.M)
    assert set(re.search(r"\.PHONY: (.*)", makefile)[1].split()) == set(helped)


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


@pytest.mark.parametrize("index, gpu, cuda, calls", [
    ("", False, True, None), ("", False, False, []), ("", True, True, []), ("default", False, True, []), ("ADDRESS", False, True, ["--index-url", "ADDRESS"])])
def test_no_cuda_is_pulled_unasked(monkeypatch, index, gpu, cuda, calls):
    import install
    names, called = ["torch", *["nvidia-cublas"]*cuda], []
    def pip(*args, **kwargs):
        called.append(args)
        return SimpleNamespace(stdout=json.dumps({"install": [{"metadata": {"name": name}} for name in names]}))
    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
    monkeypatch.setenv("GOAL", "test")
    if calls is None:
        with pytest.raises(SystemExit, match=r"(?s)pytorch.org.*--index-url.*make test TORCH_INDEX=ADDRESS"): install.install_torch(index)
        assert all("--dry-run" in args for args in called), "nothing was installed"
    else:
        install.install_torch(index)
        assert called[-1] == ("install", "-c", "constraints.txt", "torch", *calls) and "--dry-run" not in called[-1]


def test_the_matrix_is_what_it_says(tmp_path, monkeypatch, capsys):
    import matrix
    monkeypatch.setenv("EXP_MIRROR", "somewhere"), monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    (tmp_path/"bin").mkdir(); (tmp_path/"bin/python").touch()
    columns = dict(matrix.runs(str(tmp_path)))
    seen = [(argv[-1], env.get("ATEN_CPU_CAPABILITY"), env["EXP_THREADS"]) for argv, env in columns.values()]
    assert seen == [("tests", "default", "1"), ("tests", "avx2", "2"), ("tests", None, "2"), ("tests", None, "1"), ("tests/fresh_kernels.py", None, "1")]
    assert [argv[0] for argv, _ in columns.values()][3] == str(tmp_path/"bin/python")
    assert all(env["EXP_OFFLINE"] == "1" and "EXP_MIRROR" not in env for _, env in columns.values())
    monkeypatch.setattr(matrix, "about", lambda argv, env: "torch"), monkeypatch.setattr(matrix.sys, "argv", ["matrix.py"])
    monkeypatch.setattr(matrix.subprocess, "run", lambda argv, **kwargs: SimpleNamespace(returncode=int("fresh_kernels" in argv[-1])))
    with pytest.raises(SystemExit): matrix.main()
    said = capsys.readouterr().out
    assert said.count("passed in") == 3 and said.count("FAILED in") == 1 and "another PyTorch, 1 thread         not run: say make matrix MATRIX_TORCH=PATH" in said


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
