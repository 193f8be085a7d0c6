"""The `__main__` of dist/stockyard: unpacks the file safely, then hands over to shiv's own bootstrap.

Native parts cannot be loaded from inside a zip, so they live in an extraction root on disk, and what lies there will
hold provider keys. shiv trusts an extraction that exists, and its preamble runs only after that folder's .pth files
were executed. Hence this file, which runs first:

1. the interpreter must be one that the native parts were built for (another on PATH is used if it is);
2. the root (`SHIV_ROOT`, else ~/.stockyard/runtime) must belong to the effective user and be writable by nobody else;
3. every file below it must be listed, with its SHA-256, in the manifest inside the zip: anything altered, added or
   missing has the whole folder written again; a .pth file is never in the manifest;
   (a file for several platforms unpacks the parts of this one alone, into a folder of their own; where it has no
   compiled modules for this Python they are made once, and listed beside the folder);
4. folders of older builds that no process uses any more are deleted;
5. variables that would change what runs are dropped, and the bundle comes before PYTHONPATH and site-packages.

Only syntax that Python 2.7 and 3.6 have too, so that an old Python prints a sentence and no SyntaxError.
"""

import sys

NAME = "stockyard"
OLDEST = (3, 11)
COMPILED = ".compiled.json"
HINT = "Set SHIV_ROOT= to a folder that only you can write to."
# Each of these makes a dependency leave its C code out; aiohttp's Python parser is where request smuggling was found.
UNWANTED = (
    "AIOHTTP_NO_EXTENSIONS",
    "FROZENLIST_NO_EXTENSIONS",
    "MULTIDICT_NO_EXTENSIONS",
    "PROPCACHE_NO_EXTENSIONS",
    "YARL_NO_EXTENSIONS",
)


def fail(sentence):
    sys.stderr.write("%s: %s\n" % (NAME, sentence))
    sys.exit(1)


def version_text():
    return "%s is Python %d.%d.%d" % ((sys.executable,) + sys.version_info[:3])


if sys.version_info < (3, 6):
    fail("needs Python %d.%d or newer; %s." % (OLDEST + (version_text(),)))

import fcntl  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import stat  # noqa: E402
import zipfile  # noqa: E402
import zlib  # noqa: E402
from importlib.machinery import EXTENSION_SUFFIXES  # noqa: E402

SUFFIX = EXTENSION_SUFFIXES[0]


def main():
    zip_path = os.path.realpath(sys.argv[0])
    with zipfile.ZipFile(zip_path) as archive:
        manifest_bytes = archive.read("manifest.json")
        manifest = json.loads(manifest_bytes.decode())
        require_interpreter(manifest["builds"])
        root = prepare_root()
        if len(manifest["builds"]) > 1:
            root = os.path.join(root, SUFFIX.split(".")[1])
            make_private(root)
        build_id = hashlib.sha256(manifest_bytes).hexdigest()
        prefix = os.path.basename(zip_path) + "_"
        try:
            site_packages = unpack(archive, files_for_here(manifest), root, prefix, build_id)
        except OSError as error:
            fail("cannot unpack into %s: %s. %s" % (root, error.strerror or error, HINT))
    clean_environment(root)
    # In front of everything, so that neither PYTHONPATH nor an installed package can stand in for a bundled one.
    sys.path.insert(0, site_packages)
    # Every module has its .pyc; a new one would make the folder differ from the manifest.
    sys.dont_write_bytecode = True
    require_native_parts(root)
    from _bootstrap import bootstrap

    bootstrap()


def files_for_here(manifest):
    """What this interpreter can use of a manifest's files: all but native parts and compiled modules for others."""
    tag = "." + sys.implementation.cache_tag + ".pyc"
    return {
        name: digest for name, digest in manifest["files"].items()
        if not (name.endswith(".so") and not name.endswith(SUFFIX)) and not (name.endswith(".pyc") and not name.endswith(tag))
    }  # fmt: skip


