"fetch against a server that misbehaves in every way we could think of; archives that bite; IDX files; the stand-ins."
import errno
import gzip
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import tarfile
import time
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import exp.datasets as D
from exp.datasets import (DataSet, UnsafeArchive, WrongDigest, cache_folder, datasets, fetch, load_idx, read_idx, registry, safe_member,
                          source_of, unpack)

ROOT = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills and limits a forked child")


# ---- a server that does as it is told ----

def serve(data, *, cut=None, status=200, claim=None, pause=None, piece=None, headers=()):
    "A page: `cut` hangs up after so many bytes, `claim` is what Content-Length says, `pause`/`piece` dawdle."
    def page(handler):
        handler.send_response(status)
        for field in headers: handler.send_header(*field)
        handler.send_header("Content-Length", str(claim or len(data)))
        handler.end_headers()
        body = data[:cut] if cut else data
        for i in range(0, len(body), piece or len(body) or 1):
            handler.wfile.write(body[i:i + (piece or len(body))])
            handler.wfile.flush()
            if pause: pause()
    return page


def in_turn(*pages):
    "Another page each time; the last one for ever."
    pages = list(pages)
    return lambda handler: (pages.pop(0) if len(pages) > 1 else pages[0])(handler)


class Web:
    "Pages by path, and a log of the paths asked for."
    def __init__(self):
        self.pages, self.log = {}, []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                path = unquote(self.path)
                web.log.append(path)
                web.agent = self.headers["User-Agent"]
                try: web.pages[path](self) if path in web.pages else self.send_error(404)
                except (ConnectionError, TimeoutError): pass        # the client went away
            def log_message(self, *args): pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()


def tgz(files, top="toy/"):
    "An archive in memory: name -> text, or a TarInfo that is added as it is."
    with tarfile.open(fileobj=(f := io.BytesIO()), mode="w:gz") as tar:
        for name, body in files.items():
            member = body if isinstance(body, tarfile.TarInfo) else tarfile.TarInfo(top + name)
            data = b"" if isinstance(body, tarfile.TarInfo) else body.encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return f.getvalue()


# Not compressible, so that the archive is long enough to be cut.
FILES = {"train/a.txt": os.urandom(20_000).hex(), "val/b.txt": "b"}
GOOD = tgz(FILES)
BAD = GOOD[:-1] + bytes([GOOD[-1] ^ 1])


def toy(data, *addresses, name="toy", **kwargs):
    digest = kwargs.pop("digest", "sha256:" + hashlib.sha256(data).hexdigest())
    return DataSet(name, "a toy", .1, {"toy.tgz": digest}, addresses, ("train", "val"), "CC0", "nobody", "fashion",
                   "clothes", **kwargs)


@pytest.fixture(scope="module")
def server():
    web = Web()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        yield web
    web.server.shutdown(); web.server.server_close()


@pytest.fixture
def web(server, monkeypatch, tmp_path):
    "A fresh cache, a short patience, no waits between rounds, no proxies, and a toy set at /a/ and /b/."
    server.pages.clear(); server.log.clear()
    for k, v in dict(EXP_OFFLINE="", EXP_MIRROR="", EXP_DATA=str(tmp_path/"cache"), EXP_TIMEOUT="1",
                     XDG_CACHE_HOME=str(tmp_path/"home")).items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(D, "_WAITS", (0, 0, 0))
    monkeypatch.setitem(registry, "toy", toy(GOOD, f"{server.url}/a/", f"{server.url}/b/"))
    return server


def check(path, source="official"):
    "A whole set of FILES, with its note, and nothing half-done beside it."
    assert {f: (path/f).read_text() for f in FILES} == FILES
    assert source_of(path) == source_of(path/"train"/"a.txt") == source
    assert sorted(p.name for p in path.parent.iterdir()) == [".toy.lock", path.name]


def nothing_left():
    "Neither a set nor a part of one."
    assert not [p for p in Path(os.environ["EXP_DATA"]).rglob("*") if not p.name.startswith(".toy.lock")]


# ---- the plain road ----

def test_fetch_then_cache(web):
    web.pages["/a/toy.tgz"] = serve(GOOD)
    path = fetch("toy")
    check(path)
    assert "Mozilla" in web.agent
    assert json.loads((path/".source.json").read_text())["licence"] == "CC0"
    assert fetch("toy") == path and len(web.log) == 1           # the second call asked nobody


