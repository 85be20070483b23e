"""Teaches Orbax paths that it does not know: folders with brackets in their names, and buckets.

Of buckets, Orbax itself knows only Google's. There it writes a file into a checkpoint that is complete, in place of a
rename, and asks google-cloud-storage whether the bucket has real folders. We treat Amazon's buckets alike and use no
real folders. Everything else, such as TensorStore's driver that reads and writes the arrays, is as in Orbax.
"""

import functools
import glob
import os

from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from igpt.errors import UserError
from igpt.files import AnyPath, is_bucket

EtilsPath = type(epath.Path("/"))
etils_glob = EtilsPath.glob


def _glob(folder: EtilsPath, pattern: str):
    """Lists the matches in a folder, for Orbax. Without it, a checkpoint in a folder such as run[1] cannot be read.

    The reason is that etils takes "[", "*" and "?" in the folder's own name for a pattern, and finds nothing.
    """
    path = os.fspath(folder)
    if glob.has_magic(path) and os.path.isdir(path):
        return map(EtilsPath, glob.glob(os.path.join(glob.escape(path), pattern)))
    return etils_glob(folder, pattern)


EtilsPath.glob = _glob


def known_to_orbax(folder: AnyPath) -> epath.Path:
    """The absolute path of a folder, which Orbax can use. Raises UserError for a bucket and an unknown Orbax."""
    if is_bucket(folder):
        _teach_buckets()
    return epath.Path(folder.absolute())


@functools.cache
def _teach_buckets() -> None:
    from igpt.bucket import SCHEMES, specification  # registers its paths with etils

    # These names are private to Orbax, which has no public way to name a driver.
    replaced = {
        (gcs_utils, "_GCS_PATH_PREFIX"): tuple(SCHEMES),
        (gcs_utils, "is_hierarchical_namespace_enabled"): lambda path: False,
        (gcs_utils, "get_kvstore_for_gcs"): specification,
        (tensorstore_utils, "_use_gcs_driver"): is_bucket,
        (tensorstore_utils, "_normalize_path"): lambda path: path.rstrip("/") if is_bucket(path) else normalize(path),
    }
    if missing := [name for module, name in replaced if not hasattr(module, name)]:
        raise UserError(
            f"this version of orbax-checkpoint has no {', '.join(missing)}, so it cannot use buckets; install "
            "orbax-checkpoint==0.12.8, or mount the bucket (docs/pods.md)"
        )
    normalize = tensorstore_utils._normalize_path  # makes s3:/ of s3://
    for (module, name), value in replaced.items():
        setattr(module, name, value)