def require_interpreter(builds):
    """Return if this Python can load the native parts; else start over in one that can, or say which is needed."""
    if SUFFIX in builds and sys.version_info >= OLDEST:
        return
    versions = sorted(set(builds.values()), key=lambda version: -int(version.split(".")[1]))
    for version in versions:
        found = find_interpreter("python" + version, builds)
        if found:
            os.execv(found, [found] + sys.argv)
    remedy = "Put python%s on PATH" % " or python".join(versions)
    if sys.version_info >= OLDEST:
        remedy += ", or build the file with this Python: PYTHON=%s ./build.sh" % sys.executable
    machines = sorted({suffix.split(".")[1].partition("-")[2].partition("-")[2] for suffix in builds})
    fail(
        "this file needs CPython %s (%s); %s. %s" % (" or ".join(versions), ", ".join(machines), version_text(), remedy)
    )


def find_interpreter(command, builds):
    import shutil
    import subprocess

    found = shutil.which(command)
    if not found:
        return None
    # Asked first, because a shim of that name may stand for nothing, and because a second start would ask again.
    probe = [found, "-c", "from importlib.machinery import EXTENSION_SUFFIXES as s; print(s[0])"]
    answer = subprocess.Popen(probe, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).communicate()[0]
    return found if answer.decode().strip() in builds else None


def prepare_root():
    """The extraction root, made with mode 0700 if it was missing; ends the program where another could write to it."""
    given = os.environ.get("SHIV_ROOT")
    if given:
        folders = [os.path.abspath(os.path.expanduser(given))]
    else:
        own = os.path.join(home_folder(), ".stockyard")
        folders = [own, os.path.join(own, "runtime")]
    for folder in folders:
        try:
            make_private(folder)
        except OSError as error:
            fail("cannot make the folder %s to unpack into: %s. %s" % (folder, error.strerror, HINT))
        refuse_if_shared(os.path.realpath(folder))
    return os.path.realpath(folders[-1])


def home_folder():
    if os.environ.get("HOME"):
        return os.environ["HOME"]
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        fail("HOME is not set and user id %d has no home folder. %s" % (os.geteuid(), HINT))


def make_private(folder):
    before = os.umask(0o077)
    try:
        os.makedirs(folder, exist_ok=True)
    finally:
        os.umask(before)


