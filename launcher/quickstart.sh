#!/usr/bin/env bash
# From a fresh clone to a trained model: environment, corpus, tokenizer, training on pipe 2 × tensor 2 × data 2 (8
# ranks, on the CPU or on 8 GPUs; a smaller grid on fewer), a validation loss and a sample. Files of an earlier start
# are reused.
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

gpus=$(python -c 'from megalite.ranks.devices import visible_gpus; print(visible_gpus())')
read -r ranks pipe tensor <<<"$(quickstart_grid "$gpus")"
if ((gpus == 0)); then
    where=CPU
    export DS_ACCELERATOR=cpu
else
    where=GPUs
fi
data_ranks=$((ranks / pipe / tensor))
echo "== training on $ranks ranks: pipe $pipe × tensor $tensor × data $data_ranks, on the $where"
deepspeed --num_gpus "$ranks" --master_port "$(free_port)" launcher/pretrain.py --deepspeed_config ds_configs/quickstart.json \
    "megalite.parallel.pipe=$pipe" "megalite.parallel.tensor=$tensor" "gradient_accumulation_steps=$((4 / data_ranks))" 2>&1 |
    grep --line-buffered -v -e '\[INFO\] \[launch.py' -e '\[INFO\] \[runner.py' -e 'fetch_hostfile' -e 'real_accelerator.py'

entropy=$(python tools/unigram_entropy.py $data/valid)
loss=$(grep valid_loss $run/metrics.jsonl | tail -n 1 | sed 's/.*"valid_loss": \([0-9.]*\).*/\1/')
echo "== validation loss $loss nats per token; knowing only how often each token occurs, it would be $entropy"
echo "== a sample, from tensor $tensor"
deepspeed --num_gpus "$tensor" --master_port "$(free_port)" launcher/generate.py --checkpoint $run --prompt "    def __init__(self, " --max-new-tokens 80 \
    --temperature 0.7 "megalite.parallel.tensor=$tensor" | grep '^{'
echo "== the run is in $run: report.html, config.json, metrics.jsonl, checkpoints/, tensorboard/"
