"""VideoMAE: a transformer of BEiT's blocks on tubelets (arXiv 2203.12602; V2 2303.16727).

Weights are read in the layout of the authors' files (finetuned and pretraining ones), of
transformers', and of timm's ViT and BEiT, which are inflated over time.
"""

from __future__ import annotations

import logging
import math
import re
from functools import partial
from typing import Any

import torch
from timm.models.beit import Block
from torch import Tensor, nn
from torch.nn import functional

from dr2dist.backbones.backbone import (
    OUTPUT,
    Backbone,
    ChainOf,
    FeatureInfo,
    Stem,
    Transition,
    is_built_as,
)
from dr2dist.backbones.beit import PARTS
from dr2dist.backbones.branch import branches
from dr2dist.errors import UserError

log = logging.getLogger(__name__)

SHAPES: dict[str, dict[str, Any]] = {
    "videomae_small_patch16": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "videomae_base_patch16": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "videomae_large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "videomae_huge_patch16": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "videomae_giant_patch14": {
        "embed_dim": 1408,
        "depth": 40,
        "num_heads": 16,
        "patch_size": 14,
        "mlp_ratio": 48 / 11,
    },
}
PRETRAINED_FRAMES, PRETRAINED_SIZE = 16, 224
"""Of the clips that the position table was made for."""
POSITIONS = ("fixed", "learned")


