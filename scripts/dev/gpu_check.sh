#!/usr/bin/env bash
# The checks of the CUDA kernels on a machine with a GPU: tests, sanitizers, a short training run, benchmarks.
#
#   bash scripts/dev/gpu_check.sh                               all parts, in at most LIMIT seconds (default 460)
#   PARTS="bench step" LIMIT=300 bash scripts/dev/gpu_check.sh  some parts
#   OUT=folder bash scripts/dev/gpu_check.sh                    where the logs go (default runs/gpu_check)
#   JOBS=4 bash scripts/dev/gpu_check.sh                        tests and sanitizers at once (default 6)
#   PYTHON=python3 bash scripts/dev/gpu_check.sh                use this Python, which has CuPy and the test packages
#
# Parts, in this order:
#   install     a virtual environment with minilm, CuPy and the test packages (skipped if PYTHON is set)
#   env         versions, the device, and whether the emulator runs
#   tests       pytest -m gpu, one process for each file: after an illegal address every later kernel of a process fails
#   sanitizer   compute-sanitizer (memcheck, racecheck, synccheck, initcheck) on every kernel, if it is installed
#   assistant   all training stages on the GPU, scripts/assistant.py --scale 0.05
#   bench       the time of the kernels against PyTorch, Liger and plain CuPy (those that are installed)
#   step        training steps against PyTorch, steps of DPO and RLOO against TRL, sampling (those that are installed)
#   report      registers, spills and occupancy of every kernel for the architecture of this device
#
# tests, sanitizer and assistant run at once, and end after 170 s, or after all of LIMIT if nothing is timed; bench and
# step run alone, because they are timed. Their results are also in OUT as JSON; those of bench belong into
# scripts/bench/measured/ (see scripts/dev/kernel_bounds.py). A part that fails or runs out of time does not stop the
# others. The summary is printed last. Exit status 1 if a part failed, 2 with one line of error if a part or a number is
# wrong. The settings of the device are not changed.
set -u
cd "$(dirname "$0")/../.."
OUT=${OUT:-runs/gpu_check}
LIMIT=${LIMIT:-460}
JOBS=${JOBS:-6}
ALL="install env tests sanitizer assistant bench step report"
PARTS=${PARTS-$ALL}
fail() { echo "error: $1" >&2; exit 2; }
[ $# = 0 ] || fail "$*: no arguments, but the variables PARTS, LIMIT, OUT, JOBS and PYTHON; see the first lines of this script"
[[ $LIMIT =~ ^[0-9]{1,6}$ ]] || fail "LIMIT=$LIMIT must be a whole number of seconds"
[[ $JOBS =~ ^[1-9][0-9]?$ ]] || fail "JOBS=$JOBS must be a whole number from 1 to 99"
for part in $PARTS; do [[ " $ALL " = *" $part "* ]] || fail "PARTS: no part $part; there are $ALL"; done
mkdir -p "$OUT" 2>/dev/null && OUT=$(cd "$OUT" && pwd) || fail "OUT=$OUT cannot be a folder for the logs"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
summary=$OUT/summary.txt
: >"$summary"
python=${PYTHON:-$work/venv/bin/python}
export PYTHONUNBUFFERED=1 CUPY_CACHE_DIR=$work/cupy OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1

wanted() { case " $PARTS " in *" $1 "*) true ;; *) false ;; esac; }
remaining() { echo $((LIMIT - SECONDS)); }

# check NAME SECONDS COMMAND...: runs it with a time limit, output into NAME.log, one line into the summary.
check() {
    local name=$1 most=$2 began=$SECONDS status outcome=ok
    shift 2
    [ "$most" -gt "$(remaining)" ] && most=$(remaining)
    if [ "$most" -lt 5 ]; then echo "$name: not run, no time left" >>"$summary"; return; fi
    timeout -k 5 "$most" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    [ $status = 0 ] || outcome="FAILED with status $status"
    [ $status = 124 ] || [ $status = 137 ] && outcome="FAILED, out of time after $most s"
    # Without a GPU the tests are skipped and the benchmarks only count bytes: neither is a success here.
    [ $status = 0 ] && grep -qE "^Not timed|[0-9]+ skipped" "$OUT/$name.log" && outcome="FAILED, needs a GPU: see $name.log"
    echo "$name: $outcome, $((SECONDS - began)) s" | tee -a "$summary"
}

# together NAME SECONDS COMMAND...: check in the background, at most JOBS at once, until the deadline of these parts.
together() {
    local left name=$1 most=$2
    shift 2
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n; done
    left=$((deadline - SECONDS))
    check "$name" $((most < left ? most : left)) "$@" &
}

