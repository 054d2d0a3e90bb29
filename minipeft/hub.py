"""Download and upload models, tokenizers and data sets: a local folder or a Hugging Face hub id, by exact file names.

The hub's own client does the transfer; it is imported only for a hub id.

A revision is resolved once, to a commit and its list of files. Every file then comes from that commit, so that a push
between two downloads cannot mix two versions. Only the requested files are downloaded: no code, no pickle. The cache
folder is named after the commit (`.../snapshots/COMMIT`), which `read_commit` returns.

With HF_HUB_OFFLINE=1 only the cache is used. Otherwise an unreachable hub is an error: the cache is no silent fallback.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from minipeft.errors import InputError, check_path, check_value, format_value
from minipeft.files import check_inside

SECONDS_TO_ANSWER = 10.0  # for resolving the revision; downloads use the hub client's own timeouts and retries
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
OWNED = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # OWNER/NAME
REVISION = re.compile(r"\w[\w./+@-]*(?<![./])")  # a branch may hold slashes: refs/pr/1
COMMIT = re.compile(r"[0-9a-f]{40}")
NAMED = {"demo": Path(__file__).parent / "demo" / "model"}  # a name in place of a folder or hub id


def fetch(
    source: str | Path,
    names: Sequence[str],
    *,
    revision: str | None = None,
    repo_type: str = "model",
    optional: Sequence[str] = (),
) -> Path:
    """Return the folder that holds all of `names`, and those of `optional` that `source` has.

    "demo" is the model that comes with the package (a folder of that name is ./demo). A local folder is returned as it
    is, and `revision` is refused for it; anything else that looks like a hub id is downloaded into the hub client's
    cache.

    Raises:
        InputError: no such folder or hub id; a name is missing; the hub refuses, or cannot be reached.
    """
    for name in (*names, *optional):
        check_name(name, source)
    folder = check_path(source, "source")
    check_value(revision, str | None, {}, "revision")
    check_revision(revision, source)
    folder = NAMED.get(str(source), folder)
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                f"revision {revision!r} was given, but this is a local folder",
                file=folder,
                hint="Leave the revision out, or give a hub id",
            )
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise InputError(f"no {missing[0]} in the folder (found: {list_names(folder)})", file=folder)
        return folder
    if folder.exists():
        raise InputError("is a file; the folder that holds it is wanted", file=folder)
    if not HUB_ID.fullmatch(str(source)):
        raise InputError("no such folder, and not a hub id (NAME or OWNER/NAME)", file=source)
    return download(str(source), names, optional, revision, repo_type)


def read_commit(folder: Path) -> str | None:
    """The commit of a folder returned by `fetch`; None for a folder outside the cache."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else None


def download(hub_id: str, names: Sequence[str], optional: Sequence[str], revision: str | None, repo_type: str) -> Path:
    """Download `names`, and the files of `optional` that exist, from one commit; return their folder in the cache."""
    from huggingface_hub import constants

    wanted = [*names, *optional]
    cached = find_in_cache(hub_id, wanted, revision, repo_type)
    if constants.HF_HUB_OFFLINE:
        absent = [name for name in names if name not in cached]
        if absent or not cached:
            raise InputError(
                f"HF_HUB_OFFLINE is set, and {', '.join(absent or optional)} is not cached ({revision or 'main'})",
                file=hub_id,
                hint="Download it once with HF_HUB_OFFLINE unset, or give a local folder",
            )
        return find_root(next(iter(cached)), next(iter(cached.values())))
    if COMMIT.fullmatch(revision or "") and len(cached) == len(wanted):
        return find_root(wanted[0], cached[wanted[0]])  # a commit never changes: no request needed
    commit, held = ask(hub_id, revision, repo_type)
    missing = [name for name in names if name not in held]
    present = [*names, *(name for name in optional if name in held)]
    if missing or not present:
        lacks = missing[0] if missing else " and no ".join(optional)
        raise InputError(f"no {lacks} at commit {commit[:12]} (found: {shorten(sorted(held))})", file=hub_id)
    # The first file is requested by the revision's name, so that the cache can resolve that name offline.
    folder = find_root(present[0], get(hub_id, present[0], revision, repo_type))
    if read_commit(folder) != commit:
        raise InputError(f"{revision or 'main'} changed while it was downloaded", file=hub_id, hint="Try again")
    for name in present[1:]:
        get(hub_id, name, commit, repo_type)
    return folder


def find_in_cache(hub_id: str, names: Sequence[str], revision: str | None, repo_type: str) -> dict[str, str]:
    """The cached paths of `names` at this revision (None: the last known main)."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        paths = {name: try_to_load_from_cache(hub_id, name, revision=revision, repo_type=repo_type) for name in names}
    except errors.HFValidationError as failure:
        raise InputError(f"no such folder, and not a hub id ({failure})", file=hub_id) from failure
    return {name: path for name, path in paths.items() if isinstance(path, str)}


def ask(hub_id: str, revision: str | None, repo_type: str) -> tuple[str, set[str]]:
    """Ask the hub for the commit of `revision` (None: the newest) and its list of files."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().repo_info(hub_id, revision=revision, repo_type=repo_type, timeout=SECONDS_TO_ANSWER)
    except (OSError, errors.HTTPError) as failure:
        raise explain_failure(hub_id, revision, repo_type, failure) from failure
    return str(info.sha), {file.rfilename for file in getattr(info, "siblings", None) or []}


