"""dist/stockyard as a user meets it: it starts anywhere, trusts nothing it finds on disk, and builds reproducibly."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
SOURCES = (".build", "LICENSE", "build.sh", "pyproject.toml", "setup.cfg", "stockyard.py", "stockyard_assets")
# The interpreter behind the test environment, so that the file cannot lean on packages installed for the tests.
PYTHON = os.path.realpath(sys.executable)
# Its folder first, because the file's own first line says "python3".
PATH = os.pathsep.join([os.path.dirname(PYTHON), os.environ["PATH"]])
OLDER_BUILD = "stockyard_" + "0" * 64
START_DEADLINE_S = 30


@pytest.fixture(scope="session")
def zipapp() -> Path:
    run([TOP / "build.sh"])  # at once when nothing changed
    return TOP / "dist" / "stockyard"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def filled_root(tmp_path_factory: pytest.TempPathFactory, zipapp: Path) -> Path:
    folder = tmp_path_factory.mktemp("filled") / "root"
    assert_runs(zipapp, SHIV_ROOT=folder)
    return folder


@pytest.fixture
def root(tmp_path: Path, filled_root: Path) -> Path:
    """An extraction root as a first run leaves it."""
    return shutil.copytree(filled_root, tmp_path / "root")


def run(command: list[str | Path], **environment: str | Path) -> subprocess.CompletedProcess[str]:
    values = os.environ | {name: str(value) for name, value in environment.items()}
    return subprocess.run(command, capture_output=True, text=True, env=values, check=True, timeout=120)


def start_version(file: Path, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """`FILE version` in an environment with PATH and the given variables only."""
    values = {"PATH": PATH} | {name: str(value) for name, value in environment.items()}
    command: list[str | Path] = [PYTHON, file, "version"]
    return subprocess.run(command, capture_output=True, text=True, env=values, check=False, timeout=60, cwd="/")


def assert_runs(file: Path, **environment: str | Path) -> None:
    done = start_version(file, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("stockyard ")


def refusal(file: Path, **environment: str | Path) -> str:
    """The one line with which the file refuses to start."""
    done = start_version(file, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("stockyard: ")
    return line


def extraction(root: Path) -> Path:
    (folder,) = root.glob("stockyard_*")
    return folder


def content(folder: Path) -> dict[str, tuple[int, str]]:
    """{path: (mode, digest or "" for a folder)} of everything below."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def rewritten(zipapp: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of the file whose members went through `change`."""
    with zipfile.ZipFile(zipapp) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target


def changed_manifest(members: dict[str, bytes], **fields: object) -> None:
    manifest = json.dumps(json.loads(members["manifest.json"]) | fields).encode()
    environment = json.loads(members["environment.json"]) | {"build_id": hashlib.sha256(manifest).hexdigest()}
    members |= {"manifest.json": manifest, "environment.json": json.dumps(environment).encode()}


# ---- Starting --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(zipapp: Path, home: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The file started by its own first line in an empty home; yields process and port once /health answers."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {"PATH": PATH, "HOME": str(home)}
    with (home / "output").open("wb") as output:
        server = subprocess.Popen(
            [zipapp, "serve", "--port", str(port)], env=environment, stdout=output, stderr=output, cwd=home
        )
    try:
        wait_healthy(server, port)
        yield server, port
    finally:
        server.kill()
        server.wait()


