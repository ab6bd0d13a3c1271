"""What the Hub may answer where a model or a data set is asked for, in one sentence each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mlx_slm.errors import SlmError

SITE = "https://huggingface.co"


@contextlib.contextmanager
def said_by_the_hub(name: str, repo: str, revision: str | None, kind: str = "model") -> Iterator[None]:
    """Raise SlmError, with `name` as the user gave it, for what goes wrong within: no such repository or revision, not
    allowed, too many requests, or not reached."""
    from huggingface_hub import errors as hub

    what = "data set" if kind == "dataset" else kind
    try:
        yield
    except SlmError:
        raise
    except hub.GatedRepoError as error:
        place = f"{SITE}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        raise SlmError(f"{name}: its owner lets in those who asked: ask on {place}, then `hf auth login`") from error
    except hub.RevisionNotFoundError as error:
        raise SlmError(f"{name}: the Hub has no revision {revision!r} of it") from error
    except hub.RepositoryNotFoundError as error:
        raise SlmError(
            f"{name}: no such directory here and no such {what} on the Hub; for a private one `hf auth login` first"
        ) from error
    except hub.HFValidationError as error:
        raise SlmError(f"{name}: not the name of a {what} on the Hub") from error
    except Exception as error:  # of whichever library it reaches the network with
        if asks_to_wait(error):
            raise SlmError(f"{name}: the Hub asks to wait (429): the same command later, or `hf auth login`") from error
        raise SlmError(
            f"{name}: no such directory here, and the Hub was not reached ({type(error).__name__}: {reason_of(error)})"
        ) from error


def asks_to_wait(error: BaseException) -> bool:
    """Whether the Hub answered that there were too many requests."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status == 429 or "429 Too Many Requests" in str(error) or "429 Client Error" in str(error)


def reason_of(error: BaseException) -> str:
    """Its message in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
