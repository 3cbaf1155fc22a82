"""The stage cache and the run folder: whole or not at all, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edgekit import cache, runfolder
from edgekit.errors import FormatError, InputError, ParityError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))


def entry() -> Path:
    (found,) = (p.parent for p in cache.folder().rglob("entry.json"))
    return found


def stored(tmp_path: Path) -> str:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_bytes(b"abc")
    key = cache.key("stage", {"x": 1})
    cache.put(key, tmp_path / "made", ["a"])
    return key


def test_an_entry_comes_back_with_its_bytes(tmp_path: Path) -> None:
    key = stored(tmp_path)
    assert cache.take(key, tmp_path / "there") == ["a"]
    assert (tmp_path / "there" / "a").read_bytes() == b"abc"
    (tmp_path / "there" / "a").write_bytes(b"changed")  # a copy, not a link
    assert cache.take(key, tmp_path / "again") == ["a"]
    assert (tmp_path / "again" / "a").read_bytes() == b"abc"
    assert cache.take(cache.key("stage", {"x": 2}), tmp_path / "there") is None
    assert cache.take(cache.key("other", {"x": 1}), tmp_path / "there") is None


@pytest.mark.parametrize("damage", ["alter", "remove file", "remove entry", "truncate entry"])
def test_a_damaged_entry_counts_as_missing_and_can_be_made_again(damage: str, tmp_path: Path) -> None:
    key = stored(tmp_path)
    if damage == "alter":
        (entry() / "a").write_bytes(b"abd")
    elif damage == "remove file":
        (entry() / "a").unlink()
    elif damage == "remove entry":
        (entry() / "entry.json").unlink()
    else:
        (entry() / "entry.json").write_text("{")
    assert cache.take(key, tmp_path / "there") is None
    cache.put(key, tmp_path / "made", ["a"])
    assert cache.take(key, tmp_path / "there") == ["a"]


def test_the_key_sees_versions_and_edgekit_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    base = cache.key("stage", {})
    monkeypatch.setattr(cache.environment, "versions", lambda: {"torch": "0"})
    other = cache.key("stage", {})
    monkeypatch.setattr(cache, "code_digest", lambda: "0")
    assert len({base, other, cache.key("stage", {})}) == 3


def test_an_unwritable_cache_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write the cache .*set EDGEKIT_CACHE"):
        cache.put(cache.key("stage", {}), tmp_path, [])


def make(folder: Path, text: str, **options: Any) -> None:
    with runfolder.staged(folder, **options) as work:
        (work / "a").write_text(text)
        (work / "sub").mkdir(exist_ok=True)
        (work / "sub" / "b").write_text(text)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_a_run_folder_has_a_manifest_of_every_file_and_is_replaced_whole(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    make(run, "one")
    assert set(runfolder.names(run)) == {"a", "sub/b"} and runfolder.altered(run) == []
    (run / "notes.txt").write_text("mine")
    with runfolder.staged(run) as work:
        (work / "c").write_text("two")
    assert set(content(run)) == {"c", "notes.txt", "manifest.json"}  # the user's own file is carried over
    assert set(runfolder.names(run)) == {"c"}
    with runfolder.staged(run, keep=True) as work:
        (work / "d").write_text("three")
    assert set(runfolder.names(run)) == {"c", "d"} and (run / "notes.txt").read_text() == "mine"
    assert leftovers(run) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EFBIG])
def test_a_failed_write_leaves_the_previous_run(code: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(run, "one")
    before = content(run)
    with pytest.raises(InputError, match=f"cannot write {run}: "), runfolder.staged(run, keep=True) as work:
        (work / "a").write_text("two")
        raise OSError(code, os.strerror(code))
    assert content(run) == before and leftovers(run) == []


def test_errors_name_the_run_folder_not_the_one_it_is_built_in(tmp_path: Path) -> None:
    with pytest.raises(ParityError) as caught, runfolder.staged(tmp_path / "run") as work:
        raise ParityError(f"{work}/model.onnx differs")
    assert str(caught.value) == f"{tmp_path}/run/model.onnx differs"
    assert not (tmp_path / "run").exists() and leftovers(tmp_path / "run") == []


def test_what_is_no_run_folder_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="holds files but is not a run folder"):
        make(home, "x")
    assert content(home) == {"letter.txt": b"dear"}
    with pytest.raises(InputError, match="is not a folder"):
        make(home / "letter.txt", "x")
    with pytest.raises(InputError, match="a part of the path is a file"):
        make(home / "letter.txt" / "run", "x")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "x")
    with pytest.raises(FormatError, match="not a run folder"):
        runfolder.names(home)


def test_altered_and_newer_runs_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(run, "one")
    (run / "a").write_text("two")
    assert runfolder.altered(run) == ["a"]
    with pytest.raises(FormatError, match="altered after it was written"):
        runfolder.open_run(run, "a")
    with pytest.raises(FormatError, match="has no c"):
        runfolder.open_run(run, "c")
    (run / "manifest.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(FormatError, match=r"format 99.*upgrade edgekit"):
        runfolder.names(run)


def test_without_the_system_call_the_swap_is_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runfolder, "_exchange", lambda a, b: False)
    make(tmp_path / "run", "one")
    make(tmp_path / "run", "two")
    assert (tmp_path / "run" / "a").read_text() == "two" and leftovers(tmp_path / "run") == []
    real = os.rename

    def failing(a: Path, b: Path) -> None:
        if Path(b) == tmp_path / "run" and ".old." not in str(a):
            raise OSError(errno.ENOSPC, "")
        real(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(InputError, match="no space"):
        make(tmp_path / "run", "three")
    assert (tmp_path / "run" / "a").read_text() == "two" and leftovers(tmp_path / "run") == []


CHILD = """
import sys, time
from pathlib import Path
from edgekit import runfolder
with runfolder.staged(Path(sys.argv[1])) as work:
    (work / "a").write_text("two")
    print("built", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_the_run_and_its_leftovers_are_swept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(run, "one")
    before = content(run)
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(run)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"built\n"
    make(tmp_path / "run", "one")  # a live process's folder is not swept
    assert len(leftovers(run)) == 1
    child.kill()
    child.wait()
    assert content(run) == before and len(leftovers(run)) == 1
    make(run, "three")
    assert (run / "a").read_text() == "three" and leftovers(run) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_really_full_disk_leaves_the_previous_run(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        make(disk / "run", "one")
        before = content(disk / "run")
        with pytest.raises(InputError, match="no space left"), runfolder.staged(disk / "run") as work:
            (work / "a").write_bytes(bytes(1 << 20))
        assert content(disk / "run") == before and leftovers(disk / "run") == []
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, capture_output=True)
        with pytest.raises(InputError, match="read-only"):
            make(disk / "run", "two")
        assert content(disk / "run") == before
    finally:
        time.sleep(0.05)
        subprocess.run(["umount", str(disk)], check=True, capture_output=True)
