"""DenseAttention written token by token, straight from the table of the specification: the yardstick of the tests."""

import torch


def sees(pattern, i, j, window, causal):
    """Whether the token of rank i sees the token of rank j of the same document."""
    if causal and j > i:
        return False
    if pattern == "g":
        return True
    if pattern == "l":
        return j // window == i // window
    if pattern == "sl":
        return (j + window // 2) // window == (i + window // 2) // window
    return i - window < j <= i


def brute_force(query, key, value, pattern, window=None, causal=False, mask=None, segments=None, decay=None):
    """(B, T, H, D) tensors, a loop over pairs of tokens; ranks count real tokens of the same document, by which terms fade."""
    batch, length = query.shape[:2]
    out = torch.zeros_like(query)
    for b in range(batch):
        rank, documents = {}, {}
        for t in range(length):
            if mask is not None and not mask[b, t]:
                continue
            document = 0 if segments is None else int(segments[b, t])
            rank[t] = documents.get(document, 0)
            documents[document] = rank[t] + 1
        for i in rank:
            for j in rank:
                if segments is not None and segments[b, i] != segments[b, j]:
                    continue
                if sees(pattern, rank[i], rank[j], window, causal):
                    term = (query[b, i] * key[b, j]).sum(-1, keepdim=True) * value[b, j]  # (H, D)
                    if decay is not None:
                        left = decay.neg().exp()[:, None]
                        term = term * (1 - left) * left ** (rank[i] - rank[j])
                    out[b, i] += term
    return out
