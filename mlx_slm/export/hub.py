"""A model directory to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from mlx_slm.errors import SlmError
from mlx_slm.storage.artifacts import MANIFEST, is_litter


def push(directory: Path, repo: str, private: bool) -> str:
    """Upload the files of a model directory to a repository, which is made if it is not there; returns its address.

    Raises SlmError where the Hub is not reached or does not let us in; what was there before stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    skipped = [MANIFEST, *(p.name for p in directory.iterdir() if is_litter(p) or p.name.startswith("."))]
    try:
        api = HfApi()
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=directory, repo_id=address.repo_id, ignore_patterns=skipped, commit_message="Upload by mlx-slm"
        )
    except HFValidationError as error:
        raise SlmError(f"--push-to-hub {repo}: not the name of a repository, such as user/model") from error
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        advice = "log in with `hf auth login`, and check that the repository is yours"
        raise SlmError(f"--push-to-hub {repo}: the Hub did not take it ({reason}): {advice}") from error
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise SlmError(f"--push-to-hub {repo}: the Hub does not take the card ({reason})") from error
    except Exception as error:  # of whichever library it reaches the network with
        raise SlmError(f"--push-to-hub {repo}: the Hub was not reached ({type(error).__name__}: {error})") from error
    return str(address)
