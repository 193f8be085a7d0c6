"""Makes the single file out of folders of installed packages; called by build.sh, byte for byte the same each time.

pack.py merge TARGET FOLDER...        add what a running Stockyard reads of some folders, native parts without symbols
pack.py compile FOLDER TARGET         every module as .pyc of the running Python
pack.py seal FROM_SHIV COMPILED FILE  add compiled modules, bill of materials and manifest, put bootstrap.py in as __main__.py
"""

from __future__ import annotations

import email
import hashlib
import importlib.util
import json
import marshal
import re
import struct
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

# For one platform, and for all of them.
MAX_BYTES = 5_000_000
MAX_BYTES_ANY = 30_000_000
# The earliest moment a zip can state.
TIMESTAMP = (1980, 1, 1, 0, 0, 0)
UNWANTED_SUFFIXES = {".c", ".cpp", ".h", ".hash", ".in", ".pxd", ".pxi", ".pyc", ".pyi", ".pyx", ".typed"}
UNWANTED_FOLDERS = {"__pycache__", "_testing", "bin", "test", "tests", "testing"}
UNWANTED_FILES = re.compile(
    r"aiohttp/(pytest_plugin|test_utils)\.py|uvloop/_testbase\.py|multidict/_testcapi\..*|stamp"
)
# Of *.dist-info: what states versions and licences, and what shiv reads the console script from.
WANTED_METADATA = re.compile(r"METADATA|entry_points\.txt|licenses/.*|(LICEN[SC]E|NOTICE|COPYING)[^/]*")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["merge", target, *folders]:
            merge(Path(target), [Path(folder) for folder in folders])
        case ["compile", folder, target]:
            compile_modules(Path(folder), Path(target))
        case ["seal", from_shiv, compiled, file]:
            seal(Path(from_shiv), Path(compiled), Path(file))
        case _:
            sys.exit(__doc__)


def merge(target: Path, folders: list[Path]) -> None:
    """Native parts carry Python and machine in their names; any other file must be the same in every folder."""
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder)
            if path.suffix == ".pth":
                sys.exit(f"pack: {name} would run at every start of Python; it has no place in the file")
            if is_wanted(name):
                add_file(target / name, path.read_bytes())


def add_file(copy: Path, data: bytes) -> None:
    if copy.suffix == ".so":
        data = without_symbols(data)
    elif copy.name == "METADATA":
        data = data.partition(b"\n\n")[0] + b"\n"  # without the project's long description
    if copy.exists() and copy.read_bytes() != data:
        sys.exit(f"pack: {copy} is not the same on every platform")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(data)


def is_wanted(name: Path) -> bool:
    if name.parts[0].endswith(".dist-info"):
        return WANTED_METADATA.fullmatch("/".join(name.parts[1:])) is not None
    if UNWANTED_FILES.fullmatch(name.as_posix()) or UNWANTED_FOLDERS & set(name.parts[:-1]):
        return False
    return name.suffix not in UNWANTED_SUFFIXES and not name.name.startswith(".")


def without_symbols(library: bytes) -> bytes:
    """A 64-bit little-endian ELF file cut after its last segment; anything else (macOS) is answered as it came.

    The loader reads segments only. Sections (symbol and debug tables) stand behind them and can go: what strip(1) does,
    but for every processor, without binutils, and the same whichever version is installed.
    """
    if library[:6] != b"\x7fELF\x02\x01":
        return library
    (table_at,) = struct.unpack_from("<Q", library, 0x20)
    entry_bytes, entries = struct.unpack_from("<HH", library, 0x36)
    ends = [table_at + entry_bytes * entries]
    for index in range(entries):
        entry = table_at + entry_bytes * index
        (offset,) = struct.unpack_from("<Q", library, entry + 8)
        (size,) = struct.unpack_from("<Q", library, entry + 32)
        ends.append(offset + size)
    cut = bytearray(library[: max(ends)])
    struct.pack_into("<Q", cut, 0x28, 0)  # where the section table was
    struct.pack_into("<HH", cut, 0x3C, 0, 0)  # how many sections, and which holds their names
    return bytes(cut)


