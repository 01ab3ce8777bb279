"""Tables of features of a few slides whose label a few patches tell, and a config to learn it."""

import numpy as np
import toy

from raylarge import schema, storage
from raylarge.train.config import Train
from raylarge.train.tasks.mil import MilConfig, fold_of

WIDTH = 4


def write(root, slides=24, patches=(12, 30), tells=0, says=lambda i: i % 2, **more):
    """Slides of two patients' halves, patches at scales 0 and 2, labels in EXAMPLES.

    In a slide of label 1 two patches of scale `tells` have a feature that no other patch has.
    """
    rng = np.random.default_rng(0)
    features, examples = [], []
    for i in range(slides):
        count, label = int(rng.integers(*patches)), says(i)
        cells = {0: [(r, c) for r in range(6) for c in range(6)], 2: [(0, 0), (0, 4), (4, 0)]}
        cells[0] = sorted(cells[0][j] for j in rng.choice(36, count, replace=False))
        for k in (0, 2):
            for n, (row, column) in enumerate(cells[k]):
                values = rng.standard_normal(WIDTH)
                if k == tells:
                    values[1] += 6 * bool(label and n < 2)
                features.append(row_of(i, k, row, column) | {"feature": values.astype(np.float16)})
        told = [("grade", "high" if label else "low"), ("empty", "")] if label >= 0 else []
        blank = {"image": b"", "grid": [], "grid_rows": 1, "grid_columns": 1, "tissue": 1.0}
        examples.append(row_of(i, 0, 0, 0) | {"labels": told} | blank)
    features.sort(key=lambda row: row["scale"])
    for split in ("train", "val", "test"):
        for name, rows, kind in (
            ("features-0", features, schema.FEATURES),
            ("examples", examples, schema.EXAMPLES),
        ):
            own = [row for row in rows if row["split"] == split]
            toy.write(str(root), name, [row | more for row in own], kind, split)
    return str(root)


def row_of(slide, k, row, column):
    """Two slides of a patient; every sixth pair of patients is held out for good."""
    patient = slide // 4 * 2 + slide % 2
    split = {5: "test", 4: "val"}.get(patient // 2 % 6, "train")
    where = {"slide_id": f"s{slide:02d}", "patient_id": f"p{patient:02d}", "split": split}
    return (
        {"key": 10000 * slide + 1000 * k + 36 * row + column, "scale": k}
        | where
        | {
            "row": row,
            "column": column,
        }
    )


def add(root, row):
    """Put a row of FEATURES, twice, among those of the split `train`."""
    toy.write(root, "features-0", [row, row], schema.FEATURES, "more")
    made = storage.read_json(f"{root}/features-0.json")
    for part in made["parts"]:
        part["groups"] = [[k, s.replace("more", "train"), n] for k, s, n in part["groups"]]
    storage.write_json(f"{root}/features-0.json", made)


def rows(root):
    """All features, part by part."""
    parts = storage.read_json(f"{root}/features-0.json")["parts"]
    return [
        row for part in parts for row in storage.read_table(f"{root}/{part['part']}").to_pylist()
    ]


def config(root, seed=0, **values):
    known = {"label": "grade", "folds": 3, "width": 16, "attention": 8}
    return Train(model="mil", data=root, out="", seed=seed, mil=MilConfig(**(known | values)))


def fold(wish):
    """Return the fold that a configuration asks for."""
    return fold_of(wish.mil, wish.run)
