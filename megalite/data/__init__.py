"""From text to samples: tokenizers, the indexed format, the order of samples, blends, batches.

Reading order: `indexed.py` (the files), `samples.py` (windows and their order), `blend.py` (which corpus),
`loader.py` (batches for the training loop); `tokenizer.py`, `documents.py` and `preprocess.py` make the files.
"""
