#!/usr/bin/env bash
# Builds, tests, measures and sanitizes on a machine with a GPU, from a bare checkout and without a network.
set -uo pipefail

usage() {
    cat <<'TEXT'
scripts/gpu_check.sh [--stages LIST] [--budget SECONDS] [--results DIR] [--rehearse | --dry-run]

Needs a GPU, torch, triton, pytest, pytest-benchmark, ninja, a C++ compiler and nvcc; nothing is downloaded.

  --stages LIST     of goals,build,tests,benchmarks,sanitizer, separated by commas; all by default,
                    in a rehearsal all but the sanitizer
  --budget SECONDS  for everything together (570); a stage that no longer fits is named and not begun
  --results DIR     receives the results ($OUT where that is set, else benchmarks/results)
  --rehearse        run without a GPU: small sizes on the CPU, kernels in Triton's interpreter; judges no figure
  --dry-run         print what would run and what is missing here; needs no GPU and changes nothing

Written to DIR as it becomes known: gpu-DATE.jsonl, one line a goal and a stage; gpu-DATE.log, all output;
gpu-DATE.json, the benchmarks. $PYTHON is the interpreter (python3). Status 0: all chosen stages passed.
1: one failed or did not fit; the others ran all the same. 2: wrong arguments, or no GPU.
TEXT
}

fail_usage() {
    echo "error: $1" >&2
    usage >&2
    exit 2
}

known=(goals build tests benchmarks sanitizer)
stages=all
budget=570
results=
rehearse=
dry_run=
while (($#)); do
    case $1 in
        --stages | --budget | --results)
            (($# > 1)) || fail_usage "$1 needs a value"
            case $1 in
                --stages) stages=$2 ;;
                --budget) budget=$2 ;;
                --results) results=$2 ;;
            esac
            shift 2
            ;;
        --rehearse) rehearse=1; shift ;;
        --dry-run) dry_run=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) fail_usage "unknown argument $1" ;;
    esac
done
[[ $budget =~ ^[1-9][0-9]*$ ]] || fail_usage "--budget must be a whole number of seconds, got '$budget'"
[[ -n $stages ]] || fail_usage "--stages is empty"
if [[ $stages == all ]]; then
    stages=$(IFS=,; echo "${known[*]}")
    [[ -z $rehearse ]] || stages=${stages%,sanitizer}
