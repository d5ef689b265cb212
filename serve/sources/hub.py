"""Repositories on the hub: `huggingface_hub` tells their commit and files, which then arrive as every download does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from serve.errors import SourceError
from serve.settings import Settings
from serve.sources.guard import Origin, Reach
from serve.sources.parse import Source
from serve.sources.store import (
    Broken,
    Digest,
    GaveUp,
    Meter,
    Wanted,
    cached,
    drop_superseded,
    gather,
    key_part,
    persist,
    recall,
    remember,
    safe_path,
)
from serve.sources.transfer import Client, download
from serve.spec import ModelSpec

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

_COMMIT = re.compile(r"[0-9a-f]{40}")
_BESIDE_WEIGHTS = frozenset(
    {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm", ".yaml", ".yml"}
)
#: Kinds of weights, the first one that there is wins; those of the last can run code when they are loaded.
_WEIGHTS = ({".safetensors"}, {".gguf"}, {".onnx"}, {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"})
#: Where the public hub keeps large files.
_HUB_STORES = {"huggingface.co": (".huggingface.co", ".hf.co")}


def fetch_hub(source: Source, spec: ModelSpec, settings: Settings, progress: Callable[[int, int], None]) -> Path:
    """Return the folder of a repository at a commit, or what `source.path` names in it.

    A branch or tag is looked up each time; where the hub cannot be reached, the commit that it last was is taken if it
    is cached. Only weights and what belongs to them is fetched: see `choose`.

    Raises:
        SourceError: There is no such repository, revision or path, it wants a login, or it could not be had.
    """
    shelf = f"hf/{key_part(Origin.of(settings.hf_endpoint).netloc)}/{key_part(source.root.replace('/', '--'))}"
    wanted_revision = spec.revision or "main"
    pointer = settings.cache_dir / shelf / f"at-{key_part(wanted_revision)}"
    every = spec.task == "python"
    chosen = key_part(f"{'all' if every else 'model'}{'-' if source.path else ''}{source.path}")
    try:
        commit, api = _commit_of(source, wanted_revision, settings, recall(pointer))
    except GaveUp:
        known = recall(pointer)
        if known is None or not (settings.cache_dir / shelf / f"{known}-{chosen}").is_dir():
            raise
        commit, api = known, None
    key = f"{shelf}/{commit}-{chosen}"
    folder = cached(settings, key)
    if folder is None:
        api = api or _api(settings)
        folder = gather(settings, key, *_plan(api, source, commit, every, settings, progress))
        drop_superseded(folder)
    if not _COMMIT.fullmatch(wanted_revision):
        remember(pointer, commit)
    return folder / source.path


def _api(settings: Settings) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=settings.hf_endpoint.rstrip("/"))


def _commit_of(source: Source, revision: str, settings: Settings, known: str | None) -> tuple[str, HfApi | None]:
    if _COMMIT.fullmatch(revision):
        return revision, None
    if settings.offline:
        if known is None:
            raise SourceError(
                f"{revision!r} was never looked up in this cache, {settings.cache_dir}, and offline is set; "
                "fetch it once while online, or declare a commit as revision"
            )
        return known, None
    api = _api(settings)
    found: list[str] = []

    def ask() -> None:
        with _explained(source, revision):
            found.append(api.repo_info(source.root, revision=revision, timeout=settings.download_timeout_s).sha or "")

    persist(ask, reached=lambda: 0, meter=Meter(lambda *_: None), settings=settings)
    if not _COMMIT.fullmatch(found[-1]):
        raise SourceError(f"{settings.hf_endpoint} named {found[-1]!r} as a commit; is it a hub?")
    return found[-1], api


@contextmanager
def _explained(source: Source, revision: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise SourceError(
            f"{source.root} is gated; accept its terms on the hub, and set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"the hub has no {source.root} that this login may see; is the name right? Private ones want HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{source.root} has no revision {revision!r}; give a branch, a tag or a commit") from error
    except EntryNotFoundError as error:
        raise SourceError(f"{source.root} has no {source.path!r} at {revision}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise SourceError(f"the hub answered {status}, access is denied; is HF_TOKEN right?") from error
        if status and status not in (408, 429) and status < 500:
            raise SourceError(f"the hub answered {status}: {error}") from error
        raise Broken(f"the hub answered {status}") from error
    except SourceError:
        raise
    except Exception as error:
        # The HTTP library, and with it the class of a lost connection, differs between releases of huggingface_hub.
        raise Broken(f"the hub cannot be reached: {error or type(error).__name__}") from error


def _plan(
    api: HfApi, source: Source, commit: str, every: bool, settings: Settings, progress: Callable[[int, int], None]
) -> tuple[list[Wanted], Meter]:
    files: list[RepoFile] = []

    def ask() -> None:
        from huggingface_hub.hf_api import RepoFile

        files.clear()
        with _explained(source, commit):
            files.extend(
                entry
                for entry in api.list_repo_tree(source.root, recursive=True, revision=commit)
                if isinstance(entry, RepoFile)
            )

    persist(ask, reached=lambda: 0, meter=Meter(lambda *_: None), settings=settings)
    names = choose([file.path for file in files], source.path, every=every)
    chosen = [file for file in files if file.path in names]
    client = _client(settings)
    wanted = [_wanted(client, api, source.root, commit, file, settings) for file in chosen]
    return wanted, Meter(progress, total=sum(file.size for file in chosen))


def choose(names: Sequence[str], wanted: str, *, every: bool = False) -> set[str]:
    """Return which of a repository's files a model takes.

    Args:
        names: All of them.
        wanted: A file, which is then all; or a folder, or nothing for the whole repository. Of those the configuration
            and tokenizer files are taken, and the weights of one kind: safetensors, or else GGUF, ONNX or pickled.
        every: Take all files below `wanted`, as a user's own class may need.

    Raises:
        SourceError: Nothing is there.
    """
    if wanted in names:
        return {wanted}
    below = [name for name in names if not wanted or name.startswith(f"{wanted}/")]
    if not below:
        tops = sorted({name.split("/")[0] for name in names})[:10]
        raise SourceError(f"the repository has no {wanted!r}; at its top are {', '.join(tops) or 'no files'}")
    if every:
        return set(below)
    suffix = {name: PurePosixPath(name).suffix.lower() for name in below}
    weights = next((kind for kind in _WEIGHTS if kind.intersection(suffix.values())), set())
    taken = {name for name in below if suffix[name] in weights or suffix[name] in _BESIDE_WEIGHTS}
    if not taken:
        raise SourceError(f"the repository has no weights below {wanted or 'its top'!r}; name a file of it")
    return taken


def _client(settings: Settings) -> Client:
    from huggingface_hub import get_token

    hub = Origin.of(settings.hf_endpoint)
    reach = Reach((*settings.allowed_hosts, hub.netloc, f"{hub.host}:{hub.port}"), _HUB_STORES.get(hub.host, ()))
    token = get_token()
    return Client(settings, reach, secrets=(hub, {"Authorization": f"Bearer {token}"}) if token else None)


def _wanted(client: Client, api: HfApi, repo: str, commit: str, file: RepoFile, settings: Settings) -> Wanted:
    from huggingface_hub import hf_hub_url

    path = safe_path(file.path)
    url = hf_hub_url(repo, file.path, revision=commit, endpoint=api.endpoint)
    digest = Digest("sha256", file.lfs.sha256) if file.lfs else Digest("git", file.blob_id)

    def fill(part: Path, meter: Meter) -> None:
        download(client, url, part, digest=digest, size=file.size, limit=settings.max_unpacked_bytes, meter=meter)

    return Wanted(path, file.size, fill)
