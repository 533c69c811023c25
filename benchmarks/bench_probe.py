"""The probe's logistic regression against scikit-learn's, time and accuracy on made-up embeddings:
`python -m benchmarks.bench_probe [--sklearn]`.
"""

import argparse
import time

import numpy as np

from aria_jax.eval.classifiers import C_GRID, CLASSIFIERS, Predict
from aria_jax.eval.probe import probe


def embeddings(n: int, width: int, n_classes: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Rows of 48 latent directions and noise, classes far enough apart to be half learnable."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    latent = rng.normal(size=(n_classes, 48))[y] * 0.6 + rng.normal(size=(n, 48)) * 2
    x = latent @ rng.normal(size=(48, width)) / 7 + rng.normal(size=(n, width)) * 0.5
    return x, [f"class {c}" for c in y]


def grid_search(x: np.ndarray, y: np.ndarray, group: np.ndarray, seed: int) -> Predict:
    """The same choice of C by scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    inner = StratifiedGroupKFold(3, shuffle=True, random_state=seed)
    grid = {"logisticregression__C": C_GRID}
    return GridSearchCV(pipeline, grid, cv=inner).fit(x, y, groups=group).predict


def main() -> None:
    """Prints one line a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sklearn", action="store_true", help="scikit-learn's too (slow)")
    parser.add_argument("--sizes", default="1000x512x4,10000x512x30", help="N x E x classes, …")
    args = parser.parse_args()
    names = ["logistic"]
    if args.sklearn:
        names.append("scikit-learn")
        CLASSIFIERS["scikit-learn"] = grid_search
    for size in args.sizes.split(","):
        n, width, n_classes = map(int, size.split("x"))
        x, labels = embeddings(n, width, n_classes)
        groups = [str(i // 2) for i in range(n)]
        for name in names:
            began, cpu = time.perf_counter(), time.process_time()
            result = probe(x, labels, groups=groups, classifier=name)
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            print(f"{size:>14} {name:<13} {wall:7.1f} s, CPU {cpu:7.1f} s, {result.accuracy:.3f}")


if __name__ == "__main__":
    main()
