#!/usr/bin/env bash
# Trains a topic classifier from only this clone and a Debian mirror: WordNet's glosses in eight topics, a small decoder
# with a classification head on the last token, and its accuracy on unseen glosses. In launcher/classify.sh the decoder
# generates the topic instead.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment ""

data=runs/topics-data
config=ds_configs/topics.json
classes="act animal artifact communication food location person plant"
mkdir -p $data
if [ ! -f $data/wordnet/usr/share/wordnet/data.noun ]; then
    (cd $data && apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet)
fi
python tools/collect_glosses.py --labels --wordnet $data/wordnet/usr/share/wordnet --output $data
if [ ! -f $data/tokenizer/tokenizer.json ]; then
    python tools/train_tokenizer.py --input $data/train.jsonl --vocab-size 4096 --output $data/tokenizer
fi
for part in train valid; do
    if [ ! -f $data/$part.idx ]; then
        python tools/preprocess_data.py --label-key label --classes $classes --append-eod \
            --input $data/$part.jsonl --tokenizer $data/tokenizer --output $data/$part
    fi
done

deepspeed --num_gpus 2 --master_port "$(free_port)" launcher/pretrain.py --deepspeed_config $config
deepspeed --num_gpus 2 --master_port "$(free_port)" launcher/evaluate.py --checkpoint runs/topics --data $data/valid \
    megalite.parallel.tensor=2 | grep '^{'
rm -rf runs/topics-exported
python tools/export_hf.py --checkpoint runs/topics --output runs/topics-exported
