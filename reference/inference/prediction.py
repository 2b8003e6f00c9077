"""Segmentation of new images: from image files to label maps on the same grid."""

import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import rplib
from rplib.errors import UserError, is_out_of_memory
from rplib.reference import checkpoint
from rplib.reference.config import Config
from rplib.reference.datasets.nifti_writing import write_nifti
from rplib.reference.devices import find_device
from rplib.reference.files import output_path
from rplib.reference.inference.components import largest_components
from rplib.reference.inference.new_images import Input, Ready, Refused, find_inputs, group_inputs, read
from rplib.reference.inference.window_bar import window_bar
from rplib.reference.inference.windows import DECODER_1, Segmentation, segment_outputs, window_overlap
from rplib.reference.progress import progress

EXISTING = ("refuse", "skip", "overwrite")


class Done(NamedTuple):
    """The result for one image."""

    name: str
    path: Path  # the label map
    voxels: dict[int, int]  # class -> voxels, without background
    voxel_ml: float | None  # volume of a voxel; None in 2-D or if the voxel size is unknown


def predict(
    run: Path,
    images: Sequence[Path],
    out: Path,
    *,
    weights: str | None = None,
    output: str = DECODER_1,
    stride: Sequence[int] | None = None,
    batch: int | None = None,
    device: str | None = None,
    spacing: Sequence[float] | None = None,
    prepared: bool = False,
    keep_largest: bool = False,
    write_score: bool = False,
    existing: str = "refuse",
    on_done: Callable[[Done], None] = lambda done: None,
) -> list[Done]:
    """Segment images and write `out`/<name>_prediction.nii.gz for each.

    Args:
        run: run folder of a training, or a checkpoint file.
        images: NIfTI or h5 files; with several channels one file each, or `<name>_0000`, `<name>_0001`, ... of a case.
        out: folder to write.
        weights: ``"best"`` or ``"last"``; None uses best if it exists.
        output: ``"decoder 1"`` or ``"mean of both"``.
        stride, batch: of the windows; None uses the run's settings.
        spacing: voxel size in mm of h5 files that lack it.
        prepared: NIfTI files are preprocessed already; do not reorient, resample or normalise them.
        keep_largest: keep only the largest component of each class; not in the paper.
        write_score: also write `<name>_score.nii.gz`, the foreground probability.
        existing: what to do if a label map exists: ``"refuse"`` (before anything is done), ``"skip"``,
            ``"overwrite"``.
        on_done: called after each image.

    Raises:
        UserError: before anything is read: no network, duplicate names, invalid stride or device, no usable image; at the
            end: the images that could not be segmented.
    """
    inputs, refused = find_inputs(images)
    where = find_device(device)
    network, config = checkpoint.load_network(run, weights)  # type: ignore[arg-type]
    inputs, incomplete = group_inputs(inputs, config.in_channels)
    refused += incomplete
    wanted = len(inputs) + len(refused)
    for one in refused if wanted > 1 else []:
        print(f"rplib: {one.name} not segmented: {one.reason}", file=sys.stderr)
    if not inputs:
        raise UserError(refused[0].reason if wanted == 1 else _summary_of(refused, wanted))
    steps = tuple(stride) if stride is not None else config.stride
    window_overlap(config.patch, steps)
    if spacing is not None and len(spacing) != len(config.patch):
        raise UserError(f"--spacing has {len(spacing)} numbers; expected one per axis of the image: {len(config.patch)}.")
    paths = {item.name: output_path(out, f"{item.name}_prediction.nii.gz") for item in inputs}
    inputs = _without_existing(inputs, paths, existing)
    _try_folder(out)
    network = network.to(where)

    done: list[Done] = []
    with progress(inputs, "segmenting", "image") as bar:
        for item in bar:
            try:
                ready = read(item, config, spacing, prepared)
                with window_bar(network, ready.image.shape[1:], config.patch, steps, item.name):
                    found = _segment(network, ready.image, config, steps, batch, where, output)
            except UserError as error:
                refused.append(Refused(item.name, str(error)))
                if wanted > 1:
                    bar.write(f"rplib: {item.name} not segmented: {error}", file=sys.stderr)
                continue
            label = largest_components(found.label) if keep_largest else found.label
            label = ready.back(label)
            origin = f"rplib {rplib.__version__}: {config.title}, {config.protocol}, {output}"
            save = partial(write_nifti, affine=ready.affine, millimetres=ready.placed, header=ready.header, description=origin)
            if write_score:  # first, so that an existing label map implies a complete case
                score = ready.back(found.score).astype(np.float32)
                save(output_path(out, f"{item.name}_score.nii.gz"), score)
            save(paths[item.name], label)
            voxels = {k: int(np.count_nonzero(label == k)) for k in range(1, config.classes)}
            done.append(Done(item.name, paths[item.name], voxels, _millilitres(ready)))
            on_done(done[-1])
    if refused:
        raise UserError(refused[0].reason if wanted == 1 else _summary_of(refused, wanted))
    return done


def _summary_of(refused: Sequence[Refused], wanted: int) -> str:
    names = ", ".join(one.name for one in refused)
    return f"{len(refused)} of {wanted} images were not segmented; see above for the reasons: {names}."


def _segment(
    network: torch.nn.Module,
    image: NDArray[np.float32],
    config: Config,
    stride: tuple[int, ...],
    batch: int | None,
    where: torch.device,
    output: str,
) -> Segmentation:
    try:
        windows = batch or config.window_batch
        return segment_outputs(network, image, config.patch, stride, windows, where, (output,))[output]
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error)):
            raise
        raise UserError(f"{where} ran out of memory; lower --batch (now {windows}), or use --device cpu.") from error


def _without_existing(inputs: Sequence[Input], paths: dict[str, Path], existing: str) -> list[Input]:
    there = [item for item in inputs if paths[item.name].exists()]
    if not there or existing == "overwrite":
        return list(inputs)
    if existing == "refuse":
        raise UserError(
            f"{paths[there[0].name]} exists already ({len(there)} such files); choose another --out, or set "
            "--existing skip or --existing overwrite."
        )
    names = ", ".join(item.name for item in there)
    print(f"skipped, label maps exist: {names}", file=sys.stderr)
    return [item for item in inputs if item not in there]


def _try_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to ({error.strerror}); choose another folder.") from error


def _millilitres(ready: Ready) -> float | None:
    known = ready.placed and (ready.header is None or ready.header.get_xyzt_units()[0] in ("mm", "unknown"))
    if not known or ready.image.ndim != 4:
        return None
    return float(abs(np.linalg.det(ready.affine[:3, :3]))) / 1000


def summary(done: Done) -> str:
    """One line per image.

    >>> summary(Done("a", Path("out/a_prediction.nii.gz"), {1: 24000}, 0.001))
    'a: 24,000 voxels (24.0 ml); out/a_prediction.nii.gz'
    """
    parts = []
    for klass, voxels in done.voxels.items():
        ml = f" ({voxels * done.voxel_ml:.1f} ml)" if done.voxel_ml is not None and math.isfinite(done.voxel_ml) else ""
        parts.append(f"{f'class {klass} ' if len(done.voxels) > 1 else ''}{voxels:,} voxels{ml}")
    found = ", ".join(parts) if any(done.voxels.values()) else "nothing found, all background"
    return f"{done.name}: {found}; {done.path}"
