"""Add unlabelled images to an nnU-Net v2 data set: those in DATASET/imagesUn become cases labelled 'ignore' everywhere."""

import json
import shutil
import sys
from pathlib import Path

import SimpleITK as sitk


def main(dataset: Path) -> list[str]:
    settings = json.loads((dataset / "dataset.json").read_text())
    labels, ending = settings["labels"], settings["file_ending"]
    known = [value for name, value in labels.items() if name != "ignore"]
    labels["ignore"] = 1 + max(max(value) if isinstance(value, list) else value for value in known)
    names = set()
    for path in sorted((dataset / "imagesUn").glob(f"*_????{ending}")):
        shutil.copy2(path, dataset / "imagesTr" / path.name)
        name = path.name.removesuffix(ending)[: -len("_0000")]
        if name not in names:
            image = sitk.ReadImage(str(path))
            label = sitk.Image(image.GetSize(), sitk.sitkUInt8) + labels["ignore"]
            label.CopyInformation(image)
            sitk.WriteImage(label, str(dataset / "labelsTr" / f"{name}{ending}"))
        names.add(name)
    settings["unlabelled"] = sorted(names)
    settings["numTraining"] = len(list((dataset / "labelsTr").glob(f"*{ending}")))
    (dataset / "dataset.json").write_text(json.dumps(settings, indent=2))
    print(f"{len(names)} unlabelled cases added to {dataset}")
    return sorted(names)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
