#!/bin/sh
# Make .venv with Whimbrel in it, or reuse the one that is there:   sh scripts/setup.sh [EXTRAS]
# EXTRAS is a comma list of the extras in pyproject.toml. PYTHON=... names the Python to use.
# A torch that this Python already has is kept if it is new enough; otherwise constraints.txt says which one is fetched.
set -eu
cd "$(dirname "$0")/.."
extras=${1:-}
python=.venv/bin/python
stamp=.venv/whimbrel-setup

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
fits() { "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_torch() { # a torch that imports, and is not too old; prints its version
    "$1" -c 'import sys, torch; v = torch.__version__; print(v); sys.exit(tuple(map(int, v.split(".")[:2])) < (2, 11))' 2>/dev/null
}

# What was installed: from which description and native code, for which place (a moved clone is set up anew), with which
# extras.
want="$( (cat pyproject.toml constraints.txt scripts/setup.sh native/CMakeLists.txt native/src/*; pwd) | cksum | tr ' ' '-')"
if [ -f "$stamp" ] && "$python" -c '' 2>/dev/null; then
    for have in "$extras" dev; do # dev brings all the others
        if grep -qxF "$want $have" "$stamp"; then exit 0; fi
    done
fi

if ! fits "$python"; then
    chosen=
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.11 python3.12 python3.13 python3 python; fi
    for candidate in "$@"; do
        if fits "$candidate"; then
            [ -n "$chosen" ] || chosen=$candidate
            if has_torch "$candidate" >/dev/null; then chosen=$candidate; break; fi
        fi
    done
    [ -n "$chosen" ] || fail "needs Python 3.11 or newer with its venv module; found: $(python3 --version 2>&1 || echo none). \
Install one (on Debian: python3-venv too), or name it: make PYTHON=/path/to/python3.12 setup"
    if kept=$(has_torch "$chosen"); then
        say "making .venv with $("$chosen" --version 2>&1), which sees the torch $kept that is already installed"
        site=--system-site-packages
    else
        say "making .venv with $("$chosen" --version 2>&1)"
        site=
    fi
    # shellcheck disable=SC2086
    "$chosen" -m venv --clear $site .venv || fail "could not make .venv (on Debian: install python3-venv), or no space is left"
fi

if kept=$(has_torch "$python"); then
    sed "s/^torch==.*/torch==$kept/" constraints.txt >.venv/constraints.txt
else
    cp constraints.txt .venv/constraints.txt
    say "fetching torch $(sed -n 's/^torch==//p' constraints.txt): 192 MB as a CPU build; the default build for Linux is 527 MB \
and brings NVIDIA's libraries besides"
fi
say "installing whimbrel${extras:+[$extras]} into .venv, and compiling native/ (minutes on a slow line)"
# No input, ever: a question that nobody sees would hang a machine that has no terminal.
"$python" -m pip install -qq --no-input --disable-pip-version-check \
    --constraint .venv/constraints.txt --editable ".${extras:+[$extras]}" ||
    fail "pip could not install it (see above); the same command tries again"
if [ -f "$stamp" ]; then grep -F "$want " "$stamp" >"$stamp.new" || :; else : >"$stamp.new"; fi
printf '%s %s\n' "$want" "$extras" >>"$stamp.new"
mv "$stamp.new" "$stamp"
"$python" - <<'SAY'
from whimbrel.ops.cpu import isa, load

why = load()[1]
print(f"setup: no native library, torch's slower forms run instead: {why}" if why else f"setup: native library built, uses {isa()}")
SAY
say "done; now: .venv/bin/whimbrel doctor"
