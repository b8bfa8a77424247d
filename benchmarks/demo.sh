#!/usr/bin/env bash
# The whole way on the embedded pipeline: quantize, evaluate, compare, look. Run by `make demo`.
set -euo pipefail
DMQUANT=${DMQUANT:-dmquant}
OUT=${OUT:-runs/demo}
NUM_IMAGES=${NUM_IMAGES:-500}

run() { printf '\n$ dmquant %s\n' "$*" >&2; "$DMQUANT" "$@"; }

mkdir -p "$OUT"
run quantize --method lsq --wbits 4 --abits 8 -o "$OUT/lsq-w4a8" --force
run eval --fid --num-images "$NUM_IMAGES" -o "$OUT/float"
run eval "$OUT/lsq-w4a8" --fid --psnr --num-images "$NUM_IMAGES"
run sample embedded -n 16 --beside "$OUT/lsq-w4a8" -o "$OUT/samples.png"
run compare "$OUT/float" "$OUT/lsq-w4a8"
run compare "$OUT/float" "$OUT/lsq-w4a8" --format md > "$OUT/comparison.md"

printf '\nFiles written:\n'
for file in "$OUT/lsq-w4a8/" "$OUT/float/report.json" "$OUT/lsq-w4a8/report.json" "$OUT/samples.png" "$OUT/comparison.md"; do
    printf '  %s\n' "$file"
done
