"""Video Swin and VideoMAE: the models themselves, reversed exactly, in slices, from any file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification

import dr2dist
from dr2dist.backbones.build import build_model
from dr2dist.errors import UserError
from tests.models import VIDEO, build, inputs
from tests.modes import assert_modes_agree, one_step
from tests.pool import Pool
from tests.test_backbones import CONVENTIONAL, assert_close, assert_state_is_of

SIZES = [(8, 32, 32), (5, 26, 33), (12, 16, 48), (2, 8, 8)]


def swin3d(window: list[int], **options: Any) -> SwinTransformer3d:
    torch.manual_seed(0)
    model = SwinTransformer3d(
        [2, 4, 4], 12, [2, 2], [2, 4], window, num_classes=5, stochastic_depth_prob=0.3, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [[2, 3, 3], [8, 7, 7]])
def test_video_swin_is_itself_at_any_size_and_in_slices(
    size: tuple[int, ...], window: list[int]
) -> None:
    model, clips = swin3d(window).eval(), torch.randn(2, 3, *size)
    net = dr2dist.convert(model, **CONVENTIONAL)
    assert_state_is_of(net, model)
    wanted = model(clips)
    assert torch.equal(net(clips), wanted)
    for tokens in (1, 40, 10**6):
        sliced = dr2dist.convert(model, **CONVENTIONAL, chunk_size=1, chunk_tokens=tokens)
        assert (sliced(clips) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("window", [[2, 3, 3], [2, 9, 9]], ids=["rows", "one row"])
def test_slices_attend_in_one_window_at_a_time(window: list[int]) -> None:
    """The logits of a map's windows, 162 of them or 4, are never there together."""
    model, largest = swin3d(window), []
    net = dr2dist.convert(model, chunk_size=1, chunk_tokens=1).train()
    original = nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, *rest: Any, **more: Any) -> Tensor:
        largest.append(query.shape[0])
        return original(query, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", watched)
        net(torch.randn(1, 3, 8, 36, 36)).sum().backward()
    assert largest and max(largest) == 1


PAIRS = [(0.9, 0.1), (0.5, 0.5), (1, 0.1)]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(
    ("kind", "pair"),
    [
        *((kind, pair) for kind in ("swin3d", "videomae") for pair in PAIRS),
        ("mvit", PAIRS[0]),
        *(pytest.param("mvit", pair, marks=pytest.mark.slow) for pair in PAIRS[1:]),
    ],
)
def test_reversal_is_exact_with_droppath_and_slices(
    kind: str, pair: tuple[float, float], bf16: bool
) -> None:
    model = build(kind, depth=4, drop_path_rate=0.3, proj_drop_rate=0.1)
    x = inputs(kind)
    for slices in ({}, {"chunk_size": 2}, {"chunk_size": 1, "chunk_tokens": 30}):
        found = one_step(model, x, bf16, alpha=pair[0], beta=pair[1], **slices)
        for memory in ("store", "checkpoint"):
            setting = {"alpha": pair[0], "beta": pair[1], "memory": memory, **slices}
            for one, two in zip(found, one_step(model, x, bf16, **setting), strict=True):
                assert (one is None and two is None) or torch.equal(one, two)


def test_a_samples_path_is_dropped_alike_in_all_slices_of_it() -> None:
    """By the mean of many draws, the branches of a sample are there as often as they should be."""
    model = swin3d([2, 3, 3]).train()
    x = torch.randn(1, 3, 8, 36, 36)
    whole = dr2dist.convert(model, chunk_size=1)
    sliced = dr2dist.convert(model, chunk_size=1, chunk_tokens=1)
    seen: list[set[Tensor]] = []
    for net in (whole, sliced):
        outputs = []
        for seed in range(12):
            torch.manual_seed(seed)
            outputs.append(net(x).detach())
        seen.append({round(float(output.sum()), 3) for output in outputs})
    # As many different outcomes as seven random branches give of twelve draws: not one a slice.
    assert all(1 < len(each) <= 12 for each in seen)


@pytest.mark.parametrize(
    "kind", ["swin3d", "videomae", pytest.param("mvit", marks=pytest.mark.slow)]
)
def test_engines_agree_in_every_bit_of_the_weights(kind: str, two_ranks: Pool) -> None:
    assert_modes_agree(two_ranks, kind, 3, chunk_size=1, chunk_tokens=30)


@pytest.mark.parametrize("kind", VIDEO)
def test_zero_and_stages_follow_one_curve(
    kind: str, one_rank: Pool, two_ranks: Pool, four_ranks: Pool
) -> None:
    (wanted, *_), *_ = two_ranks.run("tests.cases:curve", kind=kind, zero=0, steps=6)
    for zero in (1, 2, 3):
        (found, *_), *_ = two_ranks.run("tests.cases:curve", kind=kind, zero=zero, steps=6)
        assert found == pytest.approx(wanted, rel=1e-4)
    ((wanted, *_),) = one_rank.run("tests.stage_cases:curve", kind=kind, stages=1, steps=6)
    for stages, pool in ((2, two_ranks), (4, four_ranks)):
        (found, *_), *_ = pool.run("tests.stage_cases:curve", kind=kind, stages=stages, steps=6)
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("v2", [False, True])
def test_mvit_is_itself_and_pools_between_its_chains(v2: bool) -> None:
    model, clips = build("mvit", depth=4, v2=v2).eval(), inputs("mvit")
    net = dr2dist.convert(model, **CONVENTIONAL)
    assert_state_is_of(net, model)
    assert torch.equal(net(clips), model(clips))
    # v1 widens in the first block's MLP, and pools in the second one's attention.
    assert [len(chain.functions) for chain in net.chains] == ([2, 5] if v2 else [1, 5])
    for slices in ({"chunk_size": 1}, {"chunk_size": 1, "chunk_tokens": 30}):
        sliced = dr2dist.convert(model, **CONVENTIONAL, **slices)
        assert_close(sliced(clips), model(clips))
    steps = (one_step(model.train(), clips, False, memory=m) for m in ("reverse", "store"))
    for one, two in zip(*steps, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    model.eval()
    model.blocks[1].mlp = nn.Identity()  # replaced modules take effect, of a transition too
    model.blocks[1].attn.project = nn.Identity()
    net.blocks[1] = model.blocks[1]
    assert torch.equal(net(clips), model(clips))
    net.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=r"blocks\.0 has a hook"):
        net(clips)
    net = dr2dist.convert(build("mvit", depth=4, v2=v2), **CONVENTIONAL)
    with pytest.raises(UserError, match=r"\[4, 32, 32\] frames.*, the model is built for \[8"):
        net(clips[:, :, :4])


@pytest.mark.parametrize(("name", "functions"), [("mvit_v1_b", 26), ("mvit_v2_s", 29)])
def test_mvit_has_torchvisions_weights_at_any_size(
    name: str, functions: int, tmp_path: Path
) -> None:
    with torch.device("meta"):
        wanted = getattr(torchvision.models.video, name)().state_dict()
    model = build_model(name, weights=None, image_size=None, num_classes=400)
    found = model.state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
    assert sum(len(chain.functions) for chain in dr2dist.convert(model).chains) == functions
    path = tmp_path / "weights.safetensors"
    save_file(found, path)
    options: Any = {"num_classes": 5, "options": {"frames": 4}, "in_channels": 1}
    smaller = build_model(name, weights=str(path), image_size=(32, 64), **options).eval()
    if name == "mvit_v1_b":  # as many places as there were, elsewhere
        wide = build_model(name, weights=str(path), image_size=(112, 448), num_classes=5)
        wanted = found["pos_encoding.spatial_pos"].view(56, 56, -1)
        rows = nn.functional.interpolate(
            wanted.permute(2, 0, 1)[None], size=(28, 112), mode="bilinear"
        )
        table = wide.pos_encoding.spatial_pos.detach().view(28, 112, -1)
        assert torch.equal(table, rows[0].permute(1, 2, 0))
    assert torch.equal(smaller.blocks[3].mlp[0].weight, found["blocks.3.mlp.0.weight"])
    assert smaller(torch.zeros(1, 1, 4, 32, 64)).shape == (1, 5)
    with pytest.raises(UserError, match=r"multiples of \(2, 4, 4\): found \(16, 30, 30\)"):
        build_model(name, weights=None, image_size=(30, 30), num_classes=5)


def test_mvit_keeps_positions_of_its_own_rectangle(tmp_path: Path) -> None:
    """Of 32 x 72 places, as many as of a square of 48, and of 16 x 24, which are no square's."""
    path, options = tmp_path / "own.safetensors", {"frames": 4}
    for size in ((128, 288), (64, 96)):
        shape: Any = {"image_size": size, "num_classes": 5, "options": options}
        model = build_model("mvit_v1_b", weights=None, **shape)
        save_file(model.state_dict(), path)
        again = build_model("mvit_v1_b", weights=str(path), **shape)
        assert torch.equal(again.pos_encoding.spatial_pos, model.pos_encoding.spatial_pos)
    with pytest.raises(UserError, match="positions are 384, allowed are the model's 8 x 8, and"):
        build_model("mvit_v1_b", weights=str(path), image_size=(32, 32), num_classes=5)


SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3, "frames": 4}
NAME = "videomae_small_patch16"


