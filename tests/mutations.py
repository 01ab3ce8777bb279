"""What the tests of random mutations share: an expected answer, and names, numbers and pictures.

Every mutation knows its right answer from its own making, without a look at the code under test:
a value that must come out exactly, or words that the refusal must hold. Seeds are fixed.
"""

import os
import unicodedata
from dataclasses import dataclass

import numpy as np

from raylarge.errors import UserError


@dataclass(frozen=True)
class Refusal:
    """What a call said instead of an answer."""

    sentence: str


class Refused:
    """Equals a refusal in one line that holds some words."""

    def __init__(self, *words):
        self.words = words

    def __repr__(self):
        return f"Refused{self.words}"

    def __eq__(self, other):
        if not isinstance(other, Refusal):
            return False
        return "\n" not in other.sentence and all(word in other.sentence for word in self.words)

    __hash__ = None


def outcome(call):
    """What a call returns, or its refusal; any other exception is a failure of the test."""
    try:
        return call()
    except UserError as error:
        return Refusal(str(error))


def pick(rng, options):
    """One of some options, of any types."""
    return options[int(rng.integers(len(options)))]


NAMES = [
    "plain.png",
    "two words.png",
    " leading space.png",
    "trailing space .png",
    "-rf.png",
    "--help.png",
    "~.png",
    "$HOME.png",
    "%41%2e%d.png",
    "100%.png",
    "a#b.png",
    "a?b.png",
    "what?.png",
    "a*b.png",
    "a[1].png",
    "a1.png",  # which a[1].png, as a pattern, means
    "[!x].png",
    "{name}.png",
    "{0}.png",
    "a,b.png",
    "a;b|c&d.png",
    "a=b.png",
    "a:b.png",
    "a::b.png",
    "memory:x.png",
    "s3:x.png",
    "back\\slash.png",
    "'single'.png",
    '"double".png',
    "new\nline.png",
    "tab\there.png",
    "bell\x07escape\x1b[31m.png",
    "\u202efdp.png",
    "zero\u200bwidth.png",
    "\ufeffmark.png",
    "élan.png",
    unicodedata.normalize("NFD", "Ångström.png"),
    "스타일.png",
    "ﬁligature.png",
    "😀👩\u200d🔬.png",
    "NA.png",
    "null.png",
    "True.png",
    "012.png",
    "1e5.png",
    "2024-01-01.png",
    "a.b.c.d.png",
    "CASE.PNG",
    "no_ending",
    ".hidden.png",
    "x" * 240 + ".png",
    "é" * 110 + ".png",
    os.fsdecode(b"bytes\xff\xfe.png"),
    "<b>&amp;<b>.png",
    "names.json",
    "..png",
    "=1+1.png",
    "0.png",
]
"""File names, all of which Linux allows, and none of which is another in Unicode's form NFC."""


def numbers(rng):
    """A word, and the number that it is in plain decimal notation; None where it is none."""
    digits = "".join(str(int(rng.integers(10))) for _ in range(int(rng.integers(1, 9))))
    whole = digits.lstrip("0") or "0"
    forms = [
        (whole, int(whole)),
        (f"-{whole}", -int(whole)),
        (f"+{whole}", int(whole)),
        (f"{whole}.{digits}", float(f"{whole}.{digits}")),
        (f"{whole}e-3", float(f"{whole}e-3")),
        (f".{digits}", float(f".{digits}")),
        (f"0{whole}1", None),
        (f"{whole}_000", None),
        (f"0x{digits}", None),
        (f"0o{digits}", None),
        (f"0b1{digits}", None),
        (f"{whole}:30", None),
        (f"{whole},5", None),
        (f"{whole} 000", None),
        (f" {whole}", None),
        (f"{whole}\n", None),
        (f"'{whole}'", None),
        (f"{whole}px", None),
        (f"{whole}%", None),
        (f"1/{whole}", None),
        (f"--{whole}", None),
        (f"{whole}j", None),
        (f"{whole}f", None),
        (f"1e{whole}9999", None),
        (whole.translate({48 + i: 0x0660 + i for i in range(10)}), None),  # Arabic digits
        (whole.translate({48 + i: 0xFF10 + i for i in range(10)}), None),  # wide digits
        ("²", None),
        ("½", None),
        (f"\u2212{whole}", None),  # the mathematical minus
        *((word, None) for word in ("", "on", "true", "inf", "-inf", "nan", ".nan", "~", "None")),
        *(
            (word, None)
            for word in ("[]", "{}", "!!int 3", "&x 3", "*x", "# 3", "3 # a", ".", "e5")
        ),
    ]
    return pick(rng, forms)


TEXTS = [
    "img #2",
    "2024_01",
    "012",
    "on",
    "off",
    "yes",
    "null",
    "~",
    "1:30",
    "0x1F",
    "1e3",
    "[a, b]",
    "{a: 1}",
    "&anchor",
    "*alias",
    "!!python/object/apply:os.system ['id']",
    "'quoted'",
    '"quoted"',
    "a: b",
    "- item",
    "${oc.env:HOME}",
    "${tile.seed}",
    "???",
    "%d {} {0} %s",
    "a=b=c",
    "=",
    "|",
    ">",
    "@at",
    "`tick`",
    "back\\n",
    "ümlaut",
    "e\u0301",
    "  spaces  ",
    "a,b",
    "\u202eright",
    "tab\t",
    "line\nbreak",
    "😀",
    "-1",
    "--help=x",
    os.fsdecode(b"\xff"),
]
"""Words that YAML, a shell or a formatter would read as something else."""


def texts(rng):
    """A text: one of TEXTS, or two of them together."""
    one = pick(rng, TEXTS)
    return one + pick(rng, TEXTS) if rng.random() < 0.4 else one


def cells(rng, rows, columns):
    """A random mask of cells, neither empty nor full, nor its own mirror image."""
    mask = rng.random((rows, columns)) < 0.4
    mask[0, 0], mask[0, -1], mask[-1, 0] = True, False, False
    return mask


def painted(rng, rows, columns, channels=3):
    """Random pixels, uint8 [rows, columns, channels]."""
    return rng.integers(0, 256, (rows, columns, channels), dtype=np.uint8)
