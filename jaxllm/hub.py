# SPDX-License-Identifier: Apache-2.0
"""The HuggingFace hub, as a place for a trained model."""

from __future__ import annotations

from huggingface_hub import HfApi

from jaxllm.errors import UserError
from jaxllm.files import MARKER
from jaxllm.paths import first_line


def create_repo(name: str, private: bool = False) -> str:
    """Creates a model repository on the hub, if it does not exist; returns its full name.

    name: NAME or OWNER/NAME. Raises UserError if the hub cannot be reached or refuses it, and if
    the repository is to be private, but exists and is public.
    """
    try:
        api = HfApi()
        repo = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        public = private and not api.repo_info(repo).private
    except Exception as error:  # that of the HTTP client, or of a missing token
        reason = first_line(error)
        raise UserError(f"{reason} (`hf auth login`, or HF_TOKEN, gives access)") from error
    if public:
        raise UserError(f"{repo} exists and is public; make it private, or choose another name")
    return repo


def upload(folder: str, name: str, private: bool = False) -> str:
    """Uploads a saved model or adapter to the main branch of a repository, in one commit.

    Returns the address of the commit. Raises UserError as `create_repo` does.
    """
    repo = create_repo(name, private)
    message = "Upload a model trained with jaxllm"
    try:
        return str(
            HfApi().upload_folder(
                repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=MARKER
            )
        )
    except Exception as error:  # as above
        raise UserError(first_line(error)) from error
