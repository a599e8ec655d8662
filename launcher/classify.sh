#!/usr/bin/env bash
# Trains a classifier from only this clone and a Debian mirror: WordNet's glosses, each with its topic as the
# completion; a small model whose loss counts only the topics, on tensor 2, and its accuracy on unseen glosses.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment ""

data=runs/classify-data
run=runs/classify
mkdir -p $data
if [ ! -f $data/wordnet/usr/share/wordnet/data.noun ]; then
    (cd $data && apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet)
fi
if [ ! -f $data/valid.jsonl ]; then
    python tools/collect_glosses.py --wordnet $data/wordnet/usr/share/wordnet --output $data
fi
if [ ! -f $data/tokenizer/tokenizer.json ]; then
    python tools/train_tokenizer.py --input $data/train.jsonl --text-key prompt --vocab-size 4096 --output $data/tokenizer
fi
for part in train valid; do
    if [ ! -f $data/$part.idx ]; then
        python tools/preprocess_data.py --chat --input $data/$part.jsonl --tokenizer $data/tokenizer --output $data/$part
    fi
done

deepspeed --num_gpus 2 --master_port "$(free_port)" launcher/pretrain.py --deepspeed_config ds_configs/classify.json
deepspeed --num_gpus 2 --master_port "$(free_port)" launcher/evaluate.py --checkpoint $run --labelled $data/valid.jsonl \
    --micro-batch-size 64 megalite.parallel.tensor=2 | grep '^{'
