"""Folders for the caches of a user who has no home folder, or cannot write to it. Torch-free.

Containers run as a number that no passwd file knows, without $HOME, or on a read-only disk.
"""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from lorasb_ds.errors import ConfigError

# What the libraries of a run write to in a home folder -> its name in ours.
CACHES = {
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_CACHE_DIR": "triton",
    "MPLCONFIGDIR": "matplotlib",
}

TEMPORARY = ("/tmp", "/var/tmp", "/usr/tmp")  # noqa: S108  # Python's own choices


def ensure_home() -> None:
    """Set what this process and its children need to know a home folder; call it first.

    Where there is none, HOME is a folder of this user's alone, beside other temporary files; torch
    would build DeepSpeed's operators in a folder named ~ of the working directory, and others end
    in a traceback. Where it cannot be written, only the libraries' caches are moved there. Users'
    own settings win.

    Raises:
        ConfigError: if that folder is somebody else's, or there is no room for temporary files.
    """
    home = os.path.expanduser("~")  # noqa: PTH111  # Path raises where there is none
    if home == "~":
        os.environ["HOME"] = str(_private_folder())
    elif not _can_be_written(Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache")):
        for variable, name in CACHES.items():
            if variable not in os.environ:
                os.environ[variable] = str(_private_folder() / name)
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER")) and not _is_known():
        os.environ["USER"] = str(os.getuid())  # torch and tensorboard ask for a name
    _check_temporary_folder()


def _check_temporary_folder() -> None:
    """Refuse a host on which torch cannot be imported: its import asks for such a folder.

    Raises:
        ConfigError: if there is none but the working directory, which the ranks have not.
    """
    folders = [os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP")]
    with suppress(FileNotFoundError):
        if tempfile.gettempdir() in {*TEMPORARY, *(os.path.abspath(f) for f in folders if f)}:  # noqa: PTH100
            return
    raise ConfigError(
        f"No folder for temporary files can be written ({', '.join(TEMPORARY)}). Set TMPDIR to one "
        "that can."
    )


def _can_be_written(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _is_known() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _private_folder() -> Path:
    """Return a folder that nobody else can have filled; it is made if need be."""
    try:
        folder = Path(tempfile.gettempdir()) / f"lorasb-ds-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(
            f"This user has no home folder that can be written, nor one for temporary files "
            f"({error}). Set HOME to a folder that can be written."
        ) from error
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise ConfigError(
            f"This user has no home folder that can be written, and {folder} is not a folder of "
            "this user's alone. Set HOME or TMPDIR to a folder that can be written."
        )
    return folder
