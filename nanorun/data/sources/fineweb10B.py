"""FineWeb, the 10 billion token sample, as GPT-2 tokens: what the NanoGPT speedruns train on.

103 training shards of 100 million tokens and one for validation, each 200,001,024 bytes, from the dataset
`kjj0/fineweb10B-gpt2` on the hub; modded-nanogpt's `data/cached_fineweb10B.py` fetches the same. The text is Hugging
Face's FineWeb (ODC-BY 1.0). The commit is the one that public code which pins it has agreed on; the two sha256 below
are in public code too (several evaluation harnesses of the speedrun carry them).
"""

from __future__ import annotations

from nanorun.data.hub_shards import HubShards

CORPUS = HubShards(
    "fineweb10B",
    "kjj0/fineweb10B-gpt2",
    "fineweb",
    pinned="889765ea1f903759787add96995d81171b632d0c",
    known={
        "fineweb_val_000000.bin": "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640",
        "fineweb_train_000001.bin": "771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e",
    },
    SUMMARY="FineWeb 10B as GPT-2 shards from the hub, at a pinned commit (--shards N, default 9; 103 are 20.8 GB)",
)
