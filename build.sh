#!/bin/sh
# Builds, tests and packs Stockyard. Needs a CPython 3.11 to 3.14 with venv and pip, and a shell; everything else is
# installed, at pinned versions checked by SHA-256, into .build-venv and .venv beside this file.
set -eu
unset CDPATH PYTHONPATH PYTHONHOME
cd "$(dirname "$0")"

usage() {
    cat <<'END'
./build.sh             make dist/stockyard, one executable file for this machine (nothing is done if it is up to date)
./build.sh all         make dist/stockyard-any, one file for CPython 3.11 to 3.14 on Linux (x86_64, aarch64; glibc, musl)
                       and macOS (arm64); modules are compiled for every python3.1X on PATH
./build.sh run [ARGS]  build if needed, then run dist/stockyard demo ARGS
./build.sh test [ARGS] build if needed, then run all tests (ARGS go to pytest)
./build.sh check       ruff, mypy --strict, then the tests
./build.sh docs        write the conformance table of README anew from the tests
./build.sh prices      refresh stockyard_assets/prices.json from the newest genai-prices package
./build.sh lock        pin the newest versions that setup.cfg allows, with their hashes
./build.sh help        this text

PYTHON=/path/to/python3 chooses the interpreter (default: the first usable of python3, python3.14 ... python3.11).
END
}

say() { printf 'build: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# ---- The interpreter -------------------------------------------------------------------------------------------------

# Prints what is wrong with the interpreter $1, nothing if it will do.
fault_of() {
    "$1" - <<'END' 2>/dev/null || echo "does not run"
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    print("is Python %d.%d" % sys.version_info[:2])
elif sys.implementation.name != "cpython" or "t" in getattr(sys, "abiflags", ""):
    print("is not the standard CPython build")
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("has no venv module (Debian and Ubuntu: apt install python%d.%d-venv)" % sys.version_info[:2])
END
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || die "PYTHON=$PYTHON: no such command"
        fault=$(fault_of "$PYTHON")
        [ -z "$fault" ] || die "PYTHON=$PYTHON $fault; CPython 3.11 to 3.14 with venv is needed"
        python=$PYTHON
        return
    fi
    # python3 first: it is what the file's first line will start.
    faults=
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        command -v "$python" >/dev/null 2>&1 || continue
        fault=$(fault_of "$python")
        [ -n "$fault" ] || return 0
        faults="$faults$python $fault; "
    done
    die "no usable Python found (${faults:-none on PATH}). Install CPython 3.11 to 3.14 with venv, for example:" \
        "Debian/Ubuntu: apt install python3 python3-venv; Fedora: dnf install python3; Alpine: apk add python3;" \
        "macOS: brew install python. Or name one: PYTHON=/path/to/python3 ./build.sh"
}

# ---- Environments ----------------------------------------------------------------------------------------------------

# What the content of an environment depends on: the interpreter and the pin files given. Not the place: nothing in it
# is started by its path but the interpreter, so a copied folder still works.
stamp_of() {
    { "$python" -c 'import sys, sysconfig; print(sys.version, sys.base_prefix, sysconfig.get_config_var("EXT_SUFFIX"))'
      cat "$@"; } | cksum
}

# ready FOLDER PINS...: a folder with exactly these pins, made anew only when they or the interpreter change.
# .build-venv/runtime is a plain folder of packages (what the file will hold); the others are virtual environments.
ready() {
    folder=$1
    shift
    stamp=$(stamp_of "$@")
    if [ -f "$folder/stamp" ] && [ "$(cat "$folder/stamp")" = "$stamp" ]; then return; fi
    say "installing $folder"
    rm -rf "$folder"
    for pins in "$@"; do
        set -- "$@" -r "$pins"
        shift
    done
    case $folder in
    */runtime) pip_install .build-venv --require-hashes --target "$folder" "$@" ;;
    *)
        "$python" -m venv "$folder"
        pip_install "$folder" --require-hashes "$@"
        ;;
    esac
    printf '%s\n' "$stamp" >"$folder/stamp"
}

pip_install() {
    venv=$1
    shift
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet install --only-binary :all: --no-compile "$@"
}

# ---- The file --------------------------------------------------------------------------------------------------------

SOURCES="stockyard.py stockyard_assets setup.cfg pyproject.toml LICENSE build.sh .build/requirements.txt
    .build/build-requirements.txt .build/bootstrap.py .build/pack.py"

build() {
    ready .build-venv .build/build-requirements.txt
    ready .build-venv/runtime .build/requirements.txt
    # shellcheck disable=SC2086  # a list of plain names
    if [ -x dist/stockyard ] && [ -z "$(find $SOURCES .build-venv/runtime/stamp -newer dist/stockyard -print)" ]; then
        say "dist/stockyard is up to date"
        return
    fi
    begin_work
    pack merge "$work/site-packages" .build-venv/runtime
    install_stockyard
    pack compile "$work/site-packages" "$work/compiled"
    finish_work dist/stockyard
}

