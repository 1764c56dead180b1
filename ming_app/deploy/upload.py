"""A folder becomes a Hugging Face Space: created where it is not there, its variables set, its files sent.

Contract: `send` talks to the hub by an `HfApi`, with the token of the library's own places (`hf auth login`, HF_TOKEN),
which is never read or shown here. Whatever fails is a MingError that says what to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ming_app import __version__
from ming_app.deploy.space import FOLDERS, HARDWARE, Upload
from ming_app.errors import MingError, UsageError

STALE = [f"{folder}/*" for folder in (*FOLDERS, "weights")]
"""what an upload takes away from a Space that is there already, where the folder no longer has it"""


def check_name(repo: str) -> None:
    """UsageError unless the hub could have a Space of that name ("name" or "owner/name")."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"{repo!r} is no name for a Space; it looks like owner/name, of letters, digits, '-', '_' and '.'.",
            f"{repo!r} 不能作为 Space 名称；正确形式为 owner/name，由字母、数字、'-'、'_' 和 '.' 组成。",
        ) from error


def address(repo: str) -> str | None:
    """Where the Space will be; None without an owner, whom only the hub knows."""
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/spaces/{repo}" if "/" in repo else None


def send(upload: Upload, folder: Path, repo: str, *, private: bool = False, api: Any = None) -> tuple[str, str]:
    """Creates the Space and fills it. (its whole name, its address). `api` stands in for HfApi in tests."""
    from huggingface_hub import HfApi, SpaceHardware

    hub = api or HfApi(library_name="ming-app", library_version=__version__)
    free = upload.hardware is HARDWARE["zerogpu"]  # what is billed is for a person to choose
    with _explained(repo):
        made = hub.create_repo(
            repo,
            repo_type="space",
            space_sdk=upload.sdk,
            space_hardware=SpaceHardware(upload.hardware.flavor) if free else None,
            private=True if private else None,
            exist_ok=True,
        )
        for key, value in upload.variables.items():
            hub.add_space_variable(made.repo_id, key, value)
        hub.upload_folder(
            repo_id=made.repo_id,
            repo_type="space",
            folder_path=folder,
            delete_patterns=STALE,
            commit_message=f"MING-MOE {__version__}",
        )
    return made.repo_id, str(made)


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise _not_logged_in() from error
    except HfHubHTTPError as error:
        raise _refused(repo, error.response.status_code, error.server_message or "") from error
    except (HTTPError, OSError) as error:
        raise MingError(
            f"The hub could not be reached ({type(error).__name__}), so {repo} is not deployed, or in part. Check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, then run the command again; --dry-run needs no network.",
            f"无法连接模型库（{type(error).__name__}），{repo} 尚未部署或只完成了一部分。请检查网络以及 HF_ENDPOINT、HF_HUB_OFFLINE 设置后"
            "重新运行；--dry-run 不需要网络。",
        ) from error


def _not_logged_in() -> MingError:
    return MingError(
        "You are not signed in to the hub. Run `hf auth login` with a token that may write, or set HF_TOKEN; then run the command again.",
        "尚未登录模型库。请用具有写权限的令牌运行 `hf auth login`，或设置 HF_TOKEN，然后重新运行。",
    )


def _refused(repo: str, status: int, said: str) -> MingError:
    """What to do about an answer of the hub; `said` are its own words."""
    if status == 401:
        return _not_logged_in()
    why_en, why_zh = (f" The hub says: {said}", f"模型库的说明：{said}") if said else ("", "")
    if status == 402:
        return MingError(
            f"The account may not host {repo} on this hardware: a Space that computes needs a paid plan, ZeroGPU excepted (--hardware zerogpu).{why_en}",
            f"该账户不能在此硬件上运行 {repo}：除 ZeroGPU（--hardware zerogpu）外，运行程序的 Space 需要付费套餐。{why_zh}",
        )
    if status in (403, 404):
        return MingError(
            f"You may not write to {repo}. Use a token with the right to write, and an owner that is you or an organisation of yours.{why_en}",
            f"没有写入 {repo} 的权限。请使用具有写权限的令牌，并确认所有者是你本人或你所在的组织。{why_zh}",
        )
    return MingError(
        f"The hub refused {repo} (HTTP {status}).{why_en or ' Try again later.'}",
        f"模型库拒绝了 {repo}（HTTP {status}）。{why_zh or '请稍后重试。'}",
    )
