"""A model in a loop, without a server: its vectors, and what it gives at batch 1, 8 and 32.

Usage: bare.py answers TEXTS.json VECTORS.npy
       bare.py torch TEXTS.json SECONDS
       bare.py roundhouse TEXTS.json SECONDS CACHE_FOLDER
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path


def rates(embed, texts, seconds):
    for size in (1, 8, 32):
        batches = itertools.cycle([texts[at : at + size] for at in range(0, len(texts) - size + 1, size)])
        embed(next(batches))
        took, cpu, end = [], time.process_time(), time.perf_counter() + seconds
        while time.perf_counter() < end or len(took) < 3:
            start = time.perf_counter()
            embed(next(batches))
            took.append(time.perf_counter() - start)
        items = size * len(took)
        print(
            json.dumps(
                {
                    "batch": size,
                    "rate": items / sum(took),
                    "p50_ms": statistics.median(took) * 1e3,
                    "cpu_ms": (time.process_time() - cpu) * 1e3 / items,
                }
            )
        )


def roundhouse(cache):
    from bare_weights import folder

    from serve.models.base import LoadContext
    from serve.models.text_embedding import TextEmbedding
    from serve.spec import EmbeddingOptions

    model = TextEmbedding()
    model.load(
        LoadContext(
            folder=folder(),
            options=EmbeddingOptions(),
            device="cpu",
            dtype="float32",
            threads=1,
            max_batch_size=32,
            cache_dir=Path(cache),
            progress=lambda what, done, total: None,
        )
    )
    return lambda texts: model.predict([model.prepare({"text": text}) for text in texts])


if __name__ == "__main__":
    mode, texts, *rest = sys.argv[1:]
    loaded = json.loads(Path(texts).read_text())
    if mode == "roundhouse":
        rates(roundhouse(rest[1]), loaded, float(rest[0]))
    else:
        import numpy as np
        from bare_model import MiniLM

        model = MiniLM()
        if mode == "torch":
            rates(model.embed, loaded, float(rest[0]))
        else:
            np.save(rest[0], np.stack([model.embed([text])[0] for text in loaded]))
