"""MiniLM as every peer runs it: transformers' forward on one torch thread, a padded batch at a time."""

from collections.abc import Sequence

import numpy as np
import torch
from bare_weights import folder
from transformers import AutoModel, AutoTokenizer


class MiniLM:
    """all-MiniLM-L6-v2: mean over the tokens, length 1."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(folder())
        self._model = AutoModel.from_pretrained(folder(), add_pooling_layer=False, attn_implementation="sdpa").eval()
        self.embed(["warm"] * 32)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return float32 [n, 384]."""
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
            return torch.nn.functional.normalize(mean).numpy()
