#!/usr/bin/env bash
# Trains a translator from only this clone and a Debian mirror: program messages in German; a small decoder, trained to
# generate them after the English ones; and chrF and BLEU on messages of unseen families, compared with copying the
# source and with the translation of the most similar training message. It takes about 30 minutes of CPU time, 15 on
# each of two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment ""
python -c "import sacrebleu" 2>/dev/null || python -m pip install -q "sacrebleu>=2.4"

data=runs/translation-data
if [ ! -f $data/valid.jsonl ]; then
    python tools/collect_catalogues.py --language de --output $data
fi
if [ ! -f $data/tokenizer/tokenizer.json ]; then
    python tools/train_tokenizer.py --input $data/text.jsonl --vocab-size 2048 --output $data/tokenizer
fi
for part in train valid; do
    if [ ! -f $data/$part.idx ]; then
        python tools/preprocess_data.py --pairs --input $data/$part.jsonl --tokenizer $data/tokenizer \
            --output $data/$part
    fi
done
head -n 500 $data/valid.jsonl >$data/test.jsonl

deepspeed --num_gpus 2 --master_port "$(free_port)" launcher/pretrain.py \
    --deepspeed_config ds_configs/translation.json
python tools/nearest_translations.py --train $data/train.jsonl --test $data/test.jsonl
for beams in "" "--beams 4"; do
    written=runs/translation/translations${beams:+-beams}.jsonl
    rm -f $written
    deepspeed --num_gpus 2 --master_port "$(free_port)" launcher/evaluate.py --checkpoint runs/translation \
        --translations $data/test.jsonl $beams --micro-batch-size 32 --write $written | grep '^{'
done
