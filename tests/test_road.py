"The reader's road: doctor, progress, roads, milestones, the board, and what strangers get."
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import doctor
import house
import milestones
import nbformat
import progress
import pytest
import wheel
import yaml
from conftest import ROOT
from house import LATER, ROADS, SKIP, lessons, number, read, source
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from exp.datasets import cache_folder, registry
from exp.testing import record, result_text


# --- doctor --------------------------------------------------------------------------------------------------------------

def test_the_doctor_needs_nothing_but_python():
    "No site-packages, as on a new machine: it looks around all the same, and says what brings what is missing."
    done = subprocess.run([sys.executable, "-I", "-S", "-X", "utf8", ROOT/"tools/doctor.py"], capture_output=True, text=True, encoding="utf-8")
    assert not done.stderr and re.search(r"PyTorch +not here.*make lab", done.stdout) and "could not be examined" not in done.stdout
    assert {line.split()[1] for line in done.stdout.splitlines() if line.startswith(("✓", "○", "✗"))} >= {"Python", "PyTorch", "packages", "exp", "processor", "disk"}
    assert done.returncode == int("✗" in done.stdout)
    plain = subprocess.run([sys.executable, "-S", ROOT/"tools/doctor.py"], capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"})
    assert "? processor" in plain.stdout and not plain.stderr, "a console that knows no ✓"


def test_the_doctor_finds_this_environment_well():
    found = {topic: sign for sign, topic, _ in doctor.examine([doctor.check_python, doctor.check_torch, doctor.check_packages, doctor.check_exp])}
    assert found["Python"] == found["PyTorch"] == found["packages"] == found["exp"] == "✓"


def trouble(check) -> str:
    "The words of the one trouble that a check finds."
    [text] = [text for sign, _, text in doctor.examine([check]) if sign == "✗"]
    return text


def test_each_trouble_has_a_cure(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(doctor.sys, "version_info", (3, 9, 1))
        assert "make lab PYTHON=" in trouble(doctor.check_python)
    with monkeypatch.context() as m:
        m.setattr(doctor, "ready", lambda: True)
        m.setattr(doctor, "installed", lambda name: "0.1")
        assert "numpy 0.1" in trouble(doctor.check_packages) and "remove .venv" in trouble(doctor.check_packages)
        m.setattr(doctor.importlib.util, "find_spec", lambda name: None)
        assert "make lab" in trouble(doctor.check_torch) and "pip install -e ." in trouble(doctor.check_exp)
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.3.1", cuda=SimpleNamespace(is_available=lambda: False), backends=sys.modules["torch"].backends,
                                                        __spec__=sys.modules["torch"].__spec__))
        assert "2.3.1 is older than 2.4" in trouble(doctor.check_torch)
        m.setitem(sys.modules, "torch", None)
        m.setattr(doctor.importlib.util, "find_spec", lambda name: True)
        assert "does not import" in trouble(doctor.check_torch)
        m.setattr(doctor.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path/"exp/__init__.py")))
        assert "not from this folder" in trouble(doctor.check_exp)
    with monkeypatch.context() as m:
        m.setenv("EXP_SCALE", "huge"); m.setenv("EXP_MIRROR", str(tmp_path))
        assert ["tiny, cpu or gpu" in t or "SHA256SUMS" in t for s, _, t in doctor.check_settings() if s == "✗"] == [True, True]
    with monkeypatch.context() as m:
        m.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e8)); m.setattr(doctor, "missing_sets", lambda: {"a": 100.})
        assert "make room" in trouble(doctor.check_disk)


def test_a_check_that_fails_is_a_trouble_and_the_others_go_on():
    def check_stars(): raise OSError("clouds")
    assert [(s, t) for s, t, _ in doctor.examine([check_stars, doctor.check_python])][:2] == [("✗", "stars"), ("✓", "Python")]


def test_the_doctor_looks_where_fetch_keeps_its_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("EXP_DATA", str(tmp_path))
    assert doctor.places()[0] == cache_folder() and set(doctor.missing_sets()) <= set(registry)
    (tmp_path/"mnist").mkdir()
    assert doctor.missing_sets()["mnist"] == registry["mnist"].size
    (tmp_path/"mnist/.source.json").touch()
    assert "mnist" not in doctor.missing_sets() and "mnist" in next(t for s, _, t in doctor.check_data() if s == "✓")


