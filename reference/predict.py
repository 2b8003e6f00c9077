"""Segment new images with a trained run: NIfTI, DICOM or h5 in, one NIfTI label map per image out, on the image's grid.

NIfTI files are raw images and are preprocessed like the training data (Left Atrium: z-score; Pancreas-CT: reoriented, 1 mm,
windowed, z-score; BraTS: FLAIR, reoriented, z-score over the brain; generic: the recipe's normalisation); the label map is
resampled to the original grid. h5 files must contain preprocessed images, like the training data.

examples:
  rplib predict RUN scan1.nii.gz scan2.nii.gz --out DIR      DIR/scan1_prediction.nii.gz, DIR/scan2_prediction.nii.gz
  rplib predict RUN new/*.nii.gz --out DIR --existing skip   resumes an interrupted call
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rplib predict`."""
    from rplib.reference.arguments import length, positive
    from rplib.reference.inference.prediction import EXISTING

    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder of `rplib train`, or a checkpoint (*.pt, *.pth)")
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE",
        help="NIfTI (.nii.gz, .nii) or h5 files, or folders of a DICOM series; several channels in one file, or as "
        "NAME_0000.nii.gz NAME_0001.nii.gz ...",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="output folder")
    parser.add_argument(
        "--weights", choices=("best", "last"), help="checkpoint of the run (default: best if it exists, else last)"
    )
    parser.add_argument(
        "--decoder", choices=("1", "mean"), default="1",
        help="decoder 1, as in the paper, or the mean of both decoders' probabilities (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stride", type=positive, nargs="+", metavar="N",
        help="voxels between windows, one number per axis (default: the run's setting)",
    )  # fmt: skip
    parser.add_argument("--batch", type=positive, metavar="N", help="windows per forward pass (default: the run's setting)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    parser.add_argument(
        "--spacing", type=length, nargs="+", metavar="MM",
        help="voxel size of h5 files that lack it, one number per axis (the published Left Atrium files: 0.625 0.625 0.625)",
    )  # fmt: skip
    parser.add_argument(
        "--prepared", action="store_true",
        help="NIfTI files are preprocessed already: do not reorient, resample or normalise",
    )  # fmt: skip
    parser.add_argument("--largest-component", action="store_true", help="keep the largest component of each class (paper: no)")
    parser.add_argument("--score", action="store_true", help="also write NAME_score.nii.gz, the foreground probability")
    parser.add_argument(
        "--existing", choices=EXISTING, default=EXISTING[0],
        help="what to do if a label map exists (default: %(default)s, before any image is segmented)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Segments and returns the exit code; user errors raise `rplib.errors.UserError`."""
    from tqdm import tqdm

    from rplib.errors import UserError
    from rplib.reference.inference.prediction import predict, summary
    from rplib.reference.inference.windows import DECODER_1, MEAN

    if not args.run_folder.exists():
        raise UserError(f"no run folder {args.run_folder}; create one with `rplib train --out {args.run_folder}`.")
    done = predict(
        args.run_folder,
        args.images,
        args.out,
        weights=args.weights,
        output=DECODER_1 if args.decoder == "1" else MEAN,
        stride=args.stride,
        batch=args.batch,
        device=args.device,
        spacing=args.spacing,
        prepared=args.prepared,
        keep_largest=args.largest_component,
        write_score=args.score,
        existing=args.existing,
        on_done=lambda one: tqdm.write(summary(one)),
    )
    print(f"{len(done)} segmented, written to {args.out}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`rplib predict` with these arguments (default: those of the process)."""
    from rplib.cli import main as rplib

    return rplib(["predict", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    # `python reference/predict.py` uses the checkout that contains it, installed or not.
    root = Path(__file__).resolve().parent.parent
    if (root / "rplib" / "__init__.py").is_file():
        sys.path[0] = str(root)
    sys.exit(main())
