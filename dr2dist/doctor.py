"""What a machine has, and whether residual functions recompute bit for bit on it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
from importlib.metadata import PackageNotFoundError, version

from dr2dist.arguments import positive
from dr2dist.version import __version__

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "torchmetrics")


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """What `dr2dist doctor` takes."""
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm's name of a model")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--image-size", type=positive, help="pixels; default: the model's own")
    parser.add_argument("--batch", type=positive, default=2, help="images of the trial")
    parser.set_defaults(command=run)


def run(given: argparse.Namespace) -> int:
    """`dr2dist doctor`: 0 if the trial is sound."""
    for line in describe_machine():
        print(line)
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
    lines += [f"{name:13} {_version(name)}" for name in PACKAGES]
    lines.append(f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    lines += _devices()
    lines.append(f"launcher      {shutil.which('deepspeed') or 'deepspeed is not on PATH'}")
    lines.append(f"several nodes {_several_nodes()}")
    lines.append(f"network       {', '.join(name for _, name in socket.if_nameindex())}")
    lines.append(f"host          {socket.gethostname()} is {_address()}")
    return lines


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["gpu           none: runs use the CPU and gloo"]
    lines = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        lines.append(f"gpu {index}         {found.name}, {found.total_memory / 2**30:.0f} GiB")
    return lines


def _several_nodes() -> str:
    pdsh = shutil.which("pdsh")
    return pdsh if pdsh else "pdsh is not on PATH (only needed for --hostfile)"


def _address() -> str:
    """This host's own address. Ranks on several nodes cannot meet at a loopback address."""
    try:
        found = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "not resolved: set GLOO_SOCKET_IFNAME in .deepspeed_env for several nodes"
    if found.startswith("127."):
        return f"{found}: set GLOO_SOCKET_IFNAME in .deepspeed_env for several nodes"
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
