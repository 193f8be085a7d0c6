"""Writes the pinned requirement files, with the SHA-256 of every wheel that a supported machine may choose.

Run by `./build.sh lock` from the top folder, in an environment that holds the resolver. Input: the requirement
lists of setup.cfg. Output: .build/requirements.txt (runtime), .build/build-requirements.txt, tests/requirements.txt.
Source archives are never listed, so that an install can run no foreign build script.
"""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

PYTHON_TAG = re.compile(r"cp31[1-4]|py3|py2\.py3")
ABI_TAG = re.compile(r"cp31[1-4]|abi3|none")
PLATFORM_TAG = re.compile(r"any|(many|musl)linux\S*_(x86_64|aarch64)|macosx_\d+_\d+_(arm64|universal2)")
FOREIGN_MARKER = re.compile(r"(?<! or )sys_platform == '(win32|emscripten)'$")
OLD_ABI3_TAG = re.compile(r"cp3([2-9]|10)")


def main() -> None:
    lists = configparser.ConfigParser()
    lists.read("setup.cfg")
    extras = lists["options.extras_require"]
    runtime = lists["options"]["install_requires"] + extras["fast"]
    runtime_pins = write_pins(".build/requirements.txt", runtime, "what Stockyard runs on", {})
    write_pins(".build/build-requirements.txt", extras["build"], "what packs dist/stockyard", {})
    write_pins("tests/requirements.txt", extras["test"], "what the tests need beside the runtime", runtime_pins)


def write_pins(target: str, wanted: str, purpose: str, known: dict[str, str]) -> dict[str, str]:
    """Resolve `wanted` (one requirement a line) and write `target`; answers {package: "==version ; marker"} of it.

    `known` holds what the runtime file pins: respected; written again only if pinned for some Pythons only.
    """
    lines = [f"# Written by `./build.sh lock`: {purpose}."]
    if known:
        lines.append("-r ../.build/requirements.txt")
    pins = {}
    for package in resolve(wanted, known):
        name, version = package["name"], package["version"]
        marker = f" ; {package['marker']}" if "marker" in package else ""
        if known.get(name) == f"=={version}":
            continue
        pins[name] = f"=={version}{marker}"
        hashes = sorted({wheel["hashes"]["sha256"] for wheel in package.get("wheels", ()) if is_wanted(wheel)})
        if not hashes:
            sys.exit(f"lock: {name} {version} has no wheel for the supported machines")
        lines += [f"{name}{pins[name]} \\", *(f"    --hash=sha256:{digest} \\" for digest in hashes)]
        lines[-1] = lines[-1].removesuffix(" \\")
    Path(target).write_text("\n".join(lines) + "\n")
    print(f"lock: {target}: {len(pins)} packages")
    return pins


def resolve(wanted: str, known: dict[str, str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        source, limits, answer = Path(folder, "wanted.in"), Path(folder, "limits.txt"), Path(folder, "pylock.toml")
        source.write_text(wanted)
        limits.write_text("".join(f"{name}{pin}\n" for name, pin in known.items()))
        options = ["--universal", "--python-version=3.11", "--format=pylock.toml", "--generate-hashes", "--quiet"]
        command = [sys.executable, "-m", "uv", "--no-config", "pip", "compile", *options]
        # The machine's own certificates, as pip uses, for networks that see through TLS.
        environment = os.environ | {"UV_SYSTEM_CERTS": "1"}
        subprocess.run([*command, "-c", str(limits), "-o", str(answer), str(source)], check=True, env=environment)
        packages: list[dict[str, Any]] = tomllib.loads(answer.read_text())["packages"]
    return [package for package in packages if not FOREIGN_MARKER.search(package.get("marker", ""))]


def is_wanted(wheel: dict[str, Any]) -> bool:
    """Whether a CPython 3.11 to 3.14 on Linux (x86_64, aarch64; glibc, musl) or macOS arm64 may choose this wheel."""
    name = wheel.get("name") or wheel["url"].rpartition("/")[2]
    python, abi, platforms = name.removesuffix(".whl").rsplit("-", 3)[1:]
    if PYTHON_TAG.fullmatch(python) is None and not (abi == "abi3" and OLD_ABI3_TAG.fullmatch(python)):
        return False
    return bool(ABI_TAG.fullmatch(abi)) and any(PLATFORM_TAG.fullmatch(tag) for tag in platforms.split("."))


if __name__ == "__main__":
    main()
