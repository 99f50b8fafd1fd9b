#!/usr/bin/env bash
# The demo from a fresh clone: install, cut photographs, pre-train without labels, fine-tune on 20 labels per class, and
# train the same network from random weights, once as long as the fine-tuning and once three times as long.
# Takes about 5 minutes on 2 CPU cores after the install.
#   bash scripts/run_demo.sh [SEED] [swin|vit] [METHOD ...]
# NETWORK is swin unless stated; METHOD is fastmim unless stated. With swin, "fastmim simmim" compares two methods.
# Output goes to runs/demo-<time>, with report.html in it. The last line is
#   demo: top1 pretrained=XX.X scratch=XX.X      (for several methods METHOD=XX.X ... scratch=XX.X)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seed=${1:-0}
network=${2:-swin}
methods=("${@:3}")
[ ${#methods[@]} -gt 0 ] || methods=(fastmim)
for method in "${methods[@]}"; do
    if [ ! -f "config/demo/${network}_${method}_pretrain.yaml" ]; then
        echo "error: no demo of $method with $network; write for example: bash scripts/run_demo.sh 0 swin fastmim" >&2
        exit 2
    fi
done
if [[ ! $seed =~ ^[0-9]+$ ]]; then
    echo "error: SEED: $seed is not a whole number; write for example: bash scripts/run_demo.sh 0" >&2
    exit 2
fi

source scripts/environment.sh
use_environment .venv-demo requirements.txt requirements-demo.txt
out=runs/demo-$(date +%Y%m%d-%H%M%S)
start=$SECONDS
python scripts/prepare_demo.py --out data/demo

finetune=(python train.py --config "config/demo/${network}_finetune.yaml" seed="$seed")
for method in "${methods[@]}"; do
    python train.py --config "config/demo/${network}_${method}_pretrain.yaml" seed="$seed" \
        output="$out/$method-pretrain"
    "${finetune[@]}" --init-from "$out/$method-pretrain/last.ckpt" output="$out/$method"
    python eval.py --ckpt "$out/$method/last.ckpt"
    python export.py --ckpt "$out/$method/last.ckpt"
done
"${finetune[@]}" output="$out/scratch"
"${finetune[@]}" train.epochs=90 train.warmup_epochs=9 output="$out/scratch-long"

echo "pictures: $out/*-pretrain/gallery/ and curves.png; demo took $((SECONDS - start)) s after the install"
python scripts/demo_report.py "$out"
