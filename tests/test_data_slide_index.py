import pytest

from raylarge import storage
from raylarge.data import slide_index
from raylarge.data.tile_candidates import TileConfig
from raylarge.errors import UserError

SLIDES = [f"s3://bucket/a/TCGA-{p}-{i}.0F3A.svs" for p in ("AA", "BB", "CC", "DD") for i in (1, 2)]
PATIENT = r"^(TCGA-..)"


def known(**values):
    return {
        e.path: e for e in slide_index.index(SLIDES, TileConfig(patient=PATIENT, **values)).entries
    }


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
    assert first.patient_id == second.patient_id == slide_index.pseudonym("raylarge", "P1")
    assert third.patient_id == fourth.patient_id == slide_index.pseudonym("raylarge", "TCGA-BB")


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
    tile = TileConfig(patient=r"^(TCGA-....)", val_fraction=0.2, test_fraction=0.1)
    entries = slide_index.index(paths, tile).entries
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
        TileConfig(unlisted="maybe").check()
    with pytest.raises(UserError, match=r"have one file name"):
        slide_index.index(["a/x.svs", "b/x.svs"], TileConfig())


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
    before = slide_index.fingerprint(str(path))
    assert slide_index.fingerprint(str(path)) == before
    path.write_bytes(b"a" * 2_999_999 + b"b")
    assert slide_index.fingerprint(str(path)) != before
    folder = tmp_path / "dicom"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_bytes(name.encode())
    before = slide_index.fingerprint(str(folder))
    (folder / "b").write_bytes(b"c")
    assert slide_index.fingerprint(str(folder)) != before
    storage.remove(str(path))
    with pytest.raises(UserError, match="does not exist"):
        slide_index.fingerprint(str(path))


def indexed(tmp_path, text, paths, **values):
    table = write(tmp_path / "t.csv", text)
    return slide_index.index(paths, TileConfig(table=table, **values))


def test_an_accent_written_in_two_ways_is_one_name_and_one_patient(tmp_path):
    composed, apart = "M\u00fcller", "Mu\u0308ller"
    rows = f"slide,patient,split\n{composed}-1,{apart},test\n{apart}-2.tif,{composed},test\n"
    found = indexed(tmp_path, rows, [f"/s/{apart}-1.tif", f"/s/{composed}-2.tif"])
    assert [entry.split for entry in found.entries] == ["test", "test"]
    assert len({entry.patient_id for entry in found.entries}) == 1
    assert found.lines == []
    with pytest.raises(UserError, match="have one file name"):
        slide_index.index([f"/s/{apart}.tif", f"/r/{composed}.tif"], TileConfig())


def test_another_case_is_no_match_but_a_hint_and_a_missing_split_is_refused(tmp_path):
    rows = "slide,split\na,train\ne.tif,test\nghost,test\n"
    with pytest.raises(UserError) as refused:
        indexed(tmp_path, rows, ["/s/a.tif", "/s/E.TIF"])
    assert "1 of 2 slides have no split in tile.table=" in str(refused.value)
    assert "row 'e.tif' and slide 'E.TIF' differ in the case of letters" in str(refused.value)
    found = indexed(tmp_path, rows, ["/s/a.tif", "/s/E.TIF"], unlisted="skip")
    assert [entry.path for entry in found.entries] == ["/s/a.tif"]
    assert found.skipped == ["/s/E.TIF"]
    text = "\n".join(found.lines)
    assert "rows without a slide: 2 ('e.tif', 'ghost')" in text
    assert "slides without a row: 1 ('E.TIF')" in text
    assert "slides without a split, left out: 1" in text
    counts = slide_index.account(found, "salt", names=False)
    assert "ghost" not in str(counts)
    assert (counts["table"]["rows_without_slide"], counts["unlisted"]) == (2, 1)
    assert "ghost" in str(slide_index.account(found, "salt", names=True))
    with pytest.raises(UserError, match=r"names none of the slides; row 'A' and slide 'a\.tif'"):
        indexed(tmp_path, "slide\nA\n", ["/s/a.tif"])
    with pytest.raises(UserError, match=r"differ in folder or ending"):
        indexed(tmp_path, "slide\nold/a.svs\n", ["/s/a.tif"])


