#!/bin/sh
# Runs the tests of native/ on a library that checks every address and every operation without a defined result
# (AddressSanitizer, UndefinedBehaviorSanitizer), in every instruction set of this machine; warnings are errors.
#
#   scripts/sanitize.sh [PYTEST ARGUMENT]…     default: the tests of tests/ops that run the library
#
# FORMS=avx2 builds that instruction set and the baseline alone. PYTHON names an interpreter in which the package is installed
# as `make setup` does it (default .venv/bin/python). The build stays in build/sanitize. Leaks are not looked for here, because
# Python has many: tests/ops/test_leaks.py does that. ThreadSanitizer does not know the barriers of gcc's OpenMP; that the
# number of threads changes no bit is tested instead.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
build=$PWD/build/sanitize
place=$build/whimbrel/ops/cpu # where the package looks for its library in a folder of sys.path

cmake -S native -B "$build" -G "${CMAKE_GENERATOR:-Unix Makefiles}" -DCMAKE_BUILD_TYPE=Debug -DWHIMBREL_STRICT=ON \
    "-DWHIMBREL_FORMS=${FORMS-avx2;avx512}" -DWHIMBREL_SANITIZE=address,undefined >/dev/null
cmake --build "$build" --parallel "${JOBS:-2}"
mkdir -p "$place"
cp "$build/libwhimbrel.so" "$place"

# The checks come before all else; libstdc++ with them, so that torch's exceptions are seen.
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$build/CMakeCache.txt")
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so.6)"
# Not detect_stack_use_after_return: gcc lays vectors of 64 bytes in its frames 32 bytes off, which is a fault
# of its own. Nothing here returns the address of a local.
ASAN_OPTIONS=allocator_may_return_null=1:detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0
UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1
PYTHONPATH=$build
export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS PYTHONPATH

found=$("$python" -c 'from whimbrel.ops.cpu import library; print(library.load()[0]._name)')
[ "$found" = "$place/libwhimbrel.so" ] || { echo "the package loads $found, not the library that was built here" >&2; exit 1; }
[ $# -gt 0 ] || set -- tests/ops
exec "$python" -m pytest -q -p no:cacheprovider --capture=sys -m "not slow" "$@"
