#!/usr/bin/env bash
# Everything that wants a GPU, in one call:  benchmarks/gpu.sh OUT [PEAK]
#
# OUT is a folder for the tables, PEAK the device's bfloat16 TFLOP/s (989 for an H100 or H200).
# Needs the package with a GPU build of the backends named in BACKENDS ("jax torch"). About half an
# hour; each part writes its own file, so one that fails leaves the others.
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT [PEAK]} peak=${2:-989}
cd "$(dirname "$0")"
mkdir -p "$out"
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_FORCE_GPU_ALLOW_GROWTH=true
contenders=() samplers=()
for backend in ${BACKENDS:-jax torch}; do
    contenders+=("keras-$backend") samplers+=("keras-$backend")
done

step() {
    local name=$1
    shift
    python train_step.py --dtypes bfloat16 --steps 10 --turns 5 --device-tflops "$peak" \
        --contenders "$@" >"$out/train_step-$name.txt" 2>"$out/train_step-$name.err"
}
step S "${contenders[@]}" torch-compile dit --sizes S/2 --batch-sizes 32 128 512
step L "${contenders[@]}" torch-compile dit --sizes L/2 --batch-sizes 32 128
step H "${contenders[@]}" torch-compile --sizes H/2 --batch-sizes 16 64
step L-remat "${contenders[@]}" --sizes L/2 --batch-sizes 128 --remat
step H-remat "${contenders[@]}" --sizes H/2 --batch-sizes 64 128 --remat
for size in S/2 L/2; do
    python generate.py --size $size --dtype bfloat16 --contenders "${samplers[@]}" torch-compile \
        >"$out/generate-${size%/*}.txt" 2>"$out/generate-${size%/*}.err"
done
grep -h '^|' "$out"/*.txt