def test_the_speed_is_compared_with_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    measured = doctor.speeds(rounds=1)
    assert min(measured.values()) > 0
    monkeypatch.setattr(doctor, "speeds", lambda: {"matrix product": 50., "convolution": 20.})
    [(sign, _, text)] = doctor.check_speed()
    assert sign == "○" and "no recorded figure" in text, text
    for name, mean in (("matrix product", 100.), ("convolution", 30.)):
        record(doctor.LESSON, doctor.SPEED.format(name), [mean], unit="GFLOP/s", folder=tmp_path/"results")
    [(sign, _, text)] = doctor.check_speed()
    assert sign == "✓" and "about 2.0×" in text
    monkeypatch.setattr(doctor, "speeds", lambda: {"matrix product": 101., "convolution": 31.})
    assert "should hold" in next(iter(doctor.check_speed()))[2]


# --- progress --------------------------------------------------------------------------------------------------------------

def test_what_a_checker_said():
    def heard(text="", **error):
        outputs = [new_output("stream", text=text)]*bool(text) + [new_output("error", **error, traceback=[])]*bool(error)
        return progress.verdict("add", "check_add(add)", outputs)
    assert heard("✓ add\n") == ("✓", "") and heard("words\n✓ add\n")[0] == "✓"
    assert heard("○ add is still a stub: write\n")[0] == "○" and heard()[0] == "○"
    assert heard("✓ add_more\n")[0] == "○", "another exercise's tick"
    assert heard(ename="AssertionError", evalue="look at the sign") == ("✗", "look at the sign")
    assert heard(ename="NameError", evalue="no x") == ("✗", "NameError: no x")
    assert progress.names("check_a(a)\n  check_b(b)\ncheck_c_d(x, y)  # check_e(e)") == ["a", "c_d"]


def test_one_broken_exercise_stops_no_other(tmp_path):
    cells = ["def check(name): print('✓', name)\ncheck_first = check_stuck = check_dead = check_wrong = check_last = check", "1/0", "def loop():\n    while True:\n        try: import time; time.sleep(1)\n        except BaseException: pass",
             "check_first('first')", "check_stuck(loop())", "import os\ncheck_dead(os._exit(1))", "check_wrong(x)", "check_last('last')", "check_last('las')"]
    nbformat.write(new_notebook(cells=[new_code_cell(c) for c in cells]), tmp_path/"00_x_exercises.ipynb")
    found = progress.exercises(tmp_path/"00_x_exercises.ipynb", limit=6)
    assert {name: sign for name, (sign, _) in found.items()} == {"first": "✓", "stuck": "✗", "dead": "✗", "wrong": "✗", "last": "○"}
    assert "6 seconds" in found["stuck"][1] and "ends Python" in found["dead"][1] and found["wrong"][1].startswith("NameError")


def test_the_checkers_themselves_are_asked(tmp_path, capsys):
    "A copy that holds the solutions passes all exercises of its lesson; a lesson without a copy is not spoken of."
    shutil.copy(ROOT/"nbs/solutions/00_setup_solutions.ipynb", tmp_path/"00_setup_exercises.ipynb")
    ran, passed = progress.report("00_setup", 60, [tmp_path])
    assert not ran and passed == progress.asked_for("00_setup") and len(passed) >= 3
    assert capsys.readouterr().out.count("✓") == len(passed)
    assert progress.report("01_matmul", 60, [tmp_path]) == (False, set()) and not capsys.readouterr().out


def test_which_lessons_ran(tmp_path):
    def write(name, *counts, error=False):
        cells = [new_code_cell("1", execution_count=n) for n in counts] + [new_code_cell("#| eval: false\nx"), new_code_cell(""), new_markdown_cell("w")]
        if error: cells[0].outputs = [new_output("error", ename="E", evalue="", traceback=[])]
        nbformat.write(new_notebook(cells=cells), tmp_path/f"{name}.ipynb")
    assert progress.ran("05_x", [tmp_path]) == "–"
    write("05_x", None, None); assert progress.ran("05_x", [tmp_path]) == "–"
    write("05_x_2", 1, None); assert progress.ran("05_x", [tmp_path]) == "1 of 2 cells"
    write("05_x_3", 1, 2, error=True); assert progress.ran("05_x", [tmp_path]) == "an error, 2 of 2 cells"
    write("05_x", 1, 2); assert progress.ran("05_x", [tmp_path]) == "every cell"
    write("05_x_exercises", 1, None); assert [p.stem for p in progress.copies(tmp_path, "05_x")] == ["05_x", "05_x_2", "05_x_3"]


# --- roads and what may be skipped -----------------------------------------------------------------------------------------

NUMBERS = {number(p) for p in lessons()}