def get(hub_id: str, name: str, revision: str | None, repo_type: str) -> str:
    """Download one file unless it is cached, and return its path."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return str(hf_hub_download(hub_id, name, revision=revision, repo_type=repo_type))
    except (OSError, errors.HTTPError, errors.EntryNotFoundError) as failure:
        raise explain_failure(hub_id, revision, repo_type, failure, name) from failure


def explain_failure(
    hub_id: str, revision: str | None, repo_type: str, failure: BaseException, name: str | None = None
) -> InputError:
    """Explain in one line why a download failed, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(failure, "response", None), "status_code", None)
    reason = " ".join(str(failure).split())[:200]
    hint = None
    if isinstance(failure, errors.GatedRepoError):
        problem, hint = (
            "gated: its owner asks you to accept conditions",
            "Accept them on its page, then `hf auth login` or set HF_TOKEN",
        )
    elif isinstance(failure, errors.RevisionNotFoundError):
        problem = f"the hub has no revision {revision!r} of it"
    elif isinstance(failure, errors.RepositoryNotFoundError):
        problem = f"no local folder and no public {repo_type} of this name on the hub (HTTP {status})"
        hint = "If it is private, run `hf auth login`, or set HF_TOKEN"
    elif status is not None:
        problem = f"the hub refuses with HTTP {status}: {reason}"
    elif isinstance(failure, (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        problem = f"no local folder of this name, and the hub cannot be reached ({reason})"
        hint = "Give a local folder, or set HF_HUB_OFFLINE=1 to use only what was downloaded before"
    else:  # the cache folder is not writable, or the disk is full
        problem, hint = f"cannot download ({reason})", "HF_HOME names the folder of the cache"
    return InputError(problem, file=hub_id, where=name, hint=hint)


def push(folder: Path, names: Sequence[str], hub_id: str, *, private: bool = True, revision: str | None = None) -> str:
    """Upload these files of a folder as one commit to a model repository, and return the commit.

    `revision` is a branch, main by default. Repository and branch are created if they do not exist.

    Raises:
        InputError: not OWNER/NAME; a file lies outside the folder; the repository is public but `private` is set; the
            hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi, errors

    if not OWNED.fullmatch(hub_id):
        raise InputError("is not a hub id to push to (OWNER/NAME)", file=hub_id)
    for name in names:
        check_name(name, folder)
        check_inside(folder / name, folder)
    api = HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        if private and not api.repo_info(hub_id, timeout=SECONDS_TO_ANSWER).private:
            hint = "--public pushes to it all the same"
            raise InputError("is a public repository, and private was asked for", file=hub_id, hint=hint)
        if revision is not None:
            api.create_branch(hub_id, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=hub_id,
            folder_path=folder,
            allow_patterns=list(names),
            revision=revision,
            commit_message=f"Upload {folder.name} with minipeft",
        )
    except InputError:
        raise
    except (OSError, ValueError, errors.HTTPError) as failure:  # ValueError: the client's own checks of name and card
        raise explain_push_failure(hub_id, failure) from failure
    return str(done.oid)


def explain_push_failure(hub_id: str, failure: BaseException) -> InputError:
    """Explain in one line why an upload failed, and what to do."""
    status = getattr(getattr(failure, "response", None), "status_code", None)
    reason = " ".join(str(failure).split())[:200]
    if status in (401, 403):
        hint = "`hf auth login`, or HF_TOKEN, with a token that may write there"
        return InputError(f"the hub refuses to be written to (HTTP {status})", file=hub_id, hint=hint)
    if status is not None:
        return InputError(f"the hub refuses with HTTP {status}: {reason}", file=hub_id)
    return InputError(f"cannot be pushed to ({reason})", file=hub_id)


def check_name(name: str, source: str | Path) -> None:
    """Refuse a file name that could leave the folder: `../x`, `/x`, a drive, a NUL."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(sign in name for sign in "\\:\0"):
        raise InputError(f"{name!r} is not a plain file name", file=source)


def check_revision(revision: str | None, source: str | Path) -> None:
    """Refuse a name that is no git revision: the client builds a path from it, and `../x` would leave the cache."""
    if revision is not None and (".." in revision or not REVISION.fullmatch(revision)):
        raise InputError(f"{format_value(revision)} is not a commit, tag or branch", file=source, where="revision")


def find_root(name: str, path: str | Path) -> Path:
    """The folder that `name` is relative to, given its full `path`; `name` may hold slashes."""
    return Path(path).parents[len(PurePosixPath(name).parts) - 1]


def list_names(folder: Path) -> str:
    """The first few names in a folder, for an error."""
    return shorten(sorted(entry.name for entry in folder.iterdir()))


def shorten(names: Iterable[str]) -> str:
    """At most eight names, then how many more."""
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
