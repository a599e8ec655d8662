"""From text to samples: tokenizers, the indexed format, the order of samples, blends, batches.

Read in this order: `indexed.py` (the files), `samples.py` (windows and their order), `blend.py` (the choice of corpus),
`loader.py` (batches for the training loop). `tokenizer.py`, `documents.py` and `preprocessing.py` create the files.
"""
