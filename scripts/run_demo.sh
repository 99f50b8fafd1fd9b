#!/usr/bin/env bash
# The demo from a fresh clone: install, crop photographs, pre-train, fine-tune, compare with training from scratch,
# evaluate, export. It takes a few minutes on 2 CPU cores after the install.
#   bash scripts/run_demo.sh [SEED] [vit|swin]
# vit (default) pre-trains with FastMIM, swin with FastMIM and with SimMIM. Output goes to runs/demo-<time>. The last
# line is  demo: top1 pretrained=XX.X scratch=XX.X  (for swin: fastmim=XX.X simmim=XX.X scratch=XX.X)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
use_environment .venv-demo requirements.txt requirements-demo.txt

seed=${1:-0}
network=${2:-vit}
case $network in
    vit) methods=(fastmim) ;;
    swin) methods=(fastmim simmim) ;;
    *)
        echo "error: there is no demo for $network; write vit or swin" >&2
        exit 2
        ;;
esac
out=runs/demo-$(date +%Y%m%d-%H%M%S)
start=$SECONDS
python scripts/prepare_demo.py --out data/demo

for method in "${methods[@]}"; do
    python train.py --config "config/demo/${network}_${method}_pretrain.yaml" seed="$seed" \
        output="$out/$method-pretrain"
    python train.py --config "config/demo/${network}_finetune.yaml" --init-from "$out/$method-pretrain/last.ckpt" \
        seed="$seed" output="$out/$method"
    python eval.py --ckpt "$out/$method/last.ckpt"
    python export.py --ckpt "$out/$method/last.ckpt"
done
python train.py --config "config/demo/${network}_finetune.yaml" seed="$seed" output="$out/scratch"

echo "pictures: $out/*-pretrain/gallery/ and curves.png; demo took $((SECONDS - start)) s after the install"
python scripts/demo_report.py "$out"
