"""What states of 16 bits cost in accuracy of a pass, beside what training in bf16 costs anyway.

    python benchmarks/rounding.py       (after launch/quickstart.sh, which fetches the weights)

The pretrained ViT-S/14 on 32 held-out photographs of the quickstart, weights and tokens in
bf16: relative errors of the normed features, and of the gradient of a random projection of the
class token by all parameters, against the same coefficients in fp32.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor

import dr2dist
from benchmarks.features import pretrained

WAYS: dict[str, tuple[float, dict[str, Any]]] = {
    "conventional": (0.0, {"arithmetic": "float", "memory": "store"}),
    "floating point, tokens in bf16": (0.1, {"arithmetic": "float", "memory": "store"}),
    "exact, states of 32 bits": (0.1, {}),
    "exact, states of 16 bits": (0.1, {"state_bits": 16}),
}
"""By name: beta, and options of `convert`. The first is timm's model."""


def results(net: Any, images: Tensor) -> list[Tensor]:
    """Normed features, and the gradient by all parameters, in fp32."""
    features = net.forward_features(images)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(features.shape[-1], generator=generator)
    (features[:, 0].float() @ weights).mean().backward()
    gradients = [p.grad.float().flatten() for p in net.parameters() if p.grad is not None]
    return [features.detach().float(), torch.cat(gradients)]


def errors(model: Any, images: Tensor, beta: float, options: dict[str, Any]) -> list[float]:
    """Of a way in bf16, relative to its network in fp32."""

    def net() -> Any:
        return dr2dist.convert(copy.deepcopy(model), 1 - beta, beta, **options)

    wanted = results(net(), images)
    found = results(net().bfloat16(), images.bfloat16())
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


def main() -> None:
    """Prints a table."""
    model, images = pretrained()
    sys.stdout.write("| weights and tokens in bf16 | features | gradient |\n|---|---|---|\n")
    for name, (beta, options) in WAYS.items():
        features, gradient = errors(model, images, beta, options)
        sys.stdout.write(f"| {name} | {features:.4f} | {gradient:.4f} |\n")


if __name__ == "__main__":
    main()