fi
for stage in ${stages//,/ }; do
    [[ " ${known[*]} " == *" $stage "* ]] || fail_usage "unknown stage '$stage', there are ${known[*]}"
done
chosen() { [[ ",$stages," == *",$1,"* ]]; }

# Paths on the command line are relative to where it was typed.
[[ -z $results || $results == /* ]] || results=$PWD/$results
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
root=$PWD
results=${results:-${OUT:-$root/benchmarks/results}}
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Matrix products are reproducible only with a workspace of fixed size.
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}
[[ -z $rehearse ]] || export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
began=$SECONDS
left() { echo $((budget - (SECONDS - began))); }

find_tool() {
    command -v "$1" || { [[ -x /usr/local/cuda/bin/$1 ]] && echo "/usr/local/cuda/bin/$1"; } || true
}
sanitizer=$(find_tool compute-sanitizer)
nvcc=${CUDACXX:-$(find_tool nvcc)}
gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

# The other tests need more packages than the kernels. If one is missing, only the kernels are tested.
have() { "$python" -c 'import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, sys.argv[1:])))' "$@" 2>/dev/null; }
tests=(tests/mekernels tests/benchmarks)
if [[ -n $rehearse ]]; then
    tests=(tests/mekernels)
elif have av diffusers torchvision transformers; then
    tests+=(tests/motionenhancer)
fi
# Most of the tests' time is compiling kernels, on the CPU.
workers=()
if [[ -z $rehearse ]] && have xdist; then workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))"); fi
# Without caching every tensor is an allocation of its own, so that reading past its end is seen.
uncached=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1)
native_tests=(tests/mekernels/test_native_*.py)

stamp=$(date -u +%Y%m%d-%H%M%S)
log=$results/gpu-$stamp.log
json=$results/gpu-$stamp.json
lines=$results/gpu-$stamp.jsonl
size=real
[[ -z $rehearse ]] || size=tiny

# Seconds a stage needs at least, and seconds kept back for each stage behind it.
declare -A least=([goals]=30 [build]=5 [tests]=30 [benchmarks]=60 [sanitizer]=30)
declare -A kept=([goals]=0 [build]=40 [tests]=150 [benchmarks]=90 [sanitizer]=60)
limit_of() {
    local reserved=0 later=
    for stage in "${known[@]}"; do
        [[ -n $later ]] && chosen "$stage" && reserved=$((reserved + kept[$stage]))
        [[ $stage == "$1" ]] && later=1
    done
    local limit=$(($(left) - reserved))
    ((limit >= least[$1])) || limit=$(left)
    echo $limit
}

commands_of() { # stage, seconds it may take: one command a line, quoted
    # Compiling and checking what was begun before the deadline takes time behind it.
    local deadline=$(($2 - 60))
    ((deadline > 10)) || deadline=10
    case $1 in
        build)
            quoted env MEKERNELS_NATIVE=1 MEKERNELS_CUDA=$([[ -n $rehearse ]] && echo auto || echo 1) \
                "$python" -m mekernels.build
            quoted "$python" -m mekernels
            ;;
        goals) quoted "$python" benchmarks/goals.py "$lines" --size "$size" --deadline "$deadline" ;;
        tests) quoted "$python" -m pytest -m gpu -q -p no:cacheprovider "${workers[@]}" "${tests[@]}" ;;
        benchmarks)
            quoted "$python" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider \
                --size "$size" --deadline "$deadline" --benchmark-json "$json"
            quoted "$python" benchmarks/report.py "$json"
            ;;
        sanitizer)
            for tool in memcheck racecheck; do
                quoted "${uncached[@]}" "${sanitizer:-compute-sanitizer}" --tool "$tool" \
                    --target-processes all --report-api-errors no --error-exitcode 99 \
                    "$python" -m pytest -m gpu -q -p no:cacheprovider "${native_tests[@]}"
            done
            ;;
    esac
}
quoted() { printf '%q ' "$@"; echo; }

if [[ -n $dry_run ]]; then
    echo "dry run: nothing is executed; budget $budget s; results would be $lines"
    gpu || echo "missing here: a GPU that torch sees"
    [[ -n $nvcc ]] || echo "missing here: nvcc"
    [[ -n $sanitizer ]] || echo "missing here: compute-sanitizer"
    ((${#tests[@]} > 2)) || echo "missing here: diffusers, av or torchvision; only ${tests[*]} would be tested"
    began=$SECONDS
    for stage in "${known[@]}"; do
        chosen "$stage" || continue
        limit=$(limit_of "$stage")
        echo "[$stage] at most $limit s"
        commands_of "$stage" "$limit" | sed 's/^/    /'
    done
    exit 0
fi

[[ -n $rehearse ]] || gpu || { echo "error: torch sees no GPU here; try --dry-run or --rehearse" >&2; exit 2; }
mkdir -p "$results" || exit 2
: >"$log" || exit 2
failed=0
note() { "$python" benchmarks/record_check.py "$lines" "$@"; }

record() { # stage, outcome, seconds, why
    note stage "$1" "$2" "$3" "$4" || failed=1
    echo "[$1] $2 after $3 s${4:+: $4}" | tee -a "$log"
    [[ $2 == passed ]] || failed=1
}

run_stage() {
    local stage=$1 start=$SECONDS limit code=0 why=
    limit=$(limit_of "$stage")
    if ((limit < least[$stage])); then
        record "$stage" "did not fit" 0 "$(left) s of the budget were left, it needs ${least[$stage]}"
        return
    fi
    if [[ $stage == sanitizer && -z $sanitizer ]]; then
        record "$stage" failed 0 "compute-sanitizer is not installed; leave the stage out with --stages"
        return
    fi
    echo "[$stage] at most $limit s"
    while IFS= read -r command; do
        local rest=$((limit - (SECONDS - start)))
        if ((rest < 2)); then
            why="${why:+$why; }did not fit: $command"
            continue
        fi
        echo "\$ $command"
        local before
        before=$(wc -c <"$log")
        # An interrupt lets pytest say what it had reached.
        eval "timeout --signal=INT --kill-after=15 $rest $command" 2>&1 </dev/null | tee -a "$log"
        code=${PIPESTATUS[0]}
        if ((code == 124 || code == 137)); then
            why="${why:+$why; }stopped at its limit: $command"
        elif ((code)); then
            why="${why:+$why; }status $code: $command"
        elif [[ $stage == tests ]] && ! grep -qE '[0-9]+ passed' < <(tail -c "+$((before + 1))" "$log"); then
            why="${why:+$why; }no test passed, all were skipped: $command"
        fi
    done < <(commands_of "$stage" "$limit")
    record "$stage" "$([[ -z $why ]] && echo passed || echo failed)" $((SECONDS - start)) "$why"
}

note machine || failed=1
for stage in "${known[@]}"; do
    if chosen "$stage"; then run_stage "$stage"; else echo "[$stage] not chosen"; fi
done

((${#tests[@]} > 2)) || echo "not tested: tests/motionenhancer, as diffusers, av or torchvision is missing"
note summary
echo "results: $lines $log$([[ -e $json ]] && echo " $json")"
if [[ -n ${OUT:-} && -d ${OUT:-} && $(realpath "$OUT") != "$(realpath "$results")" ]]; then
    cp "$results/gpu-$stamp".* "$OUT"/
fi
echo "$((SECONDS - began)) s of $budget s; $( ((failed)) && echo FAILED || echo passed)"
exit $failed
