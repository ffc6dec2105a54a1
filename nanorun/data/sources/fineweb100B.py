"""FineWeb, the 100 billion token sample, as GPT-2 tokens.

About 1,030 training shards of 100 million tokens and one for validation, 200 MB each, from the dataset
`kjj0/fineweb100B-gpt2` on the hub; modded-nanogpt's `data/cached_fineweb100B.py` fetches the same. The text is Hugging
Face's FineWeb (ODC-BY 1.0). No public code names a commit of it: the newest at the first preparation is kept to, and
the manifest names it; `--revision` chooses another.
"""

from __future__ import annotations

from nanorun.data.hub_shards import HubShards

CORPUS = HubShards(
    "fineweb100B",
    "kjj0/fineweb100B-gpt2",
    "fineweb",
    SUMMARY="FineWeb 100B as GPT-2 shards, fetched from the hub (--shards N, default 9; all are about 200 GB)",
)
