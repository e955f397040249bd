"""How far a converted network's features are from those of the pretrained model it is made of.

    python benchmarks/features.py       (after launch/quickstart.sh, which fetches the weights)

Normed features of the pretrained ViT-S/14 on 32 held-out photographs of the quickstart, 112 pixels:
|converted - timm's| / |timm's| over all tokens, and the mean cosine of the class token.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dr2dist
from dr2dist.assembly import assemble
from dr2dist.config import load_config
from dr2dist.data.fields import Fields
from dr2dist.data.stream import ShardDataset
from dr2dist.training.plan import make_plan

PAIRS = ((1.0, 0.0), (0.95, 0.05), (0.9, 0.1), (0.5, 0.5), (1.0, 0.1), (0.3, 0.7))


def pretrained() -> tuple[Any, Tensor]:
    """(the quickstart's model, 32 of its held-out photographs)."""
    root = Path(__file__).resolve().parent.parent
    config = load_config(str(root / "configs/elpv_vit_small.yaml"), [])
    plan = make_plan(config, 1)
    task = plan.task
    data = ShardDataset(root / str(config.data.val), Fields(task.fields), task.transform())
    images = torch.stack([data[0, index].values["image"] for index in range(32)])
    return assemble(plan.blueprint).model.eval(), images


def main() -> None:
    """Prints one line for each pair of coefficients."""
    model, images = pretrained()
    with torch.inference_mode():
        wanted = model.forward_features(images)
        for alpha, beta in PAIRS:
            exact = {} if beta else {"arithmetic": "float", "memory": "store"}
            found = dr2dist.convert(model, alpha, beta, **exact).forward_features(images)
            away = float((found - wanted).norm() / wanted.norm())
            cosine = float(torch.cosine_similarity(found[:, 0], wanted[:, 0]).mean())
            sys.stdout.write(f"alpha {alpha}, beta {beta}: {away:.3f} away, cosine {cosine:.3f}\n")


if __name__ == "__main__":
    main()
