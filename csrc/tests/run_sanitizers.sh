#!/usr/bin/env bash
# Builds the CPU library and the CUDA kernels (as C++, on csrc/tests/cuda_on_host) with the address and
# undefined-behaviour sanitizers, runs the native tests and then the fuzz driver.
#   run_sanitizers.sh [cases]     CXX chooses the compiler, FUZZ_SEED the cases (default 100000 and 1)
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
cases=${1:-100000}
cxx=${CXX:-c++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! command -v "${cxx%% *}" >/dev/null; then
    echo "sanitizers: skipped, no C++ compiler ($cxx)"
    exit 0
fi
flags="-std=c++17 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Werror -pthread"
flags+=" -fsanitize=address,undefined -fno-sanitize-recover=all"
flags+=" -I$root/tests/cuda_on_host -I$root/include -I$root/cpu -I$root/cuda"
if ! echo 'int main() { return 0; }' | $cxx $flags -x c++ - -o "$work/probe" 2>"$work/why" || ! "$work/probe"; then
    echo "sanitizers: skipped, $cxx cannot build or run with them: $(tail -1 "$work/why")"
    exit 0
fi

levels=""
case "$($cxx -dumpmachine)" in
    x86_64* | amd64*) levels="-DMEK_HAVE_AVX2 -DMEK_HAVE_AVX512" ;;
esac

compile() {
    local source=$1 extra="$levels"
    case "$source" in
        *kernels_avx2.cpp) extra+=" -mavx2 -mfma" ;;
        *kernels_avx512.cpp) extra+=" -mavx512f -mavx2 -mfma" ;;
        *fuzz.cpp) extra+=" -DMEK_FUZZ_MAIN" ;;
    esac
    if [[ -z $levels && $source == *kernels_avx* ]]; then return; fi
    $cxx $flags $extra -x c++ -c "$source" -o "$work/$(basename "$source").o"
}
export -f compile
export cxx flags levels work
printf '%s\0' "$root"/common/*.cpp "$root"/cpu/*.cpp "$root"/cuda/*.cu "$root"/tests/cuda_on_host/*.cpp \
    "$root"/tests/native_tests.cpp "$root"/tests/fuzz.cpp |
    xargs -0 -n 1 -P "$(getconf _NPROCESSORS_ONLN)" bash -c 'set -e; compile "$0"'

for program in native_tests fuzz; do
    mv "$work/$program.cpp.o" "$work/$program.main"
done
for program in native_tests fuzz; do
    $cxx $flags "$work"/*.o -x none "$work/$program.main" -o "$work/$program"
done

# Fibers have stacks of their own, which the use-after-return check cannot follow.
export ASAN_OPTIONS="detect_stack_use_after_return=0:${ASAN_OPTIONS:-}"
"$work/native_tests"
"$work/fuzz" "$cases" "${FUZZ_SEED:-1}"