def test_loose_files(web, monkeypatch):
    bodies = {"one.txt": b"1", "two.txt": b"2"}
    web.pages |= {f"/a/{n}": serve(b) for n, b in bodies.items()}
    files = {n: "md5:" + hashlib.md5(b).hexdigest() for n, b in bodies.items()}
    monkeypatch.setitem(registry, "loose", DataSet("loose", "", 1, files, (f"{web.url}/a/",), tuple(files), "", "", "fashion", ""))
    path = fetch("loose")
    assert {f.name: f.read_bytes() for f in path.glob("*.txt")} == bodies


def test_cache_elsewhere_is_found(web, tmp_path, monkeypatch):
    web.pages["/a/toy.tgz"] = serve(GOOD)
    path = fetch("toy")
    monkeypatch.setenv("EXP_DATA", str(tmp_path/"other"))
    (tmp_path/"home").mkdir()
    path.parent.rename(tmp_path/"home"/"dl-from-scratch")
    assert fetch("toy") == tmp_path/"home"/"dl-from-scratch"/"toy" and len(web.log) == 1


def test_a_set_is_readable_by_whom_the_umask_lets(web):
    web.pages["/a/toy.tgz"] = serve(GOOD)
    (Path(os.environ["EXP_DATA"])/"mine").mkdir(parents=True)
    assert fetch("toy").stat().st_mode == (Path(os.environ["EXP_DATA"])/"mine").stat().st_mode


def test_no_server_gives_the_standin_in_one_line(web, capsys, monkeypatch):
    monkeypatch.setitem(registry, "toy", toy(GOOD, "http://127.0.0.1:9/"))
    path = fetch("toy")
    said = capsys.readouterr().err
    assert source_of(path) == "stand-in" and said.count("\n") == 1
    assert "refused" in said and "clothes" in said and "EXP_MIRROR" in said
    nothing_left()


@pytest.mark.parametrize("value, offline", [("1", None), ("true", None), ("", True), ("0", True)])
def test_offline_asks_nobody(web, monkeypatch, capsys, value, offline):
    web.pages["/a/toy.tgz"] = serve(GOOD)
    monkeypatch.setenv("EXP_OFFLINE", value)
    assert source_of(fetch("toy", offline=offline)) == "stand-in" and not web.log
    assert ("EXP_OFFLINE" if offline is None else "offline=True") in capsys.readouterr().err


@pytest.mark.parametrize("value, offline", [("0", None), ("", None), ("off", None), ("False", None), ("1", False)])
def test_online(web, monkeypatch, value, offline):
    web.pages["/a/toy.tgz"] = serve(GOOD)
    monkeypatch.setenv("EXP_OFFLINE", value)
    check(fetch("toy", offline=offline))


def test_offline_ignores_the_cache(web):
    web.pages["/a/toy.tgz"] = serve(GOOD)
    check(fetch("toy"))
    assert source_of(fetch("toy", offline=True)) == "stand-in"


@pytest.mark.parametrize("name, hint", [("MNIST", "'mnist'"), ("imagenette", "'imagenette2-160'"), ("zzz", "imdb"), (None, "imdb")])
def test_unknown_name(name, hint):
    with pytest.raises(ValueError, match=hint): fetch(name)


# ---- faults on the line ----

@settings(max_examples=10)
@given(cut=st.integers(1, len(GOOD) - 1))
def test_any_cut_is_noticed(server, cut):
    server.pages["/cut"] = serve(GOOD, cut=cut)
    with pytest.raises(IncompleteRead, match=f"{len(GOOD) - cut} more expected"): D._read(server.url, "cut", 1)


def test_a_cut_line_is_tried_again(web):
    web.pages["/a/toy.tgz"] = in_turn(serve(GOOD, cut=4000), serve(GOOD))
    check(fetch("toy"))
    assert web.log == ["/a/toy.tgz", "/b/toy.tgz", "/a/toy.tgz"]       # the other address first


def test_a_line_that_is_always_cut(web, capsys):
    web.pages["/a/toy.tgz"] = serve(GOOD, cut=5000)
    assert source_of(fetch("toy")) == "stand-in"
    assert "5000 bytes read" in capsys.readouterr().err and web.log.count("/a/toy.tgz") == 3
    nothing_left()


