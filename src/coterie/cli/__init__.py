"""The command line: one command per public function, its flags read off the settings; no logic of its own.

stdout is the result, stderr is progress. Exit 0; 1 is our bug; 2 is something the user can fix, told in one line.
Nothing here imports torch before a command runs.
"""

from coterie.cli import again, doctor, shelves  # their commands join the table as they are imported
from coterie.cli.commands import main

__all__ = ["again", "doctor", "main", "shelves"]
