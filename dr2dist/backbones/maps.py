"""Models of stages whose states are maps: one chain a stage, and what is between them."""

from __future__ import annotations

from typing import Any, ClassVar

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from dr2dist.backbones.backbone import OUTPUT, Backbone, ChainOf, FeatureInfo, Transition
from dr2dist.backbones.branch import BranchSpec, branches

Parts = dict[type, tuple[BranchSpec, ...]]
"""The branches of blocks by their class."""


class MapBackbone(Backbone):
    """timm's models of stages: each a downsampling, which is a transition, and a chain."""

    stages: ClassVar[str] = "layers"
    """The model's list of stages."""
    parts: ClassVar[Parts]
    """The branches of its blocks."""
    channel_dim: ClassVar[int] = -1
    """Of its maps: -1 for [B, H, W, C], 1 for [B, C, H, W]."""

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""
        found: list[ChainOf | Transition] = []
        for index, stage in enumerate(getattr(model, self.stages)):
            if not isinstance(stage.downsample, nn.Identity):
                where = f"{self.stages}.{index}.downsample"
                found.append(Transition(where, stage.downsample))
            name = f"{self.stages}.{index}.blocks"
            functions = branches(stage.blocks, self.parts, name)
            found.append(ChainOf(name, functions, self.channel_dim))
        return found

    def features(self, model: Any) -> list[FeatureInfo]:
        """See Backbone: after each stage."""
        chains = [layer for layer in self.layers(model) if isinstance(layer, ChainOf)]
        infos = [
            FeatureInfo(
                f"{self.stages}.{index}",
                index,
                len(chain.functions) - 1,
                info["num_chs"],
                info["reduction"],
                "BHWC" if self.channel_dim == -1 else "BCHW",
            )
            for index, (chain, info) in enumerate(zip(chains, model.feature_info, strict=True))
        ]
        return [*infos, infos[-1]._replace(name=OUTPUT)]

    def to_map(self, model: Any, tokens: Tensor) -> Tensor:
        """See Backbone."""
        return tokens.permute(0, 3, 1, 2) if self.channel_dim == -1 else tokens

    def intermediates(self, net: Any, images: Tensor, /, **options: Any) -> Any:
        """See Backbone."""
        return self._maps(net, images, **options)

    def _maps(
        self,
        net: Any,
        images: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps [B, C, H, W] after chosen stages. Raises ValueError for another output_fmt."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}, allowed is NCHW")
        taken, last = feature_take_indices(len(net.chains), indices)
        ends = [(n, len(i.functions) - 1) for n, i in enumerate(net.items) if i in net.chains]
        stop = ends[last] if stop_early else None
        flow = net.forward_taps(images, [ends[index] for index in taken], stop)
        maps = []
        for index in sorted(set(taken)):
            tokens = flow.taps[ends[index]]
            chosen = self.norm(net, tokens) if norm and index == len(ends) - 1 else tokens
            maps.append(self.to_map(net, chosen).contiguous())
        tokens, whole = flow.value, not stop_early or last == len(ends) - 1
        if intermediates_only:
            return maps
        return (self.norm(net, tokens) if whole else tokens), maps
