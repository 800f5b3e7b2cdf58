#!/usr/bin/env bash
# Prints everything that a GPU tells about hf-tract, in less than 8 minutes, and writes it to a folder.
#
#     bash benchmarks/gpu_report.sh [FOLDER] [--smoke]
#
# FOLDER, outputs/gpu_report by default, gets report.txt (all that is printed), gpu_checks.json, overhead.jsonl (each
# turn), overhead.json (estimates and verdicts) and overhead.png. What FOLDER has of an earlier report is replaced. A
# part that fails or takes too long does not stop the others; the last lines name it, and the exit code is then 1.
# --smoke runs tiny sizes on the CPU, to try this script. PYTHON names the interpreter, python3 by default.
set -uo pipefail

folder=outputs/gpu_report
smoke=
for argument in "$@"; do
    case $argument in
    --smoke) smoke=1 ;;
    -*)
        echo "$argument: the only option is --smoke; a folder may stand beside it." >&2
        exit 2
        ;;
    *) folder=$argument ;;
    esac
done
mkdir -p "$folder" || exit 2
folder=$(realpath "$folder")
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
report=$folder/report.txt
: >"$report"
rm -f "$folder/overhead.jsonl"

tell() {
    echo "$*" | tee -a "$report"
}

# Runs a command for at most so many seconds, and remembers it where it fails.
failed=()
part() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    tell ""
    tell "== $name, at most $limit s"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$report"
    local code=${PIPESTATUS[0]}
    tell "== $name took $((SECONDS - start)) s"
    case $code in
    0) ;;
    124 | 137) failed+=("$name: not done in $limit s") ;;
    *) failed+=("$name: exit code $code") ;;
    esac
}

# A bound that is broken gives the exit code 1, and one of which it cannot be said 2.
overhead() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m benchmarks.overhead --output_dir "$folder" --check "$@"
}

describe='import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.is_available())'
checks=("$python" -m benchmarks.gpu_checks --output_dir "$folder")
if [ "$smoke" ]; then
    tiny=(--device cpu --models "ViT @32" --batch 2 --repeats 7 --warmup 0 --max_minutes 0.01)
    part environment 60 "$python" -c "$describe"
    part checks 300 "${checks[@]}" --device cpu --forms eager --stems "ViT 4x4/4"
    overhead eager 300 "${tiny[@]}" --precision bf16 --scopes layer --no_memory
    overhead float32 300 "${tiny[@]}" --scopes layer
else
    # The limits come to less than 8 minutes; --max_minutes lets each part end by itself before its own.
    gpu=(--device cuda --repeats 7)
    order=("ViT-S/16" "ResNet-50" "ViT @32" "ResNet-18 @32" "ConvNeXt-T" "ViT-B/32" "ViT-B/16" "Swin-T")
    command -v nvidia-smi >/dev/null && part card 10 nvidia-smi
    part environment 20 "$python" -c "$describe"
    overhead "eager, bf16" 175 "${gpu[@]}" --precision bf16 --models "${order[@]}" --max_minutes 2.2
    part checks 130 "${checks[@]}" --device cuda
    overhead "compiled, bf16" 85 "${gpu[@]}" --precision bf16 --compile --models "ViT @32" "ViT-S/16" --max_minutes 0.5
    overhead "float32" 55 "${gpu[@]}" --models "ViT @32" "ViT-S/16" --max_minutes 0.4
fi

tell ""
tell "Written to $folder after $SECONDS s."
if [ ${#failed[@]} -gt 0 ]; then
    tell "Failed:"
    for each in "${failed[@]}"; do
        tell "  $each"
    done
    exit 1
fi
tell "Every part passed."
