# SPDX-License-Identifier: Apache-2.0
"""The HuggingFace hub, as a place for a trained model."""

from __future__ import annotations

from huggingface_hub import HfApi

from jaxllm.errors import UserError
from jaxllm.files import MARKER
from jaxllm.paths import first_line


def create_repo(name: str, private: bool = False) -> None:
    """Creates a model repository on the hub, if it does not exist. name: NAME or OWNER/NAME.

    Raises UserError if the hub cannot be reached or refuses it.
    """
    try:
        HfApi().create_repo(name, private=private or None, exist_ok=True)
    except Exception as error:  # that of the HTTP client, or of a missing token
        reason = first_line(error)
        raise UserError(f"{reason} (`hf auth login`, or HF_TOKEN, gives access)") from error


def upload(folder: str, name: str) -> str:
    """Uploads a saved model or adapter to the main branch of a repository, in one commit.

    Returns the address of the repository. Raises UserError if the hub cannot be reached or refuses
    it.
    """
    try:
        api = HfApi()
        repo = api.create_repo(name, exist_ok=True)  # its full name
        message = "Upload a model trained with jaxllm"
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message=message, ignore_patterns=MARKER
        )
    except Exception as error:  # as above
        raise UserError(first_line(error)) from error
    return str(repo)