build_all() {
    ready .build-venv .build/build-requirements.txt
    begin_work
    for version in 3.11 3.12 3.13 3.14; do
        fetch "$version" manylinux2014_x86_64 manylinux_2_17_x86_64 manylinux_2_28_x86_64
        fetch "$version" manylinux2014_aarch64 manylinux_2_17_aarch64 manylinux_2_28_aarch64
        fetch "$version" musllinux_1_2_x86_64
        fetch "$version" musllinux_1_2_aarch64
        fetch "$version" macosx_11_0_arm64 macosx_10_9_universal2
    done
    install_stockyard
    for version in 3.11 3.12 3.13 3.14; do
        if [ -z "$(fault_of "python$version")" ]; then
            PYTHONHASHSEED=0 "python$version" .build/pack.py compile "$work/site-packages" "$work/compiled"
        else
            say "no python$version here: on it, the file compiles its modules when it is first started"
        fi
    done
    finish_work dist/stockyard-any
}

# fetch VERSION PLATFORM...: the packages for another Python and platform, into the folder of all.
fetch() {
    folder=.build-venv/any/$1-$2
    for platform in "$@"; do
        [ "$platform" = "$1" ] && set -- "$1" && continue
        set -- "$@" --platform "$platform"
    done
    if [ ! -f "$folder/stamp" ] || ! cmp -s "$folder/stamp" .build/requirements.txt; then
        say "fetching $folder"
        rm -rf "$folder"
        version=$1
        shift
        pip_install .build-venv --require-hashes --target "$folder" --implementation cp --python-version "$version" \
            --abi "cp3${version#3.}" --abi none "$@" -r .build/requirements.txt
        cp .build/requirements.txt "$folder/stamp"
    fi
    pack merge "$work/site-packages" "$folder"
}

begin_work() {
    work=.build-venv/work
    rm -rf "$work"
    mkdir -p "$work/source" "$work/site-packages" dist
}

# Stockyard beside its packages, from a copy, because setuptools leaves build/ and *.egg-info in the folder it builds.
install_stockyard() {
    cp -R stockyard.py stockyard_assets setup.cfg pyproject.toml LICENSE "$work/source/"
    pip_install .build-venv --no-index --no-deps --no-build-isolation --target "$work/own" "$work/source"
    pack merge "$work/site-packages" "$work/own"
}

finish_work() {
    pack_with_shiv "$work/site-packages" "$work/shiv.zip"
    pack seal "$work/shiv.zip" "$work/compiled" "$1"
    rm -rf "$work"
}

# A fixed hash seed, because compiled modules hold sets in the order of the hashes.
pack() {
    PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 .build-venv/bin/python .build/pack.py "$@"
}

pack_with_shiv() {
    SOURCE_DATE_EPOCH=315532800 .build-venv/bin/python -W ignore -m shiv --reproducible --python '/usr/bin/env python3' \
        --console-script stockyard --site-packages "$1" --output-file "$2"
}

# ---- The other verbs -------------------------------------------------------------------------------------------------

# The dashboard is tested in Debian's Chromium: a browser of its own would be a download from nowhere we know.
need_chromium() {
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null 2>&1; then return; fi
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing chromium, which the tests of the dashboard drive"
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
            say "apt-get could not install chromium; the tests of the dashboard will fail"
    else
        say "no chromium on PATH; the tests of the dashboard will fail (Debian: apt install chromium)"
    fi
}

run_tests() {
    build
    need_chromium
    ready .venv .build/requirements.txt tests/requirements.txt
    status=0
    .venv/bin/python -m pytest "$@" || status=$?
    [ "$status" -ne 5 ] || die "no test ran"
    return "$status"
}

check() {
    ready .venv .build/requirements.txt tests/requirements.txt
    .venv/bin/python -m ruff check .
    .venv/bin/python -m mypy --strict stockyard.py
    run_tests
}

# Newest on purpose, so neither pinned nor kept.
with_newest() {
    package=$1
    shift
    rm -rf .lock-venv
    "$python" -m venv .lock-venv
    pip_install .lock-venv "$package"
    .lock-venv/bin/python "$@"
    rm -rf .lock-venv
}

verb=${1:-build}
[ "$#" -eq 0 ] || shift
case $verb in
build | all | run | test | check | docs | prices | lock) find_python ;;
help | -h | --help)
    usage
    exit
    ;;
*)
    usage >&2
    die "unknown verb: $verb"
    ;;
esac
# The tests call this file again, and must get the same interpreter.
PYTHON=$python
export PYTHON
case $verb in
build) build ;;
all) build_all ;;
run)
    build
    exec "$python" dist/stockyard demo "$@"
    ;;
test) run_tests "$@" ;;
check) check ;;
docs)
    ready .venv .build/requirements.txt tests/requirements.txt
    PYTHONPATH=.:tests .venv/bin/python tests/test_conformance.py
    ;;
prices) with_newest genai-prices .build/prices.py --date "$(date -u +%Y-%m-%d)" "$@" ;;
lock) with_newest uv .build/lock.py ;;
esac
