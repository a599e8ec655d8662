#!/usr/bin/env bash
# From a fresh clone to a trained model: environment, corpus, tokenizer, training on pipe 2 × tensor 2 × data 2
# (8 ranks), a validation loss and a sample. What stands from an earlier start is used again.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment ""

data=runs/quickstart-data
run=runs/quickstart
if [ ! -f $data/train.jsonl ] || [ ! -f $data/valid.jsonl ]; then
    python tools/collect_sources.py --output $data
fi
if [ ! -f $data/tokenizer/tokenizer.json ]; then
    echo "== training a tokenizer of 2,048 pieces"
    python tools/train_tokenizer.py --input $data/train.jsonl --vocab-size 2048 --output $data/tokenizer
fi
for part in train valid; do
    if [ ! -f $data/$part.idx ]; then
        echo "== tokenizing $part"
        python tools/preprocess_data.py --input $data/$part.jsonl --tokenizer $data/tokenizer --output $data/$part \
            --append-eod --workers 2
    fi
done

echo "== training on 8 ranks: pipe 2 × tensor 2 × data 2"
deepspeed --num_gpus 8 --master_port "$(free_port)" launcher/pretrain.py --deepspeed_config ds_configs/quickstart.json 2>&1 |
    grep --line-buffered -v -e '\[INFO\] \[launch.py' -e '\[INFO\] \[runner.py' -e 'fetch_hostfile' -e 'real_accelerator.py'

entropy=$(python tools/unigram_entropy.py $data/valid)
loss=$(grep valid_loss $run/metrics.jsonl | tail -n 1 | sed 's/.*"valid_loss": \([0-9.]*\).*/\1/')
echo "== validation loss $loss nats a token; knowing only how often each token occurs, it would be $entropy"
echo "== a sample, from tensor 2"
deepspeed --num_gpus 2 --master_port "$(free_port)" launcher/generate.py --checkpoint $run --prompt "    def __init__(self, " --max-new-tokens 80 \
    --temperature 0.7 megalite.parallel.tensor=2 | grep '^{'
echo "== the run is in $run: config.json, metrics.jsonl, checkpoints/, tensorboard/"