@pytest.mark.parametrize("cut", [0, 3, 4000])
def test_a_cut_line_without_a_length_is_tried_again(web, cut):
    "In pieces, as servers send what they make on the way: the last piece is missing, or the end that says so."
    def cut_off(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        if cut: handler.wfile.write(b"%x\r\n" % 5000 + GOOD[:cut])
        handler.close_connection = True
    web.pages["/a/toy.tgz"] = in_turn(cut_off, serve(GOOD))
    check(fetch("toy"))
    assert web.log == ["/a/toy.tgz", "/b/toy.tgz", "/a/toy.tgz"]


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_server_is_asked_again(web, monkeypatch, code):
    naps = []
    monkeypatch.setattr(D, "_WAITS", (0, .01, .02))
    monkeypatch.setattr(D.time, "sleep", naps.append)
    monkeypatch.setitem(registry, "toy", toy(GOOD, f"{web.url}/a/"))
    web.pages["/a/toy.tgz"] = in_turn(serve(b"busy", status=code), serve(b"busy", status=code), serve(GOOD))
    check(fetch("toy"))
    assert naps == [0, .01, .02] and web.log == ["/a/toy.tgz"]*3


@pytest.mark.parametrize("code", [403, 404, 500])
def test_another_refusal_is_not(web, capsys, code):
    web.pages |= {p: serve(b"no", status=code) for p in ("/a/toy.tgz", "/b/toy.tgz")}
    assert source_of(fetch("toy")) == "stand-in" and web.log == ["/a/toy.tgz", "/b/toy.tgz"]
    assert capsys.readouterr().err.count(f"HTTP Error {code}") == 2


def test_404_tries_the_second_address(web):
    web.pages["/b/toy.tgz"] = serve(GOOD)
    check(fetch("toy"))
    assert web.log == ["/a/toy.tgz", "/b/toy.tgz"]


def test_truncated_file_has_a_wrong_digest(web):
    "The server honestly serves a file that lost its tail."
    web.pages["/a/toy.tgz"] = serve(GOOD[:5000])
    with pytest.raises(WrongDigest): fetch("toy")
    nothing_left()


def test_wrong_digest_names_both_and_keeps_nothing(web):
    web.pages |= {"/a/toy.tgz": serve(BAD), "/b/toy.tgz": serve(BAD)}
    with pytest.raises(WrongDigest) as e: fetch("toy")
    for data in (BAD, GOOD): assert hashlib.sha256(data).hexdigest() in str(e.value)
    nothing_left()
    web.pages["/a/toy.tgz"] = serve(GOOD)
    check(fetch("toy"))                                         # and nothing stands in the way of a better day


def test_wrong_digest_then_a_good_address(web):
    web.pages |= {"/a/toy.tgz": serve(b"evil" + GOOD), "/b/toy.tgz": serve(GOOD)}
    check(fetch("toy"))


def test_wrong_digest_is_not_hidden_by_a_dead_second_address(web):
    web.pages["/a/toy.tgz"] = serve(b"evil" + GOOD)
    with pytest.raises(WrongDigest): fetch("toy")


@pytest.mark.parametrize("claim", [f"{len(GOOD)}, {len(GOOD)}", "unknown"], ids=["twice", "unknown"])
def test_an_odd_length_is_no_obstacle(web, claim):
    web.pages["/a/toy.tgz"] = serve(GOOD, claim=claim)
    check(fetch("toy"))


@pytest.mark.parametrize("how", ["silent", "stalls"])
def test_slow_server_times_out(web, monkeypatch, capsys, how):
    monkeypatch.setenv("EXP_TIMEOUT", "0.2")
    monkeypatch.setitem(registry, "toy", toy(GOOD, f"{web.url}/a/"))
    over = Event()
    web.pages["/a/toy.tgz"] = {"silent": lambda h: over.wait(5), "stalls": serve(GOOD, cut=1, pause=lambda: over.wait(5))}[how]
    start = time.monotonic()
    assert source_of(fetch("toy")) == "stand-in"
    over.set()
    assert time.monotonic() - start < 3
    assert "timed out" in (said := capsys.readouterr().err) and "EXP_TIMEOUT" in said
    nothing_left()


def test_timeout_must_be_a_number(web, monkeypatch):
    monkeypatch.setenv("EXP_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="'soon'"): fetch("toy")


# ---- mirrors ----

def mirror(folder, data=GOOD, sums=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"toy.tgz").write_bytes(data)
    (folder/"SHA256SUMS").write_text(sums or f"{hashlib.sha256(data).hexdigest().upper()} *./toy.tgz\n\n")


def test_mirror_folder_governs(web, monkeypatch, tmp_path):
    "A mirror may keep another archive than the official one; its own digest counts."
    monkeypatch.setitem(registry, "toy", toy(b"", f"{web.url}/a/"))
    mirror(tmp_path/"m")
    monkeypatch.setenv("EXP_MIRROR", str(tmp_path/"m"))
    check(fetch("toy"), "mirror")
    assert not web.log and (tmp_path/"m"/"toy.tgz").exists()


def test_mirror_path_counts_from_the_root(web, monkeypatch, tmp_path):
    mirror(tmp_path/"m")
    monkeypatch.setenv("EXP_MIRROR", os.path.relpath(tmp_path/"m", ROOT))
    monkeypatch.chdir(tmp_path)
    check(fetch("toy"), "mirror")


@pytest.mark.parametrize("path", ["/m", "/m/", "/donn\xe9es", "/my data"])
def test_mirror_url(web, monkeypatch, path):
    monkeypatch.setenv("EXP_MIRROR", web.url + path)
    folder = path.rstrip("/")
    web.pages |= {f"{folder}/toy.tgz": serve(GOOD), f"{folder}/SHA256SUMS": serve(f"{hashlib.sha256(GOOD).hexdigest()}  toy.tgz\n".encode())}
    check(fetch("toy"), "mirror")
    assert "/a/toy.tgz" not in web.log


SUM = hashlib.sha256(GOOD).hexdigest()
LISTS = {"GNU": f"{SUM}  toy.tgz\n", "binary": f"{SUM} *toy.tgz\n", "dot": f"{SUM}  ./toy.tgz", "capitals": f"{SUM.upper()}  toy.tgz\r\n",
         "BSD": f"SHA256 (toy.tgz) = {SUM}\n", "others": f"# sets\n{'0'*64}  other.tgz\n\n{SUM}  toy.tgz\nSHA256 (more.tgz) = {'1'*64}\n"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("style", LISTS)
def test_a_list_in_any_style_and_encoding(web, monkeypatch, tmp_path, style, encoding):
    mirror(tmp_path/"m")
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path/"m"/"SHA256SUMS").write_bytes(mark + LISTS[style].encode(encoding))
    monkeypatch.setenv("EXP_MIRROR", str(tmp_path/"m"))
    check(fetch("toy"), "mirror")


def test_a_list_with_a_comment_in_another_encoding(web, monkeypatch, tmp_path):
    mirror(tmp_path/"m")
    (tmp_path/"m"/"SHA256SUMS").write_bytes("# d\xe9p\xf4t\n".encode("latin-1") + LISTS["GNU"].encode())
    monkeypatch.setenv("EXP_MIRROR", str(tmp_path/"m"))
    check(fetch("toy"), "mirror")


@given(st.binary(max_size=300))
def test_any_list_can_be_read(raw): assert all(re.fullmatch(r"sha256:\w*", digest) for digest in D._digests(raw).values())


@pytest.mark.parametrize("sums, word", [(None, "No such file"), ("0"*64 + "  other.tgz", "its SHA256SUMS lacks one of ['toy.tgz']"),
                                        ("no digests here\nodd\n", "its SHA256SUMS lacks one of ['toy.tgz']")])
def test_a_poor_mirror_is_passed_over(web, monkeypatch, tmp_path, capsys, sums, word):
    if sums: mirror(tmp_path/"m", sums=sums)
    monkeypatch.setenv("EXP_MIRROR", str(tmp_path/"m"))
    assert source_of(fetch("toy")) == "stand-in"
    assert word in capsys.readouterr().err
    web.pages["/a/toy.tgz"] = serve(GOOD)
    check(fetch("toy"))


@pytest.mark.parametrize("address", ["http://[::1/x", "http://" + "a"*70 + ".example/x", "http://", "https://127.0.0.1:9/", "http://127.0.0.1:port/"])
def test_a_mirror_that_cannot_be_is_passed_over(web, monkeypatch, address):
    monkeypatch.setenv("EXP_MIRROR", address)
    web.pages["/a/toy.tgz"] = serve(GOOD)
    check(fetch("toy"))


def test_a_tampered_mirror_is_named(web, monkeypatch, tmp_path):
    mirror(tmp_path/"m", sums="0"*64 + "  toy.tgz")
    monkeypatch.setenv("EXP_MIRROR", str(tmp_path/"m"))
    with pytest.raises(WrongDigest, match=f"from {re.escape(str(tmp_path/'m'))} .*EXP_MIRROR"): fetch("toy")
    assert (tmp_path/"m"/"toy.tgz").read_bytes() == GOOD        # a mirror's own files are not ours to delete


# ---- faults on the disk ----

def in_child(target):
    "Run in a forked child, which needs no second import of torch."
    child = multiprocessing.get_context("fork").Process(target=target, daemon=True)
    child.start()
    return child


@posix
def test_disk_full(web, tmp_path):
    "A real limit: no file may grow beyond 30 kB, and train/a.txt wants 40."
    import resource
    web.pages["/a/toy.tgz"] = serve(GOOD)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        try: fetch("toy")
        except OSError as e: (tmp_path/"said").write_text(f"{e.errno} {e} {e.__notes__}")
    (child := in_child(limited)).join(20)
    said = (tmp_path/"said").read_text()
    assert said.startswith(f"{errno.EFBIG} ") and "make room there, or set EXP_DATA" in said and str(tmp_path/"cache") in said
    nothing_left()                                              # the half-unpacked files are gone: there is room again
    check(fetch("toy"))
    assert child.exitcode == 0


def test_no_place_to_write(web, monkeypatch, tmp_path):
    (tmp_path/"file").write_text("in the way")
    monkeypatch.setenv("EXP_DATA", str(tmp_path/"file"/"cache"))
    with pytest.raises(OSError) as e: fetch("toy")
    assert "set EXP_DATA" in e.value.__notes__[0]


def test_a_folder_without_note_is_set_aside(web, tmp_path):
    "Somebody's half-unpacked folder stands under the final name: it is neither trusted nor deleted."
    (tmp_path/"cache"/"toy"/"train").mkdir(parents=True)
    (tmp_path/"cache"/"toy"/"train"/"mine.txt").write_text("mine")
    web.pages["/a/toy.tgz"] = serve(GOOD)
    path = fetch("toy")
    assert source_of(path) == "official" and not (path/"train"/"mine.txt").exists()
    [aside] = (tmp_path/"cache").glob("toy.aside-*")
    assert (aside/"train"/"mine.txt").read_text() == "mine"


@posix
def test_a_dangling_link_in_the_cache_is_set_aside(web, tmp_path):
    (tmp_path/"cache").mkdir()
    (tmp_path/"cache"/"toy").symlink_to(tmp_path/"a disk that was taken away")
    web.pages["/a/toy.tgz"] = serve(GOOD)
    assert source_of(fetch("toy")) == "official"
    [aside] = (tmp_path/"cache").glob("toy.aside-*")
    assert aside.is_symlink()


def test_a_set_that_lost_a_part_is_fetched_again(web):
    web.pages["/a/toy.tgz"] = serve(GOOD)
    (fetch("toy")/"val").rename(Path(os.environ["EXP_DATA"])/"gone")
    path = fetch("toy")
    assert (path/"val"/"b.txt").exists()


# ---- two at once, and kill -9 ----

@posix
def test_two_processes_download_once(web, tmp_path):
    web.pages["/a/toy.tgz"] = serve(GOOD, piece=4000, pause=lambda: time.sleep(.03))

    def run(i): (tmp_path/f"{i}").write_text(source_of(fetch("toy")))
    children = [in_child(lambda i=i: run(i)) for i in range(3)]
    for c in children: c.join(20)
    assert [c.exitcode for c in children] == [0]*3
    assert [(tmp_path/f"{i}").read_text() for i in range(3)] == ["official"]*3
    assert len(web.log) == 1
    check(tmp_path/"cache"/"toy")


def test_two_threads_download_once(web, capsys):
    web.pages["/a/toy.tgz"] = serve(GOOD, piece=4000, pause=lambda: time.sleep(.15))
    threads = [Thread(target=fetch, args=("toy",)) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join(20)
    assert len(web.log) == 1 and "another process is fetching this set; waiting" in capsys.readouterr().err
    check(Path(os.environ["EXP_DATA"])/"toy")


def kill_when(child, ready):
    deadline = time.monotonic() + 10
    while not ready() and time.monotonic() < deadline: time.sleep(.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join(5)
    assert child.exitcode == -signal.SIGKILL


@posix
def test_killed_while_downloading(web):
    "Its lock dies with it."
    first, over = Event(), Event()
    web.pages["/a/toy.tgz"] = in_turn(serve(GOOD, cut=7000, pause=lambda: (first.set(), over.wait(5))), serve(GOOD))
    kill_when(in_child(lambda: fetch("toy")), first.is_set)
    over.set()
    nothing_left()
    start = time.monotonic()
    check(fetch("toy"))
    assert time.monotonic() - start < 5


@posix
def test_killed_while_unpacking(web, tmp_path):
    web.pages["/a/toy.tgz"] = serve(GOOD)

    def stuck():
        D.json.dumps = lambda *a, **kw: ((tmp_path/"ready").touch(), time.sleep(30))     # the note is the last thing that is made
        fetch("toy")
    kill_when(in_child(stuck), lambda: (tmp_path/"ready").exists())
    half = tmp_path/"cache"/".toy"/"files"
    assert (half/"toy"/"train"/"a.txt").exists() and not (tmp_path/"cache"/"toy").exists()
    (half/"toy"/"train"/"stale.txt").write_text("from the dead")
    check(path := fetch("toy"))
    assert not (path/"train"/"stale.txt").exists()


def test_a_stale_lock_file_locks_nobody_out(web, tmp_path):
    (tmp_path/"cache").mkdir(parents=True)
    (tmp_path/"cache"/".toy.lock").touch()
    web.pages["/a/toy.tgz"] = serve(GOOD)
    check(fetch("toy"))


@pytest.mark.parametrize("where", ["urlopen", "unpack"])
def test_an_interrupt_leaves_nothing(web, monkeypatch, where):
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    web.pages["/a/toy.tgz"] = serve(GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(D, where, interrupted)
        with pytest.raises(KeyboardInterrupt): fetch("toy")
    nothing_left()
    check(fetch("toy"))


# ---- archives ----

def member(name, kind=tarfile.REGTYPE, linkname=""):
    m = tarfile.TarInfo(name)
    m.type, m.linkname = kind, linkname
    return m


EVIL = {"parent": member("toy/../../x"), "parent-win": member("toy\\..\\..\\x"), "bare": member(".."), "absolute": member("/tmp/x"),
        "drive": member("C:/x"), "share": member("\\\\host\\x"), "symlink": member("toy/l", tarfile.SYMTYPE, "/etc"),
        "symlink-up": member("toy/l", tarfile.SYMTYPE, "../../.."), "hard": member("toy/l", tarfile.LNKTYPE, "../../x"),
        "pipe": member("toy/p", tarfile.FIFOTYPE), "device": member("toy/d", tarfile.CHRTYPE)}


@pytest.mark.parametrize("kind", EVIL)
def test_evil_archives_are_refused(web, monkeypatch, tmp_path, kind):
    data = tgz(FILES | {"evil": EVIL[kind]})
    monkeypatch.setitem(registry, "toy", toy(data, f"{web.url}/a/"))
    web.pages["/a/toy.tgz"] = serve(data)
    with pytest.raises(UnsafeArchive, match=re.escape(repr(EVIL[kind].name))): fetch("toy")
    nothing_left()
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".toy.lock"]     # neither here nor outside


@given(st.lists(st.sampled_from(["a", "b.txt", "..", ".", "", "...", "..b"]), min_size=1, max_size=6))
def test_safe_member_passes_only_what_stays_inside(parts):
    name = "/".join(parts)
    inside = name != "" and not name.startswith("/") and ".." not in parts
    try: assert safe_member(m := tarfile.TarInfo(name)) is m
    except UnsafeArchive: assert not inside
    else: assert inside and not os.path.relpath(os.path.join("/root/here", name), "/root/here").startswith("../")


@pytest.mark.parametrize("spoil", [lambda d: d[:len(d)//2], lambda d: d[:12] + b"\xff"*9 + d[21:], lambda d: b"no archive"])
def test_damaged_archive(tmp_path, spoil):
    import zlib
    with pytest.raises((tarfile.TarError, EOFError, zlib.error)): unpack(spoil(GOOD), tmp_path/"out")


def test_another_set_in_the_archive(web, monkeypatch):
    data = tgz({"pictures/a.txt": "a"})
    monkeypatch.setitem(registry, "toy", toy(data, f"{web.url}/a/"))
    web.pages["/a/toy.tgz"] = serve(data)
    with pytest.raises(ValueError, match="files of toy lack.*train.*val"): fetch("toy")
    nothing_left()


def test_archive_without_a_top_folder(web, monkeypatch):
    data = tgz(FILES, top="")
    monkeypatch.setitem(registry, "toy", toy(data, f"{web.url}/a/"))
    web.pages["/a/toy.tgz"] = serve(data)
    check(fetch("toy"))


# ---- small parts ----

def test_source_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="pass what fetch returned"): source_of(tmp_path)


def test_a_large_file_is_announced(web, monkeypatch, capsys):
    data = bytes(6_000_000)
    monkeypatch.setitem(registry, "big", DataSet("big", "", 6, {"big.bin": "sha256:" + hashlib.sha256(data).hexdigest()}, (f"{web.url}/a/",), ("big.bin",),
                                                 "", "", "fashion", ""))
    web.pages["/a/big.bin"] = serve(data)
    fetch("big")
    assert capsys.readouterr().err == f"fetching {web.url}/a/big.bin\n"


def test_registry_and_table(capsys):
    datasets()
    table = capsys.readouterr().out
    for d in registry.values():
        assert d.name in table and d.licence in table and d.cite in table
        assert d.addresses and d.size > 0 and d.holds and d.instead
        for digest in d.files.values(): assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", digest)
    assert set(registry) == {"mnist", "fashion-mnist", "imagenette2-160", "imdb", "wikitext-2", "playing-cards",
                             "horse2zebra"}


def test_in_a_wheel(tmp_path, monkeypatch, capsys):
    "No settings.ini beside the package, so stand-ins lie inside it and relative paths count from where Python was started."
    package = tmp_path/"site"/"exp"
    package.mkdir(parents=True)
    shutil.copytree(ROOT/"data", package/"standins", ignore=shutil.ignore_patterns("cache", "photos"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(package/"__init__.py")))
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "exp.datasets"}
    exec(compile((ROOT/"exp"/"datasets.py").read_text(encoding="utf-8"), "datasets.py", "exec"), space)
    assert space["fetch"]("mnist", offline=True) == package/"standins"/"fashion"
    for value, folder in (("mine", tmp_path/"mine"), ("", tmp_path/"home"/"dl-from-scratch")):
        monkeypatch.setenv("EXP_DATA", value); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"home"))
        assert space["cache_folder"]() == folder


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("EXP_DATA", raising=False)
    assert cache_folder() == ROOT/"data"/"cache"
    for value, folder in ((str(tmp_path), tmp_path), ("my/data", ROOT/"my"/"data"), ("~/data", Path.home()/"data")):
        monkeypatch.setenv("EXP_DATA", value)
        assert cache_folder() == folder


# ---- IDX ----

def idx_bytes(a, code):
    return bytes([0, 0, code, a.ndim]) + struct.pack(f">{a.ndim}I", *a.shape) + a.astype(D._IDX_KINDS[code]).tobytes()


@given(st.sampled_from(list(D._IDX_KINDS)), st.lists(st.integers(0, 4), max_size=4), st.booleans())
def test_idx_round_trip(tmp_path_factory, code, shape, zipped):
    a = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    file = tmp_path_factory.getbasetemp()/"some.idx"
    raw = idx_bytes(a, code)
    file.write_bytes(gzip.compress(raw, 1) if zipped else raw)
    got = read_idx(file)
    assert got.dtype == np.dtype(D._IDX_KINDS[code]).newbyteorder("=") and got.shape == a.shape and (got == a).all()
    got[...] = 0                                                # an array of the caller's own


@given(st.data())
def test_idx_of_any_other_length_is_refused(tmp_path_factory, data):
    raw = idx_bytes(np.zeros((2, 3)), 8)
    n = data.draw(st.integers(0, len(raw) + 3).filter(lambda n: n != len(raw)))
    file = tmp_path_factory.getbasetemp()/"cut.idx"
    file.write_bytes((raw + b"123")[:n])
    with pytest.raises(ValueError, match="cut.idx"): read_idx(file)


ZIPPED = gzip.compress(idx_bytes(np.arange(4), 8))


@pytest.mark.parametrize("raw", [ZIPPED[:-6], ZIPPED[:12], ZIPPED[:-8] + b"xxxx" + ZIPPED[-4:], ZIPPED[:10] + b"\xff\xff" + ZIPPED[12:], ZIPPED + b"junk"],
                         ids=["cut", "cut in its header", "wrong checksum", "changed inside", "something behind it"])
def test_a_damaged_gzip_is_named(tmp_path, raw):
    (tmp_path/"labels.gz").write_bytes(raw)
    with pytest.raises(ValueError, match="labels.gz is no IDX file, or damaged"): read_idx(tmp_path/"labels.gz")


@pytest.mark.parametrize("head", [b"\x01\0\x08\x01", b"\0\0\x07\x01", b"PK\3\4", b"\0\x01\x08\x01"])
def test_not_idx(tmp_path, head):
    (tmp_path/"x").write_bytes(head + bytes(100))
    with pytest.raises(ValueError, match="no IDX file"): read_idx(tmp_path/"x")


@pytest.mark.parametrize("change", [dict(labels=np.zeros(3)), dict(labels=np.zeros((4, 1))), dict(code=13), dict(code=9)])
@pytest.mark.parametrize("part", [0, 1])
def test_pictures_and_labels_must_match(tmp_path, change, part):
    for i in range(2):
        change_here = change if i == part else {}
        images, labels = list(registry["mnist"].files)[2*i:2*i + 2]
        (tmp_path/images).write_bytes(idx_bytes(np.zeros((4, 2, 2)), change_here.get("code", 8)))
        (tmp_path/labels).write_bytes(idx_bytes(change_here.get("labels", np.zeros(4)), 8))
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} holds .*: not bytes, a label each"): load_idx(tmp_path)


# ---- the stand-ins ----

@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_clothes(name, capsys):
    path = fetch(name)
    assert source_of(path) == "stand-in" and name in capsys.readouterr().err
    x_train, y_train, x_valid, y_valid = load_idx(path)
    for x, y, n in ((x_train, y_train, 10_000), (x_valid, y_valid, 2_000)):
        assert x.shape == (n, 784) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
        assert y.shape == (n,) and y.dtype == torch.int64 and (y.bincount() == n//10).all()
    assert not torch.equal(y_train[:100], y_train[:100].sort()[0])         # not sorted by class


def test_photographs():
    from PIL import Image
    path = fetch("imagenette2-160")
    classes = sorted(p.name for p in (path/"train").iterdir())
    assert len(classes) == 10 and classes == sorted(p.name for p in (path/"val").iterdir())
    modes = []
    for part, n in (("train", 40), ("val", 12)):
        for c in classes:
            files = list((path/part/c).iterdir())
            assert len(files) == n and all(f.suffix == ".jpg" for f in files)
            for f in files:
                with Image.open(f) as im: assert im.size == (160, 160); modes.append(im.mode)
    assert set(modes) == {"RGB", "L"} and modes.count("L") < 20


def test_photographs_can_be_learnt():
    "A photograph's mean and spread of colour already tell most classes of the other part of each picture."
    from PIL import Image
    path = fetch("imagenette2-160")
    def features(part):
        files = sorted((path/part).rglob("*.jpg"))
        x = torch.stack([torch.from_numpy(np.asarray(Image.open(f).convert("RGB").resize((32, 32)), np.float32)) for f in files])
        return torch.cat([x.mean((1, 2)), x.std((1, 2))], 1), [f.parent.name for f in files]
    x, y = features("train")
    xv, yv = features("val")
    right = [y[i] == label for i, label in zip(torch.cdist(xv, x).argmin(1), yv)]
    assert sum(right) > .6*len(right)


def test_passages():
    path = fetch("imdb")
    texts = {(part, c): [f.read_text(encoding="utf-8") for f in sorted((path/part/c).glob("*.txt"))]
             for part, c in (("train", "emma"), ("train", "mansfield_park"), ("test", "emma"), ("test", "mansfield_park"), ("train", "unsup"))}
    assert [len(t) for t in texts.values()] == [150, 150, 60, 60, 100]
    everything = [t for ts in texts.values() for t in ts]
    assert len(set(everything)) == len(everything) and all(200 <= len(t.split()) <= 400 for t in everything)


def test_tokens():
    path = fetch("wikitext-2")
    words = {part: (path/f"{part}.txt").read_text(encoding="utf-8").split() for part in ("train", "valid", "test")}
    assert len(words["train"]) > 100_000 and min(map(len, words.values())) > 15_000
    assert not set(words["valid"]) - set(words["train"]) - set("= : Chapter".split()) - {w for w in words["valid"] if w.isdigit()}
    assert .01 < words["train"].count("<unk>")/len(words["train"]) < .05
    assert (path/"train.txt").read_text(encoding="utf-8").startswith(" \n = ")


def test_standins_are_small_and_licensed():
    files = [f for f in (ROOT/"data").rglob("*") if f.is_file() and "cache" not in f.relative_to(ROOT/"data").parts]
    assert sum(f.stat().st_size for f in files) < 10_000_000
    licences = (ROOT/"data"/"LICENCES.md").read_text(encoding="utf-8")
    for c in (ROOT/"data"/"photos"/"train").iterdir(): assert f"`{c.name}`" in licences
    assert "Zalando" in licences and "Permission is hereby granted" in licences and "Austen" in licences
    for d in registry.values(): assert (ROOT/"data"/d.standin/".source.json").exists()
