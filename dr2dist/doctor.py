"""What a machine has, and whether residual functions recompute bit for bit on it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import time
from pathlib import Path

from dr2dist.arguments import path, positive
from dr2dist.launching.hosts import read_hostfile
from dr2dist.launching.remote import RemoteLauncher, forwarded
from dr2dist.launching.survey import describe_hosts, installed
from dr2dist.version import __version__

LIMIT = 60.0
"""Seconds that other hosts have to answer."""
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "torchmetrics")


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dr2dist doctor` takes."""
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm's name of a model")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--image-size", type=positive, help="pixels; default: the model's own")
    parser.add_argument("--batch", type=positive, default=2, help="images of the trial")
    parser.add_argument("--hostfile", type=path, help="look at its hosts too, by ssh")
    parser.set_defaults(command=run)


def run(given: argparse.Namespace) -> int:
    """`dr2dist doctor`: 0 if the trial is sound."""
    for line in describe_machine():
        print(line)
    if given.hostfile is not None:
        print(describe_others(given.hostfile))
    lines, sound = try_recompute(
        given.model, bf16=given.precision == "bf16", image_size=given.image_size, batch=given.batch
    )
    for line in lines:
        print(line)
    return 0 if sound else 1


def describe_machine() -> list[str]:
    """Versions, devices, launcher and network, a line each."""
    import torch

    lines = [f"dr2dist       {__version__}", f"python        {platform.python_version()}"]
    lines += [f"{name:13} {installed(name)}" for name in PACKAGES]
    lines.append(f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    lines += _devices()
    lines.append(f"launcher      {shutil.which('deepspeed') or 'deepspeed is not on PATH'}")
    lines.append(f"several nodes {shutil.which('ssh') or 'ssh is not on PATH (for --hostfile)'}")
    lines.append(f"network       {', '.join(name for _, name in socket.if_nameindex())}")
    lines.append(f"host          {socket.gethostname()} is {_address()}")
    return lines


def describe_others(hostfile: Path) -> str:
    """What the hosts of a hostfile say of themselves, a line each. Raises UserError for those that
    do not answer."""
    hosts, begin = read_hostfile(hostfile), time.time()
    launcher = RemoteLauncher(hosts, "", 0.0)
    try:
        found = launcher.greet(LIMIT, forwarded(os.environ))
        return describe_hosts(hosts, found, (begin + time.time()) / 2)
    finally:
        launcher.close()


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["gpu           none: runs use the CPU and gloo"]
    lines = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        lines.append(f"gpu {index}         {found.name}, {found.total_memory / 2**30:.0f} GiB")
    return lines


def _address() -> str:
    """This host's own address. Ranks on several nodes cannot meet at a loopback address."""
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "not resolved; ranks take the address that leads to rank 0"
    if found.startswith("127."):
        return f"{found}; ranks take the address that leads to rank 0"
    return found


def try_recompute(
    name: str, *, bf16: bool, image_size: int | None, batch: int
) -> tuple[list[str], bool]:
    """One exact training pass of a model with random weights; (lines, whether it was proven)."""
    import torch

    from dr2dist.backbones.build import build_model
    from dr2dist.backbones.convert import convert

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = None if image_size is None else (image_size, image_size)
    model = build_model(name, weights=None, image_size=size, num_classes=10, drop_path=0.1)
    net = convert(model.to(device), 0.9, 0.1, on_failure="record").train()
    images = torch.randn(batch, *net.family.example(net).shape[1:], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = net(images)
    output.float().square().mean().backward()
    certificate = net.certificate()
    functions = sum(len(chain.functions) for chain in net.chains)
    kind = f"{name}, {'bf16' if bf16 else 'fp32'}, {functions} functions on {device.type}"
    if not certificate.failures:
        return [f"recompute     {kind}: bit for bit"], True
    return [f"recompute     {kind}: FAILS", *certificate.messages], False
