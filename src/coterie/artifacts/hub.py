"""The model hub: what is had from it, and what is published there; its own client speaks to it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from coterie.errors import CoterieError, first_line

LOGIN = "log in with: hf auth login, or set HF_TOKEN to a token that may do this"
KEPT_BY_HUB = (".gitattributes", "README.md", "LICENSE")
"""Files of a repository that may be there before anything of ours is."""


def may_be_on_hub(name: str) -> bool:
    """Say whether a name may be a hub id, OWNER/NAME; where a folder OWNER is here, it is a path that is not there.

    The hub, or its absence, would tell the same after half a minute of trying.
    """
    path = Path(name)
    is_path = name.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors") or path.parent.is_dir()
    return name.count("/") == 1 and not is_path


@contextmanager
def hub_errors(what: str, advice: str = "check the name and the network") -> Iterator[None]:
    """Tell in one line why the hub did not give or take something; the client raises many kinds of errors.

    Raises:
        CoterieError: for all of them, with the advice, or with how to log in where that is lacking.
    """
    try:
        yield
    except CoterieError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        todo = LOGIN if status in (401, 403) else advice
        raise CoterieError(f"{what} ({first_line(error)}); {todo}") from error


def hub_folder(source: str, patterns: list[str], advice: str, revision: str | None = None) -> Path:
    """Download a repository of the hub and return its folder: files that match the patterns, and no others.

    Args:
        source: the repository, OWNER/NAME.
        patterns: of the files that are had, as `fnmatch` reads them; `*` stands for slashes too.
        advice: what to do where the source is no hub id.
        revision: a branch, tag or commit; the newest by default.

    Raises:
        CoterieError: with the advice when the source is no hub id, OWNER/NAME; or when it cannot be had.
    """
    if not may_be_on_hub(source):
        raise CoterieError(advice)
    from huggingface_hub import snapshot_download

    with hub_errors(f"{source} is no folder and cannot be had from the hub", "check the name"):
        return Path(snapshot_download(source, allow_patterns=patterns, revision=revision))


def publish(folder: Path, repository: str, owned: Sequence[str], mark: str, *, public: bool) -> str:
    """Upload all files of a folder as a repository of the hub, in the place of what an earlier upload left there.

    Args:
        folder: what is uploaded.
        repository: OWNER/NAME; made where it is not there.
        owned: the names at the top that such folders have: what the folder lacks of them goes.
        mark: the file that each such folder has; without it, a repository with files of other names is left alone.
        public: whether a new repository can be seen by everybody; one that is there stays as it is.

    Returns:
        Its address.

    Raises:
        CoterieError: when the name is none, the hub refuses, or the repository holds something else.
    """
    from huggingface_hub import HfApi

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise CoterieError(f"{repository!r} is no repository of the hub; write OWNER/NAME")
    hub = HfApi(library_name="coterie")
    with hub_errors(f"{repository} cannot be written on the hub"):
        address = hub.create_repo(repository, private=not public, exist_ok=True)
        there = hub.list_repo_files(repository)
        foreign = sorted(name for name in there if name.partition("/")[0] not in (*owned, *KEPT_BY_HUB))
        if foreign and mark not in there:
            raise CoterieError(f"{repository} holds {foreign[0]} and no {mark}, so it is left alone; give another name")
        message = f"Upload {folder.name}"
        patterns = [f"{name}*" if "." in name else f"{name}/*" for name in owned]
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=patterns)
    return str(address)
