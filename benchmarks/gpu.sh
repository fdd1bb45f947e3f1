#!/usr/bin/env bash
# Runs all checks that need a CUDA GPU, in about six minutes: benchmarks/gpu.sh
# dtrain need not be installed: the script writes the package metadata through which Python finds the plugins into the
# checkout. PYTHON chooses the interpreter.
# Each check prints its exit code. The script's own exit code is the number of checks that failed.
set -u
cd "$(dirname "$0")/.." || exit 1
unset CI  # where CI is set, the tests fail if FFCV is missing, which a machine with a GPU need not have
python=${PYTHON:-python3}
PYTHONPATH=$PWD:$PWD/plugins:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH PYTHONUNBUFFERED=1
"$python" -c "from setuptools import setup; setup()" -q egg_info
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0

check() {  # check NAME SECONDS COMMAND ...: run COMMAND with a time limit, show its last lines, count a failure
    local name=$1 limit=$2 started=$SECONDS code
    shift 2
    timeout "$limit" "$@" >"$folder/log" 2>&1
    code=$?
    echo "== $name: exit code $code after $((SECONDS - started)) s"
    tail -n "${LINES_SHOWN:-6}" "$folder/log"
    [ "$code" -eq 0 ] || failed=$((failed + 1))
}

train=("$python" -m dtrain train --device cuda --dataset digits --arch allcnn_c)

"$python" -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(), flush=True)"
check "tests" 240 "$python" -m pytest -m gpu -p no:cacheprovider tests
check "a run" 120 "${train[@]}" --epochs 4 --output "$folder/run"
check "eval" 60 "$python" -m dtrain eval "$folder/run" --device cuda
check "replay" 60 "$python" -m dtrain replay "$folder/run" --step 60 --device cuda --out "$folder/pictures"
check "float16, EMA, clipping" 60 "${train[@]}" --steps 40 --amp-dtype float16 --ema 0.99 --output "$folder/half"
check "skip" 60 "${train[@]}" --steps 40 --on-nonfinite skip --output "$folder/skip"
check "muon" 60 "${train[@]}" --opt muon --lr 0.02 --clip-grad 5 --steps 40 --output "$folder/muon"
check "resume" 120 "$python" -m dtrain prove resume --stops 2 -- --device cuda --deterministic --dataset digits \
    --arch allcnn_c --steps 40
check "resume with stages and freezing" 150 "$python" -m dtrain prove resume --stops 2 -- --device cuda --dataset digits \
    --arch allcnn_c --batch-size 32,96@1 --image-size 16,32@1 --epochs 2 --freeze 'layers.0.*@1' --ema 0.9
check "compiled" 120 "${train[@]}" --steps 20 --compile --output "$folder/compiled"
for arch in allcnn_c resnet18; do
    check "speed of $arch" 60 "$python" -m dtrain train --device cuda --dataset synthetic --recipe none --arch $arch \
        --batch-size 512 --steps 300 --lr 0.01 --flip --shift 2 --log-interval 50 --eval-every end --output "$folder/$arch"
    check "bare loop of $arch" 60 "$python" -m dtrain_bench.bare_gpu $arch 512 300
done
exit "$failed"
