"""Files on a local disk and objects in S3 behind one set of functions.

    files     bytes, JSON, whole folders        parquet   tables, complete or by row groups
    folders   listings and patterns             objects   objects of a store over HTTP
    retry     retries and errors of stores      cache     remote and converted files on the node
    lock      one command at a time writes to a folder
    web       web addresses without their secrets

Every write is atomic. A path is a local path or a URL such as `s3://bucket/key`. All functions
retry transient failures (for `retry.RETRY_S`) and raise `UserError`, with the path and the cure,
for others; their docstrings do not repeat this.
"""

from raylarge.storage.files import (
    as_json,
    chunks,
    digest,
    digest_chunks,
    digest_file,
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
    glob,
    join,
    sizes,
    without_folders,
)
from raylarge.storage.lock import InUse, exclusive
from raylarge.storage.objects import read_range
from raylarge.storage.parquet import read_metadata, read_rows, read_table, write_table
from raylarge.storage.retry import is_local, with_retries
from raylarge.storage.web import name_of, redacted
from raylarge.storage.writable import require_writable

__all__ = [
    "InUse",
    "absolute",
    "as_json",
    "children",
    "chunks",
    "digest",
    "digest_chunks",
    "digest_file",
    "entries",
    "exclusive",
    "exists",
    "glob",
    "is_local",
    "join",
    "name_of",
    "put_file",
    "put_folder",
    "read_bytes",
    "read_json",
    "read_metadata",
    "read_range",
    "read_rows",
    "read_table",
    "redacted",
    "remove",
    "remove_all",
    "require_writable",
    "sizes",
    "with_retries",
    "without_folders",
    "write_bytes",
    "write_json",
    "write_table",
]