class TubeletEmbed(nn.Module):
    """Clips [B, C, T, H, W] to tokens [B, T' H' W', D] of tubelets, frame after frame."""

    def __init__(
        self,
        img_size: tuple[int, int],
        frames: int,
        patch_size: int,
        tubelet: int,
        in_chans: int,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.img_size, self.frames = img_size, frames
        self.patch_size, self.tubelet, self.in_chans = (patch_size, patch_size), tubelet, in_chans
        kernel = (tubelet, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, kernel, kernel)

    @property
    def grid_size(self) -> tuple[int, int, int]:
        """Tubelets over time, height and width."""
        height, width = self.img_size
        return (
            self.frames // self.tubelet,
            height // self.patch_size[0],
            width // self.patch_size[1],
        )

    def forward(self, clips: Tensor) -> Tensor:
        """Raises UserError for clips of another size, for which there are no positions."""
        wanted = (self.frames, *self.img_size)
        if tuple(clips.shape[2:]) != wanted:
            raise UserError(
                f"clips of {list(clips.shape[2:])} frames, height and width, the model is built "
                f"for {list(wanted)}"
            )
        tokens: Tensor = self.proj(clips).flatten(2).transpose(1, 2)
        return tokens


class VideoMae(nn.Module):
    """The network, with a mean over tokens before its last norm and its head.

    img_size: height and width; frames: of a clip, in tubelets of `tubelet`. chunks: clips of so
    many frames that a longer one is cut into; they do not see each other. norm_eps, fc_norm_eps:
    of the blocks' norms and the last one: 1e-6 of the authors, 1e-12 and 1e-5 of transformers. No
    file says them, nor num_heads. positions: "fixed" is the table of sines, resized to other sizes
    than the one it was made for; "learned" is a parameter, as inflated image models need.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        img_size: tuple[int, int] = (PRETRAINED_SIZE, PRETRAINED_SIZE),
        frames: int = PRETRAINED_FRAMES,
        chunks: int = 1,
        patch_size: int = 16,
        tubelet: int = 2,
        in_chans: int = 3,
        num_classes: int = 400,
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        norm_eps: float = 1e-6,
        fc_norm_eps: float | None = None,
        positions: str = "fixed",
    ) -> None:
        super().__init__()
        if frames % tubelet:
            raise UserError(f"frames is {frames}, allowed are multiples of {tubelet}")
        if chunks < 1:
            raise UserError(f"chunks is {chunks}, allowed is at least 1")
        if positions not in POSITIONS:
            raise UserError(f"positions is {positions}, allowed is {' or '.join(POSITIONS)}")
        self.embed_dim, self.num_features, self.num_classes = embed_dim, embed_dim, num_classes
        self.num_prefix_tokens, self.chunks = 0, chunks
        self.pretrained_cfg = {
            "input_size": (in_chans, *img_size),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj",
            "classifier": ("head", "fc_norm"),
        }
        size = (img_size[0], img_size[1])
        self.patch_embed = TubeletEmbed(size, frames, patch_size, tubelet, in_chans, embed_dim)
        grid = self.patch_embed.grid_size
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1] * grid[2], embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        else:
            side = PRETRAINED_SIZE // patch_size
            base = (PRETRAINED_FRAMES // tubelet, side, side)
            table = resized(sines(base[0] * side * side, embed_dim), base, grid)
            self.register_buffer("pos_embed", table, persistent=False)
        self.pos_drop = nn.Dropout(proj_drop_rate)
        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                qkv_bias=True,
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                drop_path=drop_path_rate * number / max(depth - 1, 1),
                init_values=init_values,
                norm_layer=norm,
            )
            for number in range(depth)
        )
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, norm_eps if fc_norm_eps is None else fc_norm_eps)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def embed(self, clips: Tensor) -> Tensor:
        """Clips [B, C, chunks * T, H, W] to tokens [B * chunks, N, D] with their positions.

        Raises UserError for clips of another length.
        """
        if self.chunks > 1:
            wanted = self.chunks * self.patch_embed.frames
            if clips.shape[2] != wanted:
                raise UserError(
                    f"clips of {clips.shape[2]} frames, the model is built for {self.chunks} "
                    f"chunks of {self.patch_embed.frames}"
                )
            clips = clips.unflatten(2, (self.chunks, -1)).transpose(1, 2).flatten(0, 1)
        tokens = self.patch_embed(clips)
        return self.pos_drop(tokens + self.pos_embed.to(tokens.dtype))

    def forward_features(self, clips: Tensor) -> Tensor:
        """Tokens [B * chunks, N, D] after the last block."""
        tokens = self.embed(clips)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Logits of the mean over a clip's tokens."""
        whole = tokens.reshape(-1, self.chunks * tokens.shape[1], tokens.shape[2])
        return self.head(self.fc_norm(whole.mean(1)))

    def forward(self, clips: Tensor) -> Tensor:
        """Clips [B, C, T, H, W] to logits."""
        return self.forward_head(self.forward_features(clips))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sines(count: int, width: int) -> Tensor:
    """One table over all tokens in order, in pairs of sine and cosine: fp32 [1, count, width]."""
    place = torch.arange(count, dtype=torch.float64)[:, None]
    pair = torch.arange(width, dtype=torch.float64) // 2
    angle = place / 10000 ** (2 * pair / width)
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return table.float()[None]


def resized(table: Tensor, before: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """Positions [1, N, D] of a grid (time, height, width) for another one: bicubic in space, as
    published finetuning on other sizes does it, and linear in time."""
    if before == grid:
        return table
    maps = table.unflatten(1, before).squeeze(0).permute(0, 3, 1, 2)
    if before[1:] != grid[1:]:
        maps = functional.interpolate(maps, grid[1:], mode="bicubic", align_corners=False)
    lines = maps.permute(2, 3, 1, 0).flatten(0, 1)
    if before[0] != grid[0]:
        lines = functional.interpolate(lines, grid[0], mode="linear", align_corners=False)
    return lines.permute(2, 0, 1).flatten(0, 1)[None].contiguous()


_OF_TRANSFORMERS = (
    (r"^videomae\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.q(?:uery\.|_)bias$", ".attn.q_bias"),
    (r"\.attention\.attention\.v(?:alue\.|_)bias$", ".attn.v_bias"),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_OF_OTHERS = (
    (r"^encoder\.", ""),  # the authors' pretraining files
    (r"^patch_embed\.projection\.", "patch_embed.proj."),  # mmaction's
    (r"\.mlp\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.mlp\.layers\.1\.", ".mlp.fc2."),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),  # timm's ViT
)
_LEFT = r"^(decoder|encoder_to_decoder|mask_token|position_embeddings|cls_token|reg_token|norm\.)"
_PREFIX = ("cls_token", "reg_token")
_RELATIVE = r"rel_pos_bias|relative_position"


def checkpoint_filter_fn(state: dict[str, Tensor], model: VideoMae) -> dict[str, Tensor]:
    """Weights of any of the layouts by this model's names, at its size and length.

    Decoders, tokens of no place and the norm before a mean are left out, as finetuning leaves them.
    Raises ValueError for learned positions where the model has fixed ones, and for those of an
    image that is neither of the model's size nor as high as wide.
    """
    of_transformers = any(".layernorm_before." in name for name in state)
    rules = _OF_TRANSFORMERS if of_transformers else _OF_OTHERS
    named = {_renamed(name, rules): value for name, value in state.items()}
    found = {name: value for name, value in named.items() if not re.match(_LEFT, name)}
    relative = [name for name in found if re.search(_RELATIVE, name)]
    if relative:
        log.warning("relative positions are left out: %s and its like", relative[0])
    found = {name: value for name, value in found.items() if name not in relative}
    _join_queries(found)
    if "fc_norm.weight" not in found and "norm.weight" in named and "cls_token" in named:
        found |= {f"fc_norm.{kind}": named[f"norm.{kind}"] for kind in ("weight", "bias")}
    return _inflated(found, model, sum(named[n].shape[1] for n in _PREFIX if n in named))


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, text in rules:
        name = re.sub(pattern, text, name)
    return name


def _join_queries(state: dict[str, Tensor]) -> None:
    """Query, key and value as one weight, and biases of queries and values alone: a bias of keys
    adds the same to all logits of a query."""
    for name in [name for name in state if name.endswith(".attn.query.weight")]:
        start = name.removesuffix("query.weight")
        parts = [state.pop(f"{start}{kind}.weight") for kind in ("query", "key", "value")]
        state[f"{start}qkv.weight"] = torch.cat(parts)
        state.pop(f"{start}key.bias", None)
    for name in [name for name in state if name.endswith(".attn.qkv.bias")]:
        queries, _, values = state.pop(name).chunk(3)
        start = name.removesuffix("qkv.bias")
        state[f"{start}q_bias"], state[f"{start}v_bias"] = queries, values
    for name in [name for name in state if name.endswith(".attn.k_bias")]:
        del state[name]


def _inflated(state: dict[str, Tensor], model: VideoMae, prefix: int) -> dict[str, Tensor]:
    """An image model's patches and positions over time: a still clip's tokens are the image's.

    prefix: the file's tokens of no place.
    """
    weight, tubelet = state.get("patch_embed.proj.weight"), model.patch_embed.tubelet
    flat = weight is not None and weight.ndim == 4
    if weight is not None and flat:
        state["patch_embed.proj.weight"] = weight[:, :, None].repeat(1, 1, tubelet, 1, 1) / tubelet
    table = state.get("pos_embed")
    if table is None:
        return state
    if not isinstance(model.pos_embed, nn.Parameter):
        raise ValueError("it has learned positions: model.options={positions: learned} takes them")
    grid = model.patch_embed.grid_size
    if flat:
        rows, columns = _image_grid(table.shape[1], prefix, model.patch_embed)
        places = table[:, table.shape[1] - rows * columns :].repeat(1, grid[0], 1)
        state["pos_embed"] = resized(places, (grid[0], rows, columns), grid)
    return state


def _image_grid(count: int, prefix: int, embed: TubeletEmbed) -> tuple[int, int]:
    """Rows and columns of an image model's positions, of which tokens of no place have the first,
    or none: a square of published size, the model's own grid, or another square."""
    _, rows, columns = embed.grid_size
    published = PRETRAINED_SIZE // embed.patch_size[0]
    for places in (count - prefix, count):
        side = math.isqrt(max(places, 0))
        if places == rows * columns and side != published:
            return rows, columns
        if side * side == places:
            return side, side
    raise ValueError(
        f"it has {count} positions, {prefix} of them of no place; allowed are those of "
        f"{rows} x {columns} places, and of a square"
    )


class VideoMaeBackbone(Backbone):
    """One chain of all blocks, on clips [B, C, T, H, W]."""

    name = "videomae"
    patterns = ("videomae_*",)
    classes = (VideoMae,)
    input = "video"
    tail = ("norm", "fc_norm", "head")

    def build(self, name: str, **options: Any) -> nn.Module | None:
        """See Backbone. Options: those of VideoMae, such as frames."""
        return VideoMae(**{**SHAPES[name], **options}) if name in SHAPES else None

    def matches(self, model: nn.Module) -> bool:
        """See Backbone."""
        return is_built_as(model, VideoMae)

    def layers(self, model: Any) -> list[ChainOf | Transition]:
        """See Backbone."""
        return [ChainOf("blocks", branches(model.blocks, PARTS, "blocks"))]

    def stem(self, model: Any, clips: Tensor, /, **options: Any) -> Stem:
        """No options."""
        return Stem(model.embed(clips), rows=model.chunks, apart=True)

    def preprocessing(self, model: Any) -> dict[str, Any]:
        """Of clips: as of images, frames, and tubelet, the frames of a token."""
        embed = model.patch_embed
        taken = {"frames": model.chunks * embed.frames, "tubelet": embed.tubelet}
        return {**taken, **super().preprocessing(model)}

    def example(self, model: Any) -> Tensor:
        """See Backbone."""
        embed = model.patch_embed
        frames = model.chunks * embed.frames
        return embed.proj.weight.new_zeros(1, embed.in_chans, frames, *embed.img_size)

    def features(self, model: Any) -> list[FeatureInfo]:
        """See Backbone: after each block."""
        embed = model.patch_embed
        shape = (model.embed_dim, embed.patch_size[0], "BNC", model.chunks, embed.grid_size)
        infos = [FeatureInfo(f"blocks.{k}", 0, 2 * k + 1, *shape) for k in range(len(model.blocks))]
        return [*infos, infos[-1]._replace(name=OUTPUT)]
