"""The `dr2dist` command."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dr2dist.arguments import Commands, not_negative, path, positive
from dr2dist.bench.command import add_bench_arguments
from dr2dist.data.command import add_shards_arguments
from dr2dist.doctor import add_doctor_arguments
from dr2dist.errors import UserError
from dr2dist.files import check_file_output
from dr2dist.shipped import add_configs_arguments
from dr2dist.status import Status, end_after, say, take_signals
from dr2dist.training.command import add_train_arguments
from dr2dist.training.report import add_report_arguments
from dr2dist.training.state import add_status_arguments
from dr2dist.version import __version__

FAULTS_OF_STDOUT = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""What printing may end in; who has closed a pipe wants to read no more. Files that commands write
have errors of their own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; exits 2 with one line on stderr for a user's error."""
    take_signals()  # one of several ranks has them held back
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = _parser()
    given, more = parser.parse_known_args(arguments)
    runs = hasattr(given, "overrides")  # it does more than to say something
    # argparse takes no second run of positional arguments after an option.
    odd = [text for text in more if text.startswith("-") or not runs]
    if odd:
        hint = "; a setting is written key=value" if any("=" in text for text in odd) else ""
        parser.error(f"unrecognized arguments: {' '.join(odd)}{hint}")
    if more:
        given.overrides += more
    given.arguments = list(sys.argv[1:] if arguments is None else arguments)
    command: Callable[[argparse.Namespace], int] = given.command
    try:
        status = command(given)
        if not runs:
            sys.stdout.flush()
    except UserError as error:
        say(f"dr2dist: {error}")
        status = Status.USER_ERROR
    except OSError as error:
        if runs or error.filename is not None or error.errno not in FAULTS_OF_STDOUT:
            raise
        status = Status.DONE if error.errno == errno.EPIPE else Status.USER_ERROR
        if status:
            say(f"dr2dist: stdout cannot be written: {error.strerror}")
    except KeyboardInterrupt:
        say("dr2dist: stopped")
        status = 130
    raise SystemExit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dr2dist", description=__doc__)
    parser.add_argument("--version", action="version", version=f"dr2dist {__version__}")
    commands = Commands(parser, "COMMAND")
    add_train_arguments(
        commands.add(
            "train",
            "Check a configuration and run it.",
            "dr2dist train configs/elpv_vit_small.yaml --ranks 2 train.epochs=1",
        )
    )
    add_configs_arguments(
        commands.add(
            "configs",
            "List the configurations that come with dr2dist, or copy one.",
            "dr2dist configs finetune --output my.yaml",
        )
    )
    add_report_arguments(
        commands.add(
            "report",
            "Compare runs: a table of what they reached, and a picture of their curves.",
            "dr2dist report runs/photos runs/other --picture curves.png",
        )
    )
    add_status_arguments(
        commands.add(
            "status",
            "Tell how a run is, from its folder's files alone.",
            "dr2dist status runs/photos --watch",
        )
    )
    add_shards_arguments(
        commands.add(
            "shards", "Make, index or verify shards.", "dr2dist shards verify demo/elpv/train"
        )
    )
    _add_export(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    add_doctor_arguments(
        commands.add(
            "doctor",
            "Show what this machine has, and whether a model recomputes bit for bit on it.",
            "dr2dist doctor --model vit_small_patch14_dinov2 --precision bf16",
        )
    )
    add_bench_arguments(
        commands.add(
            "bench",
            "Measure memory and step time of all ways to train a model, side by side.",
            "dr2dist bench --model vit_small_patch16_224 --depths 12 24 --output bench",
        )
    )
    return parser


def _add_plugin(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python module that registers the model's task or backbone",
    )


def _add_ranks(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ranks", type=positive, help="processes of this machine that share the samples; default 1"
    )


def _import(plugins: Sequence[str]) -> None:
    from dr2dist.config import import_plugins

    import_plugins(plugins)


def _add_export(commands: Commands) -> None:
    export = commands.add(
        "export",
        "Write a run's best or last checkpoint as one file: safetensors for dr2dist, ONNX or a "
        "program of torch.export for anything else.",
        "dr2dist export runs/photos --output photos.safetensors",
    )
    export.add_argument("run", type=path, help="folder of a run")
    export.add_argument(
        "--output", type=path, required=True, help="FILE.safetensors, FILE.onnx or FILE.pt2"
    )
    export.add_argument("--which", choices=("best", "last"), default="best")
    export.add_argument("--overwrite", action="store_true", help="a file that is there already")
    export.add_argument(
        "--lora",
        choices=("merged", "apart"),
        help="a run's adapters: added to its weights, as by default, or beside them in the file",
    )
    _add_plugin(export)
    export.set_defaults(command=_export)


def _export(given: argparse.Namespace) -> int:
    from dr2dist.inference.exported import export
    from dr2dist.inference.portable import ENDINGS, export_portable

    _import(given.plugin)
    if given.output.suffix == ".safetensors":
        facts = export(given.run, given.output, given.which, given.overwrite, given.lora)
    elif given.output.suffix in ENDINGS:
        if given.lora == "apart":
            raise UserError(f"--lora: apart is for .safetensors, {given.output} has them merged")
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.safetensors"
            facts = export(given.run, weights, given.which, lora=given.lora)
            difference = export_portable(weights, given.output, given.overwrite)
        print(f"{given.output}: within {difference:.2g} of the module's outputs")
    else:
        allowed = ", ".join((".safetensors", *ENDINGS))
        raise UserError(f"{given.output}: allowed endings are {allowed}")
    print(
        f"{given.output}: {facts.model} after {facts.step} steps, alpha {facts.alpha:.4f}, "
        f"beta {facts.beta:.4f}, for {facts.task['name']}"
    )
    return 0


def _add_evaluate(commands: Commands) -> None:
    evaluate = commands.add(
        "evaluate",
        "Measure an exported model on all samples of shards that say what is right.",
        "dr2dist evaluate photos.safetensors shards/photos/val --output report.json",
    )
    evaluate.add_argument("model", type=path, help="a file of 'dr2dist export'")
    evaluate.add_argument("shards", type=os.path.expanduser, help="as data.val names them")
    evaluate.add_argument(
        "--cache", type=path, metavar="FOLDER", help="for shards elsewhere, up to 100 GB"
    )
    evaluate.add_argument("--output", type=path, help="report as JSON; a PNG is put beside it")
    evaluate.add_argument("--batch", type=positive, default=32)
    evaluate.add_argument("--workers", type=not_negative, default=0, help="loader processes")
    evaluate.add_argument(
        "--skip-unreadable", action="store_true", help="leave such samples out, and count them"
    )
    evaluate.add_argument(
        "--fields",
        nargs="+",
        default=(),
        metavar="NAME=ENDING",
        help="members of samples, as data.fields says them; by default those of the run",
    )
    _add_ranks(evaluate)
    _add_plugin(evaluate)
    evaluate.set_defaults(command=_evaluate)


def _evaluate(given: argparse.Namespace) -> int:
    from dr2dist.inference.ranks import on_ranks

    if given.output is not None:
        _check_report(given.output)

    def find() -> dict[str, Any]:
        from dr2dist.inference.evaluate import evaluate

        _import(given.plugin)
        return evaluate(
            given.model,
            given.shards,
            batch=given.batch,
            workers=given.workers,
            skip_unreadable=given.skip_unreadable,
            fields=_fields(given.fields),
            cache=given.cache,
        )

    def tell(report: dict[str, Any]) -> None:
        from dr2dist.inference.evaluate import draw, write_report

        for line in _report_lines(report):
            print(line)
        if given.output is not None:
            write_report(report, given.output)
            draw(report, given.output.with_suffix(".png"))

    return on_ranks(given.arguments, given.ranks, find, tell)


def _check_report(output: Path) -> None:
    """Raises UserError for a report that would take the place of something else."""
    if output.suffix != ".json":
        raise UserError(f"--output: {output}: allowed is FILE.json; its picture gets .png")
    picture = output.with_suffix(".png")
    check_file_output(output)
    check_file_output(picture)
    if picture.exists() and not output.exists():
        raise UserError(
            f"--output: {picture} is there, and no report beside it whose picture it is: name "
            "another file"
        )


def _fields(said: Sequence[str]) -> dict[str, str] | None:
    """By name; None where nothing is said."""
    pairs = [each.partition("=") for each in said]
    for name, sign, ending in pairs:
        if not (name and sign and ending):
            raise UserError(f"--fields: found {name}{sign}{ending}, allowed is NAME=ENDING")
    return {name: ending for name, _, ending in pairs} or None


def _report_lines(report: dict[str, Any]) -> Iterator[str]:
    """Numbers, then tables of numbers by name; longer things are in the file."""
    for name, value in report.items():
        if isinstance(value, int | float):
            yield f"{name:18} {value:.6g}"
    for name, value in report.items():
        if isinstance(value, dict):
            yield name
            for key, number in value.items():
                yield f"  {key:16} {'no sample' if number is None else f'{number:.4f}'}"


def _add_predict(commands: Commands) -> None:
    predict = commands.add(
        "predict",
        "Predict for files by an exported model.",
        "dr2dist predict photos.safetensors new_photos --output predictions.csv",
    )
    predict.add_argument("model", type=path, help="a file of 'dr2dist export'")
    predict.add_argument(
        "files", type=path, nargs="+", help="files of samples, and folders of them"
    )
    predict.add_argument(
        "--output",
        type=path,
        required=True,
        help="FILE.csv or FILE.json; a PNG is put beside it where there is more to see",
    )
    predict.add_argument("--batch", type=positive, default=32)
    predict.add_argument(
        "--skip-unreadable", action="store_true", help="give such a sample a row with its error"
    )
    predict.add_argument(
        "--frame-rate",
        type=float,
        help="frames a second of films that are folders of frames; default 25",
    )
    _add_ranks(predict)
    _add_plugin(predict)
    predict.set_defaults(command=_predict)


def _predict(given: argparse.Namespace) -> int:
    from dr2dist.inference.predict import check_output, predict, write_rows
    from dr2dist.inference.ranks import on_ranks

    check_output(given.output)
    picture = given.output.with_suffix(".png")
    check_file_output(picture)

    def find() -> list[dict[str, Any]]:
        _import(given.plugin)
        return predict(
            given.model,
            given.files,
            batch=given.batch,
            skip_unreadable=given.skip_unreadable,
            picture=picture,
            frame_rate=given.frame_rate,
        )

    def tell(rows: list[dict[str, Any]]) -> None:
        write_rows(rows, given.output)
        wrong = sum("error" in row for row in rows)
        print(f"{given.output}: {len(rows)} samples, {wrong} of them with an error")

    return on_ranks(given.arguments, given.ranks, find, tell)


def command() -> None:
    """What `dr2dist` is."""
    end_after(main)


if __name__ == "__main__":
    command()
