"""Recall at k: the share of the relevant candidates among the k that a model scores highest.

With the largest entries of a teacher's attention as the relevant ones it says how many of them a sparse estimate keeps.
"""

import datasets
import evaluate
import numpy as np

DESCRIPTION = (
    "Share of each row's relevant candidates among its k highest scores, averaged over the rows; higher is better."
)
INPUTS = """
Args:
    predictions: for each row a list of scores, one a candidate.
    references: for each row the indices of the relevant candidates, at least one.
    k (int, defaults to 1): how many of the highest scores count.
Returns:
    recall_at_k: mean over rows of (relevant among the k highest) / relevant.
Example:
    >>> metric = evaluate.load(metric_path("recall_at_k"))
    >>> metric.compute(predictions=[[0.1, 0.7, 0.2]], references=[[1, 0]], k=2)["recall_at_k"]
    0.5
"""


class RecallAtK(evaluate.Metric):
    """See DESCRIPTION."""

    def _info(self):
        features = datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float64")),
                "references": datasets.Sequence(datasets.Value("int64")),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, predictions, references, k=1):
        if k < 1:
            raise ValueError(f"`k` is {k}, expected at least 1")
        found = []
        for row, (scores, relevant) in enumerate(zip(predictions, references)):
            relevant = set(relevant)
            if not relevant or min(relevant) < 0 or max(relevant) >= len(scores):
                raise ValueError(
                    f"`references[{row}]` is {sorted(relevant)}, expected at least one index of the {len(scores)} candidates"
                )
            highest = np.argsort(-np.asarray(scores), kind="stable")[:k]
            found.append(len(relevant.intersection(highest.tolist())) / len(relevant))
        return {"recall_at_k": float(np.mean(found))}
