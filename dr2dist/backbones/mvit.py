"""torchvision's MViT (mvit_v1_b, mvit_v2_s): chains between halves of blocks that pool or widen.

A block is two halves, attention and MLP. The half that changes tokens' number or width is a
transition, the other one is a function of the chain behind or before it. Tokens are [B, N, C] with
the class token first; N counts places of a grid that is fixed when a model is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.video.mvit import MSBlockConfig, MultiscaleBlock, MViT

from dr2dist.backbones.backbone import Backbone, ChainOf, Stem, Transition
from dr2dist.backbones.branch import BranchSpec, branches
from dr2dist.backbones.slicing import Tokenwise
from dr2dist.errors import UserError

Places = tuple[int, int, int]
"""Frames, rows and columns of a grid of tokens."""

DEPTHS, HEADS, WIDTHS = (1, 2, 11, 2), (1, 2, 4, 8), (96, 192, 384, 768)
"""Of the four stages of both models: https://arxiv.org/abs/2104.11227, 2112.01526."""
KEYS = ([1, 8, 8], [1, 4, 4], [1, 2, 2], [1, 1, 1])
"""How many places are pooled to one for keys and values, by stage."""
V1 = dict.fromkeys(
    ("residual_pool", "residual_with_cls_embed", "rel_pos_embed", "proj_after_attn"), False
)
V2 = {"residual_pool": True, "rel_pos_embed": True, "proj_after_attn": True}
NAMES: dict[str, dict[str, Any]] = {"mvit_v1_b": {}, "mvit_v2_s": V2}
FRAMES, SIZE = 16, (224, 224)
PLACES = 56 * 56
"""Of the spatial positions of torchvision's weights."""
MEAN, STD = 0.45, 0.225
"""Of torchvision's weights, of each channel."""


class Mvit(MViT):
    """torchvision's model for clips of any number of frames, size and channels.

    frames: a multiple of 2. img_size: height and width, multiples of 4. v2: what MViTv2 does
    otherwise. options: torchvision's, such as dropout (of the head). Raises UserError for others.
    """

    def __init__(
        self,
        v2: dict[str, Any],
        frames: int = FRAMES,
        img_size: tuple[int, int] = SIZE,
        in_chans: int = 3,
        blocks: list[MSBlockConfig] | None = None,
        **options: Any,
    ) -> None:
        clip, strides = (frames, *img_size), (2, 4, 4)
        if any(side % stride for side, stride in zip(clip, strides, strict=True)):
            raise UserError(
                f"MViT takes clips of frames, height and width that are multiples of {strides}: "
                f"found {clip}"
            )
        super().__init__(
            spatial_size=(img_size[0], img_size[1]),
            temporal_size=frames,
            block_setting=blocks or list(_blocks(bool(v2))),
            **{**V1, **v2, "num_classes": 400, **options},
        )
        self.pretrained_cfg = {"first_conv": "conv_proj"}
        proj: Any = self._modules["conv_proj"]
        if in_chans != proj.in_channels:
            self.conv_proj = nn.Conv3d(
                in_chans, proj.out_channels, proj.kernel_size, proj.stride, proj.padding
            )


def _blocks(v2: bool) -> Iterator[MSBlockConfig]:
    """Of the two models that torchvision has."""
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            pools = stage > 0 and block == 0
            widens = (pools and v2) or (block == depth - 1 and stage < 3 and not v2)
            width = WIDTHS[stage]
            yield MSBlockConfig(
                num_heads=HEADS[stage],
                input_channels=width // 2 if widens and v2 else width,
                output_channels=2 * width if widens and not v2 else width,
                kernel_q=[3, 3, 3] if v2 or pools else [],
                kernel_kv=[3, 3, 3],
                stride_q=[1, 2, 2] if pools else [1, 1, 1] if v2 else [],
                stride_kv=KEYS[stage],
            )


def checkpoint_filter_fn(state: dict[str, Tensor], model: Mvit) -> dict[str, Tensor]:
    """Weights of torchvision's names with positions for the model's clips: linear in each
    direction, as torchvision itself does where queries and keys are of other sizes.

    Raises ValueError for spatial positions of another rectangle: no file says its sides.
    """
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    return {
        name: _resized(value, wanted[name][0], name.endswith("spatial_pos"), model)
        if name.endswith(("_pos", *(f".rel_pos_{axis}" for axis in "thw"))) and name in wanted
        else value
        for name, value in state.items()
    }


def _resized(table: Tensor, count: int, square: bool, model: Mvit) -> Tensor:
    """A table [n, C] for `count` places; square: n are those of the model's picture, or of one as
    high as wide. Raises ValueError where n can be neither."""
    if table.ndim != 2:
        return table
    if not square:
        found = functional.interpolate(table.T[None], size=count, mode="linear")
        return found[0].T.contiguous()
    side = round(len(table) ** 0.5)
    size = model.pos_encoding.spatial_size
    # As many as published files have are a square's, whatever the model's rectangle.
    if size == (side, side) or len(table) == size[0] * size[1] != PLACES:
        return table
    if side * side != len(table):
        raise ValueError(
            f"its spatial positions are {len(table)}, allowed are the model's "
            f"{size[0]} x {size[1]}, and those of a square"
        )
    maps = table.T.reshape(1, -1, side, side)
    return functional.interpolate(maps, size=size, mode="bilinear").flatten(2)[0].T.contiguous()


@cache
def _at(compute: Any, places: Places) -> Any:
    """The same object for all blocks whose tokens are there: what it costs is measured once."""
    return partial(compute, places=places)


def _attention(block: Any, x: Tensor, places: Places) -> Tensor:
    found: Tensor = block.stochastic_depth(block.attn(block.norm1(x), places)[0])
    return found


