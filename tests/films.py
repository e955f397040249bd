"""Small films whose frames' brightness says their number."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from dr2dist.data.annotated_films import annotated_films
from dr2dist.data.shards import make_shards
from dr2dist.data.sources import video_folder

DARKEST, STEP = 20, 5


def film(
    frames: int = 40,
    rate: int = 10,
    codec: str = "libx264",
    kind: str = "mp4",
    times: Sequence[float] | None = None,
    size: tuple[int, int] = (48, 64),
    backwards: bool = False,
) -> bytes:
    """A file. times: of frames in seconds, where they are not even. Key frames are 8 apart.
    backwards: the last frame first."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *size, "yuv420p", 8
        stream.bit_rate = 4_000_000
        stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            bright = frames - 1 - number if backwards else number
            pixels = np.full((*size, 3), DARKEST + STEP * bright, np.uint8)
            pixels[: size[0] // 4] = 255 - pixels[: size[0] // 4]  # so that one sees which way up
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            shown = number / rate if times is None else times[number]
            frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * shown)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def joined(
    *films: bytes, kind: str = "mp4", start: float = 0.0, last: float | None = None
) -> bytes:
    """Packets of films, one film after the other, without decoding, as programs cut them.

    start: seconds that are left out: their packets are kept, with times before 0, from a key frame
    on. last: seconds for which the last packet is shown.
    """
    file, packets, after = io.BytesIO(), [], 0.0
    with av.open(file, "w", format=kind) as container:
        for data in films:
            with av.open(io.BytesIO(data)) as source:
                stream = source.streams.video[0]
                own = container.streams.video[0] if packets else None
                own = own or container.add_stream_from_template(stream)
                source.seek(int(start / stream.time_base), stream=stream)
                shift = round((after - start) / stream.time_base)
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = own
                        packets.append(packet)
                after += source.duration / av.time_base
        if last is not None:
            packets[-1].duration = round(last / packets[-1].time_base)
        container.mux(packets)
    return file.getvalue()


def with_sound(data: bytes, later: float, kind: str = "mp4") -> bytes:
    """A film after silence: sound from 0 s on, its frames so many seconds later."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=kind) as container:
        stream = source.streams.video[0]
        own = container.add_stream_from_template(stream)
        voice: Any = container.add_stream("aac", rate=8000)
        for number in range(8):
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            heard.sample_rate, heard.pts, heard.time_base = 8000, 1024 * number, Fraction(1, 8000)
            container.mux(voice.encode(heard))
        container.mux(voice.encode())
        for packet in source.demux(stream):
            if packet.dts is not None:
                shift = round(later / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, own
                container.mux(packet)
    return file.getvalue()


def sound() -> bytes:
    """A file without pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def numbers(pixels: NDArray[np.uint8]) -> list[int]:
    """Of frames [T, H, W, 3], by the lower half of each."""
    means = pixels[:, pixels.shape[1] // 2 :].mean((1, 2, 3))
    return [round(float(mean - DARKEST) / STEP) for mean in means]


def make_film_shards(root: Path, count: int = 12, classes: int = 2) -> Path:
    """root/shards/{train,val} of films that grow brighter or darker, or some number of classes."""
    for number in range(count * classes):
        kind = number % classes
        place = root / "films" / f"kind_{kind}" / f"{number}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(film(20 + number % 20, backwards=kind == 1))
    records, names = video_folder(root / "films")
    output = root / "shards"
    make_shards(records, names, output, samples_per_shard=8, val_fraction=0.3, progress=False)
    return output


def make_action_shards(root: Path) -> Path:
    """root/made/{train,val} of films of 2 to 5 seconds, in which something of two kinds happens for
    a second; in some nothing does. One film that is named is not there."""
    database: dict[str, Any] = {}
    random = np.random.default_rng(0)
    for number in range(16):
        name, frames = f"film_{number}", int(random.integers(20, 48))
        (root / f"{name}.mp4").write_bytes(film(frames, backwards=number % 2 == 1))
        start = float(random.uniform(0, frames / 10 - 1.2))
        said = [{"label": f"kind {number % 2}", "segment": [start, start + 1.0]}]
        subset = "training" if number < 12 else "validation"
        found = [] if number % 5 == 0 else said
        database[name] = {"subset": subset, "annotations": found}
    database["film_lost"] = {"subset": "training", "annotations": []}
    (root / "actions.json").write_text(json.dumps({"database": database}))
    records, classes = annotated_films(root / "actions.json")
    assert classes == ["kind 0", "kind 1"] and len(records) == 16
    make_shards(records, classes, root / "made", split_by="subset", progress=False)
    return root / "made"
