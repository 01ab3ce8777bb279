import pytest

from raylarge import storage
from raylarge.data import roster
from raylarge.data.candidates import Tile
from raylarge.errors import UserError

SLIDES = [f"s3://bucket/a/TCGA-{p}-{i}.0F3A.svs" for p in ("AA", "BB", "CC", "DD") for i in (1, 2)]
PATIENT = r"^(TCGA-..)"


def known(**values):
    return {e.path: e for e in roster.index(SLIDES, Tile(patient=PATIENT, **values)).entries}


def write(path, text):
    path.write_text(text)
    return str(path)


def test_a_table_gives_labels_mpp_and_patients_by_any_form_of_the_name(tmp_path):
    table = write(
        tmp_path / "slides.csv",
        "slide,patient,mpp,grade,site\n"
        "TCGA-AA-1.0F3A.svs,P1,0.25,3,left\n"
        "TCGA-AA-2.0F3A,P1,,2,\n"
        'TCGA-BB-1,,0.5,"1, or 2",right\n',
    )
    found = known(table=table, mpp=0.4, labels=["grade", "site"])
    assert {e.slide_id: e.labels for e in known(table=table).values() if e.labels} == {}
    first, second, third, fourth = (found[path] for path in SLIDES[:4])
    assert (first.mpp, second.mpp, third.mpp, fourth.mpp) == (0.25, 0.4, 0.5, 0.4)
    assert first.labels == {"grade": "3", "site": "left"}  # text, as it stands there
    assert second.labels == {"grade": "2", "site": ""}
    assert third.labels["grade"] == "1, or 2"
    assert fourth.labels == {}
    assert first.patient_id == second.patient_id == roster.pseudonym("raylarge", "P1")
    assert third.patient_id == fourth.patient_id == roster.pseudonym("raylarge", "TCGA-BB")


def test_folds_in_the_form_of_hipt_and_clam(tmp_path):
    folds = write(
        tmp_path / "splits_0.csv",
        ",train,val,test\n0,TCGA-AA-1,TCGA-BB-1,TCGA-CC-1\n1,TCGA-AA-2,TCGA-BB-2,TCGA-CC-2\n",
    )
    with pytest.raises(UserError, match=r"2 of 8 slides have no split in tile\.split=.*'TCGA-DD-1"):
        known(split=folds)
    found = known(split=folds, unlisted="skip")
    assert [found[path].split for path in SLIDES[:6]] == [
        s for s in ("train", "val", "test") for _ in range(2)
    ]
    assert len(found) == 6
    hashed = known(split=folds, unlisted="hash", val_fraction=0.999)
    assert [hashed[path].split for path in SLIDES[6:]] == ["val", "val"]


def test_splits_by_patient_in_two_columns(tmp_path):
    rows = "".join(f"TCGA-{p},{s}\n" for p, s in (("AA", "train"), ("BB", "test"), ("CC", "val")))
    split = write(tmp_path / "split.csv", "patient,split\n" + rows + "TCGA-DD,train\n")
    found = known(split=split)
    assert [found[path].split for path in SLIDES] == [
        s for s in ("train", "test", "val", "train") for _ in range(2)
    ]


def test_splits_by_hash_are_near_their_fractions_and_by_patient_alone():
    paths = [f"TCGA-{i:04d}-{j}.svs" for i in range(1500) for j in "ab"]
    tile = Tile(patient=r"^(TCGA-....)", val_fraction=0.2, test_fraction=0.1)
    entries = roster.index(paths, tile).entries
    shares = [sum(e.split == s for e in entries) / 3000 for s in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    assert len({(e.patient_id, e.split) for e in entries}) == 1500


def test_what_does_not_fit_is_refused(tmp_path):
    mixed = write(tmp_path / "m.csv", "slide,split\nTCGA-AA-1,train\nTCGA-AA-2,val\n")
    with pytest.raises(UserError, match=r"is in (train|val) and .* of one patient; put both"):
        known(split=mixed, unlisted="skip")
    twice = write(tmp_path / "t.csv", "train,val\nTCGA-AA-1,TCGA-AA-1\n")
    with pytest.raises(UserError, match=r"has 'TCGA-AA-1' in train and in val"):
        known(split=twice)
    with pytest.raises(UserError, match=r"columns a, b; give train, val and test"):
        known(split=write(tmp_path / "c.csv", "a,b\n1,2\n"))
    with pytest.raises(UserError, match=r"tile\.split=half: it must be patient, band, or a file"):
        known(split="half")
    with pytest.raises(UserError, match=r"has no column 'slide', but name"):
        known(table=write(tmp_path / "n.csv", "name\nx\n"))
    with pytest.raises(
        UserError, match=r"tile\.labels: .* has no column 'stage', but slide, grade"
    ):
        known(table=write(tmp_path / "l.csv", "slide,grade\nx,1\n"), labels=["stage"])
    with pytest.raises(UserError, match=r"two rows for slide 'TCGA-AA-1'"):
        known(table=write(tmp_path / "d.csv", "slide,g\nTCGA-AA-1,1\nTCGA-AA-1,2\n"))
    with pytest.raises(UserError, match=r"says mpp=fine of 'TCGA-AA-1"):
        known(table=write(tmp_path / "p.csv", "slide,mpp\nTCGA-AA-1,fine\n"))
    with pytest.raises(UserError, match=r"is no CSV or parquet table"):
        known(table=write(tmp_path / "x.parquet", "no table"))
    with pytest.raises(UserError, match=r"tile\.unlisted=maybe: it must be refuse, skip or hash"):
        Tile(unlisted="maybe").check()
    with pytest.raises(UserError, match=r"have one file name"):
        roster.index(["a/x.svs", "b/x.svs"], Tile())


@pytest.mark.parametrize("name", ["Slide", "PATIENT", "Split", "Mpp"])
def test_a_column_in_another_case_of_letters_is_not_ignored(tmp_path, name):
    columns = ["slide", "patient", "split", "mpp"]
    cells = ["TCGA-AA-1", "p", "test", "0.5"]
    header = [name if name.lower() == column else column for column in columns]
    table = write(tmp_path / "t.csv", f"{','.join(header)}\n{','.join(cells)}\n")
    with pytest.raises(
        UserError, match=rf"column '{name}', which .*; rename it to '{name.lower()}'"
    ):
        known(table=table, unlisted="hash")
    both = write(tmp_path / "b.csv", f"{','.join([*columns, name])}\n{','.join([*cells, 'x'])}\n")
    with pytest.raises(UserError, match="remove one of them"):
        known(table=both, unlisted="hash")
    assert known(table=both, unlisted="hash", labels=[name])[SLIDES[0]].labels == {name: "x"}


def test_a_salt_changes_every_pseudonym_and_no_name_stays():
    mine, other = (known(salt=salt) for salt in ("mine", "other"))
    assert not {e.slide_id for e in mine.values()} & {e.slide_id for e in other.values()}
    assert all("TCGA" not in e.slide_id + e.patient_id for e in mine.values())


def test_the_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "slide"
    path.write_bytes(b"a" * 3_000_000)
    before = roster.fingerprint(str(path))
    assert roster.fingerprint(str(path)) == before
    path.write_bytes(b"a" * 2_999_999 + b"b")
    assert roster.fingerprint(str(path)) != before
    folder = tmp_path / "dicom"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_bytes(name.encode())
    before = roster.fingerprint(str(folder))
    (folder / "b").write_bytes(b"c")
    assert roster.fingerprint(str(folder)) != before
    storage.remove(str(path))
    with pytest.raises(UserError, match="does not exist"):
        roster.fingerprint(str(path))