def wait_healthy(server: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < give_up and server.poll() is None:
        with contextlib.suppress(OSError):
            if health_status(port) == 200:
                return
        time.sleep(0.02)
    pytest.fail(f"no answer on /health; exit status {server.poll()}")


def health_status(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


def test_serves_from_an_empty_home_and_stops_on_sigterm(zipapp: Path, home: Path) -> None:
    with serving(zipapp, home) as (server, _port):
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    for folder in (home / ".stockyard", home / ".stockyard/runtime"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_simultaneous_first_starts(zipapp: Path, home: Path) -> None:
    environment = {"PATH": PATH, "HOME": str(home)}
    starts = [
        subprocess.Popen([PYTHON, zipapp, "version"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(4)
    ]
    outputs = [start.communicate(timeout=60)[0] for start in starts]
    assert all(output.startswith(b"stockyard ") for output in outputs)
    assert len(set(outputs)) == 1


def test_home_that_cannot_be_written(zipapp: Path, tmp_path: Path) -> None:
    """A path below a file: permission bits would not stop a root user, this does."""
    (tmp_path / "file").touch()
    line = refusal(zipapp, HOME=tmp_path / "file" / "home")
    assert str(tmp_path / "file" / "home") in line
    assert "SHIV_ROOT=" in line


def test_a_given_root_needs_no_home(zipapp: Path, root: Path) -> None:
    assert_runs(zipapp, SHIV_ROOT=root, HOME="")


# ---- Who may write to the extraction root ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_refuses_a_root_that_others_can_write_to(zipapp: Path, tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    line = refusal(zipapp, SHIV_ROOT=tmp_path)
    assert f"{tmp_path}: others can write to it (mode {mode:04o})" in line
    assert "SHIV_ROOT=" in line
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_shared_default_root(zipapp: Path, home: Path) -> None:
    (home / ".stockyard").mkdir()
    (home / ".stockyard").chmod(0o777)
    assert str(home / ".stockyard") in refusal(zipapp, HOME=home)


def test_refuses_a_root_of_another_user(zipapp: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if os.geteuid() == 0:
        os.chown(root, 65534, -1)
    else:
        root = Path("/")
    line = refusal(zipapp, SHIV_ROOT=root)
    assert f"{root}: it belongs to user id" in line
    assert "SHIV_ROOT=" in line


def test_refuses_a_link_to_a_root_that_others_can_write_to(zipapp: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to("open")
    assert "others can write to it" in refusal(zipapp, SHIV_ROOT=tmp_path / "link")


# ---- What lies in the extraction root --------------------------------------------------------------------------------


def plant_pth(site_packages: Path, marker: Path) -> None:
    (site_packages / "planted.pth").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")


def plant_module(site_packages: Path, marker: Path) -> None:
    (site_packages / "sitecustomize.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")


def alter_native_part(site_packages: Path, _marker: Path) -> None:
    native_part = next(site_packages.glob("aiohttp/_http_parser.*.so"))
    data = bytearray(native_part.read_bytes())
    data[len(data) // 2] ^= 1
    native_part.write_bytes(data)


def alter_compiled_module(site_packages: Path, _marker: Path) -> None:
    with next(site_packages.glob("__pycache__/stockyard.*.pyc")).open("ab") as compiled:
        compiled.write(b"\0")


def truncate_module(site_packages: Path, _marker: Path) -> None:
    (site_packages / "stockyard.py").write_bytes(b"")


def remove_module(site_packages: Path, _marker: Path) -> None:
    (site_packages / "aiohttp" / "web.py").unlink()


def add_folder(site_packages: Path, _marker: Path) -> None:
    (site_packages / "planted").mkdir()


def link_module(site_packages: Path, _marker: Path) -> None:
    module = site_packages / "stockyard.py"
    elsewhere = site_packages.parent.parent.parent / "elsewhere.py"
    module.rename(elsewhere)
    module.symlink_to(elsewhere)


def link_folder(site_packages: Path, _marker: Path) -> None:
    elsewhere = site_packages.parent.parent.parent / "elsewhere"
    (site_packages / "aiohttp").rename(elsewhere)
    (site_packages / "aiohttp").symlink_to(elsewhere)


def open_module_to_others(site_packages: Path, _marker: Path) -> None:
    (site_packages / "stockyard.py").chmod(0o666)


def open_folder_to_others(site_packages: Path, _marker: Path) -> None:
    (site_packages / "aiohttp").chmod(0o777)


TAMPERINGS = [
    plant_pth,
    plant_module,
    alter_native_part,
    alter_compiled_module,
    truncate_module,
    remove_module,
    add_folder,
    link_module,
    link_folder,
    open_module_to_others,
    open_folder_to_others,
]


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda tamper: tamper.__name__)
def test_anything_altered_is_unpacked_again(
    zipapp: Path, root: Path, tmp_path: Path, tamper: Callable[[Path, Path], None]
) -> None:
    before = content(extraction(root))
    marker = tmp_path / "planted code ran"
    tamper(extraction(root) / "site-packages", marker)
    assert content(extraction(root)) != before
    assert_runs(zipapp, SHIV_ROOT=root)
    assert content(extraction(root)) == before
    assert not marker.exists()


def test_nothing_is_written_again_while_all_is_well(zipapp: Path, root: Path) -> None:
    before = extraction(root).stat().st_ino
    assert_runs(zipapp, SHIV_ROOT=root)
    assert extraction(root).stat().st_ino == before


def test_leftovers_of_an_interrupted_start_are_removed(zipapp: Path, root: Path) -> None:
    (root / ".stockyard_new" / "site-packages").mkdir(parents=True)
    (root / ".stockyard_old").symlink_to("/")
    assert_runs(zipapp, SHIV_ROOT=root)
    assert sorted(path.name for path in root.iterdir()) == [".stockyard_lock", extraction(root).name]


def test_older_builds_are_deleted_once_nothing_runs_from_them(zipapp: Path, root: Path) -> None:
    older = root / OLDER_BUILD
    older.mkdir()
    unrelated = root / "stockyard_notes"
    unrelated.mkdir()
    held = os.open(older, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    assert_runs(zipapp, SHIV_ROOT=root)
    assert older.is_dir()
    os.close(held)
    assert_runs(zipapp, SHIV_ROOT=root)
    assert not older.exists()
    assert unrelated.is_dir()


def test_a_running_build_is_not_deleted_by_the_next(zipapp: Path, tmp_path: Path, home: Path) -> None:
    next_build = rewritten(zipapp, tmp_path / "stockyard", lambda members: changed_manifest(members, note="next"))
    runtime = home / ".stockyard/runtime"
    with serving(zipapp, home) as (_server, port):
        running = extraction(runtime)
        assert_runs(next_build, HOME=home)
        assert running.is_dir()
        assert health_status(port) == 200
    assert_runs(next_build, HOME=home)
    assert not running.exists()


# ---- What the environment may change ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHIV_INTERPRETER", "1"),
        ("SHIV_ENTRY_POINT", "this:d"),
        ("SHIV_MODULE", "this:d"),
        ("SHIV_CONSOLE_SCRIPT", "stockyard"),
        ("SHIV_PREPEND_PYTHONPATH", "{planted}"),
        ("PYTHONPATH", "{planted}"),
        ("AIOHTTP_NO_EXTENSIONS", "1"),
    ],
)
def test_environment_cannot_change_what_runs(zipapp: Path, root: Path, tmp_path: Path, name: str, value: str) -> None:
    for module in ("aiohttp", "orjson", "stockyard"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('planted code ran')\n")
    assert_runs(zipapp, SHIV_ROOT=root, **{name: value.format(planted=tmp_path)})


# ---- The wrong interpreter, a damaged file ---------------------------------------------------------------------------


def for_another_python(zipapp: Path, folder: Path) -> Path:
    def change(members: dict[str, bytes]) -> None:
        changed_manifest(members, builds={".cpython-399-machine.so": "3.99"})

    return rewritten(zipapp, folder / "stockyard", change)


def test_needs_the_python_it_was_built_for(zipapp: Path, tmp_path: Path, home: Path) -> None:
    line = refusal(for_another_python(zipapp, tmp_path), HOME=home)
    assert "needs CPython 3.99 (machine)" in line
    assert "Put python3.99 on PATH" in line
    assert list(home.iterdir()) == []


def test_goes_on_in_the_python_it_was_built_for(zipapp: Path, tmp_path: Path, home: Path) -> None:
    other = for_another_python(zipapp, tmp_path)
    interpreter = tmp_path / "python3.99"
    interpreter.write_text('#!/bin/sh\n[ "$1" = -c ] && echo .cpython-399-machine.so || echo "started $*"\n')
    interpreter.chmod(0o755)
    done = start_version(other, HOME=home, PATH=f"{tmp_path}:{PATH}")
    assert done.stdout == f"started {other} version\n"


def for_several_platforms(zipapp: Path, folder: Path) -> Path:
    """The file as `build.sh all` packs it on a machine that has none of the Pythons it is for."""

    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        for name in [name for name in members if name.endswith(".pyc")]:
            del members[name], manifest["files"][name]
        for name in ("site-packages/other.cpython-399-machine.so", "site-packages/__pycache__/other.cpython-399.pyc"):
            members[name] = b"for another machine"
            manifest["files"][name] = hashlib.sha256(members[name]).hexdigest()
        builds = manifest["builds"] | {".cpython-399-machine.so": "3.99"}
        changed_manifest(members, builds=builds, files=manifest["files"])

    return rewritten(zipapp, folder / "stockyard-any", change)


def test_file_for_several_platforms_unpacks_and_compiles_for_this_one(zipapp: Path, tmp_path: Path) -> None:
    any_file, root = for_several_platforms(zipapp, tmp_path), tmp_path / "root"
    assert_runs(any_file, SHIV_ROOT=root)
    (folder,) = (path for path in root.glob("cpython-*/stockyard-any_*") if path.is_dir())
    before = content(folder)
    assert not [name for name in before if "399" in name]
    assert f"site-packages/__pycache__/stockyard.{sys.implementation.cache_tag}.pyc" in before
    started = folder.stat().st_ino
    assert_runs(any_file, SHIV_ROOT=root)
    assert (content(folder), folder.stat().st_ino) == (before, started)


def test_altered_compiled_module_is_made_anew(zipapp: Path, tmp_path: Path) -> None:
    any_file, root = for_several_platforms(zipapp, tmp_path), tmp_path / "root"
    assert_runs(any_file, SHIV_ROOT=root)
    (compiled,) = root.glob("cpython-*/stockyard-any_*/site-packages/__pycache__/stockyard.*.pyc")
    good = compiled.read_bytes()
    compiled.write_bytes(good[:-9])
    assert_runs(any_file, SHIV_ROOT=root)
    assert compiled.read_bytes() == good


def test_bootstrap_parses_on_pythons_that_it_refuses() -> None:
    source = (TOP / ".build" / "bootstrap.py").read_text()
    assert ast.parse(source, feature_version=(3, 7)).body
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.JoinedStr, ast.AnnAssign))]


def test_missing_c_parser_is_an_error(zipapp: Path, tmp_path: Path, home: Path) -> None:
    def without_parser(members: dict[str, bytes]) -> None:
        for name in [name for name in members if "/aiohttp/_http_parser." in name]:
            del members[name]
        files = json.loads(members["manifest.json"])["files"]
        changed_manifest(members, files={name: files[name] for name in files if name in members})

    line = refusal(rewritten(zipapp, tmp_path / "stockyard", without_parser), HOME=home)
    assert "aiohttp._http_parser does not load" in line


def test_damaged_file_says_so(zipapp: Path, tmp_path: Path, home: Path) -> None:
    def damage(members: dict[str, bytes]) -> None:
        members["site-packages/stockyard.py"] += b"\n"

    line = refusal(rewritten(zipapp, tmp_path / "stockyard", damage), HOME=home)
    assert "is damaged (site-packages/stockyard.py)" in line


# ---- Building --------------------------------------------------------------------------------------------------------


def copy_of_sources(folder: Path) -> Path:
    for name in SOURCES:
        source = TOP / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    return folder


def test_second_build_elsewhere_is_byte_identical(zipapp: Path, tmp_path: Path) -> None:
    """In another folder, time zone, locale, umask and hash seed; with what the first build had downloaded."""
    folder = copy_of_sources(tmp_path / "another folder")
    shutil.copytree(TOP / ".build-venv", folder / ".build-venv", symlinks=True)
    command: list[str | Path] = ["sh", "-c", "umask 077; exec ./build.sh"]
    environment = os.environ | {"TZ": "Asia/Kolkata", "LC_ALL": "C", "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "0"}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True, timeout=120)
    assert (folder / "dist/stockyard").read_bytes() == zipapp.read_bytes()


def test_build_is_not_repeated(zipapp: Path) -> None:
    before = zipapp.stat().st_mtime_ns
    assert "up to date" in run([TOP / "build.sh"]).stderr
    assert zipapp.stat().st_mtime_ns == before


def test_file_holds_what_runs_and_its_licences_only(zipapp: Path) -> None:
    assert zipapp.stat().st_size < 5_000_000
    with zipfile.ZipFile(zipapp) as archive:
        names = archive.namelist()
    code = [name for name in names if ".dist-info/" not in name and "/stockyard_assets/" not in name]
    assert {Path(name).suffix for name in code} == {".json", ".py", ".pyc", ".so"}
    assert not [name for name in code if name.endswith(".json") and "/" in name]
    assert not [name for name in names if {"test", "tests", "testing"} & set(name.split("/"))]
    for package in ("aiohttp", "orjson", "uvloop", "stockyard"):
        (metadata,) = [name for name in names if name.startswith(f"site-packages/{package}-") and "METADATA" in name]
        assert [name for name in names if name.startswith(metadata.rpartition("/")[0]) and "LICENSE" in name]


def test_the_bill_of_materials_names_every_package_in_the_file(zipapp: Path, root: Path) -> None:
    bill = json.loads(run([zipapp, "version", "--json"], SHIV_ROOT=root).stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    with zipfile.ZipFile(zipapp) as archive:
        folders = {
            name.split("/")[1].removesuffix(".dist-info") for name in archive.namelist() if ".dist-info/" in name
        }
    parts = [bill["metadata"]["component"], *bill["components"]]
    assert {f"{part['name'].replace('-', '_')}-{part['version']}" for part in parts} == folders
    assert all(part["purl"].startswith("pkg:pypi/") for part in bill["components"])
    assert all(part["licenses"] for part in parts)
    listed = run([zipapp, "version", "--deps"], SHIV_ROOT=root).stdout.splitlines()
    assert {f"{part['name']} {part['version']}" for part in bill["components"]} <= set(listed)


def test_everything_that_is_installed_is_pinned_by_its_hash() -> None:
    for pins in (".build/requirements.txt", ".build/build-requirements.txt", "tests/requirements.txt"):
        lines = [
            line
            for line in (TOP / pins).read_text().split("\n")
            if line and not line.startswith(("#", "-r ../.build/"))
        ]
        heads = [at for at, line in enumerate(lines) if not line.startswith(" ")]
        assert heads
        for at in heads:
            assert re.fullmatch(r"[\w.-]+==[\w.]+( ; .*)? \\", lines[at]), lines[at]
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", lines[at + 1]), lines[at + 1]
    assert (TOP / "build.sh").read_text().count("--require-hashes") == 3  # each of its ways to install them


def test_pip_install_brings_the_assets(tmp_path: Path) -> None:
    source, target = copy_of_sources(tmp_path / "source"), tmp_path / "target"
    pip: list[str | Path] = [TOP / ".build-venv/bin/python", "-m", "pip", "install", "--quiet", "--no-index"]
    run([*pip, "--no-deps", "--no-build-isolation", "--no-compile", "--target", target, source])
    assert (target / "stockyard_assets/prices.json").read_bytes() == (TOP / "stockyard_assets/prices.json").read_bytes()
    done = run([sys.executable, "-m", "stockyard", "version"], PYTHONPATH=target, HOME=tmp_path)
    assert done.stdout.startswith("stockyard ")
    assert (target / "bin" / "stockyard").is_file()
