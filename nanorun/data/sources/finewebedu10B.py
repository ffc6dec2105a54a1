"""FineWeb-Edu, the 10 billion token sample, as GPT-2 tokens.

99 training shards of 100 million tokens (the last has 53,989,344) and one for validation, 200 MB each, from the dataset
`kjj0/finewebedu10B-gpt2` on the hub, whose files are named `finewebedu_…`; modded-nanogpt's
`data/cached_finewebedu10B.py` fetches the same. The text is Hugging Face's FineWeb-Edu (ODC-BY 1.0). No public code
names a commit of it: the newest at the first preparation is kept to, and the manifest names it; `--revision` chooses
another.
"""

from __future__ import annotations

from nanorun.data.hub_shards import HubShards

CORPUS = HubShards(
    "finewebedu10B",
    "kjj0/finewebedu10B-gpt2",
    "finewebedu",
    SUMMARY="FineWeb-Edu 10B as GPT-2 shards, fetched from the hub (--shards N, default 9; 99 are 19.9 GB)",
)
