"""Reference log-probabilities, computed once per row and refused for any other inputs.

    <root>/<identity, 16 digits>/identity.json   everything that the values depend on
    <root>/<identity>/shards/*.safetensors       rows, identified by the hash of their content
    <root>/<identity>/manifest.json              written last: every shard with its hash
    <root>/<identity>/build.lock                 locked during a build

A row is identified by its content, never by its position, so a dataset may be reordered, filtered
or repeated. docs/guides/cache.md lists the guarantees.
"""

from realign.modeling.identity import (
    Identity,
    identity_differences,
    identity_folder,
)
from realign.reference.build import build_cache
from realign.reference.read import read_cache
from realign.reference.reference import BatchVariance, CacheReference
from realign.reference.scoring import Scorer, Scoring
from realign.runtime.ranks import Ranks

__all__ = [
    "BatchVariance",
    "CacheReference",
    "Identity",
    "Ranks",
    "Scorer",
    "Scoring",
    "build_cache",
    "identity_differences",
    "identity_folder",
    "read_cache",
]