def refuse_if_shared(folder):
    status = os.stat(folder)
    if status.st_uid != os.geteuid():
        fail(
            "will not unpack into %s: it belongs to user id %d, not to %d. %s"
            % (folder, status.st_uid, os.geteuid(), HINT)
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fail(
            "will not unpack into %s: others can write to it (mode %04o). Run chmod go-w on it, or: %s"
            % (folder, stat.S_IMODE(status.st_mode), HINT)
        )


def unpack(archive, files, root, prefix, build_id):
    """Make sure that the folder of this build holds exactly `files` ({path: SHA-256}); returns its site-packages.

    One starting process at a time is in here. What it leaves is locked (shared) for as long as the process lives,
    so that the start of another build does not delete the folder under a running server.
    """
    target = os.path.join(root, prefix + build_id)
    lock = os.open(os.path.join(root, "." + prefix + "lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        discard_leftovers(root, prefix)
        if first_difference(target, with_compiled(target, files)) is not None:
            replace_folder(archive, files, root, prefix, target)
        hold = os.open(target, os.O_RDONLY)
        fcntl.flock(hold, fcntl.LOCK_SH)  # never closed: the end of the process releases it
        discard_older(root, prefix, build_id)
    finally:
        os.close(lock)
    return os.path.join(target, "site-packages")


def with_compiled(target, files):
    """The files that belong into a folder: those of the manifest, and modules that were compiled when it was written."""
    if any(name.endswith(".pyc") for name in files):
        return files
    try:
        with open(target + COMPILED) as file:
            return dict(json.load(file), **files)
    except (OSError, ValueError):
        return files


def compile_modules(fresh, files, target):
    """Compile what came without compiled modules, and list them for the next start."""
    import importlib.util
    import marshal

    compiled = {}
    for name in [name for name in files if name.endswith(".py")]:
        with open(os.path.join(fresh, name), "rb") as file:
            source = file.read()
        code = compile(source, name, "exec", dont_inherit=True)
        data = importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + importlib.util.source_hash(source) + marshal.dumps(code)
        path = importlib.util.cache_from_source(name)
        make_private(os.path.dirname(os.path.join(fresh, path)))
        write_private(os.path.join(fresh, path), data)
        compiled[path] = hashlib.sha256(data).hexdigest()
    discard(target + COMPILED)
    write_private(target + COMPILED, json.dumps(compiled).encode())


def write_private(path, data):
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def first_difference(folder, files):
    """The first path below `folder` that is not as in `files`, "" for the folder itself, None if all is as listed."""
    folders = {os.path.dirname(name) for name in files}
    folders |= {parent for name in folders for parent in parents(name)}
    seen = 0
    pending = [""]
    while pending:
        inside = pending.pop()
        try:
            entries = list(os.scandir(os.path.join(folder, inside)))
        except OSError:
            return inside
        if not is_private(os.lstat(os.path.join(folder, inside))):
            return inside
        for entry in entries:
            name = os.path.join(inside, entry.name)
            if entry.is_dir(follow_symlinks=False) and name in folders:
                pending.append(name)
            elif name not in files or not is_same(entry.path, files[name]):
                return name
            else:
                seen += 1
    return None if seen == len(files) else ""


def parents(name):
    while name:
        name = os.path.dirname(name)
        yield name


def is_private(status):
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def is_same(path, digest):
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or not is_private(status):
        return False
    with open(path, "rb", 0) as file:
        return hashlib.sha256(file.read()).hexdigest() == digest


def replace_folder(archive, files, root, prefix, target):
    """Write the whole folder anew under another name, then swap it in: a half-written one is never seen."""
    fresh = os.path.join(root, "." + prefix + "new")
    for name in files:
        path = os.path.join(fresh, name)
        make_private(os.path.dirname(path))
        write_private(path, read_member(archive, name, files[name]))
    if not any(name.endswith(".pyc") for name in files):
        compile_modules(fresh, files, target)
    if os.path.lexists(target):
        os.rename(target, os.path.join(root, "." + prefix + "old"))
    os.rename(fresh, target)
    discard_leftovers(root, prefix)


def read_member(archive, name, digest):
    try:
        data = archive.read(name)
    except (KeyError, zipfile.BadZipFile, zlib.error):
        data = b""
    if hashlib.sha256(data).hexdigest() != digest:
        fail("%s is damaged (%s): get or build it again." % (archive.filename, name))
    return data


def discard_leftovers(root, prefix):
    """Delete what an interrupted start may have left; the lock is held, so nobody is writing it."""
    for word in ("new", "old"):
        discard(os.path.join(root, "." + prefix + word))


def discard(path):
    if not os.path.lexists(path):
        return
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return
    import shutil

    shutil.rmtree(path)


def discard_older(root, prefix, build_id):
    older = re.compile(re.escape(prefix) + "(?!%s)[0-9a-f]{64}" % build_id)
    for name in os.listdir(root):
        if older.fullmatch(name.replace(COMPILED, "")) and not os.path.isdir(os.path.join(root, name)):
            discard(os.path.join(root, name))
        elif older.fullmatch(name):
            discard_if_unused(os.path.join(root, name))


def discard_if_unused(folder):
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        discard(folder)
    except OSError:
        pass  # a server of that build still runs; a later start will delete it
    finally:
        os.close(handle)


def clean_environment(root):
    for name in [name for name in os.environ if name.startswith("SHIV_") or name in UNWANTED]:
        del os.environ[name]
    os.environ["SHIV_ROOT"] = root  # what shiv's bootstrap reads next


def require_native_parts(root):
    """Without its C parser aiohttp would quietly go on with the Python one."""
    for name in ("aiohttp._http_parser", "orjson"):
        try:
            __import__(name)
        except ImportError as error:
            fail(
                "%s does not load: %s. If %s is mounted noexec: set SHIV_ROOT= to a folder on another file system."
                % (name, error, root)
            )


main()