def compile_modules(folder: Path, target: Path) -> None:
    """Every module of `folder` as .pyc (shiv leaves them out), so that no start has to compile or to write one.

    Marked as "hash, never checked against the source": no time stamp goes in, and the manifest vouches for both.
    """
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        source = path.read_bytes()
        code = compile(source, name.as_posix(), "exec", dont_inherit=True, optimize=0)
        header = importlib.util.MAGIC_NUMBER + struct.pack("<I", 1) + importlib.util.source_hash(source)
        compiled = target / name.parent / "__pycache__" / f"{name.stem}.{sys.implementation.cache_tag}.pyc"
        compiled.parent.mkdir(parents=True, exist_ok=True)
        compiled.write_bytes(header + marshal.dumps(code))


def seal(from_shiv: Path, compiled: Path, file: Path) -> None:
    """Write `file`; its name appears only when it is complete."""
    data = from_shiv.read_bytes()
    with zipfile.ZipFile(from_shiv) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        shebang = data[: min(member.header_offset for member in archive.infolist())]
    for path in sorted(compiled.rglob("*.pyc")):
        members[f"site-packages/{path.relative_to(compiled).as_posix()}"] = path.read_bytes()
    members["site-packages/stockyard_assets/sbom.json"] = bill_of_materials(members)
    files = {name: sha256(members[name]) for name in sorted(members) if name.startswith("site-packages/")}
    builds = builds_of(files)
    members["manifest.json"] = json.dumps({"builds": builds, "files": files}, indent=0).encode()
    environment = json.loads(members["environment.json"])
    # shiv's own id covers neither the compiled modules nor the interpreters they are for.
    environment["build_id"] = sha256(members["manifest.json"])
    members["environment.json"] = json.dumps(environment, sort_keys=True).encode()
    members["__main__.py"] = Path(__file__).with_name("bootstrap.py").read_bytes()
    partial = file.with_suffix(".part")
    write_zip(partial, shebang, members, len(builds) > 1)
    size, limit = partial.stat().st_size, MAX_BYTES if len(builds) == 1 else MAX_BYTES_ANY
    if size > limit:
        sys.exit(f"pack: {size:,} bytes; the file may have {limit:,}")
    partial.replace(file)
    versions = ", ".join(sorted(set(builds.values())))
    print(f"{file}: {size:,} bytes, CPython {versions}, sha256 {sha256(file.read_bytes())}")


def bill_of_materials(members: dict[str, bytes]) -> bytes:
    """The packages in the file as CycloneDX 1.6 has them; what is the same in two builds, so neither time nor serial.

    Source: https://cyclonedx.org/docs/1.6/json/
    """
    components = {}
    for name in sorted(members):
        if name.endswith(".dist-info/METADATA"):
            told = email.message_from_bytes(members[name])
            origin = "generic" if told["Name"] == "stockyard" else "pypi"
            purl = f"pkg:{origin}/{told['Name'].lower().replace('_', '-')}@{told['Version']}"
            licence = told["License-Expression"]
            components[told["Name"]] = {
                "type": "library",
                "bom-ref": purl,
                "name": told["Name"],
                "version": told["Version"],
                "purl": purl,
                "licenses": [{"expression": licence} if licence else {"license": {"name": told["License"]}}],
            }
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**components.pop("stockyard"), "type": "application"}},
        "components": list(components.values()),
    }
    return json.dumps(bill, indent=1).encode() + b"\n"


def builds_of(files: Iterable[str]) -> dict[str, str]:
    """{suffix of native parts: version of Python}, read off their names; each build must have the same parts."""
    parts: dict[str, set[str]] = {}
    for name in files:
        if name.endswith(".so"):
            stem, _, suffix = name.rpartition("/")[2].partition(".")
            parts.setdefault(f".{suffix}", set()).add(stem)
    if any(found != next(iter(parts.values())) for found in parts.values()):
        sys.exit("pack: the platforms have not the same native parts")
    versions = {suffix: re.match(r"\.cpython-3(\d+)-", suffix) for suffix in sorted(parts)}
    return {suffix: f"3.{match[1]}" for suffix, match in versions.items() if match}


def write_zip(file: Path, shebang: bytes, members: dict[str, bytes], small: bool) -> None:
    """`small` packs native parts with LZMA, which takes longer to unpack."""
    with file.open("wb") as stream:
        stream.write(shebang)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name in sorted(members):
                member = zipfile.ZipInfo(name, TIMESTAMP)
                member.compress_type = zipfile.ZIP_LZMA if small and name.endswith(".so") else zipfile.ZIP_DEFLATED
                member.create_system = 3  # Unix, wherever it was built
                member.external_attr = 0o100644 << 16
                archive.writestr(member, members[name])
    file.chmod(0o755)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