def test_an_unlisted_slide_goes_with_its_patient(tmp_path):
    rows = "slide,patient,split\nP1-a,P1,test\nP2-a,P2,train\nP3-a,P3,NA\n"
    paths = ["/s/P1-a.tif", "/s/P1-b.tif", "/s/P2-a.tif", "/s/P3-a.tif"]
    with pytest.raises(UserError, match=r"2 of 4 slides have no split.*'P1-b.tif', 'P3-a.tif'"):
        indexed(tmp_path, rows, paths, patient="^(P.)")
    found = indexed(tmp_path, rows, paths, patient="^(P.)", unlisted="hash", val_fraction=0.999)
    assert {entry.path[3:7]: entry.split for entry in found.entries} == {
        "P1-a": "test",
        "P1-b": "test",
        "P2-a": "train",
        "P3-a": "val",
    }


def test_words_for_no_value_are_no_patient_no_class_and_no_size(tmp_path):
    rows = "slide,patient,grade,mpp\na,NA,low,nan\nb,NA,NA,-\nc,N/A,high,0.5\n"
    paths = [f"/s/{name}.tif" for name in "abc"]
    found = indexed(tmp_path, rows, paths, labels=["grade"], mpp=0.25)
    by_path = {entry.path: entry for entry in found.entries}
    assert len({entry.patient_id for entry in found.entries}) == 3
    assert [by_path[path].labels["grade"] for path in paths] == ["low", "", "high"]
    assert [by_path[path].mpp for path in paths] == [0.25, 0.25, 0.5]
    assert "3 of 3 cells of 'patient' say N/A, NA and count as empty" in "\n".join(found.lines)
    assert found.counts["missing"] == {"patient": 3, "mpp": 2, "grade": 1}


@pytest.mark.parametrize("mpp", ["0,25", "inf", "-1", "0", "1_0", "0x1", "0.25um", "\u0663"])
def test_a_size_that_is_no_plain_number_is_refused(tmp_path, mpp):
    with pytest.raises(UserError, match=r"says mpp=.* of 'a\.tif'; it must be a number above 0"):
        indexed(tmp_path, f"slide;mpp\na;{mpp}\n", ["/s/a.tif"])


def test_two_rows_for_one_slide_are_refused_unless_they_say_the_same(tmp_path):
    with pytest.raises(UserError, match=r"rows 'a\.tif' and 'a', both for slide a\.tif.*grade is"):
        indexed(tmp_path, "slide,grade\na,1\na.tif,2\n", ["/s/a.tif"], labels=["grade"])
    paths = ["/s/x.tif", "/s/x.1.tif"]
    found = indexed(tmp_path, "slide,grade\nx,1\nx.1,2\n", paths, labels=["grade"])
    assert {entry.path: entry.labels["grade"] for entry in found.entries} == {
        "/s/x.tif": "1",
        "/s/x.1.tif": "2",
    }


def test_a_table_and_a_split_file_that_disagree_are_refused(tmp_path):
    split = write(tmp_path / "s.csv", "slide,split\na,val\n")
    with pytest.raises(UserError, match=r"a\.tif is in train by tile\.table=.* and in val by"):
        indexed(tmp_path, "slide,split\na,train\n", ["/s/a.tif"], split=split)
    found = indexed(tmp_path, "slide,split\na,val\nb,test\n", ["/s/a.tif", "/s/b.tif"], split=split)
    assert {entry.path: entry.split for entry in found.entries} == {
        "/s/a.tif": "val",
        "/s/b.tif": "test",
    }
