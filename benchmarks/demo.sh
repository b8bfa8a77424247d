#!/usr/bin/env bash
# The whole way on the embedded pipeline: quantize, evaluate, compare, look. Run by `make demo`. Fine-tuning is cut short here.
set -euo pipefail
DMQUANT=${DMQUANT:-dmquant}
OUT=${OUT:-runs/demo}
NUM_IMAGES=${NUM_IMAGES:-500}
LSQ=$OUT/lsq-w4a8
BINARY=$OUT/binarydm-w1a4

run() { printf '\n$ dmquant %s\n' "$*" >&2; "$DMQUANT" "$@"; }

mkdir -p "$OUT"
run quantize --method lsq --wbits 4 --abits 8 --max-steps 100 --set trajectories=128 -o "$LSQ" --force
run quantize --method binarydm --wbits 1 --abits 4 --max-steps 260 --set trajectories=128 -o "$BINARY" --force
run eval --fid --num-images "$NUM_IMAGES" -o "$OUT/float"
run eval "$LSQ" --fid --psnr --num-images "$NUM_IMAGES"
run eval "$BINARY" --fid --psnr --num-images "$NUM_IMAGES"
run sample embedded -n 16 --beside "$LSQ" --beside "$BINARY" -o "$OUT/samples.png"
run compare "$OUT/float" "$LSQ" "$BINARY"
run compare "$OUT/float" "$LSQ" "$BINARY" --format md > "$OUT/comparison.md"

printf '\nFiles written:\n'
for file in "$LSQ/" "$BINARY/" "$OUT/float/report.json" "$LSQ/report.json" "$BINARY/report.json" \
    "$OUT/samples.png" "$OUT/comparison.md"; do
    printf '  %s\n' "$file"
done
