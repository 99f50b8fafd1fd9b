#!/usr/bin/env bash
# The demo from a fresh clone: install, cut photographs, pre-train without labels, fine-tune on a few labels per class,
# and train the same network from random weights, once as long as the fine-tuning and once three times as long.
# Takes 2 to 6 minutes on 2 CPU cores after the install, with swin about 12.
#   bash scripts/run_demo.sh [SEED] [vit|swin]
# vit (default) pre-trains with FastMIM at low resolution, swin with FastMIM and with SimMIM. Output goes to
# runs/demo-<time>, with report.html in it. The last line is
#   demo: top1 pretrained=XX.X scratch=XX.X      (for swin: fastmim=XX.X simmim=XX.X scratch=XX.X)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seed=${1:-0}
case ${2:-vit} in
    vit)
        methods=(fastmim) pretrain=vit_%s_48_pretrain finetune=vit_5_labels_finetune
        long=(train.epochs=180 train.warmup_epochs=18)
        ;;
    swin)
        methods=(fastmim simmim) pretrain=swin_%s_pretrain finetune=swin_finetune
        long=(train.epochs=90 train.warmup_epochs=9)
        ;;
    *)
        echo "error: no demo for $2; write vit or swin" >&2
        exit 2
        ;;
esac
if [[ ! $seed =~ ^[0-9]+$ ]]; then
    echo "error: SEED: $seed is not a whole number; write for example: bash scripts/run_demo.sh 0" >&2
    exit 2
fi

source scripts/environment.sh
use_environment .venv-demo requirements.txt requirements-demo.txt
out=runs/demo-$(date +%Y%m%d-%H%M%S)
start=$SECONDS
python scripts/prepare_demo.py --out data/demo

tune=(python train.py --config "config/demo/$finetune.yaml" seed="$seed")
for method in "${methods[@]}"; do
    # shellcheck disable=SC2059 # the pattern is set above
    python train.py --config "config/demo/$(printf "$pretrain" "$method").yaml" seed="$seed" output="$out/$method-pretrain"
    "${tune[@]}" --init-from "$out/$method-pretrain/last.ckpt" output="$out/$method"
    python eval.py --ckpt "$out/$method/last.ckpt"
    python export.py --ckpt "$out/$method/last.ckpt"
done
"${tune[@]}" output="$out/scratch"
"${tune[@]}" "${long[@]}" output="$out/scratch-long"

echo "pictures: $out/*-pretrain/gallery/ and curves.png; the runs took $((SECONDS - start)) s after the install"
python scripts/demo_report.py "$out"