def videomae(path: Path | None = None, size: tuple[int, int] = (224, 224), **options: Any) -> Any:
    torch.manual_seed(1)
    return build_model(
        NAME,
        weights=None if path is None else str(path),
        image_size=size,
        num_classes=5,
        options={**SMALL, **options},
    ).eval()


def of_transformers(kind: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=224,
        num_frames=4,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        num_labels=5,
        **more,
    )
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_transformers_files_give_transformers_outputs(tmp_path: Path) -> None:
    """With its table of positions for four frames, which begins as that for sixteen does."""
    theirs = of_transformers(VideoMAEForVideoClassification)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = videomae(tmp_path / "model.safetensors", norm_eps=1e-12, fc_norm_eps=1e-5)
    ours.pos_embed.copy_(theirs.videomae.embeddings.position_embeddings)
    clips = torch.randn(2, 3, 4, 224, 224)
    wanted = theirs(clips.transpose(1, 2)).logits
    assert_close(ours(clips), wanted)
    assert_close(dr2dist.convert(ours, **CONVENTIONAL)(clips), wanted)


def test_positions_are_transformers_where_they_are_not_resized() -> None:
    theirs = VideoMAEForVideoClassification(
        VideoMAEConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=3)
    )
    ours = videomae(frames=16)
    assert (ours.pos_embed - theirs.videomae.embeddings.position_embeddings).abs().max() < 1e-6
    longer = videomae(frames=32, size=(112, 224))
    assert longer.pos_embed.shape == (1, 16 * 7 * 14, 48)
    maps = ours.pos_embed.unflatten(1, (8, 14, 14))
    # Linear in time: a new frame lies between its neighbours.
    again = videomae(frames=32).pos_embed.unflatten(1, (16, 14, 14))
    assert_close(again[:, 1], 0.75 * maps[:, 0] + 0.25 * maps[:, 1])


