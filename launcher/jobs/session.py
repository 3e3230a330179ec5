"""A job's secret word, by which the supervisor knows its agents. Standard library only.

It is a file for this user's eyes in the job's folder (to which `ssh_job.py` takes it where hosts
share none), and never in an argument, a log or an environment that others may list. Nor is it sent:
an agent proves that it knows the word by its answer to a challenge.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from pathlib import Path

from launcher.hosts.private_file import write_private

FILE = "LORASB_SESSION_FILE"  # environment variable: path of the word's file
# The word itself, of users whose hosts share no folder; `is_secret` keeps it from being exported.
WORD = "LORASB_SESSION_SECRET"


def new_challenge() -> str:
    return secrets.token_hex(16)


def new_word(path: Path) -> str:
    """Write a new word into its file, and return it."""
    word = secrets.token_hex(32)
    write_private(str(path), word)
    return word


def read_word(environment: Mapping[str, str]) -> str:
    """Return the word of an agent's job.

    Raises:
        OSError: if its file cannot be read.
    """
    return environment.get(WORD) or Path(environment[FILE]).read_text()


def proof(word: str, challenge: str) -> str:
    """Return what only those can say who know the word."""
    return hmac.new(word.encode(), challenge.encode(errors="replace"), "sha256").hexdigest()


def is_proof(given: object, word: str, challenge: str) -> bool:
    """Return whether something is the proof, in a time that does not tell how near it comes."""
    expected = proof(word, challenge).encode()
    return hmac.compare_digest(str(given).encode(errors="replace"), expected)