def _mlp(block: Any, x: Tensor) -> Tensor:
    found: Tensor = block.stochastic_depth(block.mlp(block.norm2(x)))
    return found


def _pooled(block: Any, x: Tensor, places: Places) -> Tensor:
    """The whole half: a skip that pools or widens, and attention."""
    normed = block.norm1(x)
    if block.proj_after_attn and block.project is not None:
        x = block.project(normed)
    if block.pool_skip is not None:
        x = block.pool_skip(x, places)[0]
    found: Tensor = x + block.stochastic_depth(block.attn(normed, places)[0])
    return found


def _widened(block: Any, x: Tensor) -> Tensor:
    """The whole half: a skip that widens, and the MLP."""
    normed = block.norm2(x)
    found: Tensor = block.project(normed) + block.stochastic_depth(block.mlp(normed))
    return found


def _halves(block: Any, places: Places) -> list[tuple[BranchSpec, bool]]:
    """Attention and MLP of a block whose tokens are at these places, and which is a function."""
    names: tuple[str, ...] = ("norm1", "attn", "stochastic_depth")
    widens = block.project is not None
    if block.pool_skip is not None or (widens and block.proj_after_attn):
        project = ("project",) if widens and block.proj_after_attn else ()
        names = (*names, *project, "pool_skip")
        first = BranchSpec(names, _at(_pooled, places), alone=False), False
    else:
        first = BranchSpec(names, _at(_attention, places), alone=False), True
    names = ("norm2", "mlp", "stochastic_depth")
    if widens and not block.proj_after_attn:
        return [first, (BranchSpec((*names, "project"), _widened, alone=False), False)]
    return [first, (BranchSpec(names, _mlp, slicing=Tokenwise(), alone=False), True)]


def _behind(block: Any, places: Places) -> Places:
    """Where tokens are that a block gives: its queries are pooled by a convolution."""
    if block.attn.pool_q is None:
        return places
    pool = block.attn.pool_q.pool
    shapes = zip(places, pool.kernel_size, pool.stride, pool.padding, strict=True)
    frames, rows, columns = ((n + 2 * edge - side) // step + 1 for n, side, step, edge in shapes)
    return frames, rows, columns


class MvitBackbone(Backbone):
    """Chains between half blocks that pool or widen."""

    name = "mvit"
    patterns = ("mvit_v1_b", "mvit_v2_s")
    classes = (Mvit, MViT)
    input = "video"
    tail = ("norm", "head")

    def build(self, name: str, **options: Any) -> nn.Module | None:
        """See Backbone. Options: frames of a clip (16), and those of torchvision's MViT."""
        if name not in NAMES:
            return None
        renamed = {"drop_path_rate": "stochastic_depth_prob", "proj_drop_rate": "attention_dropout"}
        return Mvit(NAMES[name], **{renamed.get(key, key): v for key, v in options.items()})

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        own: Any = type(model)
        return (
            isinstance(model, MViT)
            and own.forward is MViT.forward
            and not any(getattr(block, "needs_transposal", False) for block in model.blocks)
        )

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""
        branches(model.blocks, {MultiscaleBlock: ()}, "blocks")  # refuses others
        found: list[ChainOf | Transition] = []
        functions: list[nn.Module] = []
        places = _grid(model)
        for number, block in enumerate(model.blocks):
            for spec, is_function in _halves(block, places):
                half = spec.cut(block)
                if is_function:
                    functions.append(half)
                    continue
                found += _chain(functions, found)
                functions = []
                found.append(Transition(f"blocks.{number}", half))
            places = _behind(block, places)
        return [*found, *_chain(functions, found)]

    def stem(self, model: Any, clips: Tensor, /, **options: Any) -> Stem:
        """Clips [B, C, T, H, W] of the model's own size. No options.

        Raises UserError for others.
        """
        wanted = _clip_size(model)
        if tuple(clips.shape[2:]) != wanted:
            raise UserError(
                f"clips are of {list(clips.shape[2:])} frames, rows and columns, the model is "
                f"built for {list(wanted)}"
            )
        tokens = model.conv_proj(clips).flatten(2).transpose(1, 2)
        return Stem(model.pos_encoding(tokens))

    def head(self, model: Any, features: Tensor) -> Any:
        """Logits of the class token, of which the head's dropout gets a copy to write to."""
        return model.head(features[:, 0].clone())

    def preprocessing(self, model: Any) -> dict[str, Any]:
        """Of clips: as of images, frames, and tubelet, the frames of a token."""
        frames, *size = _clip_size(model)
        channels = model.conv_proj.in_channels
        taken = {"frames": frames, "tubelet": model.conv_proj.stride[0]}
        return {
            **taken,
            "size": size,
            "channels": channels,
            "mean": [MEAN] * channels,
            "std": [STD] * channels,
        }

    def example(self, model: Any) -> Tensor:
        """See Backbone."""
        weight = model.conv_proj.weight
        return weight.new_zeros(1, weight.shape[1], *_clip_size(model))


def _chain(functions: list[nn.Module], before: list[Any]) -> list[ChainOf]:
    """The next chain, if it has any functions."""
    number = sum(isinstance(each, ChainOf) for each in before)
    return [ChainOf(f"chains.{number}", functions)] if functions else []


def _clip_size(model: Any) -> Places:
    """Frames, height and width that a model is built for."""
    strides = model.conv_proj.stride
    frames, height, width = (n * step for n, step in zip(_grid(model), strides, strict=True))
    return frames, height, width


def _grid(model: Any) -> Places:
    """Where the tokens of its first chain are."""
    height, width = model.pos_encoding.spatial_size
    return model.pos_encoding.temporal_size, height, width
