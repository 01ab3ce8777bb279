import pytest

from raylarge.data import split_table
from raylarge.errors import UserError

PATHS = ["/s/a.1.svs", "/s/b.svs", "/s/c.svs"]
WANTED = {"/s/a.1.svs": "train", "/s/b.svs": "val", "/s/c.svs": "test"}


def split(tmp_path, text):
    path = tmp_path / "splits.csv"
    path.write_text(text)
    return split_table.read(str(path))[0].match(PATHS)


@pytest.mark.parametrize(
    "text",
    [
        ",train,val,test\n0,a.1,b,c\n",
        ",train,val,test\n0,a.1.svs,b.svs,c.svs\n1,,nan,\n",
        "train,val,test\na,b,c\n",
        ",train,val,test\na.1,True,False,False\nb,False,True,False\nc,False,False,True\n",
        ",train,val,test\na.1.svs,1,0,0\nb.svs,0,1,0\nc.svs,0,0,1\n",
        ",train,val,test\na,TRUE,,\nb,,TRUE,\nc,,,TRUE\n",
        "slide_id,train,val,test\na.1,1.0,0.0,0.0\nb,0.0,1.0,0.0\nc,0.0,0.0,1.0\n",
        "slide,split\na.1,train\nb,val\nc.svs,test\n",
        ",slide,split\n0,a.1,train\n1,b,val\n2,c,test\n",
    ],
)
def test_splits_in_the_forms_of_hipt_clam_and_ours(tmp_path, text):
    assert split(tmp_path, text) == WANTED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",train,val,test\na,True,True,False\n", "has 'a' in train and in val"),
        ("train,val\na,a\n", "has 'a' in train and in val"),
        ("train,val\nb,b.svs\n", r"rows 'b.svs' and 'b', both for slide b.svs"),
        ("slide,split\na,Train\n", "'Train' of 'a' is no split"),
        ("train,val\nTrue,False\n", "no column that names the slides"),
        ("train,VAL,test\na,b,c\n", "column 'VAL', which differs from 'val' only in the case"),
        ("Slide,split\na,train\n", "rename it to 'slide'"),
        ("name,fold\na,1\n", "columns name, fold; give train, val and test"),
    ],
)
def test_a_split_file_that_contradicts_itself_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        split(tmp_path, text)