@pytest.mark.parametrize("layout", ["transformers", "authors"])
def test_pretraining_files_give_all_but_the_head(layout: str, tmp_path: Path) -> None:
    theirs = of_transformers(
        VideoMAEForPreTraining, decoder_hidden_size=24, decoder_num_hidden_layers=1
    )
    state = theirs.state_dict()
    if layout == "authors":
        blocks = videomae(_saved(state, tmp_path / "a.safetensors")).state_dict()
        state = {f"encoder.{name}": v for name, v in blocks.items() if "head" not in name}
        state = {name: v for name, v in state.items() if "fc_norm" not in name}
        state |= {"encoder.norm.weight": torch.ones(48), "encoder.norm.bias": torch.ones(48)}
        state |= {"mask_token": torch.ones(1), "decoder.head.weight": torch.ones(3, 3)}
    found = videomae(_saved(state, tmp_path / "b.safetensors")).state_dict()
    query = theirs.state_dict()["videomae.encoder.layer.2.attention.attention.query.weight"]
    assert torch.equal(found["blocks.2.attn.qkv.weight"][:48], query)
    assert torch.equal(found["fc_norm.weight"], torch.ones(48))  # new, as finetuning has it


def _saved(state: dict[str, Tensor], path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def image_model(size: tuple[int, int], **options: Any) -> Any:
    torch.manual_seed(0)
    shape = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5, "global_pool": "avg"}
    options = {"class_token": False, **shape, **options}
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("size", [(224, 224), (64, 144), (112, 224)], ids=str)
def test_an_image_model_gives_a_video_start(size: tuple[int, int], tmp_path: Path) -> None:
    """On a still clip the inflated model gives what the image model gives: of 4 x 9 places too,
    as many as of a square."""
    source, image = image_model(size), torch.randn(2, 3, *size)
    path = _saved(source.state_dict(), tmp_path / "image.safetensors")
    model = videomae(path, size, positions="learned")
    wanted = source(image)
    assert_close(model(image[:, :, None].expand(-1, -1, 4, -1, -1)), wanted)


