#!/usr/bin/env bash
# Trains a sentiment classifier from only this clone and PyPI: sentences that people rated; a small encoder, pretrained
# on the sentences with masked language modelling, then trained on the ratings; and its accuracy on unseen sentences,
# compared with that of the lexicon for which the sentences were collected.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment ""

data=runs/sentiment-data
config=ds_configs/sentiment.json
package=vaderSentiment-3.3.2
mkdir -p $data
if [ ! -d $data/$package ]; then
    (cd $data && python -m pip download -q --no-deps --no-build-isolation --no-binary :all: ${package/-/==} \
        && tar xzf $package.tar.gz)
fi
python tools/collect_sentiment.py --source $data/$package --output $data
if [ ! -f $data/tokenizer/tokenizer.json ]; then
    python tools/train_tokenizer.py --input $data/train.jsonl --model-type wordpiece --lowercase --vocab-size 8192 \
        --output $data/tokenizer
fi
for part in train valid; do
    if [ ! -f $data/$part.idx ]; then
        python tools/preprocess_data.py --cls-sep --label-key label --classes negative positive \
            --input $data/$part.jsonl --tokenizer $data/tokenizer --output $data/$part
    fi
done

train() { deepspeed --num_gpus 2 --master_port "$(free_port)" launcher/pretrain.py --deepspeed_config $config "$@"; }
train megalite.data.objective='{"masked": 0.3}' megalite.train.run_dir=runs/sentiment-words megalite.train.load=null \
    megalite.train.steps=600 megalite.train.eval_steps=20
train
deepspeed --num_gpus 2 --master_port "$(free_port)" launcher/evaluate.py --checkpoint runs/sentiment --data $data/valid \
    megalite.parallel.tensor=2 | grep '^{'
rm -rf runs/sentiment-exported
python tools/export_hf.py --checkpoint runs/sentiment --output runs/sentiment-exported
