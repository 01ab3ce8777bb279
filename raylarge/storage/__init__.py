"""Files on a disk and objects in S3 behind one small set of verbs.

    files     bytes, JSON, whole folders        parquet   tables, by row groups too
    folders   what stands where                 objects   one object over HTTP
    patience  what becomes of a failure         cache     what a node fetched or made once
    lock      one command at a time writes to a folder
    web       addresses without their secrets

Every write is whole or absent. A path is a local path or a URL such as `s3://bucket/key`. What
may pass is tried again for a while (`patience.PATIENCE_S`); other failures of disk or store
are a UserError with the path and the cure, in all of these, and docstrings do not repeat it.
"""

from raylarge.storage.files import (
    as_json,
    digest,
    digest_file,
    digest_pieces,
    pieces,
    put_file,
    put_folder,
    read_bytes,
    read_json,
    remove,
    remove_all,
    write_bytes,
    write_json,
)
from raylarge.storage.folders import (
    absolute,
    children,
    entries,
    exists,
    join,
    listing,
    sizes,
    without_places,
)
from raylarge.storage.lock import InUse, exclusive
from raylarge.storage.objects import read_range
from raylarge.storage.parquet import read_metadata, read_rows, read_table, write_table
from raylarge.storage.patience import is_local, patiently
from raylarge.storage.web import name_of, shown
from raylarge.storage.writable import require_writable

__all__ = [
    "InUse",
    "absolute",
    "as_json",
    "children",
    "digest",
    "digest_file",
    "digest_pieces",
    "entries",
    "exclusive",
    "exists",
    "is_local",
    "join",
    "listing",
    "name_of",
    "patiently",
    "pieces",
    "put_file",
    "put_folder",
    "read_bytes",
    "read_json",
    "read_metadata",
    "read_range",
    "read_rows",
    "read_table",
    "remove",
    "remove_all",
    "require_writable",
    "shown",
    "sizes",
    "without_places",
    "write_bytes",
    "write_json",
    "write_table",
]