def test_an_image_models_positions_are_resized(tmp_path: Path) -> None:
    path = _saved(image_model((224, 224)).state_dict(), tmp_path / "image.safetensors")
    with pytest.raises(UserError, match=r"has learned positions: .*positions: learned"):
        videomae(path)
    wider = videomae(path, size=(112, 112), positions="learned", frames=6)
    assert wider.pos_embed.shape == (1, 3 * 49, 48)
    tokens: Any = {"class_token": True, "reg_tokens": 4}
    for more in (tokens, {**tokens, "no_embed_class": True}):
        state = image_model((64, 144), **more).state_dict()
        path = _saved(state, tmp_path / "tokens.safetensors")
        found = videomae(path, (64, 144), positions="learned").pos_embed
        assert torch.equal(found, state["pos_embed"][:, -36:].repeat(1, 2, 1))
    path = _saved(image_model((112, 224)).state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="it has 98 positions, 0 of them of no place; allowed are"):
        videomae(path, (64, 144), positions="learned")


def test_beit_and_class_tokens_give_a_start_too(tmp_path: Path) -> None:
    shape = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    for name, more in (
        ("beit_base_patch16_224", {"init_values": 0.1}),
        ("vit_tiny_patch16_224", {}),
    ):
        torch.manual_seed(0)
        source = timm.create_model(name, **shape)
        path = _saved(source.state_dict(), tmp_path / f"{name}.safetensors")
        learned = {"positions": "learned"} if name.startswith("vit") else {}
        model = videomae(path, **more, **learned)
        found = model.state_dict()["blocks.1.mlp.fc1.weight"]
        assert torch.equal(found, source.state_dict()["blocks.1.mlp.fc1.weight"])
        assert model(torch.randn(1, 3, 4, 224, 224)).shape == (1, 5)


def test_models_by_name_and_what_they_cannot_be() -> None:
    options = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": (2, 3, 3)}
    model = build_model(
        "swin3d_t",
        weights=None,
        image_size=(36, 36),
        num_classes=7,
        options={**options, "frames": 4},
    )
    net = dr2dist.convert(model)
    assert net(net.family.example(net)).shape == (1, 7)
    said = net.family.preprocessing(net)
    assert (said["frames"], said["size"], said["channels"]) == (4, [36, 36], 3)
    with pytest.raises(UserError, match="frames is 5, allowed are multiples of 2"):
        videomae(frames=5)
    with pytest.raises(UserError, match="positions is none, allowed is fixed or learned"):
        videomae(positions="none")
    with pytest.raises(UserError, match=r"clips of \[8, 224, 224\] .* built for \[4, 224, 224\]"):
        videomae()(torch.randn(1, 3, 8, 224, 224))
    with pytest.raises(UserError, match="image_size"):
        videomae(size=(100, 100))
    with pytest.raises(UserError, match="window_size are of time, height, width"):
        build_model(
            "swin3d_t",
            weights=None,
            image_size=None,
            num_classes=7,
            options={"window_size": (7, 7)},
        )


def test_one_channel_and_two(tmp_path: Path) -> None:
    path = _saved(videomae().state_dict(), tmp_path / "three.safetensors")
    for channels in (1, 2):
        model = build_model(
            NAME,
            weights=str(path),
            image_size=(224, 224),
            num_classes=5,
            in_channels=channels,
            options=SMALL,
        )
        assert model(torch.randn(1, channels, 4, 224, 224)).shape == (1, 5)
