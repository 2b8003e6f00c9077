"""nnU-Net v2 with unlabelled cases: plan, preprocess, two iterations, predict, by the trainer of reference/examples/nnunet."""

import importlib
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "reference" / "examples"
AFFINE = np.diag([0.5, 0.5, 3.0, 1.0])


@pytest.mark.slow
@pytest.mark.timeout(900)  # each of nnU-Net's worker processes imports everything again
def test_nnunet_trains_on_unlabelled_cases_and_predicts(tmp_path, monkeypatch):
    try:
        importlib.import_module("nnunetv2.training.nnUNetTrainer.primus.primus_trainers")  # what needs the most
    except Exception as error:
        pytest.skip(f"nnunetv2 cannot be imported here ({type(error).__name__}: {error}); see the extra nnunet")
    for part in ("raw", "preprocessed", "results"):
        (tmp_path / part).mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    monkeypatch.setenv("nnUNet_extTrainer", str(EXAMPLES / "nnunet"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES / "nnunet")
    dataset = tmp_path / "raw" / "Dataset001_Disc"
    images, labels = importlib.import_module("toy").discs(6, seed=0, size=32)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        write(dataset / ("imagesTr" if i < 3 else "imagesUn") / f"case{i}_0000.nii.gz", image[0].numpy())
        if i < 3:
            write(dataset / "labelsTr" / f"case{i}.nii.gz", label.numpy().astype(np.uint8))
    settings = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "disc": 1}, "numTraining": 3, "file_ending": ".nii.gz"}
    (dataset / "dataset.json").write_text(json.dumps(settings))

    api = importlib.import_module("nnunetv2.experiment_planning.plan_and_preprocess_api")
    api.extract_fingerprints([1], num_processes=1, check_dataset_integrity=True)
    importlib.import_module("add_unlabelled").main(dataset)
    written = json.loads((dataset / "dataset.json").read_text())
    assert written["labels"] == {"background": 0, "disc": 1, "ignore": 2}
    assert (written["unlabelled"], written["numTraining"]) == (["case3", "case4", "case5"], 6)
    assert (np.asarray(nibabel.load(dataset / "labelsTr" / "case4.nii.gz").dataobj) == 2).all()

    api.extract_fingerprints([1], num_processes=1, clean=False)  # as nnUNetv2_plan_and_preprocess calls it
    api.plan_experiments([1])
    api.preprocess([1], configurations=["2d"], num_processes=[1])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    training = importlib.import_module("nnunetv2.run.run_training")
    trainer = training.get_trainer_from_args("1", "2d", "all", "nnUNetTrainerMutual", device=torch.device("cpu"))
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    of_discs = trainer.plans_manager.foreground_intensity_properties_per_channel["0"]["mean"]
    assert of_discs == pytest.approx(float(images[:3, 0][labels[:3] > 0].mean()), rel=0.05)  # not of the unlabelled volumes
    trained, validated = trainer.do_split()
    assert sorted(set(trained)) == [f"case{i}" for i in range(6)]
    assert sorted(validated) == ["case0", "case1", "case2"]
    trainer.initialize()
    before = [next(network.parameters()).detach().clone() for network in trainer.network.networks]
    trainer.run_training()
    after = [next(network.parameters()).detach() for network in trainer.network.networks]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.isfinite(trainer.mutual) and trainer.mutual > 0

    inference = importlib.import_module("nnunetv2.inference.predict_from_raw_data")
    predictor = inference.nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, ("all",), "checkpoint_final.pth")
    out = tmp_path / "out"
    out.mkdir()
    image = dataset / "imagesUn" / "case4_0000.nii.gz"
    predictor.predict_from_files_sequential([[str(image)]], [str(out / "case4.nii.gz")])
    found = nibabel.load(out / "case4.nii.gz")
    assert found.shape == (32, 32, 1)
    np.testing.assert_allclose(found.affine, AFFINE)
    assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1}


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array[:, :, None], AFFINE), path)
