#!/usr/bin/env bash
# The demo from a bare clone: install, cut photographs, pre-train with FastMIM, fine-tune, compare with training from
# scratch, evaluate, export. A few minutes on 2 CPU cores after the install.
#   bash scripts/run_demo.sh [SEED]
# Output goes to runs/demo-<time>; the last line is  demo: top1 pretrained=XX.X scratch=XX.X
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
use_environment .venv-demo requirements.txt requirements-demo.txt

seed=${1:-0}
out=runs/demo-$(date +%Y%m%d-%H%M%S)
start=$SECONDS
python scripts/prepare_demo.py --out data/demo

python train.py --config config/demo/vit_fastmim_pretrain.yaml seed="$seed" output="$out/pretrain"
python train.py --config config/demo/vit_finetune.yaml --init-from "$out/pretrain/last.ckpt" seed="$seed" \
    output="$out/finetune"
python train.py --config config/demo/vit_finetune.yaml seed="$seed" output="$out/scratch"
python eval.py --ckpt "$out/finetune/last.ckpt"
python export.py --ckpt "$out/finetune/last.ckpt"

echo "pictures: $out/pretrain/gallery/ and $out/pretrain/curves.png; demo took $((SECONDS - start)) s after the install"
python scripts/demo_summary.py "$out"