@pytest.mark.parametrize("name", ROADS)
def test_a_road_leads_through_lessons_in_order(name):
    stops = ROADS[name][1].split()
    assert stops == sorted(set(stops)) and set(stops) <= NUMBERS | LATER, "each once, in reading order"
    assert set(house.on_trust(house.on_road(ROADS[name][1]))) <= NUMBERS - set(stops)


def test_a_road_is_as_long_as_its_lessons(monkeypatch):
    rows = {line.split("**")[1]: line for line in house.roads().splitlines()[2:]}
    assert set(rows) == set(ROADS)
    for name, (_, stops) in ROADS.items():
        read_them = sum(house.reading_minutes(p) for p in house.on_road(stops))
        assert house.hours(read_them) in rows[name] and rows[name].count(".ipynb") == len(house.on_road(stops))
    assert sum(map(house.reading_minutes, house.on_road(ROADS["One weekend"][1]))) <= 12*60
    assert [house.hours(m) for m in (.2, 42, 60, 585.4)] == ["5 minutes", "40 minutes", "1 h 00 min", "9 h 45 min"]


def test_a_lesson_that_arrives_steps_onto_its_roads(tmp_path, monkeypatch):
    title = "# 13 · New\n\n> Yes.\n\nx <!-- nav -->\n\n**You will build** `x` · **You need** [00](00_setup.ipynb), [03a](03a_deep_init.ipynb) · **Time** 90 s on a laptop CPU"
    nbformat.write(new_notebook(cells=[new_markdown_cell(title)]), tmp_path/"13_new.ipynb")
    before, old = house.roads(), [p for p in lessons() if number(p) != "13"]
    monkeypatch.setattr(house, "lessons", lambda: [*old, tmp_path/"13_new.ipynb"])
    assert "13_new.ipynb" in house.roads() and "03a" in house.on_trust(house.on_road(ROADS["Text"][1])) and "13_new" not in before
    assert house.run_minutes(tmp_path/"13_new.ipynb") == 1.5 and house.run_time(tmp_path/"13_new.ipynb") == (90, "seconds")
    assert house.with_skip(title, "13") == title if "13" not in SKIP else True


def test_what_may_be_skipped_is_there():
    heads = {number(p): {h for c in read(p)["cells"] if c["cell_type"] == "markdown" for h in re.findall(r"^##+ (.+)$", source(c), flags=re.M)} for p in lessons()}
    for n, line in SKIP.items(): assert set(re.findall(r"\*([^*]+)\*", line)) <= heads[n], f"{n}: {line} names a section that is not there"
    assert NUMBERS - LATER <= set(SKIP) <= NUMBERS | LATER
    for path in lessons():
        assert (f"**In a hurry?** {SKIP.get(number(path))} <!-- skip -->" in house.title_cell(path)) == (number(path) in SKIP)


def test_the_line_is_written_once_and_taken_away():
    once = house.with_skip("# T\n\ntext", "03")
    assert house.with_skip(once, "03") == once and once.count("In a hurry") == 1 and house.with_skip(once, "99") == "# T\n\ntext"


# --- milestones and the board ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", [key for key, m in milestones.MILESTONES.items() if milestones.is_there(m)])
def test_a_milestone_runs(key, capsys):
    m = milestones.MILESTONES[key]
    found = milestones.run(m)
    assert all(r["lesson"] == m.lesson and r["what"].startswith(f"milestone {m.year}: ") and r["scale"] == "tiny" for r in found)
    assert len(found) == (1 if key in ("1986", "1989") else 2) and capsys.readouterr().out.count("seed") == sum(len(r["values"]) for r in found)


def test_two_hidden_units_find_mirror_symmetry():
    sweeps = milestones.count_sweeps(milestones.LUCKY)
    assert 100 < sweeps < 5000 and milestones.count_sweeps(milestones.LUCKY, limit=sweeps - 1) is None


