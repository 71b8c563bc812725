"""How much the samples of a prompt differ: backpropagation can collapse them to one image."""

import numpy as np
from jaxtyping import Float, Int


def mean_distances(
    embeddings: Float[np.ndarray, "n d"], prompts: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """The mean of 1 - cosine from each sample's embedding to those of its prompt's other samples.

    Args:
        embeddings: of any length above 0.
        prompts: which prompt each sample is of.

    Returns:
        NaN for the only sample of a prompt. The mean over all is the mean pairwise distance.
    """
    directions = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    distances = np.full(len(prompts), np.nan, np.float32)
    for prompt in np.unique(prompts):
        rows = np.flatnonzero(prompts == prompt)
        if len(rows) > 1:
            cosines = directions[rows] @ directions[rows].T
            # A sample's distance to itself is 0, and counts for nobody.
            distances[rows] = (1 - cosines).sum(-1) / (len(rows) - 1)
    return distances