if wanted install && [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$work/venv"
    check install 400 "$python" -m pip install --quiet --disable-pip-version-check -e '.[run,test,gpu,kernels]'
fi
# Without an installation the package minilm.kernels is the folder kernels/: links make both importable.
mkdir -p "$work/site/minilm"
for path in minilm/*; do ln -s "$PWD/$path" "$work/site/minilm/"; done
ln -s "$PWD/kernels" "$work/site/minilm/kernels"
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}

cat >"$work/env.py" <<'PROGRAM'
import importlib.metadata
import platform
import shutil

print("Python", platform.python_version())
for name in ("numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "liger-kernel", "pytest", "hypothesis",
             "nvidia-cuda-nvrtc"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
print({tool: bool(shutil.which(tool)) for tool in ("g++", "nvcc", "compute-sanitizer")})
from minilm.kernels import emulator  # noqa: E402

print("emulator:", emulator.available() or "available")
import cupy  # noqa: E402

device = cupy.cuda.runtime.getDeviceProperties(0)
print("device:", device["name"].decode(), "multiprocessors", device["multiProcessorCount"], "compute capability",
      f"{device['major']}.{device['minor']}", "driver", cupy.cuda.runtime.driverGetVersion())
PROGRAM
cat >"$work/sanitized.py" <<'PROGRAM'
import importlib

import cupy
import numpy as np

cupy.cuda.set_allocator(None)               # without CuPy's pool the sanitizer sees the end of every array
SIZES = {"attention": [{}, {"T": 131, "K": 128, "G": 1}, {"T": 65, "K": 64, "dtype": "float64"}],
         "attention_bf16": [{}, {"T": 131, "K": 128}, {"T": 200, "K": 64, "H": 4, "G": 2}],
         "decode": [{}, {"T": 300, "K": 128, "H": 8, "G": 1}, {"T": 300, "dtype": "bfloat16"}], "log_probs": [{}, {"V": 5003}],
         "sampling": [{}, {"V": 5003, "dtype": "float64"}],
         "fused": [{}, {"N": 37, "D": 768, "F": 260, "K": 64, "P": 100003}],
         "fused_bf16": [{}, {"N": 37, "D": 768, "F": 264, "K": 64}],
         "sums_by_index": [{}, {"N": 3001, "D": 300}],
         "smear": [{}, {"N": 5001, "K": 64}, {"N": 300, "dtype": "bfloat16"}]}
for name, cases in SIZES.items():
    for sizes in cases:
        importlib.import_module(f"minilm.kernels.{name}").example(cupy, np.random.default_rng(0), **sizes)
cupy.cuda.Device().synchronize()
PROGRAM

wanted env && check env 60 "$python" "$work/env.py"
deadline=$LIMIT
if wanted bench || wanted step; then deadline=$((SECONDS + 170)); fi
wanted assistant && together assistant 300 "$python" scripts/assistant.py --device gpu --scale 0.05 --out "$work/assistant"
if wanted tests; then
    for name in emulator_against_gpu attention_kernel attention_bf16 decode_kernel log_probs_kernel sampling_kernel fused_kernels fused_bf16 gemm sums_by_index smear_kernel work launch_limits late mixed_precision mixed_decoding mixed_lora tf32 einsum device; do
        together "test_$name" 300 "$python" -m pytest -m gpu -q -rs --maxfail 20 --tb short -p no:cacheprovider \
            "tests/test_$name.py"
    done
fi
if wanted sanitizer; then
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck initcheck; do
            together "$tool" 200 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" "$work/sanitized.py"
        done
    else
        echo "sanitizer: not run, compute-sanitizer is not installed" | tee -a "$summary"
    fi
fi
wait
timed() { check "$1" "$2" "$python" "scripts/bench/$1.py" --device gpu --rounds 5 --json "$OUT/$1.json" "${@:3}"; }
if wanted bench; then
    check attention 60 "$python" scripts/bench/attention.py --lengths 2048,8192 --json "$OUT/attention.json"
    check log_probs 60 "$python" scripts/bench/log_probs.py --vocabularies 50257 --json "$OUT/log_probs.json"
fi
if wanted step; then
    timed train 120
    timed objectives 150 --works dpo,rloo --compute bfloat16
    timed generate 90 --sizes B32
fi
if wanted report; then
    arch=$(sed -n 's/.*compute capability \([0-9]*\)\.\([0-9]\).*/\1\2/p' "$OUT/env.log" 2>/dev/null)
    check report 200 "$python" scripts/dev/kernel_report.py --arch "${arch:-80}"
fi

# At most 11.5 KB, the outcomes of the parts last.
echo
{
    echo "Logs: $OUT"
    grep -h "^device:\|^emulator:" "$OUT/env.log"
    grep -hE "^(FAILED|ERROR) |^[0-9]+ (passed|failed|skipped)" "$OUT"/test_*.log | head -40
    for name in attention log_probs train objectives generate; do
        grep -hE "^(T|V) = |^\| minilm|of the speed of|^failed: |^error: |does not (run|fit)" "$OUT/$name.log"
        # The table at the end has all comparisons; each was also printed when it was made.
        grep -hE "^\| [a-zA-Z ]+, (float32|bf16) \|" "$OUT/$name.log" | awk '!seen[$0]++'
    done
} 2>/dev/null | cut -c1-150 | head -c 8500
echo
cat "$summary"
! grep -q FAILED "$summary"