def test_milestones_name_their_lessons_and_show_their_records(tmp_path, monkeypatch, capsys):
    coming = {n: m for n, m in milestones.MILESTONES.items() if not milestones.is_there(m)}
    assert all(number(Path(m.lesson)) in LATER for m in coming.values()) and {m.year for m in milestones.MILESTONES.values()} == {"1986", "1989", "2012", "2015", "2018"}
    monkeypatch.setattr(milestones, "ROOT", tmp_path)
    m = milestones.MILESTONES["2012"]
    assert milestones.results(m) == ""
    for label, mean in (("ReLU", 61.), ("tanh", 52.)): record(m.lesson, f"milestone 2012: {label}", [mean, mean + 2], unit="%", folder=tmp_path/"results")
    assert milestones.results(m) == "ReLU 62.0 ± 1.4 %, tanh 53.0 ± 1.4 %"
    record("02a_autograd", "milestone 1986: sweeps", [800, 900], unit="sweeps", folder=tmp_path/"results")
    assert milestones.results(milestones.MILESTONES["1986"]).endswith("sweeps (2 of 10 starts)")
    monkeypatch.setattr(milestones.sys, "argv", ["milestones.py", "1066"])
    with pytest.raises(SystemExit, match="no milestone '1066'.*1986, 1989"): milestones.main()


def test_the_board_shows_every_record():
    text = (ROOT/"results/README.md").read_text(encoding="utf-8")
    every = text.split("<!-- records -->")[1]
    for path in (ROOT/"results").glob("*.json"):
        r = json.loads(path.read_text(encoding="utf-8"))
        assert f"| {r['what']} | {result_text(r)} | {len(r['values'])} |" in every, path.name
    assert text.split("<!-- board -->")[1].split("<!-- /board -->")[0].count("../nbs/") == sum(bool(house.records(p.stem, gpu)) for p in lessons() for gpu in (False, True))


def test_milestones_and_speeds_do_not_speak_for_a_lesson(tmp_path, monkeypatch):
    monkeypatch.setattr(house, "ROOT", tmp_path)
    for what, mean in (("milestone 1989: errors", 99), ("speed, for make doctor: matrix product", 98), ("exercise 3", 97), ("accuracy", 80)):
        record("05d_cnn", what, [mean], folder=tmp_path/"results")
    assert [r["what"] for r in house.records("05d_cnn", False)][0] == "accuracy"


# --- strangers -----------------------------------------------------------------------------------------------------------------

def test_a_wheel_that_lacks_something_is_found(tmp_path):
    with zipfile.ZipFile(tmp_path/"x.whl", "w") as made:
        for p in (ROOT/"exp").rglob("*.py"):
            if p.name != "norm.py": made.writestr(p.relative_to(ROOT).as_posix(), "")
        made.writestr("dl_from_scratch-0.1.0.dist-info/licenses/LICENSE", "")
        for p in (ROOT/"data").rglob("*"):
            if p.is_file() and p.name != "sets.toml": made.writestr(f"exp/standins/{p.relative_to(ROOT/'data').as_posix()}", "")
    missing = wheel.lacking(tmp_path/"x.whl")
    assert "exp/norm.py" in missing and "LICENSE" not in missing
    if (ROOT/".git").exists(): assert missing == ["exp/norm.py", "exp/standins/sets.toml"]


def test_a_wheel_is_tried_away_from_the_checkout(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("EXP_DATA", "somewhere"), monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(wheel.subprocess, "run", lambda argv, cwd, env: seen.append((argv, cwd, env)) or SimpleNamespace(returncode=len(seen) == 2))
    assert wheel.attempt(Path("python"), tmp_path) == ["the README's example"]
    assert all(cwd == tmp_path/"elsewhere" and env["EXP_OFFLINE"] == "1" and not {"EXP_DATA", "PYTHONPATH"} & set(env) for _, cwd, env in seen)
    assert "load_idx" in seen[1][0][-1] and "walk_packages" in seen[0][0][-1]


def test_the_workflow_covers_what_the_settings_promise():
    jobs = yaml.safe_load((ROOT/".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["wheel"]["strategy"]["matrix"]
    assert set(matrix["os"]) == {"ubuntu-latest", "macos-latest", "windows-latest"} and min(matrix["python"], key=lambda v: int(v[2:])) == house.settings()["min_python"]
    oldest = re.search(r"torch>=(\S+)", house.settings()["requirements"])[1]
    assert [row for row in matrix["include"] if row["torch"].startswith(f"torch=={oldest}.")] and jobs["versions"]["strategy"]["matrix"]["include"][0]["torch"].startswith(f"torch=={oldest}.")
    targets = set(re.findall(r"^([a-z]+):", (ROOT/"Makefile").read_text(encoding="utf-8"), flags=re.M))
    called = {step["run"].split()[1] for job in jobs.values() for step in job["steps"] if step.get("run", "").startswith("make ")}
    assert called <= targets
    scripts = {word for job in jobs.values() for step in job["steps"] for word in step.get("run", "").split() if word.startswith("tools/")}
    assert scripts and all((ROOT/name).exists() for name in scripts)
