"""`python -m ming_app deploy space`: the folder of a Hugging Face Space, shown, written, and unless it is a dry run uploaded."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ming_app.console import Console
from ming_app.deploy.space import HARDWARE, SDKS, Upload, plan, write
from ming_app.models.store import gigabytes

NAMES = tuple(HARDWARE)
SHOWN = 5  # untracked files on the terminal


def add_deploy_parser(commands: Any, t: Callable[[str, str], str], parents: list[argparse.ArgumentParser]) -> None:
    """Adds `deploy` and its targets to the grammar."""
    summary = t("put the app where others can reach it", "将应用部署到可公开访问的地方")
    parser = commands.add_parser("deploy", help=summary, description=summary)
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    what = t(
        "a Hugging Face Space: shows the exact folder, then uploads it with your own token (hf auth login, or HF_TOKEN)",
        "Hugging Face Space：列出将上传的文件夹，并用你的令牌（hf auth login 或 HF_TOKEN）上传",
    )
    space = targets.add_parser("space", help=what, description=what, parents=parents)
    space.add_argument(
        "--repo", metavar="NAME", required=True, help=t("owner/name of the Space", "Space 的 owner/name")
    )
    space.add_argument(
        "--hardware",
        choices=NAMES,
        default=NAMES[0],
        help=t(
            "cpu serves the default model, zerogpu ming-moe-7b in bf16, gpu ming-moe-7b in nf4",
            "cpu 使用默认模型，zerogpu 使用 bf16 的 ming-moe-7b，gpu 使用 nf4 的 ming-moe-7b",
        ),
    )
    space.add_argument("--model", metavar="NAME", help=t("another model of the catalogue", "模型目录中的其他模型"))
    space.add_argument(
        "--sdk", choices=SDKS, default=SDKS[0], help=t("docker: by the Dockerfile", "docker：使用 Dockerfile 构建")
    )
    space.add_argument("--private", action="store_true", help=t("only you can see it", "仅自己可见"))
    space.add_argument(
        "--dry-run",
        action="store_true",
        help=t("write and show the folder, upload nothing; needs no network", "只生成并显示文件夹，不上传；无需网络"),
    )
    space.add_argument(
        "--out", metavar="DIR", type=Path, help=t("new folder to write it to and keep", "写入并保留的新文件夹")
    )


def run_deploy(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Deploys, unless it is a dry run; the JSON object."""
    from ming_app.deploy.upload import address, check_name, send

    check_name(args.repo)
    upload = plan(hardware=args.hardware, sdk=args.sdk, model=args.model or "")
    repo, url = args.repo, address(args.repo)
    with ExitStack() as after:
        if args.out:
            folder = args.out.expanduser().resolve()
        elif args.dry_run:
            folder = Path(tempfile.mkdtemp(prefix="ming-space-"))  # kept, to be looked at
        else:
            folder = Path(after.enter_context(tempfile.TemporaryDirectory(prefix="ming-space-")))
        write(upload, folder)
        _show(upload, console)
        if not args.dry_run:
            repo, url = send(upload, folder, repo, private=args.private)
        kept = args.out or args.dry_run
    if args.dry_run:
        console.note(
            f"Dry run: nothing was uploaded. The folder: {folder}", f"试运行：未上传任何内容。文件夹：{folder}"
        )
    else:
        console.note(f"Uploaded; the Space builds now: {url}", f"已上传，Space 正在构建：{url}")
    _remark(args.hardware, console)
    return {
        "repo": repo,
        "hardware": upload.hardware.flavor,
        "folder": str(folder) if kept else None,
        "files": [{"path": entry.path, "bytes": entry.size} for entry in upload.files],
        "bytes": upload.size,
        "front_matter": dict(upload.front_matter),
        "variables": dict(upload.variables),
        "uploaded": not args.dry_run,
        "url": url,
    }


def _show(upload: Upload, console: Console) -> None:
    for entry in upload.files:
        console.line(f"{entry.size:>12,}  {entry.path}")
    variables = ", ".join(f"{key}={value}" for key, value in upload.variables.items())
    if upload.left_out:
        some = ", ".join(upload.left_out[:SHOWN])
        more = " …" if len(upload.left_out) > SHOWN else ""
        console.note(
            f"Left out, because git does not track them: {some}{more}. Add to git what the app needs.",
            f"以下文件未被 git 跟踪，因此不上传：{some}{more}。如应用需要，请先加入 git。",
        )
    count, size = len(upload.files), gigabytes(upload.size)
    console.line(
        console.text(
            f"{count} files, {size}; {upload.sdk}, {upload.hardware.flavor}; {variables}",
            f"共 {count} 个文件，{size}；{upload.sdk}，{upload.hardware.flavor}；{variables}",
        )
    )


def _remark(hardware: str, console: Console) -> None:
    """What a person has to do on the Space's own page."""
    flavor = HARDWARE[hardware].flavor
    if hardware == "gpu":
        console.note(
            f"The hardware is yours to choose, in the settings of the Space: {flavor}, or one with more memory. It is billed by the hour.",
            f"请在 Space 的设置页中自行选择硬件：{flavor} 或显存更大的型号。按小时计费。",
        )
    if hardware == "zerogpu":
        console.note(
            f"A Space that was there before keeps its hardware: choose ZeroGPU ({flavor}) in its settings.",
            f"如果该 Space 此前已存在，其硬件不会改变：请在设置页中选择 ZeroGPU（{flavor}）。",
        )
